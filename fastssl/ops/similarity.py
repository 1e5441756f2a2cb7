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
    normalize: bool = True,
    backend: str,
) -> Tensor:
    """L_i = log sum_j exp(scale sim(q_i, k_j)) over the j whose id differs from row i's.

    Keys that need no gradient are not kept for the backward pass: they may change before it.

    Args:
        q: [M, D] rows.
        k: [N, D] rows.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        row_ids: [M] integers, or None where every row sees every column.
        col_ids: [N] integers, likewise.
        normalize: Whether sim is the cosine; else the plain product.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        [M], of scale's type; -inf for a row that sees no column.
    """
    lse: Tensor
    if normalize and not k.requires_grad:
        gradients = torch.is_grad_enabled() and (q.requires_grad or scale.requires_grad)
        lse = _fixed_keys_lse(q, k, scale, row_ids, col_ids, gradients, backend)[0]
    else:
        lse = _similarity_lse(q, k, scale, row_ids, col_ids, normalize, backend)[0]
    return lse


def pair_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    *,
    first: int = 0,
    columns: bool = False,
    normalize: bool = True,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row's negatives, less the score of its pair, which is column first + i.

    With x_ij = scale sim(q_i, k_j), R_i = log sum_j exp(x_ij - x_i,first+i) over the j that are
    neither the pair nor of its id, and C_j = log sum_i exp(x_ij - x_jj) likewise, from one pass
    over the matrix.

    Args:
        q: [M, D] rows.
        k: [N, D] rows, N at least first + M.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        ids: [N] integers, equal for columns that are not negatives of each other's rows.
        first: The pair of row 0.
        columns: Whether to return C, which needs M = N and first = 0.
        normalize: Whether sim is the cosine; else the plain product.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        R [M] and C [N], of scale's type, -inf where there are no negatives; C is empty if not asked
        for.
    """
    rows, cols, *_ = _pair_lse(q, k, scale, ids, first, columns, normalize, backend)
    return rows, cols


def class_lse(
    z: Tensor,
    scale: Tensor,
    classes: Tensor,
    weights: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    """Log-sum-exp over the other rows, less the mean score of the row's positives.

    With x_ij = scale <z_i, z_j> and the other rows p of row i's class, n_i of them,
    R_i = log sum_(j != i) exp(x_ij) - sum_p x_ip / n_i; 0 for a row without positives. What is
    taken off here keeps its digits, as in ``two_view_lse``, and so do gradients.

    Args:
        z: [N, D] rows.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        classes: [N] integers, equal for rows that are each other's positives.
        weights: [C, C], how much of a positive a row of class j is for one of class i, where
            classes are from 0 to C - 1; n_i is then the sum of weights. No gradient.
        backend: ``"triton"`` or ``"torch"``, resolved; with weights ``"torch"``.

    Returns:
        [N], of scale's type.
    """
    lse: Tensor = _class_lse(z, scale, classes, weights, backend)[0]
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
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return launchers(backend, "similarity").similarity_lse_fwd(
            q, k, scale, row_ids, col_ids, normalize
        )


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
    normalize: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        grads = launchers(backend, "similarity").similarity_lse_bwd(
            dlse, q, k, scale, row_ids, col_ids, top, total, q_rnorm, k_rnorm, normalize, needs
        )
    return [grad for grad in grads if grad is not None]


@torch.library.custom_op("fastssl::fixed_keys_lse", mutates_args=())
def _fixed_keys_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return launchers(backend, "similarity").fixed_keys_lse_fwd(
            q, k, scale, row_ids, col_ids, gradients
        )


@torch.library.custom_op("fastssl::fixed_keys_lse_bwd", mutates_args=())
def _fixed_keys_lse_bwd(
    dlse: Tensor,
    q: Tensor,
    scale: Tensor,
    dq: Tensor,
    dscale: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    need_q, need_scale = needs
    grads = [(dq * dlse[:, None]).to(dq.dtype)] if need_q else []
    return [*grads, dscale @ dlse] if need_scale else grads


@torch.library.custom_op("fastssl::pair_lse", mutates_args=())
def _pair_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    first: int,
    columns: bool,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return launchers(backend, "similarity").pair_lse_fwd(
            q, k, scale, ids, first, columns, normalize
        )


@torch.library.custom_op("fastssl::pair_lse_bwd", mutates_args=())
def _pair_lse_bwd(
    drows: Tensor,
    dcols: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    top: Tensor,
    total: Tensor,
    col_top: Tensor,
    col_total: Tensor,
    q_rnorm: Tensor,
    k_rnorm: Tensor,
    first: int,
    columns: bool,
    normalize: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        grads = launchers(backend, "similarity").pair_lse_bwd(
            drows, dcols, q, k, scale, ids, first, columns, top, total, col_top, col_total,
            q_rnorm, k_rnorm, normalize, needs
        )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@torch.library.custom_op("fastssl::class_lse", mutates_args=())
def _class_lse(
    z: Tensor, scale: Tensor, classes: Tensor, weights: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(z.device.type, enabled=False):
        return launchers(backend, "similarity").class_lse_fwd(z, scale, classes, weights)


@torch.library.custom_op("fastssl::class_lse_bwd", mutates_args=())
def _class_lse_bwd(
    dlse: Tensor,
    z: Tensor,
    scale: Tensor,
    classes: Tensor,
    weights: Tensor | None,
    top: Tensor,
    total: Tensor,
    count: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(z.device.type, enabled=False):
        grads = launchers(backend, "similarity").class_lse_bwd(
            dlse, z, scale, classes, weights, top, total, count, needs
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
    q: Tensor, k: Tensor, scale: Tensor, row_ids: object, col_ids: object, normalize: bool, _: str
) -> tuple[Tensor, ...]:
    rnorms = (scale.new_empty(len(x) if normalize else 0) for x in (q, k))
    return (*(scale.new_empty(len(q)) for _ in range(3)), *rnorms)


@_fixed_keys_lse.register_fake
def _fixed_keys_lse_fake(
    q: Tensor, k: Tensor, scale: Tensor, row_ids: object, col_ids: object, gradients: bool, _: str
) -> tuple[Tensor, Tensor, Tensor]:
    lse = scale.new_empty(len(q))
    if gradients:
        return lse, torch.empty_like(q), torch.empty_like(lse)
    return lse, scale.new_empty(0, 0), scale.new_empty(0)


@_pair_lse.register_fake
def _pair_lse_fake(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: object,
    first: int,
    columns: bool,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    m, n = len(q), len(k) if columns else 0
    rnorms = (scale.new_empty(len(x) if normalize else 0) for x in (q, k))
    return (*(scale.new_empty(count) for count in (m, n, m, m, n, n)), *rnorms)


@_class_lse.register_fake
def _class_lse_fake(
    z: Tensor, scale: Tensor, classes: object, weights: object, backend: str
) -> tuple[Tensor, ...]:
    return tuple(scale.new_empty(len(z)) for _ in range(4))


@_two_view_lse.register_fake
def _two_view_lse_fake(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: object, backend: str
) -> tuple[Tensor, ...]:
    rows = 2 * len(z0)
    kept = rows if backend == "torch" and rows <= TILE else 0
    return (*(scale.new_empty(rows) for _ in range(4)), scale.new_empty(kept, kept))


@_fixed_keys_lse_bwd.register_fake
def _fixed_keys_lse_bwd_fake(
    dlse: Tensor,
    q: Tensor,
    scale: Tensor,
    dq: Tensor,
    dscale: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip((q, scale), needs, strict=True) if need]


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, _, scale, *_, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    # q and scale are there to be missed: a second derivative by them raises.
    ctx.save_for_backward(q, scale, *output[1:])


def _multiply_gradients(ctx: Any, dlse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_q, _, need_scale, *others = ctx.needs_input_grad
    needs = [need_q, need_scale]
    found = iter(_fixed_keys_lse_bwd(dlse, *ctx.saved_tensors, needs, ctx.backend))
    dq, dscale = (next(found) if need else None for need in needs)
    return dq, None, dscale, *(None for _ in others)


_fixed_keys_lse.register_autograd(_multiply_gradients, setup_context=_keep_gradients)


def _connect(forward: Any, backward: Any, outputs: int, differentiable: int, tensors: int) -> None:
    """Register ``backward`` as the derivative of ``forward``.

    Forward takes so many tensors, the first so many of them differentiable, then options and the
    backend; it returns so many differentiable outputs and what backward needs. Backward takes
    their gradients, the tensors, what it needs, the options, which gradients to
    return, and the backend.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *ctx.options, ctx.backend = inputs[tensors:]
        ctx.mark_non_differentiable(*output[outputs:])
        ctx.save_for_backward(*inputs[:tensors], *output[outputs:])

    def gradient(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:differentiable]
        doutputs = doutputs[:outputs]
        found = iter(backward(*doutputs, *ctx.saved_tensors, *ctx.options, needs, ctx.backend))
        others = ctx.needs_input_grad[differentiable:]
        return (*(next(found) if need else None for need in needs), *(None for _ in others))

    def fake(*given: Any) -> list[Tensor]:
        *_, needs, _ = given
        like = given[outputs : outputs + differentiable]
        return [torch.empty_like(x) for x, need in zip(like, needs, strict=True) if need]

    forward.register_autograd(gradient, setup_context=save)
    backward.register_fake(fake)


_connect(_similarity_lse, _similarity_lse_bwd, outputs=1, differentiable=3, tensors=5)
_connect(_pair_lse, _pair_lse_bwd, outputs=2, differentiable=3, tensors=4)
_connect(_class_lse, _class_lse_bwd, outputs=1, differentiable=2, tensors=4)
_connect(_two_view_lse, _two_view_lse_bwd, outputs=1, differentiable=3, tensors=4)
