"""The operators that contrastive losses are made of, where a loss shows a part of them only."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from targets import Target
from torch import Tensor

from fastssl import reference
from fastssl.ops import fixed_keys, pairs, sigmoid, similarity, two_views

# Rows, columns, features.
SHAPES = [(32, 64, 16), (33, 70, 21), (1, 9, 8), (40, 1, 8), (5, 6, 270)]
GPU_SHAPES = [(512, 1024, 128), (1000, 3000, 96), (100, 65536, 128), (1, 1, 1), (300, 200, 768)]


def rows(target: Target, m: int, n: int, d: int, dtype: torch.dtype = torch.float32):
    return [torch.randn(size, d).to(target.device, dtype) for size in (m, n)]


def shapes(target: Target) -> list[tuple[int, int, int]]:
    return GPU_SHAPES if target.device == "cuda" else SHAPES


def fused(target: Target, row_ids=None, col_ids=None):
    return lambda q, k, scale: similarity.similarity_lse(
        q, k, scale, row_ids, col_ids, backend=target.backend
    )


@pytest.mark.parametrize("scale", [2.0, 30.0, 200.0])
def test_value_and_gradients_are_as_exact_as_promised(target: Target, scale: float) -> None:
    dtypes = [torch.float32] + ([torch.float64] if target.backend == "torch" else [])
    for m, n, d in shapes(target):
        for dtype in dtypes:
            q, k = rows(target, m, n, d, dtype)
            s = torch.tensor(scale, dtype=dtype, device=target.device)
            upstream = torch.randn(m, dtype=dtype, device=target.device)
            check_accuracy(fused(target), reference.similarity_lse, [q, k, s], upstream)


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_pairs_with_equal_ids_are_left_out(target: Target, scale: float) -> None:
    q, k = rows(target, 45, 70, 12)
    ids = [torch.randint(-3, 9, (size,), device=target.device) for size in (45, 70)]

    def plain(q, k, scale):
        return reference.similarity_lse(q, k, scale, *ids)

    s = torch.tensor(scale, device=target.device)
    check_accuracy(fused(target, *ids), plain, [q, k, s], torch.randn(45, device=target.device))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_row_that_sees_nothing_is_minus_infinity_without_gradient(
    target: Target, fixed: bool
) -> None:
    q, k = rows(target, 3, 5, 8)
    row_ids = torch.tensor([1, 2, 1], device=target.device)
    col_ids = torch.full((5,), 2, device=target.device)
    loss = fused(target, row_ids, col_ids)
    s = torch.tensor(4.0, device=target.device)
    if fixed:
        lse, dq, *grads = value_and_gradients(lambda q, s: loss(q, k, s), [q, s])
    else:
        lse, dq, *grads = value_and_gradients(loss, [q, k, s])
    assert lse[1] == -torch.inf
    assert lse[[0, 2]].isfinite().all()
    assert (dq[1] == 0).all()
    assert all(grad.isfinite().all() for grad in (dq, *grads))


def test_each_gradient_is_the_same_alone(target: Target) -> None:
    inputs = [*rows(target, 40, 23, 8), torch.tensor(7.0, device=target.device)]
    _, *together = value_and_gradients(fused(target), inputs)
    for i, expected in enumerate(together):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        fused(target)(*leaves).sum().backward()
        torch.testing.assert_close(leaves[i].grad, expected, rtol=1e-5, atol=1e-6)


def test_strides_do_not_matter(target: Target) -> None:
    q, k = rows(target, 30, 50, 20)
    s = torch.tensor(3.0, device=target.device)
    expected = fused(target)(q, k, s)
    spread = torch.zeros(60, 41, device=target.device)
    spread[::2, 1::2] = q
    torch.testing.assert_close(fused(target)(spread[::2, 1::2], k.T.contiguous().T, s), expected)


def test_gradcheck_in_float64() -> None:
    q, k = (torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (4, 6))
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for function in (partial(similarity.similarity_lse, backend="torch"), reference.similarity_lse):
        assert torch.autograd.gradcheck(function, (q, k, s))


def test_many_tiles_agree_with_one_matrix() -> None:
    q, k = rows(Target("torch", "cpu"), 1100, 1300, 8, torch.float64)
    for scale in (10.0, 90.0):
        s = torch.tensor(scale, dtype=torch.float64)
        check_accuracy(fused(Target("torch", "cpu")), reference.similarity_lse, [q, k, s])


@pytest.mark.parametrize("scale", [2.0, 200.0])
@pytest.mark.parametrize("with_ids", [False, True])
def test_keys_without_gradient_are_as_exact(target: Target, scale: float, with_ids: bool) -> None:
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    several = [(600, 1100, 8)] if target == Target("torch", "cpu") else []  # tiles
    for m, n, d in shapes(target) + several:
        q, k = rows(target, m, n, d, dtype)
        s = torch.tensor(scale, dtype=dtype, device=target.device)
        ids = (None, None)
        if with_ids:
            row_ids = torch.arange(m, device=target.device) % 4
            col_ids = torch.arange(n, device=target.device) % 4
            col_ids[-1] = 9  # so that each row sees something
            ids = (row_ids, col_ids)
        upstream = torch.randn(m, dtype=dtype, device=target.device)
        check_accuracy(
            lambda q, s, k=k, ids=ids: fused(target, *ids)(q, k, s),
            lambda q, s, k=k, ids=ids: reference.similarity_lse(q, k.to(q), s, *ids),
            [q, s],
            upstream,
        )


def test_keys_without_gradient_give_the_same(target: Target) -> None:
    q, k = rows(target, 30, 40, 12)
    s = torch.tensor(5.0, device=target.device)
    trained = value_and_gradients(fused(target), [q, k, s])
    fixed = value_and_gradients(lambda q, s: fused(target)(q, k, s), [q, s])
    for a, b in zip(fixed, (trained[0], trained[1], trained[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(fused(target)(q, k, s), fixed[0])


def scores(q: Tensor, k: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    return scale * (reference.normalize(q) @ reference.normalize(k).T if normalize else q @ k.T)


def plain_pairs(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    *,
    first: int = 0,
    columns: bool = False,
    normalize: bool = True,
) -> Tensor:
    x = scores(q, k, scale, normalize)
    at = torch.arange(len(q), device=q.device) + first
    own = x[at - first, at]
    hidden = at[:, None] == torch.arange(len(k), device=q.device)
    if ids is not None:
        hidden = hidden | (ids[at][:, None] == ids)
    x = x.masked_fill(hidden, -torch.inf)
    found = (x - own[:, None]).logsumexp(1)
    return torch.cat([found, (x - own).logsumexp(0)]) if columns else found


def fused_pairs(target: Target, *args: object, **options: object) -> Callable[..., Tensor]:
    return lambda q, k, scale: torch.cat(
        pairs.pair_lse(q, k, scale, *args, **options, backend=target.backend)
    )


# Rows, columns, the first row's pair and whether columns are asked for.
PAIRS = {
    "square": (33, 33, 0, False),
    "both sides": (33, 33, 0, True),
    "a rank's rows": (20, 47, 13, False),
    "the last rank's": (20, 47, 27, False),
    "one row": (1, 9, 4, False),
}
SEVERAL_TILES = {"tiles": (600, 600, 0, True), "tiles of a rank": (600, 1500, 700, False)}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("case", PAIRS | SEVERAL_TILES)
def test_pairs_and_their_negatives(
    target: Target, case: str, with_ids: bool, normalize: bool
) -> None:
    if case in SEVERAL_TILES and target.interpreted:
        pytest.skip("too many for the interpreter")
    m, n, first, columns = (PAIRS | SEVERAL_TILES)[case]
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    q, k = rows(target, m, n, 10, dtype)
    ids = torch.arange(n, device=target.device) * 3 % 8 if with_ids else None
    options = {"first": first, "columns": columns, "normalize": normalize}
    for scale in (2.0, 60.0) if case in PAIRS else (60.0 if with_ids else 2.0,):
        s = torch.tensor(scale, dtype=dtype, device=target.device)
        upstream = torch.randn(m + n * columns, dtype=dtype, device=target.device)
        check_accuracy(
            fused_pairs(target, ids, **options),
            lambda q, k, s, ids=ids: plain_pairs(q, k, s, ids, **options),
            [q, k, s],
            upstream,
        )


@pytest.mark.parametrize("columns", [False, True])
def test_a_pair_without_negatives_is_minus_infinity(target: Target, columns: bool) -> None:
    q, k = rows(target, 4, 4, 6)
    s = torch.tensor(3.0, device=target.device)
    alike = torch.zeros(4, dtype=torch.int64, device=target.device)
    lse, *grads = value_and_gradients(fused_pairs(target, alike, columns=columns), [q, k, s])
    assert (lse == -torch.inf).all()
    assert all(grad.isfinite().all() for grad in grads)
    lone = fused_pairs(target, columns=columns)(q[:1], k[:1], s)
    assert (lone == -torch.inf).all()


def test_columns_not_asked_for_are_empty(target: Target) -> None:
    q, k = rows(target, 4, 4, 6)
    _, cols = pairs.pair_lse(q, k, torch.tensor(3.0, device=target.device), backend=target.backend)
    assert cols.shape == (0,)


def test_one_side_of_the_pairs_alone_gets_its_gradient(target: Target) -> None:
    q, k = rows(target, 21, 21, 6)
    s = torch.tensor(3.0, device=target.device)
    for side in (0, 1):

        def part(q, k, s, side=side):
            return pairs.pair_lse(q, k, s, columns=True, backend=target.backend)[side]

        def plain(q, k, s, side=side):
            return plain_pairs(q, k, s, columns=True).view(2, 21)[side]

        check_accuracy(part, plain, [q, k, s], torch.randn(21, device=target.device))


def plain_classes(
    z: Tensor, scale: Tensor, classes: Tensor, weights: Tensor | None = None
) -> Tensor:
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    x = (scale * z @ z.T).masked_fill(itself, -torch.inf)
    positive = classes[:, None] == classes
    if weights is not None:
        positive = weights[classes][:, classes]
    positive = positive.to(x.dtype).masked_fill(itself, 0)
    count = positive.sum(1)
    mean = (positive * x.masked_fill(itself, 0)).sum(1) / count.masked_fill(count <= 0, 1)
    return torch.where(count > 0, x.logsumexp(1) - mean, 0)


def fused_classes(target: Target, *args: object) -> Callable[..., Tensor]:
    return lambda z, scale: similarity.class_lse(z, scale, *args, backend=target.backend)


@pytest.mark.parametrize("scale", [2.0, 60.0])
@pytest.mark.parametrize("kind", ["pairs", "few", "many", "alone", "one", "weights"])
def test_a_row_and_its_class(target: Target, kind: str, scale: float) -> None:
    if kind == "weights" and target.backend == "triton":
        pytest.skip("its kernels take no weights")
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    several = [(600, 9)] if target == Target("torch", "cpu") and kind in ("many", "weights") else []
    for n, d in [(34, 10), (6, 150), (2, 3), *several]:
        (z,) = rows(target, n, 0, d, dtype)[:1]
        z = reference.normalize(z)
        at = torch.arange(n, device=target.device)
        classes = {
            "pairs": at // 2,
            "few": at * 5 % 3,
            "many": at * 7 % (n // 3 + 1) - 4,
            "alone": torch.where(at % 3 > 0, at, 0),
            "one": 0 * at + 9,
            "weights": at % 5,
        }[kind]
        given = (classes,)
        if kind == "weights":  # whose class 3 has no positive
            weights = torch.arange(25, dtype=dtype, device=target.device).view(5, 5) % 4
            weights[3] = 0
            given = (classes, weights)
        s = torch.tensor(scale, dtype=dtype, device=target.device)
        upstream = torch.randn(n, dtype=dtype, device=target.device)
        check_accuracy(
            fused_classes(target, *given),
            lambda z, s, given=given: plain_classes(z, s, *given),
            [z, s],
            upstream,
        )


def test_a_row_without_a_positive_is_zero_without_gradient(target: Target) -> None:
    s = torch.tensor(3.0, device=target.device)
    for n in (1, 5):
        (z,) = rows(target, n, 0, 6)[:1]
        classes = torch.arange(n, device=target.device)
        lse, dz, ds = value_and_gradients(fused_classes(target, classes), [z, s])
        assert (lse == 0).all()
        assert (dz == 0).all()
        assert ds == 0


def test_operators_agree_where_they_are_the_same(target: Target) -> None:
    """A matrix of rows with themselves, by each operator."""
    (z,) = rows(target, 30, 0, 8)[:1]
    z = reference.normalize(z)
    s = torch.tensor(4.0, device=target.device)
    at = torch.arange(30, device=target.device)
    lse = fused(target, at, at)(z, z, s)
    torch.testing.assert_close(fused_pairs(target)(z, z, s) + s, lse)
    mean = (s * z @ z.T).fill_diagonal_(0).sum(1) / 29
    torch.testing.assert_close(fused_classes(target, 0 * at)(z, s), lse - mean)
    partner = (s * z[:15] * z[15:]).sum(1).repeat(2)
    less = two_views.two_view_lse(z[:15], z[15:], s, backend=target.backend)
    torch.testing.assert_close(torch.nn.functional.softplus(less), lse - partner)


def plain_sigmoid(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None = None, *, first: int = 0
) -> Tensor:
    y = scale * q @ k.T + bias
    at = torch.arange(len(k), device=q.device)
    own = at[:0] if first < 0 else at[first : first + len(q)]
    pair = own[:, None] == at if first >= 0 else torch.zeros_like(y, dtype=torch.bool)
    terms = -torch.nn.functional.logsigmoid(torch.where(pair, y, -y))
    if ids is not None:
        terms = terms.masked_fill((ids[own][:, None] == ids) & ~pair, 0)
    return terms.sum()


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("case", [*PAIRS, "no pairs", *SEVERAL_TILES])
def test_the_sum_of_sigmoid_terms(target: Target, case: str, with_ids: bool) -> None:
    if case in SEVERAL_TILES and target.interpreted:
        pytest.skip("too many for the interpreter")
    if case == "no pairs" and with_ids:
        pytest.skip("ids are those of pairs")
    m, n, first, _ = (PAIRS | SEVERAL_TILES | {"no pairs": (20, 30, -1, False)})[case]
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    q, k = (reference.normalize(x) for x in rows(target, m, n, 10, dtype))
    ids = torch.arange(n, device=target.device) * 3 % 8 if with_ids else None
    large = with_ids or case in PAIRS
    # In the few numbers of one row the plain rounding of large scores is luck.
    for scale, bias in [(2.0, -1.0)] + [(60.0, -20.0)] * (large and m > 1):
        scalars = [torch.tensor(x, dtype=dtype, device=target.device) for x in (scale, bias)]
        check_accuracy(
            partial(sigmoid.sigmoid_sum, ids=ids, first=first, backend=target.backend),
            partial(plain_sigmoid, ids=ids, first=first),
            [q, k, *scalars],
            0.3,
        )


def operators(
    target: Target, with_ids: bool
) -> dict[str, tuple[Callable[..., object], tuple[object, ...]]]:
    q, k = (x.requires_grad_() for x in rows(target, 6, 6, 4))
    s, b = (torch.tensor(x, device=target.device, requires_grad=True) for x in (3.0, -2.0))
    ids = torch.arange(6, device=target.device) // 2 if with_ids else None
    classes = torch.arange(6, device=target.device) % 3
    weights = torch.rand(3, 3, device=target.device)
    to = target.backend
    fixed, sigmoids = fixed_keys._fixed_keys_lse, sigmoid._sigmoid_sum
    return {
        "rows": (similarity._similarity_lse, (q, k, s, ids, ids, True, to)),
        "rows as they are": (similarity._similarity_lse, (q, k, s, ids, ids, False, to)),
        "fixed keys": (fixed, (q, k.detach(), s, ids, ids, True, to)),
        "fixed keys, no gradient": (
            fixed,
            (q.detach(), k.detach(), s.detach(), ids, ids, False, to),
        ),
        "pairs": (pairs._pair_lse, (q[:3], k, s, ids, 2, False, True, to)),
        "pairs both sides": (pairs._pair_lse, (q, k, s, ids, 0, True, False, to)),
        "classes": (similarity._class_lse, (q, s, classes, None, to)),
        "classes with weights": (similarity._class_lse, (q, s, classes, weights, "torch")),
        "two views": (two_views._two_view_lse, (q, k, s, ids, to)),
        "sigmoid": (sigmoids, (q, k, s, b, ids, 0, [True] * 4, to)),
        "sigmoid of one side": (
            sigmoids,
            (q, k.detach(), s, b.detach(), ids, 0, [True, False, True, False], to),
        ),
    }


NAMES = list(operators(Target("torch", "cpu"), False))


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_operators_are_registered_as_torch_wants(target: Target, name: str, with_ids: bool) -> None:
    if target.interpreted and with_ids:
        pytest.skip("ids take no other way through the registration")
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    operator, arguments = operators(target, with_ids)[name]
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("name", [name for name in NAMES if "no gradient" not in name])
def test_second_derivatives_are_never_silently_zero(name: str) -> None:
    """Also where the upstream gradient is constant, which a penalty does not notice."""
    operator, (q, *others) = operators(Target("torch", "cpu"), False)[name]
    found = operator(q, *others)[0].sum()
    (grad,) = torch.autograd.grad(found, q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (found + grad.square().sum()).backward()
