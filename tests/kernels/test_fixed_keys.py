"""Triton's launcher of the log-sum-exp of keys without gradient: any cut of the work, any input."""

import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

from fastssl import reference

fixed_keys = pytest.importorskip("fastssl.kernels.fixed_keys")
gpu = pytest.importorskip("fastssl.kernels.gpu")
tiles = pytest.importorskip("fastssl.kernels.tiles")
pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}  # of the largest entry


def assert_close(got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


def check_fixed_keys(
    q: Tensor, k: Tensor, s: float, *ids: Tensor | None, pair: Tensor | None = None
) -> None:
    ids = ids or (None, None)
    scale = torch.tensor(s)
    lse, dq, dscale = fixed_keys.fixed_keys_lse_fwd(q, k, scale, pair, *ids, True)
    assert dq.dtype == q.dtype

    rows, scales = q.double().requires_grad_(), torch.full((len(q), 1), s).double().requires_grad_()
    logits = scales * (reference.normalize(rows) @ reference.normalize(k.double()).T)
    if pair is not None:
        cosines = (reference.normalize(rows) * reference.normalize(pair.double())).sum(1)
        logits = logits - scales * cosines[:, None]
    if ids[0] is not None:
        logits = logits.masked_fill(ids[0][:, None] == ids[1], -torch.inf)
    exact = logits.logsumexp(1)
    want = torch.autograd.grad(exact.sum(), (rows, scales))
    assert_close(lse, exact.detach(), TOLERANCE[q.dtype])
    assert_close(dq, want[0], TOLERANCE[q.dtype])
    assert_close(dscale, want[1][:, 0], TOLERANCE[q.dtype])

    alone, *nothing = fixed_keys.fixed_keys_lse_fwd(q, k, scale, pair, *ids, False)
    assert torch.equal(alone, lse)
    assert [x.shape for x in nothing] == [(0, 0), (0,)]


def correlated(M: int, N: int, D: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and columns of which the pairs are alike."""
    q, k = torch.randn(M, D), torch.randn(N, D)
    k[first : first + M] += q
    return q, k


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
    lse, dq, dscale = fixed_keys.fixed_keys_lse_fwd(q, k, torch.tensor(7.0), None, *ids, True)
    assert ((lse == -torch.inf) == (ids[0] == 4)).all()
    assert (dq[4] == 0).all()
    assert dscale[4] == 0
    assert dq.isfinite().all()


@pytest.mark.parametrize("multiprocessors", [1, 40], indirect=True)
def test_same_input_same_bits(multiprocessors) -> None:
    q, k, scale = torch.randn(100, 16), torch.randn(100, 16), torch.tensor(3.0)
    both = (fixed_keys.fixed_keys_lse_fwd(q, k, scale, None, None, None, True) for _ in range(2))
    assert all(map(torch.equal, *both))


def test_nan_in_one_key_reaches_every_row() -> None:
    q, k = torch.randn(70, 8), torch.randn(70, 8)
    k[3, 2] = torch.nan
    found = fixed_keys.fixed_keys_lse_fwd(q, k, torch.tensor(2.0), None, None, None, True)
    assert all(x.isnan().all() for x in found)


def test_any_strides() -> None:
    check_fixed_keys(torch.randn(18, 70).T, torch.randn(140, 36)[::2, ::2], 5.0)


def test_zero_rows_and_twins_are_finite() -> None:
    q, k = torch.randn(20, 8), torch.randn(20, 8)
    q[3], k[3], k[5], q[7] = 0, 0, 0, q[6]
    check_fixed_keys(q, k, 5.0)


@pytest.mark.parametrize(
    ("multiprocessors", "D"), [(1, 20), (40, 20), (1, 300)], indirect=["multiprocessors"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_score_of_a_pair_is_taken_off(multiprocessors, D: int, dtype: torch.dtype) -> None:
    pair, k = torch.randn(70, D).to(dtype), torch.randn(150, D).to(dtype)
    q = (pair + torch.randn(70, D)).to(dtype)
    ids = torch.arange(70) % 5, torch.arange(150) % 7
    check_fixed_keys(q, k, 20.0, *ids, pair=pair)
    alone = torch.zeros(70), torch.zeros(150)
    lse, *grads = fixed_keys.fixed_keys_lse_fwd(q, k, torch.tensor(20.0), pair, *alone, True)
    assert (lse == -torch.inf).all()
    assert all((grad == 0).all() for grad in grads)
