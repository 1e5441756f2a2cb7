"""Triton's launcher of SigLIP's sigmoid loss: any cut of the work, any input."""

import itertools

import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor
from torch.nn.functional import normalize

gpu = pytest.importorskip("fastssl.kernels.gpu")
sigmoid = pytest.importorskip("fastssl.kernels.sigmoid")

pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
ALL = (True, True, True, True)
NARROW, WIDE = 20, 130  # rows that fit on the chip with their gradient, and rows that do not
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # of the largest entry


def softplus(x: Tensor) -> Tensor:
    """Torch's own has no gradient at 1e4 unless it rounds from 20 on."""
    return torch.logaddexp(x, torch.zeros_like(x))


def exact(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, first: int
) -> Tensor:
    """The terms by their formula, every matrix stored."""
    logits = scale * q @ k.T + bias
    rows, cols = torch.arange(len(q))[:, None], torch.arange(len(k))
    pairs = (cols == rows + first) if first >= 0 else torch.zeros_like(logits, dtype=torch.bool)
    terms = softplus(torch.where(pairs, -logits, logits))
    if ids is not None:
        hidden = (ids[first : first + len(q), None] == ids) & ~pairs
        terms = terms.masked_fill(hidden, 0)
    return terms.sum(1)


def check(
    q: Tensor,
    k: Tensor,
    scale: float = 3.0,
    bias: float = -10.0,
    ids: Tensor | None = None,
    first: int = 0,
) -> None:
    scale, bias = torch.tensor(scale), torch.tensor(bias)
    results = sigmoid.sigmoid_fwd(q, k, scale, bias, ids, first, ALL)
    inputs = [x.double().requires_grad_() for x in (q, k, scale, bias)]
    terms = exact(*inputs, ids, first)
    grads = torch.autograd.grad(terms.sum(), inputs)
    for got, want in zip(results, (terms.detach(), *grads), strict=True):
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        # A sum over all pairs may cancel: the other sums are of one row or column.
        largest = want.abs().max() if want.dim() else want.abs() + 1
        assert (got.double() - want).abs().max() <= TOLERANCE[q.dtype] * largest


@pytest.mark.parametrize(
    ("multiprocessors", "M", "N", "splits"),
    [(1, 150, 200, 1), (40, 70, 500, 8)],
    indirect=["multiprocessors"],
)
@pytest.mark.parametrize("ids", [False, True])
def test_narrow_rows_whatever_the_cut(multiprocessors, M, N, splits, ids) -> None:
    config = (NARROW, torch.float32, False, "interpreter", multiprocessors)
    assert sigmoid.launch_config("rows", M, N, *config)[1] == splits
    q, k = torch.randn(M, NARROW), torch.randn(N, NARROW)
    check(q, k, first=N - M, ids=torch.randint(20, (N,)) if ids else None)


@pytest.mark.parametrize(
    ("multiprocessors", "M", "N", "panel", "dq_splits", "dk_splits"),
    [(1, 200, 270, 128, 1, 1), (40, 70, 500, 128, 8, 1), (40, 1000, 40, 512, 1, 8)],
    indirect=["multiprocessors"],
)
@pytest.mark.parametrize("ids", [False, True])
def test_wide_rows_whatever_the_cut(
    multiprocessors, M, N, panel, dq_splits, dk_splits, ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sigmoid, "_panel_rows", lambda *_: panel)
    config = (WIDE, torch.float32, False, "interpreter", multiprocessors)
    assert sigmoid.launch_config("rows", M, N, *config) is None
    rows = min(M, panel)
    assert sigmoid.launch_config("product", rows, N, *config)[1] == dq_splits
    assert sigmoid.launch_config("product", N, rows, *config)[1] == dk_splits
    q, k = torch.randn(M, WIDE), torch.randn(N, WIDE)
    if N > M:
        check(q, k, 1.0, first=N - M, ids=torch.arange(N) // 3 if ids else None)
    else:
        check(q, k, 1.0, first=-1)


@pytest.mark.parametrize("D", [NARROW, WIDE])
@pytest.mark.parametrize("first", [-1, 0])
def test_float16_weights_keep_their_digits(D: int, first: int) -> None:
    """Without pairs every weight is about exp(-15), which float16 holds to three digits at best."""
    q, k = torch.randn(2, 70, D).half()
    check(q, k, 0.1, -15.0, first=first, ids=torch.arange(70) // 2 if first == 0 else None)


@pytest.mark.parametrize("D", [NARROW, WIDE])
def test_any_strides(D: int) -> None:
    q = torch.randn(D, 70).T  # features far apart
    k = torch.randn(180, 2 * D)[::2, ::2]
    check(q, k, 1.0, ids=torch.randint(30, (180,), dtype=torch.int32)[::2], first=13)


@pytest.mark.parametrize(("M", "N", "D"), [(1, 1, 1), (1, 2, WIDE), (1, 90, 5), (3, 3, 17)])
@pytest.mark.parametrize("first", [-1, 0])
def test_few_rows(M: int, N: int, D: int, first: int) -> None:
    check(torch.randn(M, D), torch.randn(N, D), 0.1, -1.0, first=first)


@pytest.mark.parametrize("bias", [-40.0, -10.0, 0.0, 10.0, 40.0])
def test_no_digit_is_lost_of_a_small_or_a_large_term(bias: float) -> None:
    """Of each term: without products one row has one term, on a pair and off it."""
    k, scale = torch.zeros(2, 3), torch.tensor(1.0)
    for first, sign in ((0, -1), (-1, 1)):
        terms, *_ = sigmoid.sigmoid_fwd(k[:1], k[:1], scale, torch.tensor(bias), None, first, ALL)
        want = softplus(torch.tensor([sign * bias], dtype=torch.float64))
        torch.testing.assert_close(terms.double(), want, rtol=5e-7 + abs(bias) * 1e-7, atol=0)


@pytest.mark.parametrize("D", [NARROW, WIDE])
@pytest.mark.parametrize("rows", ["scale 100", "long", "zero"])
def test_large_scores_and_none(D: int, rows: str) -> None:
    q, k = torch.randn(2, 40, D)
    if rows == "scale 100":
        check(normalize(q), normalize(k), 100.0)
    elif rows == "long":
        check(100 * q, 100 * k, 1.0)  # scores of 1e4 and more, either sign
    else:
        check(0 * q, k)


@pytest.mark.parametrize("multiprocessors", [1, 40], indirect=True)
@pytest.mark.parametrize("D", [NARROW, WIDE])
def test_same_input_same_bits(multiprocessors, D: int) -> None:
    q, k = torch.randn(2, 100, D)
    scale, bias = torch.tensor(1.0), torch.tensor(-2.0)
    first, second = (sigmoid.sigmoid_fwd(q, k, scale, bias, None, 0, ALL) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("D", [NARROW, WIDE])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_a_gradient_that_is_not_needed_is_empty(needs: tuple[bool, ...], D: int) -> None:
    q, k = torch.randn(9, D), torch.randn(12, D)
    scale, bias = torch.tensor(0.5), torch.tensor(-1.0)
    terms, *every = sigmoid.sigmoid_fwd(q, k, scale, bias, None, 3, ALL)
    same, *some = sigmoid.sigmoid_fwd(q, k, scale, bias, None, 3, needs)
    torch.testing.assert_close(same, terms)
    for full, got, needed in zip(every, some, needs, strict=True):
        assert got.dtype == torch.float32
        if needed:
            torch.testing.assert_close(got, full)
        else:
            assert got.shape == (0,)


@pytest.mark.parametrize("D", [NARROW, WIDE])
def test_nan_reaches_what_depends_on_it(D: int) -> None:
    q, k = torch.randn(2, 70, D)
    q[3, 2] = torch.nan
    one = torch.tensor(1.0)
    terms, dq, dk, dscale, dbias = sigmoid.sigmoid_fwd(q, k, one, one, None, 0, ALL)
    for rows in (terms, dq.amax(1)):
        assert rows.isnan().nonzero().flatten().tolist() == [3]
    assert all(x.isnan().all() for x in (dk, dscale, dbias))
    for result in sigmoid.sigmoid_fwd(k, k, one, one * torch.nan, None, 0, ALL):
        assert result.isnan().all()


def test_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a tensor of 4 GiB, of which two pages are touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 16), (2**31 + 8, 1))
    far.copy_(torch.randn(2, 16))
    check(far, far)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_workspaces_are_bounded(arch: str) -> None:
    sizes, widths = [2, 100, 3000, 65536, 1_000_000], [1, 128, 1000]
    for M, N, D, dtype in itertools.product(sizes, sizes, widths, DTYPES):
        for kernel in ("rows", "scores", "product"):
            config = sigmoid.launch_config(kernel, M, N, D, dtype, True, arch, 100)
            if config is None:
                continue
            options, splits = config
            programs = -(-M // options["BLOCK_M"]) * splits
            if kernel == "product":
                programs *= -(-D // options["BLOCK_D"])
            assert splits == 1 or programs <= 400  # twice what runs at once
        rows = sigmoid._panel_rows(M, N, D, dtype.itemsize)
        assert rows % 128 == 0
        assert rows <= 256 or rows * N * dtype.itemsize <= max(2**24, 4 * N * D)
        assert -(-M // rows) <= max(1, -(-M // 256))
