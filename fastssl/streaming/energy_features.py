"""Cross product energy in PyTorch over tiles of c: the cheaper route where D is not above N.

    c_ij = 1/N sum_n u^_ni v^_nj, 0 where i = j      E = sum_ij c_ij^2      h_ni = sum_j c_ij v^_nj

A tile is used for E and for both h while it is in the cache: 6 N D^2 operations, half of them for
v = u. h is kept for the backward pass; where one tile is all of c, the tile is.

Where one tile is all of c and means are no larger than deviations, as after a batch norm, the care
for means costs more than it saves: the rows themselves are multiplied, and means and factors are
put into the D x D matrices.
"""

import torch
from torch import Tensor

from fastssl.streaming.energy_statistics import LEAST_FACTOR, statistics_bwd
from fastssl.streaming.energy_tiles import Batch, cut, panels_of, shaped
from fastssl.streaming.memory import fresh_like

TILE = 1024  # features of a tile of c, and rows that it is summed over at a time


def is_one_tile(D: int) -> bool:
    """Whether a tile is all of c."""
    return D <= TILE


def features_fwd(
    u: Batch, v: Batch, standardize: bool, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return E, the diagonal and, to save, what the gradients of u and v need."""
    N, D = u.x.shape
    tiles, blocks = cut(D, TILE), cut(N, TILE)
    diagonal = torch.empty_like(u.mean)
    energy = diagonal.new_zeros(())
    batches = [u] if v is u else [u, v]
    sums = [diagonal.new_zeros(N + 1, D) for _ in batches] if save and len(tiles) > 1 else []
    memories = diagonal.new_empty(2, blocks[0].stop * tiles[0].stop)
    memory = diagonal.new_empty(tiles[0].stop, tiles[0].stop)
    raw = standardize and len(tiles) == 1 and _as_they_are(u, v)

    def read(rows: slice, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        x = u.read(rows, i, memories[0])
        return x, x if u is v and i == j else v.read(rows, j, memories[1])

    for k, i in enumerate(tiles):
        for j in tiles[k:] if u is v else tiles:
            mirror = u is v and i != j  # the tile stands for its mirror image too
            c = memory[: i.stop - i.start, : j.stop - j.start]
            if raw:
                torch.mm(u.x.T, v.x, out=c).div_(N).addr_(u.centre(), v.centre(), alpha=-1)
                c *= u.factor[:, None] * v.factor
            else:
                c.zero_()
                for rows in blocks:
                    x, y = read(rows, i, j)
                    c.addmm_(x.T, y)
                c /= N
            if i == j:
                diagonal[i] = c.diagonal()
                c.fill_diagonal_(0)
            squares = c.square()
            energy += (2 if mirror else 1) * squares.sum()
            if sums:
                for rows in blocks:
                    x, y = read(rows, i, j)
                    sums[0][rows, i].addmm_(y, c.T)
                    if mirror or v is not u:
                        sums[-1][rows, j].addmm_(x, c)
                sums[0][N, i] += squares.sum(1)
                if mirror or v is not u:
                    sums[-1][N, j] += squares.sum(0)
    if save and len(tiles) == 1:
        sums = [memory]
    return energy, diagonal, sums


def features_bwd(
    saved: Tensor,
    batch: Batch,
    other: Batch,
    diagonal: Tensor,
    scale: Tensor,
    along: Tensor,
    standardize: bool,
) -> Tensor:
    """Return the gradient of a batch, du^ being scale h + along v^.

    What was saved is h [N, D] with mean(h u^) in one more row, or, where one tile is all of c, that
    with the batch's features in its rows.
    """
    N, D = batch.x.shape
    one_tile = is_one_tile(D)
    if one_tile and standardize and _as_they_are(batch, other):
        return _raw_gradient(batch, other, saved, diagonal, scale, along)
    out = fresh_like(batch.x)
    memories = [batch.memory() for _ in range(3)]
    mean = saved.square().sum(1) if one_tile else saved[N]
    for rows, features in panels_of(batch.x, by_rows=one_tile):
        x = batch.read(rows, features, memories[0])
        y = x if other is batch else other.read(rows, features, memories[1])
        h = torch.mm(y, saved.T, out=shaped(memories[2], y)) if one_tile else saved[:N, features]
        statistics_bwd(
            x,
            y,
            h,
            mean=mean[features] if standardize else None,
            diagonal=diagonal[features],
            factor=batch.factor[features],
            scale=scale,
            along=along[features],
            out=out[rows, features],
        )
    return out


def _as_they_are(*batches: Batch) -> bool:
    """Whether rows may be multiplied as they are: to ask is free on a CPU alone."""
    return all(
        batch.x.device.type == "cpu"
        and batch.x.dtype == batch.mean.dtype
        and bool((batch.centre() * batch.factor).abs().max() <= 1)
        and bool(batch.factor.min() > LEAST_FACTOR)
        for batch in batches
    )


def _raw_gradient(
    batch: Batch, other: Batch, c: Tensor, diagonal: Tensor, scale: Tensor, along: Tensor
) -> Tensor:
    """Return the gradient of one of two standardised batches; c [D, D] has its features in rows."""
    matrix = scale * c
    matrix.diagonal().add_(along)
    matrix *= batch.factor[:, None] * other.factor
    inside = scale * c.square().sum(1) + along * diagonal  # mean(du^ u^)
    slope = -inside * batch.factor.square()
    offset = -(matrix @ other.centre() + slope * batch.centre())
    own = torch.addcmul(offset, batch.x, slope, out=fresh_like(batch.x))
    return own.addmm_(other.x, matrix.T)
