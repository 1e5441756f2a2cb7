"""Triton's launchers of soft cross-entropy: any cut of the work, any input."""

import itertools

import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

sinkhorn = pytest.importorskip("fastssl.kernels.sinkhorn")
soft_cross_entropy = pytest.importorskip("fastssl.kernels.soft_cross_entropy")
pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4}  # of a number, with 1e-7 beside it
DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 1), (1, 40), (40, 1), (37, 70), (52, 33)]


@pytest.fixture(params=["whole rows", "tiles of a row"])
def row_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and many shares, and rows that fit in registers or that do not."""
    whole = request.param == "whole rows"

    def sinkhorn_config(kernel: str, B: int, K: int, *_: object) -> tuple[dict[str, int], int]:
        if kernel == "merge":
            return {"BLOCK_S": 2, "BLOCK_K": 64, "num_warps": 4}, B
        block_b, block_k, rows = {
            "column": (8, 64, 16),
            "row": (8, 128, 16),
            "wide_row": (16, 32, 16),
            "codes": (16, 64, 16),
        }[kernel]
        return {"BLOCK_B": block_b, "BLOCK_K": block_k, "num_warps": 4}, rows

    def cross_entropy_config(*_: object) -> dict[str, int]:
        return {"BLOCK_B": 16, "BLOCK_K": 128 if whole else 32, "num_warps": 4}

    monkeypatch.setattr(sinkhorn, "launch_config", sinkhorn_config)
    monkeypatch.setattr(sinkhorn, "WIDEST", 128 if whole else 0)
    monkeypatch.setattr(soft_cross_entropy, "launch_config", cross_entropy_config)


def assert_close(got: Tensor, exact: Tensor, relative: float, absolute: float = 1e-7) -> None:
    assert got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=relative, atol=absolute)


def check_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> None:
    dloss = torch.linspace(-1, 2, len(logits))
    loss, top, total = soft_cross_entropy.soft_cross_entropy_fwd(logits, targets, temperature)
    dlogits = soft_cross_entropy.soft_cross_entropy_bwd(
        dloss, logits, targets, top, total, temperature
    )
    exact_logits = logits.double().requires_grad_()
    x, weights = exact_logits / temperature, targets.double()
    exact = -(weights * torch.log_softmax(x, 1)).sum(1)
    (gradient,) = torch.autograd.grad(exact @ dloss.double(), exact_logits)
    spread = weights.abs().sum(1).clamp_min(1e-3) * x.detach().abs().amax(1).clamp_min(1)
    assert loss.dtype == top.dtype == total.dtype == torch.float32
    assert dlogits.dtype == logits.dtype
    assert ((loss - exact.detach()).abs() <= 1e-6 * spread).all()
    assert torch.equal(top, logits.amax(1).float())
    exact_total = (x.detach() - x.detach().amax(1, keepdim=True)).exp().sum(1)
    assert_close(total, exact_total, 1e-6, 0)
    largest = (dloss.double() * spread / temperature).abs()[:, None]
    allowed = ROUNDING[logits.dtype] * gradient.abs() + 1e-6 * largest.clamp_min(0.1)
    assert ((dlogits - gradient).abs() <= allowed).all()


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize(("dtype", "other"), list(itertools.product(DTYPES, DTYPES)))
def test_cross_entropy_of_any_types(dtype: torch.dtype, other: torch.dtype) -> None:
    logits, targets = torch.randn(37, 70).to(dtype), torch.softmax(torch.randn(37, 70), 1)
    check_cross_entropy(logits, targets.to(other), 0.1)


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_of_any_shape(shape: tuple[int, int]) -> None:
    check_cross_entropy(torch.randn(shape), torch.softmax(torch.randn(shape), 1), 0.1)


@pytest.mark.parametrize("shape", [(70, 300), (5, 3000), (3, 17000)])
def test_cross_entropy_with_the_tiles_of_a_gpu(shape: tuple[int, int]) -> None:
    check_cross_entropy(torch.randn(shape), torch.softmax(3 * torch.randn(shape), 1), 0.1)


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("mass", [0.0, 1.0, 2.0])
def test_targets_of_any_sum(mass: float) -> None:
    check_cross_entropy(torch.randn(37, 70), mass * torch.softmax(torch.randn(37, 70), 1), 1.0)
    one_hot = torch.nn.functional.one_hot(torch.arange(37), 70).float()
    check_cross_entropy(torch.randn(37, 70), mass * one_hot, 0.1)


@pytest.mark.usefixtures("row_route")
def test_logits_of_any_size_give_digits() -> None:
    logits = torch.randn(37, 70).round(decimals=2)
    targets = torch.softmax(logits, 1)
    exact, *_ = soft_cross_entropy.soft_cross_entropy_fwd(logits, targets, 1.0)
    shifted = logits + 2.0**15  # only what the sum itself rounds off is lost
    loss, *saved = soft_cross_entropy.soft_cross_entropy_fwd(shifted, targets, 1.0)
    torch.testing.assert_close(loss, exact, rtol=0, atol=4e-3)
    check_cross_entropy(shifted - 2.0**15, targets, 1.0)
    check_cross_entropy(1e4 * logits, targets, 0.1)
    ones = torch.ones(37)
    for huge in (shifted, 1e30 * logits):
        loss, *saved = soft_cross_entropy.soft_cross_entropy_fwd(huge, targets, 0.1)
        dlogits = soft_cross_entropy.soft_cross_entropy_bwd(ones, huge, targets, *saved, 0.1)
        assert all(x.isfinite().all() for x in (loss, *saved, dlogits))
        assert_close(dlogits.double().sum(1), torch.zeros(37).double(), 0, 1e-5)


@pytest.mark.usefixtures("row_route")
def test_a_sums_gradient_and_any_strides() -> None:
    logits, targets = torch.randn(37, 70), torch.rand(37, 70)
    loss, *saved = soft_cross_entropy.soft_cross_entropy_fwd(logits, targets, 0.1)
    ones = torch.ones(37)
    dlogits = soft_cross_entropy.soft_cross_entropy_bwd(ones, logits, targets, *saved, 0.1)
    strided = (logits.T.contiguous().T, torch.cat([targets, targets], 1)[:, :70])
    results = soft_cross_entropy.soft_cross_entropy_fwd(*strided, 0.1)
    one = torch.tensor(1.0).expand(37)
    gradient = soft_cross_entropy.soft_cross_entropy_bwd(one, *strided, *saved, 0.1)
    assert gradient.is_contiguous()
    assert all(map(torch.equal, (*results, gradient), (loss, *saved, dlogits)))


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("where", ["logits", "targets"])
def test_nan_stays_in_its_row(where: str) -> None:
    logits, targets = torch.randn(37, 70), torch.rand(37, 70)
    {"logits": logits, "targets": targets}[where][20, 40] = torch.nan
    loss, *saved = soft_cross_entropy.soft_cross_entropy_fwd(logits, targets, 0.1)
    dlogits = soft_cross_entropy.soft_cross_entropy_bwd(
        torch.ones(37), logits, targets, *saved, 0.1
    )
    assert loss.isnan().nonzero().flatten().tolist() == [20]
    assert dlogits.isnan().all(1).nonzero().flatten().tolist() == [20]
    assert dlogits.isnan().sum() == 70
