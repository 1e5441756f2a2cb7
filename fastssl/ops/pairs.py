"""Log-sum-exp of pairs as a differentiable operator; ``similarity.py`` has the rest.

A backend's launchers do the work (``kernels/pairs.py``, ``streaming/pairs.py``).
"""

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.ops.registration import connect, fake_of, operator, operator_without_derivative


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


@operator
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
        return launchers(backend, "pairs").pair_lse_fwd(q, k, scale, ids, first, columns, normalize)


@operator_without_derivative
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
        grads = launchers(backend, "pairs").pair_lse_bwd(
            drows, dcols, q, k, scale, ids, first, columns, top, total, col_top, col_total,
            q_rnorm, k_rnorm, normalize, needs
        )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@fake_of(_pair_lse)
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
    m, n = q.shape[0], k.shape[0] if columns else 0
    rnorms = (scale.new_empty(x.shape[0] if normalize else 0) for x in (q, k))
    return (*(scale.new_empty(count) for count in (m, n, m, m, n, n)), *rnorms)


connect(_pair_lse, _pair_lse_bwd, outputs=2, differentiable=3, tensors=4)
