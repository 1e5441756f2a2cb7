"""Similarity log-sum-exp as differentiable operators, for autograd, autocast and torch.compile.

A backend's launchers do the work (``kernels/similarity.py``, ``streaming/similarity.py``).
Registered as custom operators, they stay whole in a compiled graph. Autocast changes nothing: rows
are multiplied in their own type and all that follows is float32. A second derivative raises,
because the backward operators have none.
"""

from typing import Any

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.streaming.similarity import TILE


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
    lse: Tensor = _similarity_lse(q, k, scale, row_ids, col_ids, backend)[0]
    return lse


def two_view_lse(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None = None, *, backend: str
) -> Tensor:
    """Log-sum-exp of each row's negatives, less its positive's score, for the rows of two views.

    With z the 2N rows of z0 and z1 one above the other and x_ij = scale cos(z_i, z_j),
    R_i = log sum_j exp(x_ij - x_ip) where p is the same sample's row in the other view and j runs
    over the rows of other samples: j mod N != i mod N, or with ids, ids[j mod N] != ids[i mod N].
    The difference is what contrastive losses need, and taken here it keeps its digits where both
    terms are large.

    Args:
        z0: [N, D] rows of one view.
        z1: [N, D] rows of the other.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        ids: [N] integers, equal for samples that are not each other's negatives.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        [2N], of scale's type; -inf for a row without negatives.
    """
    lse: Tensor = _two_view_lse(z0, z1, scale, ids, backend)[0]
    return lse


@torch.library.custom_op("fastssl::similarity_lse", mutates_args=())
def _similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    top: Tensor,
    total: Tensor,
    q_rnorm: Tensor,
    k_rnorm: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        grads = launchers(backend, "similarity").similarity_lse_bwd(
            dlse, q, k, scale, row_ids, col_ids, top, total, q_rnorm, k_rnorm, needs
        )
    return [grad for grad in grads if grad is not None]


@torch.library.custom_op("fastssl::two_view_lse", mutates_args=())
def _two_view_lse(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(z0.device.type, enabled=False):
        return launchers(backend, "similarity").two_view_lse_fwd(z0, z1, scale, ids)


@torch.library.custom_op("fastssl::two_view_lse_bwd", mutates_args=())
def _two_view_lse_bwd(
    dlse: Tensor,
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    top: Tensor,
    total: Tensor,
    rnorm: Tensor,
    tile: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(z0.device.type, enabled=False):
        grads = launchers(backend, "similarity").two_view_lse_bwd(
            dlse, z0, z1, scale, ids, top, total, rnorm, tile, needs
        )
    return [grad for grad in grads if grad is not None]


@_similarity_lse.register_fake
def _similarity_lse_fake(
    q: Tensor, k: Tensor, scale: Tensor, row_ids: object, col_ids: object, backend: str
) -> tuple[Tensor, ...]:
    return (*(scale.new_empty(len(q)) for _ in range(4)), scale.new_empty(len(k)))


@_two_view_lse.register_fake
def _two_view_lse_fake(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: object, backend: str
) -> tuple[Tensor, ...]:
    rows = 2 * len(z0)
    kept = rows if backend == "torch" and rows <= TILE else 0
    return (*(scale.new_empty(rows) for _ in range(4)), scale.new_empty(kept, kept))


@_similarity_lse_bwd.register_fake
@_two_view_lse_bwd.register_fake
def _bwd_fake(dlse: Tensor, a: Tensor, b: Tensor, scale: Tensor, *rest: Any) -> list[Tensor]:
    *_, needs, _ = rest
    return [torch.empty_like(x) for x, need in zip((a, b, scale), needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _gradient_of(backward: Any) -> Any:
    """Make the autograd formula that calls a backward operator."""

    def gradient(ctx: Any, dlse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = iter(backward(dlse, *ctx.saved_tensors, needs, ctx.backend))
        no_ids_no_backend = [None] * (len(ctx.needs_input_grad) - 3)
        return (*(next(grads) if need else None for need in needs), *no_ids_no_backend)

    return gradient


_similarity_lse.register_autograd(_gradient_of(_similarity_lse_bwd), setup_context=_save)
_two_view_lse.register_autograd(_gradient_of(_two_view_lse_bwd), setup_context=_save)
