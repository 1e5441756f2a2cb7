"""SwAV keeps every promise about numbers, on every backend."""

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from prototypes import dtypes, shapes, similarities, swap
from targets import Target

import fastssl
from fastssl import functional, reference


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
    "crops on two devices": (
        lambda: functional.swav([CROPS[0], CROPS[1].to("meta")]),
        ValueError,
        r"high_resolution_outputs\[1\] must have the device of .*cpu, got meta",
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
    "a queue elsewhere": (
        lambda: functional.swav(CROPS, (), [torch.zeros(5, 3, device="meta")] * 2),
        ValueError,
        r"queue_outputs\[0\] must be on the device of the crops, cpu, got meta",
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
