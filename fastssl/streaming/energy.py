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
before the mean, so that a mean far from zero costs no digits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 512  # features of a tile of c
GRAM_TILE = 256  # rows of a tile of u^ u^T
PANEL = 2**19  # numbers that are standardised at a time; a core's cache holds them


class _Batch(NamedTuple):
    """A batch and what standardises its features."""

    x: Tensor  # [N, D], as given
    mean: Tensor  # [D], less the first row
    factor: Tensor  # [D]

    def read(self, features: slice) -> Tensor:
        """Return standardised features [N, P], in memory of their own."""
        x = self.x[:, features].to(self.mean.dtype)
        return (x - x[0]).sub_(self.mean[features]).mul_(self.factor[features])


def cross_energy_fwd(
    u: Tensor, v: Tensor | None, eps: float, standardize: bool, dual: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return E [], the diagonal [D], u's mean and factor [D], v's, and what backward needs of each.

    That is v^ v^T / D and u^ u^T / D [N, N] on the dual route, u's and v's h [N, D] on the other,
    there only if ``save`` says so. v = None stands for u; what would be v's is then empty.
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

    def gradient(batch: _Batch, other: _Batch, saved: Tensor) -> Tensor:
        gram = D / N * scale * saved if dual else None
        out = torch.empty_like(batch.x, memory_format=torch.contiguous_format)
        for features in _panels(batch.x):
            x = batch.read(features)
            dx = (x if other is batch else other.read(features)) * along[features]
            if gram is None:
                dx.addcmul_(saved[:, features], scale)
            else:
                dx.addmm_(gram, x)
            dx -= dx.mean(0)
            if standardize:
                dx.addcmul_(x, (dx * x).mean(0), value=-1)
            out[:, features] = dx.mul_(batch.factor[features])
        return out

    du = gradient(a, b, u_saved) if needs[0] else None
    return du, gradient(b, a, v_saved) if v is not None and needs[1] else None


def _moments(x: Tensor, eps: float, standardize: bool) -> _Batch:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = torch.empty(x.shape[1], dtype=dtype, device=x.device)
    batch = _Batch(x, mean, torch.ones_like(mean))
    for features in _panels(x):
        panel = x[:, features].to(dtype)
        panel = panel - panel[0]
        mean[features] = panel.mean(0)
        if standardize:
            panel -= mean[features]
            batch.factor[features] = panel.square_().mean(0).add_(eps).rsqrt_()
    return batch


def _dual_fwd(batches: list[_Batch], save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return E, the diagonal and the matrices that u's and v's gradients multiply."""
    N, D = batches[0].x.shape
    blocks = [slice(start, start + GRAM_TILE) for start in range(0, N, GRAM_TILE)]
    pairs = [(i, j) for k, i in enumerate(blocks) for j in blocks[k:]]
    diagonal = torch.empty_like(batches[0].mean)
    grams = [diagonal.new_zeros(N, N) for _ in batches]
    for features in _panels(batches[0].x):
        panels = [batch.read(features) for batch in batches]
        for gram, x in zip(grams, panels, strict=True):
            for i, j in pairs:
                gram[i, j].addmm_(x[i], x[j].T)
        diagonal[features] = (panels[0] * panels[-1]).mean(0)
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
    sums = [diagonal.new_zeros(N, D) for _ in batches] if save else []
    for k, i in enumerate(tiles):
        x = u.read(i)
        for j in tiles[k:] if u is v else tiles:
            mirror = u is v and i != j  # the tile stands for its mirror image too
            y = x if u is v and i == j else v.read(j)
            c = (x.T @ y).div_(N)
            if i == j:
                diagonal[i] = c.diagonal()
                c.fill_diagonal_(0)
            if save:
                sums[0][:, i].addmm_(y, c.T)
                if mirror or v is not u:
                    sums[-1][:, j].addmm_(x, c)
            energy += (2 if mirror else 1) * c.square_().sum()
    return energy, diagonal, sums


def _panels(x: Tensor) -> Iterator[slice]:
    """Cut the features of a batch into panels of about PANEL numbers."""
    N, D = x.shape
    size = max(64, PANEL // N)
    return (slice(start, min(start + size, D)) for start in range(0, D, size))
