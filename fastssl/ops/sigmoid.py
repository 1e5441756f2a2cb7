"""The sigmoid loss as a differentiable operator, for autograd, autocast and torch.compile.

A backend's launchers do the work (``kernels/sigmoid.py``, ``streaming/sigmoid.py``). Gradients are
computed with the loss, if any is needed; the backward pass multiplies them. A second derivative
raises.
"""

from typing import Any

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.ops.registration import differentiate, fake_of, operator, operator_without_derivative
from fastssl.streaming.memory import fresh_like


def sigmoid_sum(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Tensor | None = None,
    *,
    first: int = 0,
    backend: str,
) -> Tensor:
    """sum_ij softplus(-+ y_ij), minus for row i's pair, column first + i, of y = scale q.k + bias.

    Args:
        q: [M, D] rows.
        k: [N, D] rows.
        scale: 0-dim, of the accumulation type (float64 for float64 rows, else float32).
        bias: 0-dim, likewise.
        ids: [N] integers; of columns with equal ids, none but the pair itself counts for a row.
        first: The pair of row 0. Where no row has a pair -1 without ids; N with ids, which then are
            [N + M], the columns' and the rows'.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        0-dim, of scale's type.
    """
    inputs = (q, k, scale, bias)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    total: Tensor = _sigmoid_sum(*inputs, ids, first, needs, backend)[0]
    return total


@operator
def _sigmoid_sum(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    first: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        terms, *grads = launchers(backend, "sigmoid").sigmoid_fwd(
            q, k, scale, bias, ids, first, needs
        )
    # An operator's results may not share memory.
    nothing = (torch.empty_like(grad) if not grad.numel() else grad for grad in grads)
    return (terms.sum(), *nothing)


@operator_without_derivative
def _sigmoid_sum_bwd(
    dtotal: Tensor, inputs: list[Tensor], grads: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return [
        torch.mul(grad, dtotal, out=fresh_like(x))
        for grad, x, need in zip(grads, inputs, needs, strict=True)
        if need
    ]


@fake_of(_sigmoid_sum)
def _sigmoid_sum_fake(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: object,
    first: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    likes = zip((q, k, scale, bias), needs, strict=True)
    grads = (scale.new_empty(x.shape if need else (0,)) for x, need in likes)
    return (scale.new_empty(()), *grads)


@fake_of(_sigmoid_sum_bwd)
def _sigmoid_sum_bwd_fake(
    dtotal: Tensor, inputs: list[Tensor], grads: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    # The inputs are there to be missed: a second derivative by them raises.
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _multiply(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    saved = list(ctx.saved_tensors)  # once: a checkpoint gives them out a single time
    found = iter(_sigmoid_sum_bwd(dtotal, saved[:4], saved[4:], needs, ctx.backend))
    return (*(next(found) if need else None for need in needs), None, None, None, None)


differentiate(_sigmoid_sum, _multiply, _save)
