"""Similarity log-sum-exp over keys without a gradient, as a differentiable operator.

A backend's launcher does the work (``kernels/fixed_keys.py``, ``streaming/fixed_keys.py``).
Gradients are computed with the sums, if any is needed; the backward pass multiplies them. A second
derivative raises.
"""

from typing import Any

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.ops.registration import differentiate, fake_of, operator, operator_without_derivative
from fastssl.streaming.tiles import pair_gradient


def fixed_keys_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    *,
    pair: Tensor | None = None,
    backend: str,
) -> Tensor:
    """``similarity_lse`` of cosines with keys that need no gradient, and are not kept.

    Args:
        q: [M, D] rows.
        k: [N, D] rows.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        row_ids: [M] integers, or None where every row sees every column.
        col_ids: [N] integers, likewise.
        pair: [M, D], a row for each of q, whose score is taken off; None for none.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        [M], of scale's type; -inf for a row that sees no column.
    """
    gradients = torch.is_grad_enabled() and (q.requires_grad or scale.requires_grad)
    lse: Tensor = _fixed_keys_lse(q, k, scale, pair, row_ids, col_ids, gradients, backend)[0]
    return lse


@operator
def _fixed_keys_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pair: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return launchers(backend, "fixed_keys").fixed_keys_lse_fwd(
            q, k, scale, pair, row_ids, col_ids, gradients
        )


@operator_without_derivative
def _fixed_keys_lse_bwd(
    dlse: Tensor,
    q: Tensor,
    scale: Tensor,
    pair: Tensor | None,
    lse: Tensor,
    dq: Tensor,
    dscale: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    need_q, need_scale, need_pair = needs
    with torch.autocast(q.device.type, enabled=False):
        grads = [(dq * dlse[:, None]).to(dq.dtype)] if need_q else []
        if need_scale:
            grads.append(dscale @ dlse)
        if pair is not None and need_pair:
            seen = dlse.masked_fill(lse == -torch.inf, 0)
            grads.append(pair_gradient(seen, q, pair, scale, True))
    return grads


@fake_of(_fixed_keys_lse)
def _fixed_keys_lse_fake(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pair: object,
    row_ids: object,
    col_ids: object,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = scale.new_empty(q.shape[0])
    if gradients:
        return lse, q.new_empty(q.shape), torch.empty_like(lse)
    return lse, scale.new_empty(0, 0), scale.new_empty(0)


@fake_of(_fixed_keys_lse_bwd)
def _fixed_keys_lse_bwd_fake(
    dlse: Tensor,
    q: Tensor,
    scale: Tensor,
    pair: Tensor | None,
    lse: Tensor,
    dq: Tensor,
    dscale: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    like = zip((q, scale, pair), needs, strict=True)
    return [x.new_empty(x.shape) for x, need in like if need and x is not None]


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, _, scale, pair, *_, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    # The scale is there to be missed, as q is without pairs: a second derivative raises.
    ctx.save_for_backward(q, scale, pair, *output)


def _multiply_gradients(ctx: Any, dlse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_q, _, need_scale, need_pair, *others = ctx.needs_input_grad
    needs = [need_q, need_scale, need_pair]
    found = iter(_fixed_keys_lse_bwd(dlse, *ctx.saved_tensors, needs, ctx.backend))
    dq, dscale, dpair = (next(found) if need else None for need in needs)
    return dq, None, dscale, dpair, *(None for _ in others)


differentiate(_fixed_keys_lse, _multiply_gradients, _keep_gradients)
