"""The soft cross-entropy keeps every promise about numbers, on every backend."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from prototypes import dtypes, extreme, shapes, similarities, swap
from targets import Target

from fastssl import functional, reference
from fastssl.ops import soft_cross_entropy


def codes(target: Target, **options: object) -> Callable[..., torch.Tensor]:
    return partial(functional.sinkhorn_knopp, backend=target.backend, **options)


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


def test_second_derivatives_raise(target: Target) -> None:
    crops = [similarities(target, 6, 4, torch.float32).requires_grad_() for _ in range(2)]
    (grad,) = torch.autograd.grad(swap(target)(*crops), crops[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        grad.square().sum().backward()
