"""Sinkhorn-Knopp and SwAV keep every promise about numbers, on every backend."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from targets import Target

import fastssl
from fastssl import functional, reference
from fastssl.ops import sinkhorn, soft_cross_entropy

# Aligned; ragged; one sample; one prototype; many prototypes.
SHAPES = [(32, 64), (37, 19), (1, 8), (9, 1), (5, 300)]
GPU_SHAPES = [(256, 3000), (4096, 300), (1, 8), (513, 1), (64, 65536)]


def shapes(target: Target) -> list[tuple[int, int]]:
    return GPU_SHAPES if target.device == "cuda" else SHAPES


def dtypes(target: Target) -> list[torch.dtype]:
    low = [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float64, *low] if target.backend == "torch" else low


def similarities(target: Target, b: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (0.3 * torch.randn(b, k)).clamp(-1, 1).to(target.device, dtype)


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


def extreme(kind: str) -> torch.Tensor:
    scores = torch.randn(12, 20)
    if kind == "large":
        scores *= 1e4 / scores.abs().max()
    elif kind == "equal":
        scores[:] = 0.7
    elif kind == "a sample far above":
        scores[3] += 1e4
    elif kind == "a prototype nobody is near":
        scores[:, 5] -= 1e4
    elif kind == "a prototype everybody is near":
        scores[:, 5] += 1e4
    return scores


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


def swap(target: Target | None, **options: object) -> Callable[..., torch.Tensor]:
    """SwAV of two global crops and any number of local ones; the reference where target is None."""
    function = reference.swav if target is None else functional.swav
    if target is not None:
        options["backend"] = target.backend
    return lambda *crops: function(crops[:2], crops[2:], **options)


def test_swav_is_as_exact_as_promised(target: Target) -> None:
    for b, k in shapes(target):
        for dtype in dtypes(target) if k > 1 else []:  # one prototype leaves nothing to predict
            crops = [similarities(target, b, k, dtype) for _ in range(4)]
            check_accuracy(swap(target), swap(None), crops)


@pytest.mark.parametrize("upstream", [65536.0, -3.0])
def test_upstream_gradient_is_passed_on(target: Target, upstream: float) -> None:
    for dtype in dtypes(target):
        crops = [similarities(target, 16, 12, dtype) for _ in range(3)]
        check_accuracy(swap(target), swap(None), crops, upstream)


def test_a_queue_takes_part_and_is_dropped(target: Target) -> None:
    crops = [similarities(target, 10, 6, torch.float32) for _ in range(3)]
    queue = [similarities(target, 25, 6, torch.float32) for _ in range(2)]
    check_accuracy(swap(target, queue_outputs=queue), swap(None, queue_outputs=queue), crops)
    with_queue = swap(target, queue_outputs=queue)(*crops)
    assert with_queue != swap(target)(*crops)


def test_three_global_crops_predict_each_other(target: Target) -> None:
    crops = [similarities(target, 10, 6, torch.float32) for _ in range(4)]
    check_accuracy(
        lambda *x: functional.swav(x[:3], x[3:], backend=target.backend),
        lambda *x: reference.swav(x[:3], x[3:]),
        crops,
    )


@pytest.mark.parametrize(
    ("scale", "mass"), [(0.3, 1.0), (0.3, 2.0), (0.3, 0.0), (1, 1), (100, 1), (1e4, 1), (1e6, 1)]
)
def test_soft_cross_entropy_is_as_exact_as_promised(
    target: Target, scale: float, mass: float
) -> None:
    """Targets stand below the logits, so that their features are reordered together."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        logits, targets = x.chunk(2)
        return soft_cross_entropy.soft_cross_entropy(
            logits, targets, temperature=0.1, backend=target.backend
        ).sum()

    def plain(x: torch.Tensor) -> torch.Tensor:
        logits, targets = x.chunk(2)
        return reference.soft_cross_entropy(logits, targets.detach(), 0.1).sum()

    for b, k in shapes(target):
        for dtype in dtypes(target) if k > 1 else []:  # one prototype leaves nothing to predict
            scale = min(scale, torch.finfo(dtype).max / 100)  # the plain loss divides by 0.1
            logits = (scale * torch.randn(b, k)).to(target.device, dtype)
            targets = mass * torch.softmax(3 * torch.randn(b, k), 1).to(target.device, dtype)
            check_accuracy(loss, plain, [torch.cat([logits, targets])])


def test_large_logits_are_finite(target: Target) -> None:
    for dtype in dtypes(target):
        crops = [extreme("large").to(target.device, dtype) for _ in range(3)]
        result = value_and_gradients(swap(target, temperature=0.01), crops)
        assert all(x.isfinite().all() for x in result)


def test_types_are_kept(target: Target) -> None:
    for dtype in dtypes(target):
        crops = [similarities(target, 6, 5, dtype) for _ in range(3)]
        assert codes(target)(crops[0]).dtype == dtype
        value, *grads = value_and_gradients(swap(target), crops)
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert {grad.dtype for grad in grads} == {dtype}


def test_autocast_changes_nothing(target: Target) -> None:
    crops = [similarities(target, 16, 9, torch.float32) for _ in range(3)]
    expected = value_and_gradients(swap(target), crops)
    with torch.autocast(target.device, torch.bfloat16):
        got = value_and_gradients(swap(target), crops)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_second_derivatives_raise(target: Target) -> None:
    crops = [similarities(target, 6, 4, torch.float32).requires_grad_() for _ in range(2)]
    (grad,) = torch.autograd.grad(swap(target)(*crops), crops[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


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


def test_three_matrices_are_saved_whatever_the_number_of_crops(target: Target) -> None:
    b, k = 12, 40
    crops = [similarities(target, b, k, torch.float32).requires_grad_() for _ in range(8)]
    saved = {}

    def record(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        loss = swap(target)(*crops)
    for crop in crops:
        saved.pop(crop.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    vectors = 8 * 4 * 4 * b
    assert sum(saved.values()) <= 3 * 4 * b * k + vectors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnGpu:
    def test_never_waits_for_the_device(self) -> None:
        crops = torch.randn(4, 256, 3000, device="cuda", requires_grad=True)
        functional.swav(crops[:2].unbind(), crops[2:].unbind()).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            functional.swav(crops[:2].unbind(), crops[2:].unbind()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_replays_from_a_captured_graph(self) -> None:
        crops = torch.randn(4, 256, 3000, device="cuda", requires_grad=True)

        def loss(x: torch.Tensor) -> torch.Tensor:
            return functional.swav(x[:2].unbind(), x[2:].unbind())

        step = torch.cuda.make_graphed_callables(loss, (crops,))
        fresh = torch.randn_like(crops).requires_grad_()
        value = step(fresh)
        value.backward()
        expected, grad = value_and_gradients(loss, [fresh])
        torch.testing.assert_close(value.detach(), expected)
        torch.testing.assert_close(fresh.grad, grad)

    def test_codes_take_one_matrix_beside_the_scores(self) -> None:
        scores = torch.randn(4096, 3000, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        functional.sinkhorn_knopp(scores)
        assert torch.cuda.max_memory_allocated() - before < 1.2 * scores.nbytes


CROPS = [torch.zeros(4, 3), torch.zeros(4, 3)]
BAD_INPUT = {
    "scores of one dimension": (
        lambda: functional.sinkhorn_knopp(torch.zeros(4)),
        ValueError,
        r"scores must have shape \(B, K\) with B and K at least 1, got \(4,\)",
    ),
    "no samples": (
        lambda: functional.sinkhorn_knopp(torch.zeros(0, 4)),
        ValueError,
        r"scores must have shape .* got \(0, 4\)",
    ),
    "integers": (
        lambda: functional.sinkhorn_knopp(torch.zeros(2, 2, dtype=torch.int64)),
        TypeError,
        "scores must be float64.*got int64",
    ),
    "epsilon of 0": (
        lambda: functional.sinkhorn_knopp(CROPS[0], 0.0),
        ValueError,
        "epsilon must be positive and finite, got 0.0",
    ),
    "epsilon of too large an inverse": (
        lambda: functional.sinkhorn_knopp(CROPS[0], 1e-40),
        ValueError,
        "epsilon must be positive and finite in float32, and so its inverse, got 1e-40",
    ),
    "epsilon past float32": (
        lambda: functional.swav(CROPS, epsilon=1e300),
        ValueError,
        r"epsilon must be positive and finite in float32.* got 1e\+300",
    ),
    "no crops at all": (
        lambda: functional.swav(None),
        TypeError,
        "high_resolution_outputs must be a sequence of tensors, got NoneType",
    ),
    "no sequence of local crops": (
        lambda: functional.swav(CROPS, None),
        TypeError,
        "low_resolution_outputs must be a sequence of tensors, got NoneType",
    ),
    "iterations below 0": (
        lambda: functional.sinkhorn_knopp(CROPS[0], iterations=-1),
        ValueError,
        "iterations must be at least 0, got -1",
    ),
    "iterations not whole": (
        lambda: functional.sinkhorn_knopp(CROPS[0], iterations=1.5),
        TypeError,
        "iterations must be a whole number, got float",
    ),
    "hard and differentiable": (
        lambda: functional.sinkhorn_knopp(CROPS[0], hard=True, differentiable=True),
        ValueError,
        "hard codes have no gradient",
    ),
    "differentiable kernels": (
        lambda: functional.sinkhorn_knopp(CROPS[0], differentiable=True, backend="triton"),
        RuntimeError,
        "backend='triton' cannot run here: its kernels have no gradient",
    ),
    "unknown backend": (
        lambda: functional.sinkhorn_knopp(CROPS[0], backend="cuda"),
        ValueError,
        "backend must be one of",
    ),
    "one global crop": (
        lambda: functional.swav(CROPS[:1]),
        ValueError,
        "high_resolution_outputs must hold at least 2 tensors, one a crop, got 1",
    ),
    "crops of two shapes": (
        lambda: functional.swav(CROPS, [torch.zeros(4, 5)]),
        ValueError,
        r"low_resolution_outputs\[0\] must have the shape of .*\(4, 3\), got \(4, 5\)",
    ),
    "crops of two dtypes": (
        lambda: functional.swav([CROPS[0], CROPS[1].double()]),
        ValueError,
        r"high_resolution_outputs\[1\] must have the dtype of .*float32, got torch.float64",
    ),
    "a queue for one crop": (
        lambda: functional.swav(CROPS, (), [torch.zeros(5, 3)]),
        ValueError,
        "queue_outputs must hold 2 tensors.*got 1",
    ),
    "a queue of another width": (
        lambda: functional.swav(CROPS, (), [torch.zeros(5, 3), torch.zeros(5, 2)]),
        ValueError,
        r"queue_outputs\[1\] must have 3 columns.*got shape \(5, 2\)",
    ),
    "a queue of another dtype": (
        lambda: functional.swav(CROPS, (), [torch.zeros(5, 3).double()] * 2),
        ValueError,
        r"queue_outputs\[0\] must have dtype and device of the crops, torch.float32",
    ),
    "temperature of 0": (
        lambda: functional.swav(CROPS, temperature=0.0),
        ValueError,
        "temperature must be positive and finite, got 0.0",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


class TestModule:
    def test_agrees_with_the_function(self, target: Target) -> None:
        crops = [similarities(target, 12, 8, torch.float32) for _ in range(4)]
        module = fastssl.SwaVLoss(0.2, 2, 0.1, backend=target.backend)
        expected = functional.swav(
            crops[:2], crops[2:], temperature=0.2, iterations=2, epsilon=0.1, backend=target.backend
        )
        assert torch.equal(module(crops[:2], crops[2:])[0], expected)

    def test_shows_its_options(self) -> None:
        assert "sinkhorn_iterations=5" in repr(fastssl.SwaVLoss(sinkhorn_iterations=5))

    def test_refuses_bad_options(self) -> None:
        for options, message in (
            ({"temperature": -1.0}, "temperature must be positive"),
            ({"sinkhorn_iterations": -1}, "sinkhorn_iterations must be at least 0"),
            ({"sinkhorn_epsilon": 0.0}, "sinkhorn_epsilon must be positive"),
            ({"backend": "gpu"}, "backend must be one of"),
        ):
            with pytest.raises(ValueError, match=message):
                fastssl.SwaVLoss(**options)

    @pytest.mark.parametrize("with_queue", [False, True])
    def test_replaces_lightlys(self, with_queue: bool) -> None:
        lightly = pytest.importorskip("lightly.loss")
        crops = torch.randn(5, 14, 9, dtype=torch.float64).div_(4).unbind()
        queue = list(torch.randn(2, 6, 9, dtype=torch.float64).div_(4)) if with_queue else None
        for options in ({}, {"temperature": 0.3, "sinkhorn_iterations": 0}):
            results = []
            for criterion in (fastssl.SwaVLoss(**options), lightly.SwaVLoss(**options)):
                results.append(
                    value_and_gradients(
                        lambda *x, criterion=criterion: criterion(x[:2], x[2:], queue), crops
                    )
                )
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
