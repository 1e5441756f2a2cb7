"""Log-sum-exp of two views' rows as a differentiable operator; ``similarity.py`` has the rest.

A backend's launchers do the work (``kernels/two_views.py``, ``streaming/two_views.py``).
"""

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.ops.registration import connect, fake_of, operator, operator_without_derivative
from fastssl.streaming.tiles import TILE


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


@operator
def _two_view_lse(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(z0.device.type, enabled=False):
        return launchers(backend, "two_views").two_view_lse_fwd(z0, z1, scale, ids)


@operator_without_derivative
def _two_view_lse_bwd(
    dlse: Tensor,
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    top: Tensor,
    total: Tensor,
    kept: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(z0.device.type, enabled=False):
        grads = launchers(backend, "two_views").two_view_lse_bwd(
            dlse, z0, z1, scale, ids, top, total, kept, needs
        )
    return [grad for grad in grads if grad is not None]


@fake_of(_two_view_lse)
def _two_view_lse_fake(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: object, backend: str
) -> tuple[Tensor, ...]:
    rows = 2 * z0.shape[0]
    # A tile where it holds all rows, without a branch, which would make a graph for either case.
    tile = torch.sym_min(1, TILE // rows) * rows * rows if backend == "torch" else 0
    return (*(scale.new_empty(rows) for _ in range(3)), scale.new_empty(rows + tile))


connect(_two_view_lse, _two_view_lse_bwd, outputs=1, differentiable=3, tensors=4)
