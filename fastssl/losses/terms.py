"""The terms of a loss, one a row, and what is made of them."""

from torch import Tensor, nn

from fastssl.distributed import Ranks

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(lse: Tensor) -> Tensor:
    """log(1 + exp(lse)): the positive's own exponential is 1, relative to the positive."""
    return -nn.functional.logsigmoid(-lse)


def reduced(terms: Tensor, reduction: str, ranks: Ranks | None) -> Tensor:
    """Mean, sum or all of the terms; with other ranks, of all of theirs, seen from this one."""
    if reduction == "none":
        return terms
    if ranks is None:
        return terms.mean() if reduction == "mean" else terms.sum()
    share = ranks.sizes[ranks.rank] / ranks.mean_size
    return share * terms.mean() if reduction == "mean" else len(ranks.sizes) * terms.sum()
