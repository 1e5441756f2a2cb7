"""Cross product energy in PyTorch over N x N matrices: the cheaper route where N is below D.

    E = <u^ u^T, v^ v^T> / N^2 - sum_i c_ii^2        h = (v^ v^T) u^ / N - c_ii v^

The two matrices are kept: 2 N^2 D operations with their symmetric halves, 4 N^2 D backward.
Outliers of one batch that is not standardised are no part of them (energy_outliers.py).
"""

import torch
from torch import Tensor

from fastssl.streaming.energy_outliers import find_outliers, outlier_rows
from fastssl.streaming.energy_statistics import statistics_bwd
from fastssl.streaming.energy_tiles import Batch, cut, panels_of, shaped
from fastssl.streaming.memory import fresh_like

GRAM_TILE = 256  # rows of a tile of u^ u^T


def dual_fwd(u: Batch, v: Batch, standardize: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return E, the diagonal and what the gradients of u and v need: v^ v^T / D and u^ u^T / D."""
    (N, D), symmetric = u.x.shape, v is u
    batches = [u] if symmetric else [u, v]
    blocks = cut(N, GRAM_TILE)
    pairs = [(i, j) for k, i in enumerate(blocks) for j in blocks[k:]]
    diagonal = torch.empty_like(u.mean)
    grams = [diagonal.new_zeros(N, N) for _ in batches]
    memories = [batch.memory() for batch in batches]
    outliers: list[int] = []
    energy = diagonal.new_zeros(())
    if symmetric and not standardize:
        for rows, features in panels_of(u.x):
            diagonal[features] = u.read(rows, features, memories[0]).square_().mean(0)
        outliers = find_outliers(diagonal)
    if outliers:
        far = u.read(slice(None), outliers, diagonal.new_empty(N * len(outliers)))
    for rows, features in panels_of(u.x):
        panels = []
        for batch, gram, memory in zip(batches, grams, memories, strict=True):
            x = batch.read(rows, features, memory)
            if outliers:
                c = outlier_rows(far, x, outliers, features)
                energy += c.square().sum()
                here = [i - features.start for i in outliers if features.start <= i < features.stop]
                c[:, here] = 0
                energy += c.square().sum()  # of the columns, which are these rows
                x[:, here] = 0
            for i, j in pairs:
                gram[i, j].addmm_(x[i], x[j].T)
            panels.append(x)
        if standardize or not symmetric:
            diagonal[features] = panels[0].mul_(panels[-1]).mean(0)
    for gram in grams:
        for i, j in pairs:
            if i != j:
                gram[j, i] = gram[i, j].T
        gram /= D
    squares = diagonal.square()
    if outliers:
        squares[outliers] = 0
    energy += (D / N) ** 2 * (grams[0] * grams[-1]).sum() - squares.sum()
    return energy, diagonal, grams[::-1]


def dual_bwd(
    gram: Tensor,
    batch: Batch,
    other: Batch,
    diagonal: Tensor,
    scale: Tensor,
    along: Tensor,
    standardize: bool,
) -> Tensor:
    """Return the gradient of a batch, du^ being scale h + along v^; gram [N, N] is the other's."""
    N, D = batch.x.shape
    out = fresh_like(batch.x)
    memories = [batch.memory() for _ in range(3)]
    outliers = find_outliers(diagonal) if batch is other and not standardize else []
    if outliers:
        far = batch.read(slice(None), outliers, diagonal.new_empty(N * len(outliers)))
        h_far = torch.zeros_like(far)
    share = along - scale * diagonal  # c_ii v^ is in this h
    for rows, features in panels_of(batch.x):
        x = batch.read(rows, features, memories[0])
        y = x if other is batch else other.read(rows, features, memories[1])
        h = torch.mm(gram, x, out=shaped(memories[2], x)).mul_(D / N)
        if outliers:
            c = outlier_rows(far, x, outliers, features)
            h.addmm_(far, c)
            h_far.addmm_(x, c.T)
        statistics_bwd(
            x,
            y,
            h,
            mean=(h * x).mean(0) if standardize else None,
            diagonal=diagonal[features],
            factor=batch.factor[features],
            scale=scale,
            along=share[features],
            out=out[rows, features],
        )
    if outliers:
        out[:, outliers] = (scale * h_far).addcmul_(far, along[outliers]).to(out.dtype)
    return out
