"""Cross product energy of two batches, without a D x D matrix, in PyTorch.

    u^ = (u - mean(u)) / sqrt(var(u) + eps)        per feature, or u - mean(u)
    c_ij = 1/N sum_n u^_ni v^_nj                   E = sum_{i != j} c_ij^2        diagonal c_ii

Backward, with g = dE, d the gradient of the diagonal and h the sums below:

    h_ni = sum_{j != i} c_ij v^_nj                 du^ = 2 g / N h + d v^ / N
    du = (du^ - mean(du^) - u^ mean(du^ u^)) / sqrt(var(u) + eps)

and likewise for v; for v = u both halves meet in one gradient, 4 g / N h + 2 d u^ / N. Two exact
routes lead there.

Features: tiles of c, each used for E and for both h while it is in the cache. The gradients are
ready, up to g, before the backward pass: 6 N D^2 operations in all, half of them for v = u.

Dual: E = <u^ u^T, v^ v^T> / N^2 less the squared diagonal, and h = (v^ v^T) u^ / N - c_ii v^. The
two N x N matrices are kept: 2 N^2 D operations with their symmetric halves, 4 N^2 D backward.

Features are standardised a panel at a time, whenever one is read. The first row is subtracted
before the mean, so that a mean far from zero costs no digits and u^ is centred, to rounding; so is
h then, and mean(du^) needs no pass.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 1024  # features of a tile of c, and rows that it is summed over at a time
GRAM_TILE = 256  # rows of a tile of u^ u^T
PANEL = 2**19  # numbers that are standardised at a time elsewhere; a core's cache holds them

ALL = slice(None)


class _Batch(NamedTuple):
    """A batch and what standardises its features."""

    x: Tensor  # [N, D], as given
    mean: Tensor  # [D], less the first row
    factor: Tensor  # [D]

    def read(self, rows: slice, features: slice, memory: Tensor) -> Tensor:
        """Return standardised features [B, P], written to memory."""
        x, factor = self.x[rows, features], self.factor[features]
        out = _shaped(memory, *x.shape)
        torch.sub(x, self.x[0, features].to(out.dtype), out=out)
        return torch.addcmul(-factor * self.mean[features], out, factor, out=out)


def cross_energy_fwd(
    u: Tensor, v: Tensor | None, eps: float, standardize: bool, dual: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return E [], the diagonal [D], u's mean and factor [D], v's, and what backward needs of each.

    That is v^ v^T / D and u^ u^T / D [N, N] on the dual route, on the other h [N, D] with a last
    row, mean(h u^), there only if ``save`` says so. v = None stands for u; what would be v's is
    then empty.
    """
    batches = [_moments(x, eps, standardize) for x in (u, v) if x is not None]
    energy, diagonal, saved = (_dual_fwd if dual else _features_fwd)(batches, save)
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
    a = _Batch(u, u_mean, u_factor)
    b = a if v is None else _Batch(v, v_mean, v_factor)
    scale = 2 * sides / N * denergy  # of h
    along = sides / N * ddiagonal  # of the other batch's rows
    if dual:
        along = along - scale * diagonal
    memories = [_memory(a) for _ in range(3)]

    def gradient(batch: _Batch, other: _Batch, saved: Tensor) -> Tensor:
        out = torch.empty_like(batch.x, memory_format=torch.contiguous_format)
        gram = D / N * scale * saved if dual else None
        for features in _panels(batch.x):
            x = batch.read(ALL, features, memories[0])
            y = x if other is batch else other.read(ALL, features, memories[1])
            factor, share = batch.factor[features], along[features]
            if gram is None:
                h, h_factor = saved[:N, features], scale * factor
            else:
                h, h_factor = torch.mm(gram, x, out=_shaped(memories[2], *x.shape)), factor
            # All is centred, to rounding: what remains to be taken off is the part along u^.
            if not standardize:
                inside = torch.zeros_like(share)
            elif gram is None:
                inside = scale * saved[N, features] + share * diagonal[features]
            else:
                inside = (h * x).mean(0) + share * diagonal[features]
            if y is x:
                x *= factor * (share - inside)
            else:
                x.mul_(-factor * inside).addcmul_(y, factor * share)
            torch.addcmul(x, h, h_factor, out=out[:, features])
        return out

    du = gradient(a, b, u_saved) if needs[0] else None
    return du, gradient(b, a, v_saved) if v is not None and needs[1] else None


def _moments(x: Tensor, eps: float, standardize: bool) -> _Batch:
    mean = torch.empty(
        x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    )
    batch = _Batch(x, mean, torch.ones_like(mean))
    memory = _memory(batch)
    for features in _panels(x):
        panel = x[:, features]
        centred = torch.sub(panel, panel[0].to(mean.dtype), out=_shaped(memory, *panel.shape))
        mean[features] = centred.mean(0)
        if standardize:
            centred -= mean[features]
            batch.factor[features] = centred.square_().mean(0).add_(eps).rsqrt_()
    return batch


def _dual_fwd(batches: list[_Batch], save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return E, the diagonal and the matrices that u's and v's gradients multiply."""
    N, D = batches[0].x.shape
    blocks = [slice(start, start + GRAM_TILE) for start in range(0, N, GRAM_TILE)]
    pairs = [(i, j) for k, i in enumerate(blocks) for j in blocks[k:]]
    diagonal = torch.empty_like(batches[0].mean)
    grams = [diagonal.new_zeros(N, N) for _ in batches]
    memories = [_memory(batch) for batch in batches]
    for features in _panels(batches[0].x):
        panels = [
            batch.read(ALL, features, memory)
            for batch, memory in zip(batches, memories, strict=True)
        ]
        for gram, x in zip(grams, panels, strict=True):
            for i, j in pairs:
                gram[i, j].addmm_(x[i], x[j].T)
        diagonal[features] = panels[0].mul_(panels[-1]).mean(0)
    for gram in grams:
        for i, j in pairs:
            if i != j:
                gram[j, i] = gram[i, j].T
        gram /= D
    energy = (D / N) ** 2 * (grams[0] * grams[-1]).sum() - diagonal.square().sum()
    return energy, diagonal, grams[::-1]


def _features_fwd(batches: list[_Batch], save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return E, the diagonal and, to save, h of each batch."""
    u, v = batches[0], batches[-1]
    N, D = u.x.shape
    size = -(-D // -(-D // TILE))
    tiles = [slice(start, min(start + size, D)) for start in range(0, D, size)]
    diagonal = torch.empty_like(u.mean)
    energy = diagonal.new_zeros(())
    sums = [diagonal.new_zeros(N + 1, D) for _ in batches] if save else []
    blocks = [slice(start, min(start + TILE, N)) for start in range(0, N, TILE)]
    memories = diagonal.new_empty(2, size * min(N, TILE))
    c_memory = diagonal.new_empty(size * size)
    for k, i in enumerate(tiles):
        for j in tiles[k:] if u is v else tiles:
            c = _shaped(c_memory, i.stop - i.start, j.stop - j.start).zero_()
            for rows in blocks:
                x = u.read(rows, i, memories[0])
                y = x if u is v and i == j else v.read(rows, j, memories[1])
                c.addmm_(x.T, y)
            c /= N
            if i == j:
                diagonal[i] = c.diagonal()
                c.fill_diagonal_(0)
            mirror = u is v and i != j  # the tile stands for its mirror image too
            for rows in blocks if save else []:
                if len(blocks) > 1:
                    x = u.read(rows, i, memories[0])
                    y = x if u is v and i == j else v.read(rows, j, memories[1])
                sums[0][rows, i].addmm_(y, c.T)
                if mirror or v is not u:
                    sums[-1][rows, j].addmm_(x, c)
            energy += (2 if mirror else 1) * c.square_().sum()
            if save:
                sums[0][N, i] += c.sum(1)
                if mirror or v is not u:
                    sums[-1][N, j] += c.sum(0)
    return energy, diagonal, sums


def _panels(x: Tensor) -> Iterator[slice]:
    """Cut the features of a batch into panels of about PANEL numbers."""
    D, size = x.shape[1], _panel_size(x)
    return (slice(start, min(start + size, D)) for start in range(0, D, size))


def _panel_size(x: Tensor) -> int:
    return min(x.shape[1], max(64, PANEL // len(x)))


def _memory(batch: _Batch) -> Tensor:
    """Memory for a panel."""
    return batch.mean.new_empty(len(batch.x) * _panel_size(batch.x))


def _shaped(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)
