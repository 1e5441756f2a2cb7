"""The one rule on rounding that tests and benchmarks hold a loss to.

Against the float64 result of the reference, an error may be twice that of the plain PyTorch loss in
the same dtype, plus a few units in the last place of the largest entry (of 1, for a loss below 1).
The plain loss's error is the largest of a few orders of the features, which change its rounding and
nothing else, and at least half a unit of its type, by which any result of that type may be rounded:
one order alone can be exact by luck. In float64 itself the two agree to 12 digits of
the largest entry, or of 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FEW_EPS = 8
FLOAT64_TOLERANCE = 1e-12
TRUTH_ERROR = 1e-13  # float64 is rounded too: the plain loss takes 1 - p for 0 below 1e-16
ORDERS = 4


def value_and_gradients(
    loss: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor | float = 1.0,
    fixed: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return the loss and the gradient of each input but the fixed ones, its last arguments."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*inputs, *fixed)
    value.backward(
        torch.as_tensor(upstream, dtype=value.dtype, device=value.device).expand_as(value)
    )
    gradients: list[Any] = [x.grad for x in inputs]
    return [value.detach(), *gradients]


def check_accuracy(
    fused: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor | float = 1.0,
    fixed: Sequence[Tensor] = (),
) -> None:
    """Raise AssertionError where value or a gradient of ``fused`` breaks the rule.

    Inputs with two dimensions are rows of features; others are left in their order. Fixed ones, the
    last arguments, get no gradient.
    """
    truth = value_and_gradients(plain, _double(inputs), upstream, _double(fixed))
    ours = value_and_gradients(fused, inputs, upstream, fixed)
    peers = [_with_features_reordered(plain, inputs, upstream, fixed) for _ in range(ORDERS)]
    for i, (exact, got, *theirs) in enumerate(zip(truth, ours, *peers, strict=True)):
        name = f"gradient of input {i - 1}" if i else "value"
        assert got.shape == exact.shape, (
            f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
        )
        error, largest = (got - exact).abs().max(), exact.abs().max()
        if inputs[0].dtype == torch.float64:
            allowed = FLOAT64_TOLERANCE * (1 + largest)
        else:
            # Where the plain loss is lost (inf, NaN) only the few units remain.
            plain_error = max((x - exact).abs().max().nan_to_num(0, 0).item() for x in theirs)
            plain_error = max(plain_error, torch.finfo(theirs[0].dtype).eps / 2 * largest)
            units = FEW_EPS * torch.finfo(got.dtype).eps
            allowed = 2 * plain_error + units * largest.clamp_min(0 if i else 1) + TRUTH_ERROR
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_same_function(
    loss: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    fixed: Sequence[Tensor] = (),
    *,
    backward: bool = True,
) -> None:
    """Raise AssertionError where a loss is not the plain one but for rounding, however large."""
    allowed = 30 * torch.finfo(inputs[0].dtype).eps ** 0.75
    if backward:
        truth = value_and_gradients(plain, _double(inputs), fixed=_double(fixed))
        found = value_and_gradients(loss, inputs, fixed=fixed)
    else:
        truth, found = [plain(*_double(inputs), *_double(fixed))], [loss(*inputs, *fixed)]
    for got, exact in zip(found, truth, strict=True):
        error = (got - exact).abs().max() / exact.abs().max()
        assert error <= allowed, f"off by {error:.1e} of the largest entry"


def _double(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def _with_features_reordered(
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor | float,
    fixed: Sequence[Tensor],
) -> list[Tensor]:
    widths = dict.fromkeys(x.shape[1] for x in [*inputs, *fixed] if x.dim() == 2)
    orders = {width: torch.randperm(width, device=inputs[0].device) for width in widths}
    reordered, others = (
        [x[:, orders[x.shape[1]]] if x.dim() == 2 else x for x in y] for y in (inputs, fixed)
    )
    result = value_and_gradients(plain, reordered, upstream, others)
    back = {width: order.argsort() for width, order in orders.items()}
    return [result[0], *(x[:, back[x.shape[1]]] if x.dim() == 2 else x for x in result[1:])]
