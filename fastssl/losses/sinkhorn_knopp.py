"""Codes of SwAV: samples assigned to prototypes that are all used alike."""

import torch
from torch import Tensor
from torch import distributed as dist

from fastssl.checks import check_choice, check_count, check_embeddings, check_number, check_ranks
from fastssl.distributed import Group, Ranks, sum_over_ranks
from fastssl.ops import backend as backends
from fastssl.ops.sinkhorn import sinkhorn


def sinkhorn_knopp(
    scores: Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    differentiable: bool = False,
    hard: bool = False,
    gather_distributed: bool = False,
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """Codes of SwAV: each sample's weights over prototypes, with all prototypes used alike.

    Equivalent, where the exponentials do not overflow, to::

        q = exp(scores / epsilon).T                                             # K x B
        q /= q.sum()
        for _ in range(iterations):
            q /= q.sum(1, keepdim=True) * K                                     # prototypes
            q /= q.sum(0, keepdim=True) * B                                     # samples
        codes = (q * B).T

    Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
    2020, section 3 and algorithm 1. Any finite score is safe. Adding a constant to all scores
    changes nothing.

    Args:
        scores: [B, K] similarities of samples and prototypes, float64, float32, bfloat16 or
            float16.
        epsilon: Positive number; smaller ones give sharper codes.
        iterations: Whole number; 0 scales all exponentials to the sum B.
        differentiable: Whether the codes carry the gradient of the iterations, which PyTorch then
            unrolls, keeping two matrices of each. SwAV and DINO take codes as constants.
        hard: Whether each row is rounded to its largest code, which has no gradient.
        gather_distributed: Whether the samples of all ranks are assigned together, B of them this
            rank's. Ranks send sums of K numbers, no scores. Without a process group it makes no
            difference.
        group: Process group, the default one for None.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        [B, K] codes in the scores' type; from one iteration on, rows sum to 1.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes or values do not fit, or hard codes shall be differentiable.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> sinkhorn_knopp(torch.randn(8, 5)).sum(1).allclose(torch.ones(8))
        True
    """
    ranks = check_ranks("scores", scores, gather_distributed, group)
    check_embeddings("scores", scores, letters="B and K")
    check_number("epsilon", epsilon, scores, positive=True)
    check_count("iterations", iterations)
    if hard and differentiable:
        raise ValueError("hard codes have no gradient: give hard=True or differentiable=True")
    if differentiable:
        if backend == "triton":
            raise RuntimeError(
                "backend='triton' cannot run here: its kernels have no gradient; use "
                "differentiable=False, or backend='torch' or 'auto'"
            )
        check_choice("backend", backend, backends.BACKENDS)
        return _unrolled(scores, epsilon, iterations, ranks)
    codes = sinkhorn(
        scores,
        epsilon=float(epsilon),
        iterations=iterations,
        backend=backends.resolve(backend, scores),
        samples=sum(ranks.sizes) if ranks else 0,
        group=group,
    )
    if hard:
        return torch.zeros_like(codes).scatter_(1, codes.argmax(1, keepdim=True), 1)
    return codes


def _unrolled(scores: Tensor, epsilon: float, iterations: int, ranks: Ranks | None) -> Tensor:
    """Codes with their gradient, in PyTorch on logarithms."""
    dtype = scores.dtype

    def over_samples(x: Tensor) -> Tensor:
        if ranks is None:
            return x.logsumexp(0)
        top = x.detach().amax(0)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=ranks.group)
        return sum_over_ranks((x - top).exp().sum(0), ranks.group).log() + top

    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        top = scores.detach().max()  # what all scores have in common shall cost no digits
        if ranks is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=ranks.group)
        log_codes = (scores - top) / epsilon
        log_codes = log_codes - over_samples(log_codes).logsumexp(0)
        for _ in range(iterations):
            log_codes = log_codes - over_samples(log_codes)
            log_codes = log_codes - log_codes.logsumexp(1, keepdim=True)
        if not iterations:
            return (log_codes.exp() * (sum(ranks.sizes) if ranks else scores.shape[0])).to(dtype)
        return log_codes.exp().to(dtype)
