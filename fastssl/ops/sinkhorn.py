"""Sinkhorn-Knopp as an operator, for torch.compile and autocast. It has no gradient.

A backend's launcher does the work: ``kernels/sinkhorn.py``, ``streaming/sinkhorn.py``.
"""

import torch
from torch import Tensor

from fastssl.ops.backend import launchers


def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int, backend: str) -> Tensor:
    """Codes of prototype scores, after so many iterations over prototypes and samples.

    Args:
        scores: [B, K].
        epsilon: positive.
        iterations: 0 or more.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        [B, K], of scores' type, without a gradient.
    """
    codes: Tensor = _sinkhorn(scores.detach(), epsilon, iterations, backend)
    return codes


@torch.library.custom_op("fastssl::sinkhorn", mutates_args=())
def _sinkhorn(scores: Tensor, epsilon: float, iterations: int, backend: str) -> Tensor:
    with torch.autocast(scores.device.type, enabled=False):
        return launchers(backend, "sinkhorn").sinkhorn_fwd(scores, epsilon, iterations)


@_sinkhorn.register_fake
def _sinkhorn_fake(scores: Tensor, epsilon: float, iterations: int, backend: str) -> Tensor:
    return scores.new_empty(scores.shape)
