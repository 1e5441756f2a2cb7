"""Sinkhorn-Knopp as an operator, for torch.compile and autocast. It has no gradient.

A backend's launcher does the work: ``kernels/sinkhorn.py``, ``streaming/sinkhorn.py``.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from fastssl.distributed import Group
from fastssl.ops.backend import launchers
from fastssl.ops.registration import fake_of, operator_without_derivative


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float,
    iterations: int,
    backend: str,
    samples: int = 0,
    group: Group = None,
) -> Tensor:
    """Codes of prototype scores, after so many iterations over prototypes and samples.

    Of several ranks, the sums of K prototypes are added up over ranks, once for an iteration, and
    their first maximum is taken; no scores are sent.

    Args:
        scores: [B, K], of several ranks those of this one, with one K and dtype.
        epsilon: positive.
        iterations: 0 or more.
        backend: ``"triton"`` or ``"torch"``, resolved.
        samples: the sum of B over ranks; 0 where there are no others.
        group: process group of the ranks, the default one for None.

    Returns:
        [B, K], of scores' type, without a gradient.
    """
    scores = scores.detach()
    if not samples:
        codes: Tensor = _sinkhorn(scores, epsilon, iterations, backend)
        return codes

    def reduce(x: Tensor, how: str) -> None:
        op = dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM
        dist.all_reduce(x, op=op, group=group)

    with torch.autocast(scores.device.type, enabled=False):
        launch = torch.compiler.disable(  # type: ignore[no-untyped-call]
            launchers(backend, "sinkhorn").sinkhorn_fwd
        )
        return launch(scores, epsilon, iterations, samples, reduce)


@operator_without_derivative
def _sinkhorn(scores: Tensor, epsilon: float, iterations: int, backend: str) -> Tensor:
    with torch.autocast(scores.device.type, enabled=False):
        return launchers(backend, "sinkhorn").sinkhorn_fwd(scores, epsilon, iterations)


@fake_of(_sinkhorn)
def _sinkhorn_fake(scores: Tensor, epsilon: float, iterations: int, backend: str) -> Tensor:
    return scores.new_empty(scores.shape)
