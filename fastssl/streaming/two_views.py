"""Log-sum-exp of the rows of two views, less their positives, tile by tile in PyTorch.

With the rows z of both views one above the other, and p the other view of row i's sample:

    x_ij = s cos(z_i, z_j)      R_i = log sum_j exp(x_ij) - x_ip      over the j of other samples

The matrix is symmetric, so half of the tiles serves all rows. Where one tile holds all scores, its
exponentials are kept for the backward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like
from fastssl.streaming.tiles import (
    TILE,
    Block,
    Gradients,
    Share,
    Sums,
    add_gradients,
    as_asked,
    blocks_of,
    drop_negligible_,
    exp_,
    gain_of,
    is_unshifted,
    rnorm_of,
    sums_of,
    through_scaling,
)


def two_view_lse_fwd(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lse less the row's positive, its top and total, and what is kept, all [2N].

    That is the inverse lengths, after which come the exp(x - top) of all where one tile holds them.
    """
    if 2 * len(z0) <= TILE:
        return _one_tile_fwd(z0, z1, scale, ids)
    rnorm = torch.cat([rnorm_of(z0), rnorm_of(z1)])
    blocks = blocks_of([z0, z1], rnorm * scale.sqrt(), _twice(ids))
    sums, _, pairs = sums_of(blocks, None, is_unshifted(scale, z0, z1, True), first=len(z0))
    return sums.lse(pairs.repeat(2)), *sums, rnorm


def two_view_lse_bwd(
    dlse: Tensor,
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    top: Tensor,
    total: Tensor,
    kept: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of z0, z1 and scale, each where ``needs`` asks for it."""
    rnorm, tile = kept[: len(top)], kept[len(top) :]
    if len(tile):
        return _one_tile_bwd(dlse, z0, z1, scale, total, rnorm, tile.view(-1, len(top)), needs)
    need_0, need_1, need_scale = needs
    dz0 = fresh_like(z0, top.dtype) if need_0 or need_scale else None
    dz1 = fresh_like(z1, top.dtype) if need_1 or need_scale else None
    blocks = blocks_of([z0, z1], rnorm * scale.sqrt(), _twice(ids), [dz0, dz1])
    gain = gain_of(dlse)
    share = Share.of(Sums(top, total), dlse, gain)
    unshifted = is_unshifted(scale, z0, z1, True)
    add_gradients(blocks, None, share, share, unshifted, first=len(z0))
    dscale = through_scaling(blocks, scale, gain, True) / 2  # every pair was counted from both ends
    return as_asked((dz0, dz1, dscale), (z0, z1, top), needs)


def _one_tile_fwd(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, z = len(z0), torch.cat([z0, z1])
    rnorm = rnorm_of(z)
    kept = rnorm.new_empty(2 * n + 4 * n * n)
    kept[: 2 * n] = rnorm
    rows = z * (rnorm * scale.sqrt())[:, None]
    scores = torch.mm(rows, rows.T, out=kept[2 * n :].view(2 * n, 2 * n))
    positive = scores.diagonal(n).repeat(2)
    if ids is not None:
        ids = ids.repeat(2)
        scores.masked_fill_(ids[:, None] == ids, -torch.inf)
    else:
        for offset in (0, n, -n):
            scores.diagonal(offset).fill_(-torch.inf)
    if is_unshifted(scale, z0, z1, True):
        top = torch.zeros_like(rnorm)
    else:
        top = scores.amax(1)
        scores -= top.masked_fill(top == -torch.inf, 0)[:, None]
    total = exp_(scores).sum(1)
    return Sums(top, total).lse(positive), top, total, kept


def _one_tile_bwd(
    dlse: Tensor,
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    total: Tensor,
    rnorm: Tensor,
    tile: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    n, z = len(z0), torch.cat([z0, z1])
    gain = gain_of(dlse)
    dlse = dlse / gain
    weight = dlse / total.masked_fill(total == 0, torch.inf)
    if is_unshifted(scale, z0, z1, True):
        weights = (weight[:, None] + weight).mul_(tile)
    else:
        weights = tile * weight[:, None]
        weights = drop_negligible_(weights + weights.T)
    both = dlse[:n] + dlse[n:]
    for offset in (n, -n):
        weights.diagonal(offset).copy_(both).neg_()
    factor = (rnorm * scale.sqrt())[:, None]
    dz = weights @ (z * factor)
    dscale = through_scaling([Block(slice(0, 2 * n), z, factor, None, dz)], scale, gain, True)
    # Every pair was counted from both of its ends. An operator's results may not share memory.
    return as_asked((dz[:n].clone(), dz[n:].clone(), dscale / 2), (z0, z1, rnorm), needs)


def _twice(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else torch.cat([ids, ids])
