"""Similarity log-sum-exp as differentiable operators, for autograd, autocast and torch.compile.

A backend's launchers do the work (``kernels/similarity.py``, ``streaming/similarity.py``). Registered as custom
operators, they stay whole in a compiled graph. Autocast changes nothing: rows are multiplied in their own type and
all that follows is float32. A second derivative raises, because the backward operators have none.
"""

from typing import Any

import torch
from torch import Tensor

from fastssl.ops.backend import launchers


def similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    """L_i = log sum_j exp(scale cos(q_i, k_j)) over the j whose id differs from row i's.

    Args:
        q: [M, D] rows.
        k: [N, D] rows.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        row_ids: [M] integers, or None where every row sees every column.
        col_ids: [N] integers, likewise.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        [M], of scale's type; -inf for a row that sees no column.
    """
    lse, _, _ = _similarity_lse(q, k, scale, row_ids, col_ids, backend)
    return lse


def two_view_lse(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None = None, *, backend: str
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the negatives of both views' rows, and the scores of the positives.

    With z the 2N rows of z0 and z1 one above the other, L_i = log sum_j exp(scale cos(z_i, z_j)) over the j that stem
    from another sample: j mod N != i mod N, or with ids, ids[j mod N] != ids[i mod N]. The positives' scores are
    scale cos(z0_n, z1_n).

    Args:
        z0: [N, D] rows of one view.
        z1: [N, D] rows of the other.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        ids: [N] integers, equal for samples that are not each other's negatives.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        lse [2N] and positive [N], of scale's type; lse is -inf for a row without negatives.
    """
    lse, positive, _ = _two_view_lse(z0, z1, scale, ids, backend)
    return lse, positive


@torch.library.custom_op("fastssl::similarity_lse", mutates_args=())
def _similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return launchers(backend, "similarity").similarity_lse_fwd(q, k, scale, row_ids, col_ids)


@torch.library.custom_op("fastssl::similarity_lse_bwd", mutates_args=())
def _similarity_lse_bwd(
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    lse: Tensor,
    q_rnorm: Tensor,
    k_rnorm: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        grads = launchers(backend, "similarity").similarity_lse_bwd(
            dlse, q, k, scale, row_ids, col_ids, lse, q_rnorm, k_rnorm, needs
        )
    return [grad for grad in grads if grad is not None]


@torch.library.custom_op("fastssl::two_view_lse", mutates_args=())
def _two_view_lse(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(z0.device.type, enabled=False):
        return launchers(backend, "similarity").two_view_lse_fwd(z0, z1, scale, ids)


@torch.library.custom_op("fastssl::two_view_lse_bwd", mutates_args=())
def _two_view_lse_bwd(
    dlse: Tensor,
    dpositive: Tensor,
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    lse: Tensor,
    rnorm: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(z0.device.type, enabled=False):
        grads = launchers(backend, "similarity").two_view_lse_bwd(
            dlse, dpositive, z0, z1, scale, ids, lse, rnorm, needs
        )
    return [grad for grad in grads if grad is not None]


@_similarity_lse.register_fake
def _similarity_lse_fake(
    q: Tensor, k: Tensor, scale: Tensor, row_ids: object, col_ids: object, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return scale.new_empty(len(q)), scale.new_empty(len(q)), scale.new_empty(len(k))


@_two_view_lse.register_fake
def _two_view_lse_fake(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: object, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = 2 * len(z0)
    return scale.new_empty(rows), scale.new_empty(len(z0)), scale.new_empty(rows)


@_similarity_lse_bwd.register_fake
def _similarity_lse_bwd_fake(dlse: Tensor, q: Tensor, k: Tensor, scale: Tensor, *rest: Any) -> Any:
    *_, needs, _ = rest
    return _empty_where_needed((q, k, scale), needs)


@_two_view_lse_bwd.register_fake
def _two_view_lse_bwd_fake(
    dlse: Tensor, dpositive: Tensor, z0: Tensor, z1: Tensor, scale: Tensor, *rest: Any
) -> Any:
    *_, needs, _ = rest
    return _empty_where_needed((z0, z1, scale), needs)


def _save_similarity_lse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output)


def _similarity_lse_gradient(ctx: Any, dlse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = _similarity_lse_bwd(dlse, *ctx.saved_tensors, needs, ctx.backend)
    return (*_spread(grads, needs), None, None, None)


def _save_two_view_lse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    lse, _, rnorm = output
    ctx.mark_non_differentiable(rnorm)
    ctx.save_for_backward(*tensors, lse, rnorm)


def _two_view_lse_gradient(
    ctx: Any, dlse: Tensor, dpositive: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = _two_view_lse_bwd(dlse, dpositive, *ctx.saved_tensors, needs, ctx.backend)
    return (*_spread(grads, needs), None, None)


_similarity_lse.register_autograd(_similarity_lse_gradient, setup_context=_save_similarity_lse)
_two_view_lse.register_autograd(_two_view_lse_gradient, setup_context=_save_two_view_lse)


def _empty_where_needed(inputs: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip(inputs, needs, strict=True) if need]


def _spread(grads: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Put None where no gradient was needed."""
    given = iter(grads)
    return [next(given) if need else None for need in needs]
