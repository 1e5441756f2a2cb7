"""Soft cross-entropy as a differentiable operator, for autograd, autocast and torch.compile.

A backend's launchers do the work (``kernels/soft_cross_entropy.py``,
``streaming/soft_cross_entropy.py``). Targets get no gradient, and a second derivative raises.
"""

from typing import Any

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.ops.registration import differentiate, fake_of, operator, operator_without_derivative


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, *, temperature: float, backend: str
) -> Tensor:
    """-sum_k t_bk log softmax(logits_b / temperature)_k for each row b.

    Args:
        logits: [B, K].
        targets: [B, K], weights of any sum; no gradient.
        temperature: positive.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        [B], float64 for float64 logits, else float32.
    """
    loss: Tensor = _soft_cross_entropy(logits, targets.detach(), temperature, backend)[0]
    return loss


@operator
def _soft_cross_entropy(
    logits: Tensor, targets: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):
        launch = launchers(backend, "soft_cross_entropy").soft_cross_entropy_fwd
        return launch(logits, targets, temperature)


@operator_without_derivative
def _soft_cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    top: Tensor,
    total: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        launch = launchers(backend, "soft_cross_entropy").soft_cross_entropy_bwd
        return launch(dloss, logits, targets, top, total, temperature)


@fake_of(_soft_cross_entropy)
def _soft_cross_entropy_fake(
    logits: Tensor, targets: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss, top, total = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))
    return loss, top, total


@fake_of(_soft_cross_entropy_bwd)
def _soft_cross_entropy_bwd_fake(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.temperature, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, targets, *output[1:])


def _gradient(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dlogits = _soft_cross_entropy_bwd(dloss, *ctx.saved_tensors, ctx.temperature, ctx.backend)
    return dlogits, None, None, None


differentiate(_soft_cross_entropy, _gradient, _save)
