"""The negative cosine keeps every promise about numbers, and the stop-gradient stops."""

from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import NEEDS_GPU

import fastssl
from fastssl import functional, reference

SHAPES = [(64, 32), (37, 19), (1, 5), (7, 1), (300, 257)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
loss, plain = functional.negative_cosine_similarity, reference.negative_cosine_similarity


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def views(n: int, d: int, device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x0 = torch.randn(n, d)
    return [x.to(device, dtype) for x in (x0, x0 + torch.randn(n, d))]


def test_pairs_at_known_angles() -> None:
    x0 = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [5.0, 0.0]])
    x1 = torch.tensor([[7.0, 0.0], [0.0, -1.0], [1.0, 0.0], [3.0, 4.0]])
    truth = -(1 - 1 + 2**-0.5 + 0.6) / 4
    for function in (loss, plain):
        assert function(x0, x1).item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients_are_as_exact_as_promised(device: str, dtype: torch.dtype) -> None:
    for n, d in SHAPES:
        for upstream in (1.0, -3.0):
            check_accuracy(loss, plain, views(n, d, device, dtype), upstream)


@pytest.mark.parametrize("function", [loss, plain])
def test_gradcheck_in_float64(function) -> None:
    x0, x1 = (x.requires_grad_() for x in views(5, 4, "cpu", torch.float64))
    assert torch.autograd.gradcheck(function, (x0, x1))
    assert torch.autograd.gradgradcheck(function, (x0, x1))
    short = (x0.detach() * 1e-3).requires_grad_()  # shorter than eps: the other formula
    assert torch.autograd.gradcheck(partial(function, eps=0.5), (short, x1), eps=1e-8, atol=1e-6)


def test_it_is_pytorchs_cosine_similarity_for_any_dimension(device: str) -> None:
    x = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64, device=device)
    for dim in (0, 1, 2, 3, -1, -3):
        truth = value_and_gradients(
            lambda a, b, dim=dim: -torch.cosine_similarity(a, b, dim).mean(), x
        )
        # Some rows are shorter than 2, where PyTorch's gradient is not that of its value.
        short = -torch.cosine_similarity(*x, dim, 2.0).mean()
        for function in (loss, plain):
            found = value_and_gradients(partial(function, dim=dim), x)
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(function(*x, dim, 2.0), short)


@pytest.mark.parametrize("function", [loss, plain])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_counts_as_cosine_zero_and_gets_no_gradient(
    function, dtype: torch.dtype, device: str
) -> None:
    x0, x1 = views(4, 8, device, dtype)
    x0[1], x1[2] = 0, 0
    value, d0, d1 = value_and_gradients(function, (x0, x1))
    rest, r0, r1 = value_and_gradients(function, (x0[[0, 3]], x1[[0, 3]]))
    torch.testing.assert_close(2 * value, rest, rtol=1e-2, atol=0)
    for found, expected in ((d0, r0), (d1, r1)):
        assert not found[1:3].any()
        torch.testing.assert_close(2 * found[[0, 3]], expected, rtol=2e-2, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    d=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    scales=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
    alike=st.booleans(),
)
def test_any_finite_input_gives_finite_results(n, d, dtype, scales, alike) -> None:
    z = torch.randn(2, n, d, dtype=torch.float64)
    z = z[:1].expand(2, n, d) if alike else z
    low, high = torch.finfo(dtype).smallest_normal ** 0.4, torch.finfo(dtype).max / 8
    x = [
        (view * min(max(10.0**scale, low), high / view.abs().max().item())).to(dtype)
        for view, scale in zip(z, scales, strict=True)
    ]
    for result in value_and_gradients(loss, x):
        assert result.isfinite().all()


def test_length_does_not_matter_however_long(device: str) -> None:
    x0, x1 = views(16, 8, device)
    expected = loss(x0, x1)
    for scale in (1e4, 1e12, 1e20, 1e37, 1e-4):
        torch.testing.assert_close(loss(scale * x0, scale * x1), expected, rtol=1e-5, atol=1e-6)
    value, d0, _ = value_and_gradients(loss, (1e4 * x0, 1e4 * x1))
    assert (d0 * 1e4 * x0).sum(1).abs().max() < 1e-6  # across the row, never along it
    assert value.isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-8, 1e-30])
def test_short_rows_are_divided_by_eps(device: str, dtype: torch.dtype, eps: float) -> None:
    for scale in (1e-6, 1e-15, 1e-20, 1e-25, 1e-33):
        x0, x1 = views(6, 8, device, dtype)
        for x in ((scale * x0, x1), (x0, scale * x1)):
            found = value_and_gradients(partial(loss, eps=eps), x)
            exact = [view.double() for view in x]
            expected = value_and_gradients(partial(plain, eps=eps), exact)
            value = -torch.cosine_similarity(*exact, eps=eps).mean()
            torch.testing.assert_close(expected[0], value, rtol=1e-12, atol=0)
            for a, b in zip(found, expected, strict=True):
                assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_half_precision_is_computed_in_float32_and_a_loss_scale_is_safe(device: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = views(64, 128, device, dtype)
        value, *gradients = value_and_gradients(loss, x, 65536.0)
        assert value.dtype == torch.float32
        for gradient in gradients:
            assert gradient.dtype == dtype
            assert gradient.isfinite().all()
        with torch.autocast(device, dtype):
            assert torch.equal(loss(*x), value)


def test_nan_comes_out_as_nan(device: str) -> None:
    x0, x1 = views(4, 3, device)
    x0[2, 1] = float("nan")
    assert loss(x0, x1).isnan()


def test_strides_do_not_matter(device: str) -> None:
    x0, x1 = views(12, 10, device)
    wide = torch.randn(12, 20, device=device)
    wide[:, ::2] = x0
    assert torch.equal(loss(wide[:, ::2], x1.T.contiguous().T), loss(x0, x1))


def test_torch_compile_takes_it_whole(device: str) -> None:
    x = views(33, 20, device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        value_and_gradients(compiled, x), value_and_gradients(loss, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_module_takes_lightlys_arguments() -> None:
    lightly = pytest.importorskip("lightly.loss")
    x0, x1 = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    for arguments in ((), (2,), (-1, 0.5)):
        ours = fastssl.NegativeCosineSimilarity(*arguments)
        theirs = lightly.NegativeCosineSimilarity(*arguments)
        assert (ours.dim, ours.eps) == (theirs.dim, theirs.eps)
        torch.testing.assert_close(
            value_and_gradients(ours, (x0, x1)), value_and_gradients(theirs, (x0, x1))
        )
    assert repr(fastssl.NegativeCosineSimilarity(2)) == "NegativeCosineSimilarity(dim=2, eps=1e-08)"


def test_the_symmetric_loss_is_the_mean_of_both_directions_and_stops_the_gradient() -> None:
    z0, p0, z1, p1 = torch.randn(4, 8, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x.detach().requires_grad_() for x in (z0, p0, z1, p1)]
    z0, p0, z1, p1 = leaves
    value = fastssl.SymNegCosineSimilarityLoss()((z0, p0), (z1, p1))
    similarity = torch.cosine_similarity
    truth = -(similarity(p0, z1, -1).mean() + similarity(p1, z0, -1).mean()) / 2
    torch.testing.assert_close(value, truth)
    value.backward()
    assert z0.grad is z1.grad is None
    expected = torch.autograd.grad(truth, (p0, p1))
    torch.testing.assert_close((p0.grad, p1.grad), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: loss(x, x[:4]), ValueError, r"x0 and x1 .* equal shapes, got \(8, 4\) and \(4"),
        (lambda x: loss(x.long(), x), TypeError, "x0 must be float64, float32.* got int64"),
        (lambda x: loss(x, [1.0]), TypeError, "x1 must be a tensor, got list"),
        (lambda x: loss(x[0], x[0]), ValueError, r"x0 must have shape .* got \(4,\)"),
        (lambda x: loss(x[:0], x[:0]), ValueError, r"no dimension 0, got \(0, 4\)"),
        (lambda x: loss(x, x, 2), ValueError, r"dim must be -2 to 1 for shape \(8, 4\), got 2"),
        (lambda x: loss(x, x, 1.0), TypeError, "dim must be a whole number, got float"),
        (
            lambda x: fastssl.NegativeCosineSimilarity("x"),
            TypeError,
            "dim must be a whole number, got str",
        ),
        (lambda x: loss(x.to_sparse(), x), TypeError, "x0 must be dense, got layout sparse_coo"),
        (lambda x: loss(x, x, 1, 0.0), ValueError, "eps must be positive and finite, got 0.0"),
        (
            lambda x: fastssl.NegativeCosineSimilarity(eps=-1.0),
            ValueError,
            "eps must be positive and finite, got -1.0",
        ),
    ],
)
def test_bad_input_is_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(8, 4))
