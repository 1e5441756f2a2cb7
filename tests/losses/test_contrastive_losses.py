"""What DESIGN promises of numbers, for every contrastive loss and on every backend.

NT-Xent, whose variants the others are, has a file of its own; so has what one loss alone promises.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import Target
from torch import Tensor

from fastssl import functional, reference

# Rows and features. Ragged; more features than a tile holds; one row.
SHAPES = [(37, 19), (9, 300), (1, 8)]
LARGE = (520, 24)  # several tiles
INTERPRETER_SHAPES = [(21, 12), (1, 8)]
GPU_SHAPES = [(1024, 128), (1000, 100), (2049, 96), (513, 768), (1, 8)]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def views(n: int, d: int) -> list[Tensor]:
    z0 = torch.randn(n, d)
    return [z0, z0 + torch.randn(n, d)]


def unit_views(n: int, d: int) -> list[Tensor]:
    return [reference.normalize(z) for z in views(n, d)]


def with_keys(n: int, d: int) -> list[Tensor]:
    return [*views(n, d), torch.randn(2 * n + 5, d)]


def with_own_keys(n: int, d: int) -> list[Tensor]:
    return [*views(n, d), torch.randn(5 * n, d)]


def samples(n: int, d: int) -> list[Tensor]:
    return [torch.stack(unit_views(n, d), 1).flatten(0, 1)]


def duplicates(n: int) -> dict[str, Tensor]:
    return {"ids": torch.arange(n) * 5 % max(2, n // 3)}


def duplicate_keys(n: int) -> dict[str, Tensor]:
    return duplicates(n) | {"negative_ids": torch.arange(2 * n + 5) % max(2, n // 2)}


def duplicate_own_keys(n: int) -> dict[str, Tensor]:
    negative_ids = (torch.arange(n)[:, None] + torch.arange(5) ** 2) % max(2, n // 3)
    return duplicates(n) | {"negative_ids": negative_ids}


def temperature(sharpness: float) -> list[float]:
    return [1 / sharpness]


class Case(NamedTuple):
    """How a loss is called and what with.

    ``call`` takes functional or reference, rows, scalars and options.
    """

    call: Callable[..., Tensor]
    rows: Callable[[int, int], list[Tensor]] = views  # of n samples with d features
    scalars: Callable[[float], list[float]] = temperature  # from how sharp scores are
    ids: Callable[[int], dict[str, Tensor]] | None = duplicates  # options for duplicates
    has_terms: bool = False
    least: int = 1  # samples
    cosine: bool = True
    kernels: bool = True  # that no other case runs in the interpreter
    complete: bool = True  # nothing in it is held constant
    twice: bool = False  # has second derivatives
    matrix_given: bool = False  # PyTorch does the work then

    def on(
        self, functions: ModuleType, *scalars: float, **options: object
    ) -> Callable[..., Tensor]:
        """The loss of its rows, or of rows and scalars where none are given here."""
        return lambda *inputs: self.call(functions, *inputs, *scalars, **options)


def _info_nce(f: ModuleType, query: Tensor, positive: Tensor, t: float, **options) -> Tensor:
    return f.info_nce(query, positive, None, t, **options)


def _trained_keys(
    f: ModuleType, query: Tensor, positive: Tensor, keys: Tensor, t: float, **options
) -> Tensor:
    return f.info_nce(query, positive, keys, t, **options)


def _queue(
    f: ModuleType, query: Tensor, positive: Tensor, keys: Tensor, t: float, **options
) -> Tensor:
    loss = f.info_nce(query, positive, keys.detach(), t, **options)
    return loss + (0 * keys.float()).mean().to(loss.dtype)


def _own_keys(
    f: ModuleType, query: Tensor, positive: Tensor, keys: Tensor, t: float, **options
) -> Tensor:
    return f.info_nce(query, positive, keys.reshape(len(query), 5, -1), t, **options)


def _dcl(f: ModuleType, z0: Tensor, z1: Tensor, t: float, **options) -> Tensor:
    return f.dcl(z0, z1, t, **options)


def _dclw(f: ModuleType, z0: Tensor, z1: Tensor, t: float, **options) -> Tensor:
    return f.dcl(z0, z1, t, weight_fn=partial(f.mises_fisher_weights, sigma=0.5), **options)


def _supcon(f: ModuleType, rows: Tensor, t: float, kind: str, **options) -> Tensor:
    features = rows.reshape(len(rows) // 2, 2, -1)
    sample = torch.arange(len(features), device=rows.device)
    labels = sample * 5 % (len(features) // 3 + 1)
    if kind == "labels":
        return f.supcon(features, labels, temperature=t, **options)
    if kind == "mask":
        mask = 0.25 * ((labels[:, None] + 2 * labels) % 5)
        return f.supcon(features, None, mask, t, **options)
    if kind == "first views":
        return f.supcon(features, labels, None, t, "one", 0.2, **options)
    return f.supcon(features, temperature=t, **options)


def _clip(f: ModuleType, image: Tensor, text: Tensor, scale: float, **options) -> Tensor:
    return f.clip(image, text, scale, **options)


def _distill_clip(
    f: ModuleType, image: Tensor, text: Tensor, scale: float | Tensor, **options
) -> Tensor:
    """With a teacher that has texts and images exchanged, and softer scores."""
    dist_scale = (scale.detach() if isinstance(scale, Tensor) else scale) / 2
    teacher = text.detach(), image.detach(), dist_scale
    contrastive, distillation = f.distill_clip(image, text, scale, *teacher, **options)
    return contrastive + 2 * distillation


def _siglip(
    f: ModuleType, image: Tensor, text: Tensor, scale: float, bias: float, **options
) -> Tensor:
    return f.siglip(image, text, scale, bias, **options)


supcon = partial(Case, rows=samples, ids=None, cosine=False)
CASES = {
    "info_nce": Case(_info_nce, has_terms=True),
    "info_nce of trained keys": Case(_trained_keys, with_keys, ids=duplicate_keys, has_terms=True),
    "info_nce of a queue": Case(
        _queue, with_keys, ids=duplicate_keys, has_terms=True, complete=False
    ),
    "info_nce of own keys": Case(
        _own_keys,
        with_own_keys,
        ids=duplicate_own_keys,
        has_terms=True,
        kernels=False,
        twice=True,
    ),
    "dcl": Case(_dcl, has_terms=True, least=2),
    "dclw": Case(_dclw, has_terms=True, least=2, kernels=False, complete=False),
    "supcon of labels": supcon(partial(_supcon, kind="labels")),
    "supcon of a mask": supcon(partial(_supcon, kind="mask"), kernels=False, matrix_given=True),
    "supcon of views": supcon(partial(_supcon, kind="views"), kernels=False),
    "supcon of first views": supcon(partial(_supcon, kind="first views")),
    "clip": Case(_clip, unit_views, lambda sharpness: [sharpness], cosine=False),
    "distill_clip": Case(
        _distill_clip,
        unit_views,
        lambda sharpness: [sharpness],
        ids=None,
        cosine=False,
        complete=False,
    ),
    "siglip": Case(
        _siglip, unit_views, lambda sharpness: [sharpness, -sharpness / 2], cosine=False
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, target: Target) -> Case:
    found = CASES[request.param]
    if target.interpreted and not found.kernels:
        pytest.skip("another case runs its kernels")
    return found


def shapes(case: Case, target: Target) -> list[tuple[int, int]]:
    found = SHAPES
    if target.interpreted:
        found = INTERPRETER_SHAPES
    elif target.device == "cuda":
        found = GPU_SHAPES
    return [(max(n, case.least), d) for n, d in found]


def dtypes(target: Target) -> list[torch.dtype]:
    if target.interpreted:  # its bfloat16 tl.dot is wrong
        return [torch.float32, torch.float16]
    return [torch.float64, *LOW] if target.backend == "torch" else LOW


def precise(target: Target) -> torch.dtype:
    return torch.float64 if target.backend == "torch" else torch.float32


def rows(
    case: Case, target: Target, n: int, d: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [x.to(target.device, dtype) for x in case.rows(n, d)]


def scalars(
    case: Case, target: Target, sharpness: float, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [torch.tensor(x, dtype=dtype, device=target.device) for x in case.scalars(sharpness)]


def both(
    case: Case, target: Target, *given: float, **options: object
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The fused loss and the reference."""
    backend = "torch" if case.matrix_given else target.backend
    fused = case.on(functional, *given, backend=backend, **options)
    return fused, case.on(reference, *given, **options)


def fused(
    case: Case, target: Target, sharpness: float = 5.0, **options: object
) -> Callable[..., Tensor]:
    return both(case, target, *case.scalars(sharpness), **options)[0]


def on_device(options: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
    return {name: x.to(target.device) for name, x in options.items()}


def assert_close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharpness", [2.0, 14.3, 100.0, 200.0])
def test_value_and_gradients_are_as_exact_as_promised(
    case: Case, target: Target, sharpness: float
) -> None:
    if target.interpreted and sharpness in (2.0, 100.0):
        pytest.skip("the other two take the same way")
    loss, plain = both(case, target, *case.scalars(sharpness))
    for n, d in shapes(case, target):
        for dtype in dtypes(target):
            check_accuracy(loss, plain, rows(case, target, n, d, dtype))


@pytest.mark.parametrize(("sharpness", "dtype"), [(5.0, torch.float32), (100.0, torch.float64)])
@pytest.mark.parametrize("name", CASES)
def test_many_tiles_agree_with_one_matrix(name: str, sharpness: float, dtype: torch.dtype) -> None:
    case, target = CASES[name], Target("torch", "cpu")
    ids = {} if case.ids is None or sharpness > 5 else case.ids(LARGE[0])
    given = scalars(case, target, sharpness, dtype)
    check_accuracy(*both(case, target, **ids), [*rows(case, target, *LARGE, dtype), *given])


@pytest.mark.parametrize("sharpness", [3.0, 125.0])
def test_scalars_get_their_gradients(case: Case, target: Target, sharpness: float) -> None:
    given = scalars(case, target, sharpness, precise(target))
    check_accuracy(*both(case, target), [*rows(case, target, 30, 12, precise(target)), *given])


def test_a_tensor_counts_as_its_number(case: Case, target: Target) -> None:
    for dtype in dtypes(target):
        z = rows(case, target, 12, 8, dtype)
        expected = fused(case, target, 4.0)(*z)  # powers of 2, so that 1 / temperature is exact
        for kind in (torch.float32, dtype):
            given = scalars(case, target, 4.0, kind)
            assert torch.equal(both(case, target)[0](*z, *given), expected)


def test_a_tensor_of_one_element_counts_as_a_scalar(case: Case, target: Target) -> None:
    loss, _ = both(case, target)
    z, given = rows(case, target, 12, 8), scalars(case, target, 5.0)
    value, *grads = value_and_gradients(loss, [*z, *given])
    again, *others = value_and_gradients(loss, [*z, *(x[None] for x in given)])
    assert torch.equal(again, value)
    for found, expected, x in zip(others, grads, [*z, *(x[None] for x in given)], strict=True):
        assert found.shape == x.shape
        assert torch.equal(found, expected.reshape(x.shape))


def test_long_rows_give_large_scores(case: Case, target: Target) -> None:
    if case.cosine:
        pytest.skip("cosines are at most 1")
    for dtype in dtypes(target):
        z = [100 * x for x in rows(case, target, 26, 16, dtype)]  # scores of 1e4
        loss, plain = both(case, target, *case.scalars(1.0))
        check_accuracy(loss, plain, z)
        assert all(x.isfinite().all() for x in value_and_gradients(loss, z))


def test_terms_and_their_gradients_are_those_of_the_reference(case: Case, target: Target) -> None:
    if not case.has_terms:
        pytest.skip("has no reduction")
    given = case.scalars(10.0)
    z = rows(case, target, 37, 24, precise(target))
    loss, plain = both(case, target, *given, reduction="none")
    upstream = torch.randn(len(loss(*z)), dtype=z[0].dtype, device=target.device)
    check_accuracy(loss, plain, z, upstream)
    terms, total, mean = (
        fused(case, target, 10.0, reduction=kind)(*z) for kind in ("none", "sum", "mean")
    )
    torch.testing.assert_close(total, terms.sum())
    torch.testing.assert_close(mean, terms.mean())


@pytest.mark.parametrize("upstream", [65536.0, -3.0, 1e-8])
def test_upstream_gradient_is_passed_on(case: Case, target: Target, upstream: float) -> None:
    if target.interpreted and upstream != -3:
        pytest.skip("multiplied in the same place")
    loss, plain = both(case, target, *case.scalars(5.0))
    for dtype in dtypes(target):
        if dtype != torch.float16:  # where such gradients vanish or overflow
            check_accuracy(loss, plain, rows(case, target, 33, 16, dtype), upstream)


def test_float16_survives_a_gradient_scaler(case: Case, target: Target) -> None:
    z = rows(case, target, 32, 16, torch.float16)
    z = [8 * x if case.cosine else x for x in z]  # the scaled gradient itself must fit float16
    loss, plain = both(case, target, *case.scalars(5.0))
    check_accuracy(loss, plain, z, 65536.0)
    value, *grads = value_and_gradients(loss, z, 65536.0)
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0] != 0).any()


@pytest.mark.parametrize("sharpness", [3.0, 125.0])
def test_ids_leave_duplicates_out(case: Case, target: Target, sharpness: float) -> None:
    if case.ids is None:
        pytest.skip("labels say what duplicates are")
    if target.interpreted and sharpness > 100:
        pytest.skip("the other takes the same way")
    n = 33
    z = rows(case, target, n, 14, precise(target))
    options = on_device(case.ids(n), target)
    loss, plain = both(case, target, *case.scalars(sharpness), **options)
    check_accuracy(loss, plain, z)
    if sharpness < 100:  # else the duplicates that were drawn may hardly count
        assert not torch.allclose(loss(*z), fused(case, target, sharpness)(*z))


def test_distinct_ids_change_nothing(case: Case, target: Target) -> None:
    if case.ids is None:
        pytest.skip("labels say what duplicates are")
    z = rows(case, target, 13, 8)
    options = {}
    for i, (name, ids) in enumerate(on_device(case.ids(13), target).items()):
        fresh = torch.randperm(ids.numel(), device=target.device) - 7 + 1000 * i
        options[name] = fresh.view_as(ids)
    assert_close(
        value_and_gradients(fused(case, target, **options), z),
        value_and_gradients(fused(case, target), z),
    )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.complete])
def test_float64_gradients_pass_gradcheck(name: str) -> None:
    case, target = CASES[name], Target("torch", "cpu")
    inputs = [*rows(case, target, 4, 2, torch.float64), *scalars(case, target, 3.0, torch.float64)]
    keep = {"reduction": "none"} if case.has_terms else {}
    loss, _ = both(case, target, **keep)
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_a_gradient_asked_for_alone_is_the_same(case: Case, target: Target) -> None:
    inputs = [*rows(case, target, 20, 12), *scalars(case, target, 4.0)]
    loss, _ = both(case, target)
    _, *together = value_and_gradients(loss, inputs)
    for i, expected in enumerate(together):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        loss(*leaves).backward()
        torch.testing.assert_close(leaves[i].grad, expected, rtol=1e-5, atol=1e-7)
        assert all(x.grad is None for j, x in enumerate(leaves) if i != j)


def test_no_gradient_asked_for_means_the_same_value(case: Case, target: Target) -> None:
    z = rows(case, target, 20, 12)
    loss = fused(case, target)
    value, *_ = value_and_gradients(loss, z)
    assert torch.equal(loss(*z), value)
    with torch.no_grad():
        assert torch.equal(loss(*(x.requires_grad_() for x in z)), value)


def test_views_of_other_memory_give_the_same(case: Case, target: Target) -> None:
    z = rows(case, target, 20, 12)
    expected = value_and_gradients(fused(case, target), z)
    spread = [x.new_zeros(2 * len(x), 25) for x in z]
    for x, memory in zip(z, spread, strict=True):
        memory[::2, 1::2] = x

    def strided(*memory):
        return fused(case, target)(*(x[::2, 1::2] for x in memory))

    value, *grads = value_and_gradients(strided, spread)
    assert_close([value, *(x[::2, 1::2] for x in grads)], expected)

    def transposed(*columns):
        return fused(case, target)(*(x.T for x in columns))

    value, *grads = value_and_gradients(transposed, [x.T.contiguous() for x in z])
    assert_close([value, *(x.T for x in grads)], expected)


def test_same_input_gives_same_bits(case: Case, target: Target) -> None:
    for dtype in dtypes(target)[: 1 if target.interpreted else None]:
        z = rows(case, target, 70, 24, dtype)
        first, second = (value_and_gradients(fused(case, target), z) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_deterministic_mode_finds_no_unwritten_memory(case: Case, target: Target) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        for n, d in shapes(case, target) + [LARGE] * (not target.interpreted):
            inputs = [*rows(case, target, n, d), *scalars(case, target, 5.0)]
            result = value_and_gradients(both(case, target)[0], inputs)
            assert all(x.isfinite().all() for x in result)
    finally:
        torch.use_deterministic_algorithms(False)


def test_loss_is_float32_and_gradients_keep_the_type(case: Case, target: Target) -> None:
    for dtype in dtypes(target):
        value, *grads = value_and_gradients(fused(case, target), rows(case, target, 8, 8, dtype))
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert {grad.dtype for grad in grads} == {dtype}


def test_autocast_changes_nothing(case: Case, target: Target) -> None:
    for dtype in dtypes(target):
        z = rows(case, target, 33, 16, dtype)
        expected = value_and_gradients(fused(case, target), z)
        with torch.autocast(target.device, torch.bfloat16):
            got = value_and_gradients(fused(case, target), z)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_cosines_ignore_the_length_of_rows(case: Case, target: Target) -> None:
    z = rows(case, target, 26, 16)
    lengths = [torch.logspace(-9, 12, len(x), device=target.device)[:, None] for x in z]
    got = fused(case, target)(*(length * x for length, x in zip(lengths, z, strict=True)))
    expected = fused(case, target)(*z)
    if case.cosine:
        torch.testing.assert_close(got, expected)
    else:
        assert abs(got - expected) > 1


def degenerate(case: Case, kind: str, dtype: torch.dtype) -> list[Tensor]:
    first, *others = case.rows(20, 12)
    z = [first, *others]
    if kind == "zero rows":
        first[3] = 0
        z[-1][3] = z[-1][5] = 0
    elif kind == "identical rows":
        z = [first[:1].expand_as(x).clone() for x in z]
    elif kind == "opposite rows":
        z = [first, *(-x for x in others)]
        first[1::2] = -first[::2]
    elif kind == "largest numbers" and case.cosine:
        z = [x * min(torch.finfo(dtype).max, 1e30) / x.abs().max() for x in z]
    elif kind == "smallest numbers":
        z = [x * torch.finfo(dtype).tiny for x in z]
    return [x.to(dtype) for x in z]


KINDS = ["zero rows", "identical rows", "opposite rows", "largest numbers", "smallest numbers"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_finite_input_gives_finite_results(case: Case, target: Target, kind: str) -> None:
    for sharpness in (200.0,) if target.interpreted else (2.0, 200.0, 1e4):
        for dtype in [torch.float16] if target.interpreted else dtypes(target):
            z = [x.to(target.device) for x in degenerate(case, kind, dtype)]
            result = value_and_gradients(fused(case, target, sharpness), z)
            if kind == "smallest numbers" and case.cosine:
                result = result[:1]  # gradients grow as rows shrink, past any type's largest number
            assert all(x.isfinite().all() for x in result), (sharpness, dtype, result)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", CASES)
def test_degenerate_rows_have_the_gradients_of_the_reference(name: str, kind: str) -> None:
    """In float64: where all scores are equal the plain loss of less is exact by luck."""
    case = CASES[name]
    for sharpness in (5.0, 200.0):
        check_accuracy(
            *both(case, Target("torch", "cpu"), *case.scalars(sharpness)),
            degenerate(case, kind, torch.float64),
        )


def test_a_zero_row_gets_no_gradient_from_cosines(case: Case, target: Target) -> None:
    z = [x.to(target.device) for x in degenerate(case, "zero rows", torch.float32)]
    _, first, *_ = value_and_gradients(fused(case, target), z)
    assert (first[3] == 0).all() == case.cosine
    assert (first[4] != 0).any()


def test_one_feature_leaves_cosines_no_gradient(case: Case, target: Target) -> None:
    # A row at unit length is then 1 or -1, and stays it; other products are like any.
    z = [torch.where(x > 0, x + 1, x - 1) for x in rows(case, target, 6, 1)]
    loss, plain = both(case, target, *case.scalars(5.0))
    if not case.cosine:
        check_accuracy(loss, plain, z)
    value, *grads = value_and_gradients(loss, z)
    torch.testing.assert_close(value, plain(*z))
    assert (max(grad.abs().max() for grad in grads) < 1e-5) == case.cosine


def test_nan_comes_out_as_nan(case: Case, target: Target) -> None:
    for i in range(len(case.rows(2, 2))):
        z = rows(case, target, 20, 8)
        z[i][7, 3] = math.nan
        value, dz, *_ = value_and_gradients(fused(case, target), z)
        assert value.isnan()
        assert dz.isnan().any()


def test_infinity_hangs_nothing(case: Case, target: Target) -> None:
    z = rows(case, target, 20, 8)
    z[0][7, 3] = math.inf
    value, *_ = value_and_gradients(fused(case, target), z)
    assert not value.isfinite()


@settings(max_examples=8, deadline=None, derandomize=True)  # rounding is luck: one in thousands
@given(
    n=st.integers(2, 40),
    d=st.integers(4, 40),  # with fewer, the orders of features hardly change the plain rounding
    exponent=st.integers(-6, 6),
    sharpness=st.sampled_from([0.5, 3.0, 20.0, 50.0]),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("name", CASES)
def test_any_shape_scale_and_type_is_as_exact_as_promised(
    name: str, n: int, d: int, exponent: int, sharpness: float, half: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    case, target = CASES[name], Target("torch", "cpu")
    first, *others = rows(case, target, n, d)
    z = [(2.0**exponent * first), *others]
    z = [x.to(torch.float16 if half else torch.float32) for x in z]
    check_accuracy(*both(case, target, *case.scalars(sharpness)), z)


def test_second_derivatives_are_never_silently_zero(case: Case, target: Target) -> None:
    z = [x.requires_grad_() for x in rows(case, target, 6, 4)]
    value = fused(case, target)(*z)
    (grad,) = torch.autograd.grad(value, z[0], create_graph=True)
    assert grad.requires_grad
    if case.twice:
        inputs = [x.detach().double().requires_grad_() for x in z]
        assert torch.autograd.gradgradcheck(fused(case, target), inputs)
    else:
        with pytest.raises(RuntimeError, match="has no derivative"):
            (value + grad.square().sum()).backward()


def test_compiles_as_one_graph(case: Case, target: Target) -> None:
    if target.interpreted:
        pytest.skip("operators are the same to a compiler")
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations
    inputs = [*rows(case, target, 24, 16), *scalars(case, target, 4.0)]
    loss, _ = both(case, target)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(value_and_gradients(compiled, inputs), value_and_gradients(loss, inputs))


def saved_bytes(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> int:
    """What the backward pass keeps beside the inputs."""
    saved = {}

    def record(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        value = loss(*inputs)
    assert value.requires_grad
    return sum(saved.values()) - sum(saved.pop(x.untyped_storage().data_ptr(), 0) for x in inputs)


def test_saved_tensors_grow_with_rows_only(case: Case, target: Target) -> None:
    if case.matrix_given:
        pytest.skip("its own file says what is kept of the mask")
    n = 40 if target.interpreted else 300  # two views of which are past one tile
    small, large = (
        saved_bytes(fused(case, target), rows(case, target, count, 4)) for count in (n, 3 * n)
    )
    assert large <= 3.01 * small


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CASES)
class TestOnGpu:
    target = Target("triton", "cuda")

    def inputs(self, name: str) -> list[Tensor]:
        case = CASES[name]
        found = [*rows(case, self.target, 512, 128), *scalars(case, self.target, 10.0)]
        return [x.requires_grad_() for x in found]

    def test_never_waits_for_the_device(self, name: str) -> None:
        loss, _ = both(CASES[name], self.target)
        inputs = self.inputs(name)
        loss(*inputs).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss(*inputs).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_replays_from_a_captured_graph(self, name: str) -> None:
        loss, _ = both(CASES[name], self.target)
        step = torch.cuda.make_graphed_callables(loss, tuple(self.inputs(name)))
        fresh = self.inputs(name)
        value = step(*fresh)
        value.backward()
        expected = value_and_gradients(loss, fresh)
        assert_close([value.detach(), *(x.grad for x in fresh)], expected)


Z = torch.zeros(4, 3)
FUNCTIONS = ["info_nce", "dcl", "clip", "siglip"]
BAD_INPUT = {
    "unequal shapes": (
        (Z, torch.zeros(4, 2)),
        {},
        ValueError,
        r"\w+ and \w+ must have equal shapes, got \(4, 3\) and \(4, 2\)",
    ),
    "one dimension": ((Z[0], Z[0]), {}, ValueError, r"\w+ must have shape \(N, D\).*got \(3,\)"),
    "no rows": ((Z[:0], Z[:0]), {}, ValueError, r"N and D at least 1, got \(0, 3\)"),
    "integers": ((Z.int(), Z), {}, TypeError, r"\w+ must be float64.*got int32"),
    "not a tensor": ((Z, [[1.0]]), {}, TypeError, r"\w+ must be a tensor, got list"),
    "sparse": ((Z.to_sparse(), Z), {}, TypeError, r"\w+ must be dense, got layout sparse_coo"),
    "two devices": ((Z, Z.to("meta")), {}, ValueError, "same device, got cpu and meta"),
    "unknown backend": (
        (Z, Z),
        {"backend": "cuda"},
        ValueError,
        "backend must be one of 'auto', 'triton', 'torch', got 'cuda'",
    ),
    "ids of another length": (
        (Z, Z),
        {"ids": torch.arange(3)},
        ValueError,
        r"ids must have shape \(4,\).*got \(3,\)",
    ),
    "ids that are not integers": (
        (Z, Z),
        {"ids": torch.zeros(4)},
        TypeError,
        "ids must be integers, got float32",
    ),
    "ids in a list": (
        (Z, Z),
        {"ids": [1, 2, 3, 4]},
        TypeError,
        "ids must be a tensor of integers or None, got list",
    ),
    "ids elsewhere": (
        (Z, Z),
        {"ids": torch.arange(4, device="meta")},
        ValueError,
        "ids must be on the embeddings' device cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_named(name: str, kind: str) -> None:
    given, options, error, message = BAD_INPUT[kind]
    with pytest.raises(error, match=message):
        getattr(functional, name)(*given, **options)


BAD_SCALAR = {
    "zero": (0.0, ValueError, "must be positive and finite, got 0.0"),
    "negative": (-1.0, ValueError, "must be positive and finite, got -1.0"),
    "infinite": (math.inf, ValueError, "must be positive and finite, got inf"),
    "NaN in a tensor": (
        torch.tensor(math.nan),
        ValueError,
        "must be positive and finite, got nan",
    ),
    "of two elements": (torch.ones(2), ValueError, r"must be .* one element, got shape \(2,\)"),
    "of integers": (torch.tensor(1), TypeError, "must be a floating-point tensor, got int64"),
    "a word": ("low", TypeError, "must be a number or a tensor of one element, got str"),
    "a fraction": (Fraction(1, 2), TypeError, "must be a number, got Fraction"),
    "past all floats": (10**400, ValueError, "must be positive and finite in float32.*, got 10000"),
    "past float32": (1e300, ValueError, r"must be positive and finite in float32.*, got 1e\+300"),
    "of too large an inverse": (
        1e-40,
        ValueError,
        "must be positive and finite in float32, and so its inverse, got 1e-40",
    ),
    "of too large an inverse, in a tensor": (
        torch.tensor(1e-44),
        ValueError,
        "must be positive and finite in float32, and so its inverse, got 9.8.*e-45",
    ),
    "elsewhere": (
        torch.tensor(1.0, device="meta"),
        ValueError,
        "must be on the embeddings' device cpu, got meta",
    ),
}


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("info_nce", "temperature"),
        ("dcl", "temperature"),
        ("supcon", "temperature"),
        ("clip", "logit_scale"),
        ("siglip", "logit_scale"),
    ],
)
@pytest.mark.parametrize("kind", BAD_SCALAR)
def test_a_bad_scalar_is_named(name: str, argument: str, kind: str) -> None:
    value, error, message = BAD_SCALAR[kind]
    given = (Z[:, None],) if name == "supcon" else (Z, Z)
    with pytest.raises(error, match=f"{argument} {message}"):
        getattr(functional, name)(*given, **{argument: value})


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.matrix_given])
def test_triton_refuses_float64_by_name_only(name: str) -> None:
    case = CASES[name]
    z = rows(case, Target("torch", "cpu"), 4, 4, torch.float64)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*float64"):
        fused(case, Target("triton", "cpu"))(*z)
    assert fused(case, Target("auto", "cpu"))(*z).dtype == torch.float64
