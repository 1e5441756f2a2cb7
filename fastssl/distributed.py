"""Batches that are spread over the ranks of a process group, put together with exact gradients.

One rule holds for every loss: the mean over W ranks of the returned loss is the loss of the whole
batch in one process, and each rank's input gradient is W times its share of that loss's gradient,
so that averaging parameter gradients, as DistributedDataParallel does, gives exactly those of one
process.

Rows of other ranks come by gathering all of them, or in a ring: blocks of rows go from rank to
rank, the next in flight during the work on one, and no rank ever holds all. docs/distributed.md
has what either costs.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

Group: TypeAlias = "dist.ProcessGroup | None"  # None: the default process group

EXCHANGES = ("auto", "gather", "ring")
# From either on "auto" takes the ring: keys of a rank that hide a hop, keys that are much to hold.
RING_BLOCK_BYTES = 4 * 2**20
RING_TOTAL_BYTES = 2**30

_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold the rows of one batch.

    Attributes:
        sizes: How many rows each of them has.
        rank: Which of them this process is.
        group: Their process group.
    """

    sizes: list[int]
    rank: int
    group: Group

    @property
    def own(self) -> slice:
        """The place of this rank's rows among all."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    @property
    def mean_size(self) -> float:
        """How many rows a rank holds on average: what its sum is divided by, for the rule above."""
        return sum(self.sizes) / len(self.sizes)

    def times(self, count: int) -> "Ranks":
        """The same ranks with so many rows in the place of each."""
        return Ranks([count * size for size in self.sizes], self.rank, self.group)

    def in_ring(self, exchange: str, keys: Tensor) -> bool:
        """Whether the rows of all ranks, of which these are keys [N, ...], come in a ring."""
        total = sum(self.sizes) * keys[0].numel() * keys.element_size()
        long = total >= min(RING_BLOCK_BYTES * len(self.sizes), RING_TOTAL_BYTES)
        return exchange == "ring" or (exchange == "auto" and long)

    def gather(self, x: Tensor) -> Tensor:
        """Stack every rank's x [N, ...], differentiable once.

        A loss of the result is the same on each rank, and the backward pass sums over ranks what
        they send back for a row.
        """
        rows: Tensor = _GatherRows.apply(x, self)
        return rows

    def ring(self, *rows: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each rank's rows and which rank that is, from this one backwards.

        While the caller works with some, the next are on their way. All ranks must go through all.

        Args:
            rows: Tensors [N, ...] without gradients, alike on all ranks but for N.

        Yields:
            The owner's rank, and its tensors.
        """
        here = [x.contiguous() for x in rows]
        for owner in range(self.rank, self.rank - len(self.sizes) + 1, -1):
            coming, wait = self.pass_on(here, owner - 1)
            yield owner % len(self.sizes), here
            wait()
            here = coming
        yield (self.rank + 1) % len(self.sizes), here

    def pass_on(self, rows: list[Tensor], coming: int) -> tuple[list[Tensor], Callable[[], None]]:
        """Begin to send rows to the next rank, and to receive those of rank ``coming``.

        Returns:
            What they will be received in, and a function that waits until both is done.
        """
        count = len(self.sizes)
        received = [x.new_empty(self.sizes[coming % count], *x.shape[1:]) for x in rows]
        ways = (
            (dist.isend, rows, (self.rank + 1) % count),
            (dist.irecv, received, (self.rank - 1) % count),
        )
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(way, x, group=self.group, group_peer=peer)
                for way, tensors, peer in ways
                for x in tensors
            ]
        )

        def wait(held: list[Tensor] = rows) -> None:  # what is being sent must stay until then
            for work in works:
                work.wait()

        return received, wait


class Carried:
    """Sums for rows in a ring: they follow a step behind, each rank adds its part, and come home.

    Args:
        ranks: Those of the ring.
        add: Makes one of the sums so far and this rank's part, if not by addition.
    """

    def __init__(
        self,
        ranks: Ranks,
        add: Callable[[list[Tensor], list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        self._ranks, self._add = ranks, add or _sum
        self._coming: list[Tensor] = []
        self._wait: Callable[[], None] | None = None

    def put(self, owner: int, part: list[Tensor]) -> None:
        """Add this rank's part for the rows of owner, as ``Ranks.ring`` yields them."""
        if self._wait is not None:
            part = self._add(self.home(), part)
        part = [x.contiguous() for x in part]
        self._coming, self._wait = self._ranks.pass_on(part, owner - 1)

    def home(self) -> list[Tensor]:
        """Wait for what is coming: after the last ``put``, the sums for this rank's own rows."""
        if self._wait is not None:
            self._wait()
        return self._coming


def ranks_of(x: Tensor, group: Group = None, name: str = "x") -> Ranks | None:
    """The ranks of a group and how many rows each has; None if there are no others.

    What is wrong with the rows of one rank raises on all.

    Args:
        x: [N, ...] this rank's rows, alike on all ranks but for N, which is at least 1.
        group: A process group that this rank is in.
        name: What to call x.

    Raises:
        TypeError: Dtypes differ between ranks.
        ValueError: A rank has no rows, or rows of another size; or this rank is not in the group.
    """
    count = world_size(group)
    if count == 1:
        return None
    kind = _DTYPES.index(x.dtype) if x.dtype in _DTYPES else len(_DTYPES)
    here = torch.tensor([len(x), math.prod(x.shape[1:]), kind], device=x.device)
    every = [torch.empty_like(here) for _ in range(count)]
    dist.all_gather(every, here, group=group)
    sizes, features, kinds = torch.stack(every, 1).tolist()
    for rank in range(count):
        if sizes[rank] == 0:
            raise ValueError(f"{name} must have rows on every rank: rank {rank} has no rows")
        if features[rank] != features[0]:
            raise ValueError(
                f"{name} must have rows of one size on all ranks, got {features[0]} on rank 0 and "
                f"{features[rank]} on rank {rank}"
            )
        if kinds[rank] != kinds[0]:
            first, other = (
                str((*_DTYPES, "another")[kinds[each]]).removeprefix("torch.") for each in (0, rank)
            )
            raise TypeError(
                f"{name} must have the same dtype on all ranks, got {first} on rank 0 and {other} "
                f"on rank {rank}"
            )
    return Ranks(sizes, dist.get_rank(group), group)


def gather_rows(x: Tensor, group: Group = None) -> tuple[Tensor, slice]:
    """Stack the rows of every rank, in the order of ranks, and say which are this rank's.

    Ranks may hold different numbers of rows. Without an initialised process group, or in one of a
    single rank, x is returned.

    Args:
        x: [N, ...] this rank's rows, alike on all ranks but for N.
        group: A process group that this rank is in; None for the default one.

    Returns:
        [sum of N, ...], as ``Ranks.gather``, and the place of x in it.

    Example:
        >>> rows, own = gather_rows(torch.zeros(4, 2))
        >>> rows[own].shape
        torch.Size([4, 2])
    """
    ranks = ranks_of(x, group)
    return (x, slice(0, len(x))) if ranks is None else (ranks.gather(x), ranks.own)


def rows_per_rank(x: Tensor, group: Group = None) -> float:
    """How many rows a rank holds on average: what a rank's sum is divided by, for the rule above.

    Args:
        x: [N, ...] this rank's rows.
        group: A process group that this rank is in; None for the default one.

    Returns:
        The mean of N over ranks; N itself without an initialised process group.
    """
    ranks = ranks_of(x, group)
    return len(x) if ranks is None else ranks.mean_size


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Add up what ranks have; the backward pass adds up what they send back.

    Args:
        x: Of one shape and dtype on all ranks.
        group: A process group that this rank is in; None for the default one.

    Returns:
        The sum, the same on each rank, differentiable any number of times; x itself without an
        initialised process group.
    """
    if world_size(group) == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x, group)
    return total


def sum_gradients(x: Tensor, group: Group = None) -> Tensor:
    """Return x, which all ranks have computed alike, with the sum of their gradients.

    A loss that each rank computes from the whole batch needs nothing else to keep the rule above:
    a rank's share of the gradient is then that of its own rows.

    Args:
        x: The same on all ranks.
        group: A process group that this rank is in; None for the default one.

    Returns:
        x, differentiable any number of times.
    """
    same: Tensor = _SumGradients.apply(x, group)
    return same


def world_size(group: Group = None) -> int:
    """Number of ranks of a process group; 1 without an initialised one.

    Raises:
        ValueError: This rank is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    count: int = dist.get_world_size(group)
    if count < 1:
        raise ValueError(f"group must be one that this rank, {dist.get_rank()}, is in")
    return count


def _sum(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        padded = x.new_zeros(max(ranks.sizes), *x.shape[1:])
        padded[: len(x)] = x
        pieces = [torch.empty_like(padded) for _ in ranks.sizes]
        dist.all_gather(pieces, padded, group=ranks.group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, ranks.sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.ranks.group)
        return total[ctx.ranks.own], None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None
