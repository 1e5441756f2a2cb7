"""CLIP's loss with a teacher as a differentiable operator; ``similarity.py`` has the rest.

A backend's launchers do the work (``kernels/distill_clip.py``, ``streaming/distill_clip.py``).
"""

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.ops.registration import connect, fake_of, operator, operator_without_derivative


def distill_clip_terms(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    teacher_scale: Tensor,
    *,
    first: int = 0,
    columns: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What ``pair_lse`` has of rows as they are, and their cross-entropy against a teacher's.

    With x_ij = scale q_i.k_j, and P_ij the softmax over j of the teacher's scores, of each row

        R_i = log sum_{j != p} exp(x_ij) - x_ip        H_i = log sum_j exp(x_ij) - sum_j P_ij x_ij

    with p = first + i, and of each column likewise, from one pass over both matrices. The teacher
    must not require a gradient: it would get none.

    Args:
        q: [M, D] rows.
        k: [N, D] rows, N at least first + M.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        teacher_q: [M, E] rows, float64 if and only if q are.
        teacher_k: [N, E] rows of teacher_q's dtype.
        teacher_scale: 0-dim, like scale.
        first: The pair of row 0.
        columns: Whether to return those of columns, which needs M = N and first = 0.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        R and H of the rows [2, M] and of the columns [2, N], of scale's type; R is -inf where there
        are no negatives; those of columns are empty [2, 0] if not asked for.
    """
    teacher = teacher_q, teacher_k, teacher_scale
    rows, cols, *_ = _distill_clip_terms(q, k, scale, *teacher, first, columns, backend)
    return rows, cols


@operator
def _distill_clip_terms(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    teacher_scale: Tensor,
    first: int,
    columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return launchers(backend, "distill_clip").distill_clip_fwd(
            q, k, scale, teacher_q, teacher_k, teacher_scale, first, columns
        )


@operator_without_derivative
def _distill_clip_terms_bwd(
    drows: Tensor,
    dcols: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    teacher_scale: Tensor,
    stats: Tensor,
    col_stats: Tensor,
    first: int,
    columns: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        grads = launchers(backend, "distill_clip").distill_clip_bwd(
            drows, dcols, q, k, scale, teacher_q, teacher_k, teacher_scale, stats, col_stats,
            first, columns, needs,
        )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@fake_of(_distill_clip_terms)
def _distill_clip_terms_fake(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    teacher_q: object,
    teacher_k: object,
    teacher_scale: object,
    first: int,
    columns: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    m, n = q.shape[0], k.shape[0] if columns else 0
    return tuple(scale.new_empty(*shape) for shape in ((2, m), (2, n), (6, m), (6, n)))


connect(_distill_clip_terms, _distill_clip_terms_bwd, outputs=2, differentiable=3, tensors=6)
