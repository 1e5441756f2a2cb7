"""Triton's launcher of Sinkhorn-Knopp: any cut of the work, any input."""

import itertools
import math

import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

sinkhorn = pytest.importorskip("fastssl.kernels.sinkhorn")
soft_cross_entropy = pytest.importorskip("fastssl.kernels.soft_cross_entropy")
pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4}  # of a number, with 1e-7 beside it
DTYPES = [torch.float32, torch.float16]
UNEVEN = ["equal", "one row", "one column", "sparse", "1e4"]
WITHOUT_ITERATIONS = pytest.mark.parametrize("row_route", ["whole rows"], indirect=True)
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


def exact_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, float]:
    """The codes in float64, and how far below its largest the x of a code above 1e-9 may be."""
    x = scores.double() / epsilon
    B, K = x.shape
    f = torch.zeros(B, dtype=torch.float64)
    for _ in range(iterations):
        g = -math.log(K) - torch.logsumexp(x + f[:, None], 0)
        f = -math.log(B) - torch.logsumexp(x + g, 1)
    if iterations:
        exact, top = torch.softmax(x + g, 1), x.amax(0)
    else:
        exact, top = B * torch.softmax(x.flatten(), 0).view(B, K), x.max()
    return exact, (top - x)[exact > 1e-9].max().item()


def assert_close(got: Tensor, exact: Tensor, relative: float, absolute: float = 1e-7) -> None:
    assert got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=relative, atol=absolute)


def check(scores: Tensor, epsilon: float, iterations: int) -> None:
    """Compare with the formula in float64: exponents are rounded to float32, scores are not."""
    codes = sinkhorn.sinkhorn_fwd(scores, epsilon, iterations)
    exact, exponent = exact_sinkhorn(scores, epsilon, iterations)
    assert codes.dtype == scores.dtype
    assert_close(codes, exact, ROUNDING[scores.dtype] + 4 * 2**-24 * exponent)
    if iterations:
        assert_close(codes.double().sum(1), torch.ones(len(codes)).double(), 1e-3)


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_cut_of_the_work(shape: tuple[int, int], iterations: int) -> None:
    for epsilon, dtype in zip((0.05, 1.0), DTYPES, strict=True):
        check(torch.randn(shape).to(dtype), epsilon, iterations)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 300), (300, 40), (3, 3000), (2, 9000)])
def test_the_tiles_of_a_gpu(shape: tuple[int, int]) -> None:
    for iterations in (0, 2):
        check(torch.randn(shape), 0.05, iterations)
    check(torch.randn(shape).half(), 1.0, 2)


@WITHOUT_ITERATIONS
@pytest.mark.parametrize("shape", SHAPES)
def test_no_iterations_share_out_all_exponentials(row_route, shape) -> None:
    for epsilon, dtype in zip((0.05, 1.0), DTYPES, strict=True):
        check(torch.randn(shape).to(dtype), epsilon, 0)


def uneven_scores(case: str) -> Tensor:
    scores = torch.randn(37, 70)
    if case == "one row":
        scores[5] += 1e4
    elif case == "one column":
        scores[:, 3] -= 1e4
    elif case == "sparse":
        scores = torch.where(scores > 1, scores, -1e4)
    elif case == "1e4":
        scores *= 1e4 / scores.abs().max()
    else:
        assert case == "equal"
        scores.fill_(0.3)
    return scores


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("case", UNEVEN)
def test_scores_of_any_spread(case: str) -> None:
    scores = uneven_scores(case)
    check(scores, 0.05, 3)
    check(scores.half(), 0.05, 1)


@WITHOUT_ITERATIONS
@pytest.mark.parametrize("case", UNEVEN)
def test_scores_of_any_spread_without_iterations(row_route, case: str) -> None:
    check(uneven_scores(case), 0.05, 0)


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("iterations", [0, 3])
def test_huge_scores_give_finite_codes(iterations: int) -> None:
    for scores in (1e30 * torch.randn(20, 40), 1e30 * torch.randn(20, 40).sign()):
        assert sinkhorn.sinkhorn_fwd(scores, 0.05, iterations).isfinite().all()


@pytest.mark.usefixtures("row_route")
def test_a_constant_added_to_all_scores_changes_nothing() -> None:
    scores = (64 * torch.randn(37, 70)).round() / 64  # exact after the shift
    codes = sinkhorn.sinkhorn_fwd(scores, 0.25, 3)
    shifted = sinkhorn.sinkhorn_fwd(scores + 128, 0.25, 3)
    torch.testing.assert_close(shifted, codes, rtol=3e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered")
@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_nan_in_gives_nan_out(iterations: int) -> None:
    scores = torch.randn(37, 70)
    scores[20, 40] = torch.nan
    assert sinkhorn.sinkhorn_fwd(scores, 0.05, iterations).isnan().all()


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("iterations", [0, 2])
def test_any_strides(iterations: int) -> None:
    scores = torch.randn(20, 70)
    wide = torch.zeros(40, 140)
    wide[::2, ::2] = scores
    expected = sinkhorn.sinkhorn_fwd(scores, 0.05, iterations)
    for strided in (wide[::2, ::2], torch.cat([scores, scores], 1)[:, :70]):
        assert not strided.is_contiguous()
        codes = sinkhorn.sinkhorn_fwd(strided, 0.05, iterations)
        assert codes.is_contiguous()
        assert torch.equal(codes, expected)


@pytest.mark.usefixtures("row_route")
@pytest.mark.parametrize("iterations", [0, 2])
def test_same_input_same_bits(iterations: int) -> None:
    scores = torch.randn(37, 70)
    first, second = (sinkhorn.sinkhorn_fwd(scores, 0.05, iterations) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_workspace_is_bounded(arch: str) -> None:
    sizes = [1, 64, 3000, sinkhorn.WIDEST, 262_144]
    dtypes = (torch.float32, torch.bfloat16)
    for B, K, dtype, count in itertools.product([*sizes, 2_000_000], sizes, dtypes, (1, 132, 304)):
        for kernel, numbers in (("column", 2), ("row", 1))[: 1 + (K <= sinkhorn.WIDEST)]:
            options, rows = sinkhorn.launch_config(kernel, B, K, dtype, arch, count)
            assert rows % options["BLOCK_B"] == 0
            workspace = numbers * -(-B // rows) * K
            assert workspace <= 2**21
            assert workspace <= max(numbers * K, B * K // 2)  # and far from a second matrix
