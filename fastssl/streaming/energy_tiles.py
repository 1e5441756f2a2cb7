"""What the routes of the cross product energy share in PyTorch: rows standardised as they are read.

    u^ = (u - mean(u)) factor

A panel of about PANEL numbers is standardised whenever it is read, into memory that is kept for it.
The first row is subtracted before the mean, so that a mean far from zero costs no digits and u^ is
centred, to rounding.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PANEL = 2**20  # numbers that are standardised at a time


class Batch(NamedTuple):
    """A batch and what standardises its features."""

    x: Tensor  # [N, D], as given
    mean: Tensor  # [D], less the first row
    factor: Tensor  # [D]

    def read(self, rows: slice, features: slice | list[int], memory: Tensor) -> Tensor:
        """Return standardised features [B, P], written to memory."""
        x, factor = self.x[rows, features], self.factor[features]
        out = shaped(memory, x)
        torch.sub(x, self.x[0, features].to(out.dtype), out=out)
        return torch.addcmul(-factor * self.mean[features], out, factor, out=out)

    def centre(self) -> Tensor:
        """Return the mean [D] itself."""
        return self.mean + self.x[0]

    def memory(self) -> Tensor:
        """Return memory for a panel."""
        N, D = self.x.shape
        return self.mean.new_empty(min(N * D, max(PANEL, 64 * N)))


def cut(size: int, tile: int) -> list[slice]:
    """Cut range(size) into slices of equal length, at most tile."""
    step = math.ceil(size / math.ceil(size / tile))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def panels_of(x: Tensor, *, by_rows: bool = False) -> Iterator[tuple[slice, slice]]:
    """Cut a batch into panels of about PANEL numbers, all rows of some features or the reverse."""
    (N, D), everything = x.shape, slice(None)
    if by_rows:
        return ((rows, everything) for rows in cut(N, max(1, PANEL // D)))
    return ((everything, features) for features in cut(D, max(64, PANEL // N)))


def shaped(memory: Tensor, like: Tensor) -> Tensor:
    """As much of memory as a tensor has numbers, in its shape."""
    return memory[: like.numel()].view(like.shape)
