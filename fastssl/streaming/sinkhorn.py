"""Sinkhorn-Knopp of prototype scores, a block of rows at a time in PyTorch.

With x = scores / epsilon [B, K], potentials g of the prototypes and f of the samples:

    g_k = -log K - log sum_b exp(x_bk + f_b)        f_b = -log B - log sum_k exp(x_bk + g_k)

Prototypes first, from f = 0. After the last f the codes are B exp(x_bk + f_b + g_k).

Where each sample's x lies within RANGE of its largest, exp(x - max) is a float32 number. It is then
taken once, and an iteration is two products with it: with exp(g) for the sums over k, with exp(f)
for those over b. All terms are positive, so no digit is lost. Wider scores stay in the log domain
and take their exponentials anew in every sweep. Either way a block of rows is in the cache
while it gives its samples' f and its share of the next g.

Where samples are spread over ranks, sums over b are of all of them. They are in the log domain, so
that no rank has to know how wide the scores of another are.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like

BLOCK = 2**20  # numbers of a block of rows
RANGE = 60.0  # potentials spread no wider than x: exp(RANGE) and its inverse are float32 numbers


def sinkhorn_fwd(
    scores: Tensor,
    epsilon: float,
    iterations: int,
    samples: int = 0,
    reduce: Callable[[Tensor, str], None] | None = None,
) -> Tensor:
    """Return the codes [B, K] in scores' type.

    Of ``samples`` on all ranks, ``reduce`` puts the ``"sum"`` or ``"max"`` over ranks in place of
    a tensor.
    """
    codes = None if reduce else _scaled(scores, epsilon, iterations)
    if codes is None:
        return _log_domain(scores, epsilon, iterations, samples or len(scores), reduce)
    return codes


def _scaled(scores: Tensor, epsilon: float, iterations: int) -> Tensor | None:
    """Return the codes, with exp(x - max x) of each sample in their memory until the end.

    What a sample's f loses by its maximum, it never notices: only the first sums, where f is 0, and
    codes without any iteration need it back. Returns None where a sample's scores are too wide, and
    on devices other than a CPU, where to ask would be a host synchronisation.
    """
    if scores.device.type != "cpu":
        return None
    (B, K), dtype = scores.shape, torch.promote_types(scores.dtype, torch.float32)
    codes = fresh_like(scores, dtype)
    highs = codes.new_empty(B, 1)
    top = codes.new_full((), -torch.inf)  # of all scores so far
    sums = codes.new_zeros(K)
    for rows in _blocks(scores):
        x = scores[rows].to(dtype)
        high = torch.amax(x, dim=1, keepdim=True, out=highs[rows])
        if not (high - x.amin(1, keepdim=True)).max().item() / epsilon <= RANGE:
            return None
        block = torch.sub(x, high, out=codes[rows]).mul_(1 / epsilon).exp_()
        if (larger := high.max()) > top:
            sums *= ((top - larger) / epsilon).exp_()
            top = larger
        sums.addmv_(block.T, ((high[:, 0] - top) / epsilon).exp_())
    if not iterations:
        to_samples = ((highs - top) / epsilon).exp_()
        return codes.mul_(to_samples.mul_(B / sums.sum())).to(scores.dtype)
    for t in range(iterations):
        to_prototypes = sums.mul_(K).reciprocal_()
        sums = torch.zeros_like(sums)
        for rows in _blocks(scores):
            block = codes[rows]
            to_samples = (block @ to_prototypes).reciprocal_()
            if t + 1 < iterations:
                sums.addmv_(block.T, to_samples.div_(B))
            else:
                block.mul_(to_prototypes).mul_(to_samples[:, None])
    return codes.to(scores.dtype)


def _log_domain(
    scores: Tensor,
    epsilon: float,
    iterations: int,
    samples: int,
    reduce: Callable[[Tensor, str], None] | None,
) -> Tensor:
    """Return the codes, whatever the scores.

    g is kept as -top / epsilon, top a column's largest score, and the rest. score - top, rounded to
    its own size, is a small number where codes are not nothing; so is what the rest grows by, which
    comes from sums of codes.
    """
    K, dtype = scores.shape[1], torch.promote_types(scores.dtype, torch.float32)
    top = scores.amax(0).to(dtype)
    if reduce:
        reduce(top, "max")

    def below(top: Tensor, rows: slice) -> Tensor:
        return (scores[rows].to(dtype) - top).div_(epsilon)

    total = torch.zeros_like(top)
    for rows in _blocks(scores):
        total += below(top, rows).exp_().sum(0)
    if reduce:
        reduce(total, "sum")
    codes = fresh_like(scores)
    if not iterations:
        largest = top.max()
        everything = (total * ((top - largest) / epsilon).exp()).sum().log()
        for rows in _blocks(scores):
            codes[rows] = below(largest, rows).sub_(everything).exp_().mul_(samples)
        return codes
    rest = -(total.log() + math.log(K))
    for t in range(iterations):
        total.zero_()
        for rows in _blocks(scores):
            block = torch.softmax(below(top, rows).add_(rest), 1)
            if t + 1 < iterations:
                total += block.sum(0)
            else:
                codes[rows] = block
        if t + 1 < iterations:
            if reduce:
                reduce(total, "sum")
            # One of a column's codes is 1 / (K samples) at least, where dtype tells scores apart.
            total.clamp_(min=torch.finfo(dtype).tiny)
            rest = rest - (total.log() + math.log(K / samples))
    return codes


def _blocks(scores: Tensor) -> Iterator[slice]:
    B, K = scores.shape
    size = max(1, BLOCK // K)
    return (slice(start, min(start + size, B)) for start in range(0, B, size))
