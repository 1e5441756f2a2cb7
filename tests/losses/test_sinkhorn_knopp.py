"""Sinkhorn-Knopp keeps every promise about numbers, on every backend."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from prototypes import dtypes, extreme, shapes, similarities, swap
from targets import Target

from fastssl import functional, reference
from fastssl.ops import sinkhorn, soft_cross_entropy


def codes(target: Target, **options: object) -> Callable[..., torch.Tensor]:
    return partial(functional.sinkhorn_knopp, backend=target.backend, **options)


def published(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """The steps as SwAV's authors write them, on exponentials."""
    q = torch.exp(scores / epsilon).T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_the_reference_is_the_published_algorithm(iterations: int) -> None:
    scores = 0.5 * torch.randn(20, 12, dtype=torch.float64)
    for epsilon in (0.05, 1.0):
        torch.testing.assert_close(
            reference.sinkhorn_knopp(scores, epsilon, iterations),
            published(scores, epsilon, iterations),
        )


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_codes_are_as_exact_as_promised(target: Target, iterations: int, spread: float) -> None:
    """With scores that fit the exponentials of a type, and with such that do not.

    The codes are judged as the gradient of weights that they are multiplied with.
    """

    def weighted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda scores, weights: (
            (function(scores.detach(), iterations=iterations) * weights).sum() + 0 * scores.sum()
        )

    for b, k in shapes(target):
        for dtype in dtypes(target):
            scores = spread * similarities(target, b, k, dtype)
            weights = torch.randn(b, k, device=target.device).to(dtype)
            ours, plain = weighted(codes(target)), weighted(reference.sinkhorn_knopp)
            check_accuracy(ours, plain, [scores, weights])


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_the_gradient_of_the_iterations_is_as_exact_as_promised(iterations: int) -> None:
    target = Target("torch", "cpu")

    def weighted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda scores, weights: (function(scores, iterations=iterations) * weights).sum()

    for dtype in dtypes(target):
        scores, weights = (similarities(target, 24, 31, dtype) for _ in range(2))
        ours = weighted(codes(target, differentiable=True))
        check_accuracy(ours, weighted(reference.sinkhorn_knopp), [scores, weights])


def test_two_samples_by_hand() -> None:
    # exp(x) = [[2, 1], [1, 1]]: columns over their sums 3, 2 give [[2/3, 1/2], [1/3, 1/2]], rows
    # over theirs 7/6, 5/6 the codes.
    scores = torch.tensor([[math.log(2), 0.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[4 / 7, 3 / 7], [2 / 5, 3 / 5]], dtype=torch.float64)
    for module in (functional, reference):
        torch.testing.assert_close(module.sinkhorn_knopp(scores, 1.0, 1), expected)


def test_rows_sum_to_one_and_prototypes_are_used_alike(target: Target) -> None:
    scores = similarities(target, 30, 6, torch.float32)
    found = codes(target, epsilon=0.5, iterations=20)(scores)
    torch.testing.assert_close(found.sum(1), torch.ones(30, device=target.device))
    torch.testing.assert_close(found.sum(0), torch.full((6,), 5.0, device=target.device))


@pytest.mark.parametrize(
    "kind",
    [
        "large",
        "equal",
        "a sample far above",
        "a prototype nobody is near",
        "a prototype everybody is near",
    ],
)
def test_any_finite_scores_give_the_codes_of_the_reference(target: Target, kind: str) -> None:
    for dtype in dtypes(target):
        scores = extreme(kind).to(target.device, dtype)
        found = codes(target)(scores)
        exact = reference.sinkhorn_knopp(scores.double())
        # Scores of 1e4 over epsilon leave float32 three digits of an exponent.
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.02)
        assert found.isfinite().all()


def test_a_constant_shift_changes_nothing(target: Target) -> None:
    scores = similarities(target, 24, 10, torch.float32)
    for shift in (64.0, -1024.0):
        got = codes(target)(scores.double().add(shift).float())
        torch.testing.assert_close(got, codes(target)(scores), rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("spread", [0.25, 2.0])
def test_a_shift_that_rounds_nothing_costs_no_digits(
    target: Target, iterations: int, spread: float
) -> None:
    scores = (spread * torch.randn(24, 10)).mul(1024).round().div(1024).to(target.device)
    exact = reference.sinkhorn_knopp(scores.double(), 0.03, iterations)
    for function in (
        codes(target),
        codes(target._replace(backend="torch"), differentiable=True),
        reference.sinkhorn_knopp,
    ):
        found = function(scores + 1024, epsilon=0.03, iterations=iterations)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5 * exact.max().item())


def test_shifting_a_sample_changes_what_it_changes_in_the_reference(target: Target) -> None:
    scores = similarities(target, 24, 10, torch.float32)
    scores[4] += 0.5
    torch.testing.assert_close(
        codes(target)(scores), reference.sinkhorn_knopp(scores), rtol=1e-4, atol=1e-6
    )


def test_hard_codes_are_the_largest(target: Target) -> None:
    scores = similarities(target, 40, 7, torch.float32)
    hard = codes(target, hard=True)(scores)
    assert torch.equal(hard.argmax(1), codes(target)(scores).argmax(1))
    assert (hard.sum(1) == 1).all()
    assert (hard.max(1).values == 1).all()
    assert torch.equal(hard, reference.sinkhorn_knopp(scores, hard=True))


def test_codes_are_constants_unless_asked(target: Target) -> None:
    scores = similarities(target, 8, 5, torch.float32).requires_grad_()
    assert not codes(target)(scores).requires_grad
    found = functional.sinkhorn_knopp(scores, differentiable=True)
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), codes(target)(scores))


@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
def test_float64_gradients_pass_gradcheck(iterations: int) -> None:
    scores = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for function in (
        partial(functional.sinkhorn_knopp, differentiable=True),
        reference.sinkhorn_knopp,
    ):
        call = partial(function, epsilon=0.4, iterations=iterations)
        assert torch.autograd.gradcheck(call, scores)


def test_nan_comes_out_as_nan(target: Target) -> None:
    scores = similarities(target, 12, 6, torch.float32)
    scores[3, 2] = math.nan
    assert codes(target)(scores).isnan().any()
    loss = functional.swav([scores, scores], backend=target.backend)
    assert loss.isnan()


def test_views_of_other_memory_give_the_same(target: Target) -> None:
    scores = similarities(target, 14, 9, torch.float32)
    strided = torch.stack([scores, scores], -1)[..., 0]
    torch.testing.assert_close(codes(target)(strided), codes(target)(scores))
    torch.testing.assert_close(codes(target)(scores.T.contiguous().T), codes(target)(scores))


def test_same_input_gives_same_bits(target: Target) -> None:
    for dtype in dtypes(target):
        scores = similarities(target, 50, 33, dtype)
        assert torch.equal(codes(target)(scores), codes(target)(scores))


def test_deterministic_mode_finds_no_unwritten_memory(target: Target) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        for b, k in shapes(target):
            crops = [similarities(target, b, k, torch.float32) for _ in range(3)]
            assert codes(target)(crops[0]).isfinite().all()
            result = value_and_gradients(swap(target), crops)
            assert all(x.isfinite().all() for x in result)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_changes_nothing(target: Target) -> None:
    crops = [similarities(target, 16, 9, torch.float32) for _ in range(3)]
    expected = value_and_gradients(swap(target), crops)
    with torch.autocast(target.device, torch.bfloat16):
        got = value_and_gradients(swap(target), crops)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_compiles_as_one_graph(target: Target) -> None:
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations
    crops = [similarities(target, 8, 6, torch.float32) for _ in range(3)]
    compiled = torch.compile(swap(target), fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(swap(target), crops)
    for a, b in zip(value_and_gradients(compiled, crops), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_are_registered_as_torch_wants(target: Target) -> None:
    scores = similarities(target, 6, 4, torch.float32)
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    for iterations in (0, 2):
        arguments = (scores, 0.1, iterations, target.backend)
        torch.library.opcheck(sinkhorn._sinkhorn, arguments, test_utils=checks)
    arguments = (scores.requires_grad_(), scores.detach().softmax(1), 0.1, target.backend)
    torch.library.opcheck(soft_cross_entropy._soft_cross_entropy, arguments, test_utils=checks)
