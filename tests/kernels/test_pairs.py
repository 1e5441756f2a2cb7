"""Triton's launchers of the log-sum-exp of pairs: any cut of the work, any input."""

import itertools

import numpy as np
import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

from fastssl import reference

gpu = pytest.importorskip("fastssl.kernels.gpu")
pairs = pytest.importorskip("fastssl.kernels.pairs")
tiles = pytest.importorskip("fastssl.kernels.tiles")
pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
ALL = (True, True, True)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}  # of the largest entry
SCALES = [(10.0, True), (100.0, True), (0.4, False)]  # and whether rows are normalised


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


@pytest.mark.parametrize("multiprocessors", [1, 40], indirect=True)
def test_same_input_same_bits(multiprocessors) -> None:
    q, k = correlated(100, 100, 16)
    options = {"columns": True, "normalize": True, "upstream": upstream_of(q, k, True)}
    both = (fused_pairs(q, k, 30.0, **options) for _ in range(2))
    assert all(map(torch.equal, *both))


@pytest.mark.parametrize("normalize", [True, False])
def test_nan_in_one_row_reaches_every_row(normalize: bool) -> None:
    q, k = correlated(70, 70, 8)
    k[3, 2] = torch.nan
    options = {"columns": True, "normalize": normalize, "upstream": upstream_of(q, k, True)}
    rows, cols, dq, dk, dscale = fused_pairs(q, k, 2.0, **options)
    assert all(x.isnan().all() for x in (rows, dq.sum(1), dk, dscale, cols[3]))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_workspaces_are_bounded(arch: str) -> None:
    sizes, dtypes = [1, 100, 3000, 65536, 1_000_000], [torch.float32, torch.bfloat16]
    for N, D, dtype in itertools.product(sizes, [1, 128, 1000], dtypes):
        config = (N, D, dtype, False, arch, 100)
        options, per_group = tiles.launch_config("pair", N, *config)
        assert -(-N // options["BLOCK_M"]) <= 64 * per_group
        panel = pairs.panel_rows(N, N, dtype.itemsize)
        assert panel * N * dtype.itemsize <= max(2**25, 2048 * N * dtype.itemsize)
        weight, _ = tiles.launch_config("weight", panel, *config)
        assert panel == N or panel % weight["BLOCK_M"] == 0
        for kernel in ("product", "row_product"):
            options, splits = tiles.launch_config(kernel, panel, *config)
            outputs = -(-panel // options["BLOCK_M"]) * -(-D // options["BLOCK_N"])
            assert splits == 1 or outputs * splits <= 200  # twice what runs at once
