"""Triton's launchers of the log-sum-exp of pairs, of classes and of keys without gradient."""

import itertools

import numpy as np
import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

from fastssl import reference

fixed_keys = pytest.importorskip("fastssl.kernels.fixed_keys")
gpu = pytest.importorskip("fastssl.kernels.gpu")
pairs = pytest.importorskip("fastssl.kernels.pairs")
similarity = pytest.importorskip("fastssl.kernels.similarity")
tiles = pytest.importorskip("fastssl.kernels.tiles")

pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
ALL = (True, True, True)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}  # of the largest entry
SCALES = [(10.0, True), (100.0, True), (0.4, False)]  # and whether rows are normalised


@pytest.fixture
def multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(gpu, "target", lambda device: ("interpreter", request.param))
    return request.param


def assert_close(got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


def exact_pairs(
    q: Tensor, k: Tensor, scale: Tensor, ids: Tensor | None, first: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    if normalize:
        q, k = reference.normalize(q), reference.normalize(k)
    logits = scale * q @ k.T
    paired = torch.zeros(len(q), len(k), dtype=torch.bool)
    paired.diagonal(first).fill_(True)
    hidden = paired if ids is None else paired | (ids[first : first + len(q), None] == ids)
    negatives, positive = logits.masked_fill(hidden, -torch.inf), logits[paired]
    cols = (negatives - positive).logsumexp(0) if len(q) == len(k) else negatives.new_empty(0)
    return (negatives - positive[:, None]).logsumexp(1), cols


def fused_pairs(
    q: Tensor, k: Tensor, s: float, ids: Tensor | None = None, *, first: int = 0, columns: bool,
    normalize: bool, upstream: tuple[Tensor, Tensor], needs: tuple[bool, ...] = ALL,
) -> list[Tensor | None]:  # fmt: skip
    """Return the two log-sum-exps, the columns' perhaps empty, and the gradients."""
    scale = torch.tensor(s)
    rows, cols, *saved = pairs.pair_lse_fwd(q, k, scale, ids, first, columns, normalize)
    grads = pairs.pair_lse_bwd(
        *upstream, q, k, scale, ids, first, columns, *saved, normalize, needs
    )
    return [rows, cols, *grads]


def upstream_of(q: Tensor, k: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    return torch.rand(len(q)), torch.rand(len(k) if columns else 0)


def check_pairs(
    q: Tensor, k: Tensor, s: float, ids: Tensor | None = None, *, first: int = 0,
    columns: bool = False, normalize: bool = True, upstream: tuple[Tensor, Tensor] | None = None,
    tolerance: float | None = None,
) -> None:  # fmt: skip
    upstream = upstream or upstream_of(q, k, columns)
    got = fused_pairs(
        q, k, s, ids, first=first, columns=columns, normalize=normalize, upstream=upstream
    )
    inputs = [x.double().requires_grad_() for x in (q, k, torch.tensor(s))]
    outputs = exact_pairs(*inputs, ids, first, normalize)[: 2 if columns else 1]
    grads = torch.autograd.grad(outputs, inputs, [x.double() for x in upstream[: len(outputs)]])
    want = [x.detach() for x in outputs] + ([] if columns else [torch.empty(0)]) + list(grads)
    for one, other in zip(got, want, strict=True):
        if other.numel():
            assert_close(one, other, tolerance or TOLERANCE[q.dtype])
        else:
            assert not one.numel()


def exact_classes(z: Tensor, scale: Tensor, classes: Tensor) -> Tensor:
    scores, itself = scale * z @ z.T, torch.eye(len(z), dtype=torch.bool)
    positive = (classes[:, None] == classes) & ~itself
    count = positive.sum(1)
    mean = (scores * positive).sum(1) / count.clamp_min(1)
    lse = scores.masked_fill(itself, -torch.inf).logsumexp(1)
    return torch.where(count > 0, lse - mean, 0)


def fused_classes(
    z: Tensor, s: float, classes: Tensor, dlse: Tensor, needs: tuple[bool, bool] = ALL[:2]
) -> list[Tensor | None]:
    """Return the log-sum-exp and the gradients."""
    scale = torch.tensor(s)
    lse, *saved = similarity.class_lse_fwd(z, scale, classes, None)
    return [lse, *similarity.class_lse_bwd(dlse, z, scale, classes, None, *saved, needs)]


def check_classes(
    z: Tensor, s: float, classes: Tensor, dlse: Tensor, tolerance: float | None = None
) -> None:
    got = fused_classes(z, s, classes, dlse)
    inputs = [x.double().requires_grad_() for x in (z, torch.tensor(s))]
    exact = exact_classes(*inputs, classes)
    want = [exact.detach(), *torch.autograd.grad(exact, inputs, dlse.double())]
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, tolerance or TOLERANCE[z.dtype])


def check_fixed_keys(q: Tensor, k: Tensor, s: float, *ids: Tensor | None) -> None:
    ids = ids or (None, None)
    scale = torch.tensor(s)
    lse, dq, dscale = fixed_keys.fixed_keys_lse_fwd(q, k, scale, *ids, True)
    assert dq.dtype == q.dtype

    rows, scales = q.double().requires_grad_(), torch.full((len(q), 1), s).double().requires_grad_()
    logits = scales * (reference.normalize(rows) @ reference.normalize(k.double()).T)
    if ids[0] is not None:
        logits = logits.masked_fill(ids[0][:, None] == ids[1], -torch.inf)
    exact = logits.logsumexp(1)
    want = torch.autograd.grad(exact.sum(), (rows, scales))
    assert_close(lse, exact.detach(), TOLERANCE[q.dtype])
    assert_close(dq, want[0], TOLERANCE[q.dtype])
    assert_close(dscale, want[1][:, 0], TOLERANCE[q.dtype])

    alone, *nothing = fixed_keys.fixed_keys_lse_fwd(q, k, scale, *ids, False)
    assert torch.equal(alone, lse)
    assert [x.shape for x in nothing] == [(0, 0), (0,)]


def correlated(M: int, N: int, D: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and columns of which the pairs are alike."""
    q, k = torch.randn(M, D), torch.randn(N, D)
    k[first : first + M] += q
    return q, k


@pytest.mark.parametrize(("scale", "normalize"), SCALES)
@pytest.mark.parametrize(
    ("multiprocessors", "N", "D", "per_group"),
    [(1, 300, 20, 3), (40, 150, 70, 1)],
    indirect=["multiprocessors"],
)
def test_rows_and_columns_whatever_the_cut(
    multiprocessors, N, D, per_group, scale, normalize
) -> None:
    config = (N, N, D, torch.float32, False, "interpreter", multiprocessors)
    assert tiles.launch_config("pair", *config)[1] == per_group
    check_pairs(*correlated(N, N, D), scale, columns=True, normalize=normalize)


@pytest.mark.parametrize("multiprocessors", [40], indirect=True)
@pytest.mark.parametrize("normalize", [True, False])
def test_few_rows_fill_the_device(multiprocessors, normalize) -> None:
    config = (20, 1000, 30, torch.float32, False, "interpreter", multiprocessors)
    assert tiles.launch_config("fwd", *config)[1] > 1
    assert tiles.launch_config("product", *config)[1] > 1
    assert tiles.launch_config("row_product", *config)[1] > 1
    check_pairs(*correlated(20, 1000, 30, 5), 1.0, first=5, normalize=normalize)


@pytest.mark.parametrize("multiprocessors", [4, 40], indirect=True)
@pytest.mark.parametrize(("scale", "normalize"), SCALES)
@pytest.mark.parametrize(("M", "N", "first"), [(70, 150, 0), (9, 141, 132), (70, 140, 33)])
def test_more_columns_than_rows(multiprocessors, M, N, first, scale, normalize) -> None:
    q, k = correlated(M, N, 24, first)
    check_pairs(q, k, scale, first=first, normalize=normalize)
    ids = torch.randint(N // 2, (N,), dtype=torch.int32)
    check_pairs(q, k, scale, ids, first=first, normalize=normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_weights_are_kept_a_panel_at_a_time(columns, normalize, monkeypatch) -> None:
    monkeypatch.setattr(pairs, "PANEL_BYTES", 0)
    monkeypatch.setattr(pairs, "PANEL_ROWS", 64)
    q, k = correlated(150, 150, 20)
    check_pairs(q, k, 0.5, torch.randint(80, (150,)), columns=columns, normalize=normalize)


@pytest.mark.parametrize(("columns", "normalize"), itertools.product([True, False], repeat=2))
@pytest.mark.parametrize("upstream", [65536.0, 1e-6])
def test_float16_holds_any_upstream_gradient(columns, normalize, upstream: float) -> None:
    q, k = (x.half() / 4 for x in correlated(70, 70, 130))
    options = {"columns": columns, "normalize": normalize}
    dlse = upstream_of(q, k, columns)
    want = fused_pairs(q, k, 20.0, **options, upstream=dlse)
    got = fused_pairs(q, k, 20.0, **options, upstream=tuple(upstream * x for x in dlse))
    check_pairs(q, k, 20.0, **options)
    for one, other in zip(got[2:4], want[2:4], strict=True):
        torch.testing.assert_close(one, (upstream * other.float()).half(), rtol=1e-2, atol=2**-20)
    torch.testing.assert_close(got[4], upstream * want[4], rtol=1e-3, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_may_be_large_either_way(sign: int) -> None:
    q, k = correlated(70, 70, 300)
    q *= sign * 50
    largest = float((q @ k.T).abs().max())
    assert largest > 1e4
    rounding = 2**-23 * largest  # of a score, which is a relative error of its exponential
    check_pairs(q, k, 1.0, columns=True, normalize=False, tolerance=rounding)
    check_pairs(q, k, 1.0, normalize=False, tolerance=rounding)
    check_classes(q, 1 / 50, torch.arange(70) // 3, torch.rand(70), tolerance=rounding)


def test_the_lengths_of_orthogonal_rows_may_multiply_past_float32() -> None:
    q, k = 1e20 * torch.randn(2, 20, 8)
    q[:, ::2], k[:, 1::2] = 0, 0
    for columns, normalize in itertools.product([True, False], repeat=2):
        check_pairs(q, k, 5.0, columns=columns, normalize=normalize)


def test_zero_rows_and_twins_are_finite() -> None:
    q, k = correlated(20, 20, 8)
    q[3], k[3], k[5], q[7] = 0, 0, 0, q[6]
    for columns, normalize in itertools.product([True, False], repeat=2):
        check_pairs(q, k, 5.0, columns=columns, normalize=normalize)
    check_classes(q, 5.0, torch.arange(20) % 7, torch.rand(20))
    check_fixed_keys(q, k, 5.0)


def test_a_row_without_negatives() -> None:
    z = torch.randn(1, 5)
    nothing = (torch.zeros(1), torch.zeros(1))
    rows, cols, *grads = fused_pairs(z, z, 2.0, columns=True, normalize=True, upstream=nothing)
    assert rows == cols == -torch.inf
    assert all((grad == 0).all() for grad in grads)
    q, k = correlated(9, 9, 5)
    ids = torch.tensor([4] * 9)
    rows, cols, *_ = fused_pairs(
        q, k, 2.0, ids, columns=True, normalize=False, upstream=upstream_of(q, k, True)
    )
    assert (rows == -torch.inf).all()
    assert (cols == -torch.inf).all()


def test_any_strides() -> None:
    q = torch.randn(18, 70).T  # features far apart
    k = torch.randn(140, 36)[::2, ::2]
    one = torch.tensor(0.1).expand(70)  # the gradient of a sum
    ids = torch.randint(30, (140,))[::2]
    check_pairs(q, k, 5.0, ids, columns=True, upstream=(one, one))
    check_pairs(q[:30], k, 5.0, ids, first=7, upstream=(one[:30], one[:0]))
    check_classes(q, 0.3, ids, one)
    check_classes(k, 0.5, ids, one)
    check_fixed_keys(q, k, 5.0)


def test_rows_more_than_int32_apart() -> None:
    memory = np.empty(2**31 + 64, dtype=np.float16)  # of which only the rows are touched
    far = torch.from_numpy(memory).as_strided((2, 16), (2**31, 1))
    near = torch.randn(2, 16).half()
    far.copy_(near)
    options = {"columns": True, "normalize": True, "upstream": upstream_of(near, near, True)}
    for one, other in zip(
        fused_pairs(far, far, 2.0, **options), fused_pairs(near, near, 2.0, **options), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_a_gradient_that_is_not_needed_is_none(needs: tuple[bool, ...], columns: bool) -> None:
    q, k = correlated(9, 9, 5)
    options = {"columns": columns, "normalize": True, "upstream": upstream_of(q, k, columns)}
    every = fused_pairs(q, k, 3.0, **options)[2:]
    some = fused_pairs(q, k, 3.0, **options, needs=needs)[2:]
    for one, other, needed in zip(every, some, needs, strict=True):
        assert torch.equal(one, other) if needed else other is None


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_of_classes_that_is_not_needed_is_none(needs: tuple[bool, bool]) -> None:
    given = (torch.randn(9, 5), 3.0, torch.arange(9) % 4, torch.rand(9))
    for one, other, needed in zip(
        fused_classes(*given)[1:], fused_classes(*given, needs)[1:], needs, strict=True
    ):
        assert torch.equal(one, other) if needed else other is None


CLASSES = {
    "pairs": lambda at: at // 2,
    "several and singletons": lambda at: at * 7 % 90 - 20,
    "one": lambda at: torch.full_like(at, 3, dtype=torch.int32),
    "large names": lambda at: at % 11 + 2**62,
}


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    ("multiprocessors", "N", "splits", "kind"),
    [*((1, 150, 1, kind) for kind in CLASSES), (40, 400, 7, "several and singletons")],
    indirect=["multiprocessors"],
)
def test_classes_whatever_the_cut(multiprocessors, N, splits, kind: str, scale) -> None:
    config = (N, N, 20, torch.float32, True, "interpreter", multiprocessors)
    assert tiles.launch_config("fwd", *config)[1] == splits
    assert tiles.launch_config("bwd", *config)[1] == splits
    z = reference.normalize(torch.randn(N, 20))
    check_classes(z, scale, CLASSES[kind](torch.arange(N)), torch.randn(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wide_rows_of_classes(dtype: torch.dtype) -> None:
    z = torch.randn(70, 300).to(dtype)
    check_classes(z, 0.3, torch.arange(70) % 20, 1000 * torch.rand(70))


@pytest.mark.parametrize("upstream", [65536.0, 1e-6])
def test_float16_classes_hold_any_upstream_gradient(upstream: float) -> None:
    z, classes, dlse = torch.randn(70, 130).half() / 4, torch.arange(70) % 9, torch.rand(70)
    _, want, dscale = fused_classes(z, 2.0, classes, dlse)
    _, got, big = fused_classes(z, 2.0, classes, upstream * dlse)
    torch.testing.assert_close(got, (upstream * want.float()).half(), rtol=1e-2, atol=2**-20)
    torch.testing.assert_close(big, upstream * dscale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("multiprocessors", [4, 40], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [24, 128, 300])
def test_a_solved_class_has_no_gradient(multiprocessors, D: int, dtype: torch.dtype) -> None:
    """Where all probability is on the one positive, two large terms cancel without a rest."""
    sample = torch.eye(24)[:, torch.arange(D) % 24]  # orthogonal
    views = sample[:, None] + 0.01 * torch.randn(24, 2, D)
    z = reference.normalize(views.flatten(0, 1)).to(dtype)
    for kept in (48, 47):  # in the second case the last row has no positive
        classes = torch.arange(kept) // 2
        lse, *grads = fused_classes(z[:kept], 1000.0, classes, torch.randn(kept))
        assert all((x == 0).all() for x in (lse, *grads))


def test_rows_without_positives_give_nothing() -> None:
    for n in (1, 5, 70):
        for x in fused_classes(torch.randn(n, 6), 2.0, torch.arange(n), torch.randn(n)):
            assert (x == 0).all()


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    ("multiprocessors", "M", "N", "splits"),
    [(1, 70, 130, 1), (40, 20, 500, 8)],
    indirect=["multiprocessors"],
)
def test_fixed_keys_whatever_the_cut(multiprocessors, M, N, splits, scale) -> None:
    config = (M, N, 20, torch.float32, False, "interpreter", multiprocessors)
    assert tiles.launch_config("fixed_keys", *config)[1] == splits
    q, k = torch.randn(M, 20), torch.randn(N, 20)
    check_fixed_keys(q, k, scale)
    ids = torch.randint(9, (M,), dtype=torch.int32), torch.randint(9, (N,))
    check_fixed_keys(q, k, scale, *ids)
    check_fixed_keys(q.half(), k.half(), scale, *ids)


@pytest.mark.parametrize("multiprocessors", [1, 40], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wide_fixed_keys(multiprocessors, dtype: torch.dtype) -> None:
    check_fixed_keys(torch.randn(20, 300).to(dtype), torch.randn(150, 300).to(dtype), 10.0)


def test_a_row_that_sees_no_fixed_key_has_no_gradient() -> None:
    q, k = correlated(9, 30, 5)
    ids = torch.arange(9), torch.full((30,), 4)
    lse, dq, dscale = fixed_keys.fixed_keys_lse_fwd(q, k, torch.tensor(7.0), *ids, True)
    assert ((lse == -torch.inf) == (ids[0] == 4)).all()
    assert (dq[4] == 0).all()
    assert dscale[4] == 0
    assert dq.isfinite().all()


@pytest.mark.parametrize("multiprocessors", [1, 40], indirect=True)
def test_same_input_same_bits(multiprocessors) -> None:
    q, k = correlated(100, 100, 16)
    upstream = upstream_of(q, k, True)

    def run() -> list[Tensor]:
        paired = fused_pairs(q, k, 30.0, columns=True, normalize=True, upstream=upstream)
        classes = fused_classes(q, 3.0, torch.arange(100) % 9, upstream[0])
        fixed = fixed_keys.fixed_keys_lse_fwd(q, k, torch.tensor(3.0), None, None, True)
        return [*paired, *classes, *fixed]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("normalize", [True, False])
def test_nan_in_one_row_reaches_every_row(normalize: bool) -> None:
    q, k = correlated(70, 70, 8)
    k[3, 2] = torch.nan
    options = {"columns": True, "normalize": normalize, "upstream": upstream_of(q, k, True)}
    rows, cols, dq, dk, dscale = fused_pairs(q, k, 2.0, **options)
    assert all(x.isnan().all() for x in (rows, dq.sum(1), dk, dscale, cols[3]))
    lse, dz, _ = fused_classes(k, 2.0, torch.arange(70) % 9, torch.rand(70))
    assert lse.isnan().all()
    assert dz.isnan().all()
    lse, dq, dscale = fixed_keys.fixed_keys_lse_fwd(q, k, torch.tensor(2.0), None, None, True)
    assert all(x.isnan().all() for x in (lse, dq, dscale))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_workspaces_are_bounded(arch: str) -> None:
    sizes, dtypes = [1, 100, 3000, 65536, 1_000_000], [torch.float32, torch.bfloat16]
    for N, D, dtype in itertools.product(sizes, [1, 128, 1000], dtypes):
        config = (N, D, dtype, False, arch, 100)
        options, per_group = tiles.launch_config("pair", N, *config)
        assert -(-N // options["BLOCK_M"]) <= 64 * per_group
        panel = pairs._panel_rows(N, N, dtype.itemsize)
        assert panel * N * dtype.itemsize <= max(2**25, 2048 * N * dtype.itemsize)
        weight, _ = tiles.launch_config("weight", panel, *config)
        assert panel == N or panel % weight["BLOCK_M"] == 0
        for kernel in ("product", "row_product"):
            options, splits = tiles.launch_config(kernel, panel, *config)
            outputs = -(-panel // options["BLOCK_M"]) * -(-D // options["BLOCK_N"])
            assert splits == 1 or outputs * splits <= 200  # twice what runs at once
