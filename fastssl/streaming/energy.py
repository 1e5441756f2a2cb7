"""Cross product energy of two batches, without a D x D matrix, in PyTorch.

    u^ = (u - mean(u)) / sqrt(var(u) + eps)        per feature, or u - mean(u)
    c_ij = 1/N sum_n u^_ni v^_nj                   E = sum_{i != j} c_ij^2        diagonal c_ii

Backward, with g = dE, d the gradient of the diagonal and h the sums below:

    h_ni = sum_{j != i} c_ij v^_nj                 du^ = 2 g / N h + d v^ / N
    du = (du^ - mean(du^) - u^ mean(du^ u^)) / sqrt(var(u) + eps)

and likewise for v; for v = u both halves meet in one gradient, 4 g / N h + 2 d u^ / N. There are
two exact routes to E and h.

Features: tiles of c, each used for E and for both h while it is in the cache: 6 N D^2 operations,
half of them for v = u. h is kept for the backward pass; where one tile is all of c, the tile is.

Dual: E = <u^ u^T, v^ v^T> / N^2 less the squared diagonal, and h = (v^ v^T) u^ / N - c_ii v^. The
two N x N matrices are kept: 2 N^2 D operations with their symmetric halves, 4 N^2 D backward. What
is subtracted is small beside the rest, but where a few features hold nearly all variance. Those, at
most OUTLIERS of them, then stay out of the N x N matrix, and their rows of c are computed.

Features are standardised a panel at a time, whenever one is read. The first row is subtracted
before the mean, so that a mean far from zero costs no digits and u^ is centred, to rounding; so are
h and du^ then, and mean(du^) needs no pass. Where one tile is all of c and means are no larger than
deviations, as after a batch norm, that care costs more than it saves: the rows themselves are
multiplied, and means and factors are put into the D x D matrices.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like

TILE = 1024  # features of a tile of c, and rows that it is summed over at a time
GRAM_TILE = 256  # rows of a tile of u^ u^T
PANEL = 2**20  # numbers that are standardised at a time
OUTLIERS = 16
SHARE = 1 / 64  # of all squared variances, from which on a feature is an outlier
LEAST_FACTOR = 1e-15  # squares of deviations above its inverse may overflow float32 sums


class _Batch(NamedTuple):
    """A batch and what standardises its features."""

    x: Tensor  # [N, D], as given
    mean: Tensor  # [D], less the first row
    factor: Tensor  # [D]

    def read(self, rows: slice, features: slice | list[int], memory: Tensor) -> Tensor:
        """Return standardised features [B, P], written to memory."""
        x, factor = self.x[rows, features], self.factor[features]
        out = _shaped(memory, x)
        torch.sub(x, self.x[0, features].to(out.dtype), out=out)
        return torch.addcmul(-factor * self.mean[features], out, factor, out=out)

    def centre(self) -> Tensor:
        """Return the mean [D] itself."""
        return self.mean + self.x[0]


def saved_shapes(
    N: int, D: int, *, dual: bool, save: bool, two: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what ``cross_energy_fwd`` keeps for the gradients of u and, if there are two, v."""
    if dual:
        kept = (N, N)
    elif not save:
        return (0,), (0,)
    elif D <= TILE:
        return (D, D), (0,)
    else:
        kept = (N + 1, D)
    return kept, kept if two else (0,)


def cross_energy_fwd(
    u: Tensor, v: Tensor | None, eps: float, standardize: bool, dual: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return E [], the diagonal [D], u's mean and factor [D], v's, and what backward needs of each.

    That is v^ v^T / D and u^ u^T / D [N, N] on the dual route. On the other, and only if ``save``
    says so, it is c [D, D] without its diagonal where that is one tile, else h [N, D] with mean(h
    u^) in one more row. v = None stands for u; what would be v's is then empty.
    """
    batches = [_moments(x, eps, standardize) for x in (u, v) if x is not None]
    energy, diagonal, saved = (
        _dual_fwd(batches, standardize) if dual else _features_fwd(batches, standardize, save)
    )
    moments = [x for batch in batches for x in (batch.mean, batch.factor)]
    moments += [energy.new_empty(0) for _ in range(4 - len(moments))]
    saved += [energy.new_empty(0) for _ in range(2 - len(saved))]
    u_mean, u_factor, v_mean, v_factor = moments
    return energy, diagonal, u_mean, u_factor, v_mean, v_factor, saved[0], saved[1]


def cross_energy_bwd(
    denergy: Tensor,
    ddiagonal: Tensor,
    u: Tensor,
    v: Tensor | None,
    u_mean: Tensor,
    u_factor: Tensor,
    v_mean: Tensor,
    v_factor: Tensor,
    diagonal: Tensor,
    u_saved: Tensor,
    v_saved: Tensor,
    standardize: bool,
    dual: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of u and v, each where ``needs`` asks for it."""
    (N, D), sides = u.shape, 2 if v is None else 1  # v = u takes part on both sides
    dtype = diagonal.dtype
    a = _Batch(u, u_mean, u_factor)
    b = a if v is None else _Batch(v, v_mean, v_factor)
    one_tile = not dual and D <= TILE
    if one_tile:
        v_saved = u_saved.T
    scale = 2 * sides / N * denergy  # of h
    along = sides / N * ddiagonal  # of the other batch's rows
    if one_tile and standardize and _as_they_are(a, b):
        du = _raw_gradient(a, b, u_saved, diagonal, scale, along) if needs[0] else None
        dv = _raw_gradient(b, a, v_saved, diagonal, scale, along) if needs[1] else None
        return du, None if v is None else dv
    if dual:
        along = along - scale * diagonal
    memories = [_memory(a) for _ in range(3)]
    outliers = _outliers(diagonal) if dual and v is None and not standardize else []
    if one_tile:
        squares = u_saved.square()

    def gradient(batch: _Batch, other: _Batch, saved: Tensor) -> Tensor:
        out = fresh_like(batch.x)
        if outliers:
            far = batch.read(slice(None), outliers, out.new_empty(N * len(outliers), dtype=dtype))
            h_far = torch.zeros_like(far)
        if one_tile:  # mean(h u^)
            means = squares.sum(1 if batch is a else 0)
        elif not dual:
            means = saved[N]
        for rows, features in _panels(batch.x, by_rows=one_tile):
            x = batch.read(rows, features, memories[0])
            y = x if other is batch else other.read(rows, features, memories[1])
            if dual:
                h = torch.mm(saved, x, out=_shaped(memories[2], x)).mul_(D / N)
                if outliers:
                    c = _rows_of_c(far, x, outliers, features)
                    h.addmm_(far, c)
                    h_far.addmm_(x, c.T)
            elif one_tile:
                h = torch.mm(y, saved.T, out=_shaped(memories[2], y))
            else:
                h = saved[:N, features]
            factor, share = batch.factor[features], along[features]
            # du^ is centred, to rounding. What is left to be taken off is its part along u^.
            inside = torch.zeros_like(share)
            if standardize:
                mean = (h * x).mean(0) if dual else means[features]
                inside = scale * mean + share * diagonal[features]
            if y is x:
                x *= factor * (share - inside)
            else:
                x.mul_(-factor * inside).addcmul_(y, factor * share)
            torch.addcmul(x, h, scale * factor, out=out[rows, features])
        if outliers:
            share = sides / N * ddiagonal[outliers]
            out[:, outliers] = (scale * h_far).addcmul_(far, share).to(out.dtype)
        return out

    du = gradient(a, b, u_saved) if needs[0] else None
    return du, gradient(b, a, v_saved) if v is not None and needs[1] else None


def _as_they_are(*batches: _Batch) -> bool:
    """Whether rows may be multiplied as they are: to ask is free on a CPU alone."""
    return all(
        batch.x.device.type == "cpu"
        and batch.x.dtype == batch.mean.dtype
        and bool((batch.centre() * batch.factor).abs().max() <= 1)
        and bool(batch.factor.min() > LEAST_FACTOR)
        for batch in batches
    )


def _raw_gradient(
    batch: _Batch, other: _Batch, c: Tensor, diagonal: Tensor, scale: Tensor, along: Tensor
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


def _moments(x: Tensor, eps: float, standardize: bool) -> _Batch:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = torch.empty(x.shape[1], dtype=dtype, device=x.device)
    batch = _Batch(x, mean, torch.ones_like(mean))
    memory = _memory(batch)
    for rows, features in _panels(x):
        panel = x[rows, features]
        centred = torch.sub(panel, panel[0].to(dtype), out=_shaped(memory, panel))
        mean[features] = centred.mean(0)
        if standardize:
            centred -= mean[features]
            factor = centred.square_().mean(0).add_(eps).rsqrt_()
            if x.device.type != "cpu" or not factor.min() > LEAST_FACTOR:
                # Over a power of two, which rounds nothing, the largest deviation is at most 1.
                torch.sub(panel, panel[0].to(dtype), out=centred).sub_(mean[features])
                largest = torch.linalg.vector_norm(centred, torch.inf, dim=0).clamp_min_(1)
                power = torch.ldexp(torch.ones_like(factor), -torch.frexp(largest).exponent)
                squares = centred.mul_(power).square_().mean(0)
                factor = squares.addcmul_(power, power, value=eps).rsqrt_().mul_(power)
            batch.factor[features] = factor
    return batch


def _dual_fwd(batches: list[_Batch], standardize: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return E, the diagonal and what the gradients of u and v need."""
    N, D = batches[0].x.shape
    blocks = _cut(N, GRAM_TILE)
    pairs = [(i, j) for k, i in enumerate(blocks) for j in blocks[k:]]
    diagonal = torch.empty_like(batches[0].mean)
    grams = [diagonal.new_zeros(N, N) for _ in batches]
    memories = [_memory(batch) for batch in batches]
    outliers: list[int] = []
    energy = diagonal.new_zeros(())
    if not standardize:
        (batch,), (memory,) = batches, memories
        for rows, features in _panels(batch.x):
            diagonal[features] = batch.read(rows, features, memory).square_().mean(0)
        outliers = _outliers(diagonal)
    if outliers:
        far = batch.read(slice(None), outliers, diagonal.new_empty(N * len(outliers)))
    for rows, features in _panels(batches[0].x):
        panels = []
        for batch, gram, memory in zip(batches, grams, memories, strict=True):
            x = batch.read(rows, features, memory)
            if outliers:
                c = _rows_of_c(far, x, outliers, features)
                energy += c.square().sum()
                here = [i - features.start for i in outliers if features.start <= i < features.stop]
                c[:, here] = 0
                energy += c.square().sum()  # of the columns, which are these rows
                x[:, here] = 0
            for i, j in pairs:
                gram[i, j].addmm_(x[i], x[j].T)
            panels.append(x)
        if standardize:
            diagonal[features] = panels[0].mul_(panels[-1]).mean(0)
    for gram in grams:
        for i, j in pairs:
            if i != j:
                gram[j, i] = gram[i, j].T
        gram /= D
    inside = diagonal.index_fill(0, torch.tensor(outliers, dtype=torch.int64), 0)
    energy += (D / N) ** 2 * (grams[0] * grams[-1]).sum() - inside.square().sum()
    return energy, diagonal, grams[::-1]


def _outliers(variances: Tensor) -> list[int]:
    """Features with much of all squared variances: to ask is free on a CPU alone."""
    if variances.device.type != "cpu":
        return []
    squares = (variances / variances.max()).square()
    largest = squares.topk(min(OUTLIERS, len(squares)))
    found = largest.indices[largest.values > SHARE * squares.sum()]
    return sorted(found.tolist())


def _rows_of_c(far: Tensor, x: Tensor, outliers: list[int], features: slice) -> Tensor:
    """Rows of c of the outliers [O, P], at some features; 0 on the diagonal."""
    c = far.T @ x / len(x)
    for row, feature in enumerate(outliers):
        if features.start <= feature < features.stop:
            c[row, feature - features.start] = 0
    return c


def _features_fwd(
    batches: list[_Batch], standardize: bool, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return E, the diagonal and, to save, what the gradients of u and v need."""
    u, v = batches[0], batches[-1]
    N, D = u.x.shape
    tiles, blocks = _cut(D, TILE), _cut(N, TILE)
    diagonal = torch.empty_like(u.mean)
    energy = diagonal.new_zeros(())
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


def _cut(size: int, tile: int) -> list[slice]:
    """Cut range(size) into slices of equal length, at most tile."""
    step = math.ceil(size / math.ceil(size / tile))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _panels(x: Tensor, *, by_rows: bool = False) -> Iterator[tuple[slice, slice]]:
    """Cut a batch into panels of about PANEL numbers, all rows of some features or the reverse."""
    (N, D), everything = x.shape, slice(None)
    if by_rows:
        return ((rows, everything) for rows in _cut(N, max(1, PANEL // D)))
    return ((everything, features) for features in _cut(D, max(64, PANEL // N)))


def _memory(batch: _Batch) -> Tensor:
    """Memory for a panel."""
    N, D = batch.x.shape
    return batch.mean.new_empty(min(N * D, max(PANEL, 64 * N)))


def _shaped(memory: Tensor, like: Tensor) -> Tensor:
    return memory[: like.numel()].view(like.shape)
