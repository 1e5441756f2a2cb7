"""Batches that are spread over the ranks of a process group, put together with exact gradients.

One rule holds for every loss: the mean over W ranks of the returned loss is the loss of the whole
batch in one process, and each rank's input gradient is W times its share of that loss's gradient,
so that averaging parameter gradients, as DistributedDataParallel does, gives exactly those of one
process.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def gather_rows(x: Tensor) -> tuple[Tensor, slice]:
    """Stack the rows of every rank, in the order of ranks, and say which are this rank's.

    A loss of the result is the same on each rank, and its backward pass sums over ranks what they
    send back for a row. Ranks may hold different numbers of rows. Without an initialised process
    group, or in one of a single rank, x is returned.

    Args:
        x: [N, ...] this rank's rows, alike on all ranks but for N.

    Returns:
        [sum of N, ...], differentiable once, and the place of x in it.

    Example:
        >>> rows, own = gather_rows(torch.zeros(4, 2))
        >>> rows[own].shape
        torch.Size([4, 2])
    """
    sizes = _sizes(x)
    if len(sizes) == 1:
        return x, slice(0, len(x))
    start = sum(sizes[: dist.get_rank()])
    own = slice(start, start + len(x))
    rows: Tensor = _GatherRows.apply(x, sizes, own)
    return rows, own


def rows_per_rank(x: Tensor) -> float:
    """How many rows a rank holds on average: what a rank's sum is divided by, for the rule above.

    Args:
        x: [N, ...] this rank's rows.

    Returns:
        The mean of N over ranks; N itself without an initialised process group.
    """
    sizes = _sizes(x)
    return sum(sizes) / len(sizes)


def world_size() -> int:
    """Number of ranks of the default process group; 1 without an initialised one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sizes(x: Tensor) -> list[int]:
    """The number of rows of each rank."""
    if world_size() == 1:
        return [len(x)]
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], len(x)))
    sizes: list[int] = torch.cat(counts).tolist()
    return sizes


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], own: slice) -> Tensor:
        ctx.own = own
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        pieces = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None, None
