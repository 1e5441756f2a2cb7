"""Similarity log-sum-exp, tile by tile in PyTorch.

    x_ij = s sim(q_i, k_j)        L_i = log sum_j exp(x_ij)        C_j = log sum_i exp(x_ij)

over the pairs (i, j) that are visible, with the cosine or the plain product for sim. Backward, with
the upstream gradients g of L and h of C, and ^ for a row at unit length where sim is the cosine:

    W_ij = g_i exp(x_ij - L_i) + h_j exp(x_ij - C_j)
    dq^_i = s sum_j W_ij k^_j        dk^_j = s sum_i W_ij q^_i        ds = sum_ij W_ij sim(q_i, k_j)

and through the norm dq_i = (dq^_i - q^_i <q^_i, dq^_i>) / |q_i|. When q is k the matrix is
symmetric, C is L, and one tile stands for its mirror image too: half of the tiles serve all rows.

Kept for the backward pass are a row's top and total, L = top + log(total): exp(x - top) / total
has the digits that a rounded L would cost. Where scores are known to be at most MAX_UNSHIFTED, the
exponentials, their sums and the weights g / total fit float32 with a top of 0: no maximum is looked
for, and one exponential serves a row and a column. So it does in any tile whose rows and columns
have maxima within MAX_SPREAD, relative to the largest of them. To know either is free
on a CPU; on another device it would be a host synchronisation, so there each is shifted by its own.

Where one tile holds all scores of two views, its exponentials are kept for the backward pass.
Otherwise, beside rows and gradients, two tiles are held at a time. They stay in a core's
second-level cache, as do the rows that they multiply. Half-precision rows are multiplied, and their
gradients accumulated, in float32.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like

TILE = 512  # rows and columns of a tile
WIDE = 256  # features from which on a tile has twice as many: products take longer than the rest
MAX_UNSHIFTED = 40.0
MAX_SPREAD = 32.0
LEAST_EXPONENT = {torch.float32: -60.0, torch.float64: -600.0}
NORM_EPS = 1e-12
SAFE_SQUARES = 1e-15, 1e15  # lengths between which float32 squares can be summed as they stand

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Block(NamedTuple):
    """Consecutive rows of a matrix."""

    rows: slice  # their place among all rows
    x: Tensor  # [B, D], as given
    factor: Tensor  # [B, 1], sqrt(s), over their lengths where similarities are cosines
    ids: Tensor | None  # [B]
    grad: Tensor | None  # [B, D], accumulates the gradient of the scaled rows

    def scaled(self) -> Tensor:
        """The rows times their factors: products are scores, the same bits from either side."""
        return self.x * self.factor


class _Sums(NamedTuple):
    """The exponentials that rows or columns have seen: log-sum-exp = top + log(total)."""

    top: Tensor
    total: Tensor

    @classmethod
    def none_yet(cls, count: int, like: Tensor, unshifted: bool) -> "_Sums":
        return cls(like.new_full((count,), 0 if unshifted else -torch.inf), like.new_zeros(count))

    def of(self, rows: slice) -> "_Sums":
        return _Sums(self.top[rows], self.total[rows])

    def lse(self, less: Tensor | float = 0) -> Tensor:
        # Taken first, the difference of two large numbers is exact; the logarithm is small.
        return (self.top - less) + self.total.log()


class _Share(NamedTuple):
    """What rows or columns put into the weights: weight exp(x - top), and dlse of their pairs."""

    top: Tensor
    weight: Tensor
    dlse: Tensor

    @classmethod
    def of(cls, sums: _Sums, dlse: Tensor, gain: Tensor) -> "_Share":
        dlse = dlse / gain
        # What sees nothing has no share in any gradient; without the guards it would be 0 * inf.
        weight = dlse / sums.total.masked_fill(sums.total == 0, torch.inf)
        return cls(sums.top.masked_fill(sums.top == -torch.inf, 0), weight, dlse)


class _Positives(NamedTuple):
    """Which rows are a row's positives, and how much."""

    classes: Tensor  # [N]
    weights: Tensor | None  # [C, C]; None: 1 within a class and 0 without
    counts: Tensor  # [N], the sum of a row's weights

    def tile(self, row: _Block, col: _Block, dtype: torch.dtype) -> Tensor:
        """Weights [B, C] of the columns for the rows; a row is not its own positive."""
        i, j = self.classes[row.rows], self.classes[col.rows]
        if self.weights is None:
            tile = (i[:, None] == j).to(dtype)
        else:
            tile = self.weights[i][:, j].to(dtype)
        return tile.fill_diagonal_(0) if row is col else tile


class _Tile(NamedTuple):
    """Scores [B, C] of a row block and a column block, -inf where invisible."""

    row: _Block
    col: _Block
    scores: Tensor
    q: Tensor  # the scaled rows
    k: Tensor
    pairs: tuple[int, slice, slice] | None  # diagonal with the pairs, their rows and columns


def similarity_lse_fwd(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return lse, its top and total [M], and the inverse lengths of q's rows [M] and k's [N].

    Without normalize the inverse lengths are empty.
    """
    q_rnorm, k_rnorm = _rnorm(q, normalize), _rnorm(k, normalize)
    rows, cols = _blocks([q], q_rnorm, scale, row_ids), _blocks([k], k_rnorm, scale, col_ids)
    sums, _, _ = _sums(rows, cols, _unshifted(scale, q, k, normalize))
    return sums.lse(), *sums, q_rnorm, k_rnorm


def similarity_lse_bwd(
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    top: Tensor,
    total: Tensor,
    q_rnorm: Tensor,
    k_rnorm: Tensor,
    normalize: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of q, k and scale, each where ``needs`` asks for it."""
    dq, dk = _gradients(q, k, top, needs)
    rows = _blocks([q], q_rnorm, scale, row_ids, [dq])
    cols = _blocks([k], k_rnorm, scale, col_ids, [dk])
    gain = _gain(dlse)
    unshifted = _unshifted(scale, q, k, normalize)
    if unshifted:  # top may be that of more columns, if these are some of a ring's
        top, total = torch.zeros_like(top), total * top.exp()
    _add_gradients(rows, cols, _Share.of(_Sums(top, total), dlse, gain), None, unshifted)
    dscale = _through_scaling(rows, scale, gain, normalize)
    _through_scaling(cols, scale, gain, normalize)
    return _as_asked((dq, dk, dscale), (q, k, top), needs)


def pair_lse_fwd(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    first: int,
    columns: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return lse less the score of the row's pair, column first + i, and the same of columns.

    Then come top and total of the rows and of the columns, and the inverse lengths. What belongs to
    columns is empty without columns, inverse lengths are without normalize.
    """
    q_rnorm, k_rnorm = _rnorm(q, normalize), _rnorm(k, normalize)
    row_ids = None if ids is None else ids[first : first + len(q)]
    rows, cols = _blocks([q], q_rnorm, scale, row_ids), _blocks([k], k_rnorm, scale, ids)
    unshifted = _unshifted(scale, q, k, normalize)
    sums, col_sums, pairs = _sums(rows, cols, unshifted, first=first, columns=columns)
    col_lse = col_sums.lse(pairs) if columns else torch.empty_like(col_sums.total)
    return sums.lse(pairs), col_lse, *sums, *col_sums, q_rnorm, k_rnorm


def pair_lse_bwd(
    drows: Tensor,
    dcols: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    first: int,
    columns: bool,
    top: Tensor,
    total: Tensor,
    col_top: Tensor,
    col_total: Tensor,
    q_rnorm: Tensor,
    k_rnorm: Tensor,
    normalize: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of q, k and scale, each where ``needs`` asks for it."""
    dq, dk = _gradients(q, k, top, needs)
    row_ids = None if ids is None else ids[first : first + len(q)]
    rows = _blocks([q], q_rnorm, scale, row_ids, [dq])
    cols = _blocks([k], k_rnorm, scale, ids, [dk])
    gain = _gain(torch.cat([drows, dcols]) if columns else drows)
    row_share = _Share.of(_Sums(top, total), drows, gain)
    col_share = _Share.of(_Sums(col_top, col_total), dcols, gain) if columns else None
    unshifted = _unshifted(scale, q, k, normalize)
    _add_gradients(rows, cols, row_share, col_share, unshifted, first=first)
    dscale = _through_scaling(rows, scale, gain, normalize)
    _through_scaling(cols, scale, gain, normalize)
    return _as_asked((dq, dk, dscale), (q, k, top), needs)


def class_lse_fwd(
    z: Tensor, scale: Tensor, classes: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lse over the other rows, less the mean score of the row's positives; top and total.

    Positives of a row are the other rows of its class, or with weights [C, C] the other rows by the
    weights of their classes. Last come the positives' summed weights; where they are 0 the first
    result is 0. All are [N], and similarities are plain products.
    """
    blocks = _blocks([z], _rnorm(z, False), scale, None)
    positives = _Positives(classes, weights, torch.zeros_like(z[:, 0], dtype=scale.dtype))
    unshifted = not _has_lone_positives(classes, weights) and _unshifted(scale, z, z, False)
    sums, _, seen = _sums(blocks, None, unshifted, positives=positives)
    lonely = positives.counts <= 0
    less = seen / positives.counts.masked_fill(lonely, 1)
    return sums.lse(less).masked_fill(lonely, 0), *sums, positives.counts


def class_lse_bwd(
    dlse: Tensor,
    z: Tensor,
    scale: Tensor,
    classes: Tensor,
    weights: Tensor | None,
    top: Tensor,
    total: Tensor,
    count: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of z and scale, each where ``needs`` asks for it."""
    dz = fresh_like(z, top.dtype, zero=True)
    blocks = _blocks([z], _rnorm(z, False), scale, None, [dz])
    dlse = dlse.masked_fill(count <= 0, 0)
    gain = _gain(dlse)
    share = _Share.of(_Sums(top, total), dlse, gain)
    positives = _Positives(classes, weights, count)
    unshifted = not _has_lone_positives(classes, weights) and _unshifted(scale, z, z, False)
    _add_gradients(blocks, None, share, share, unshifted, positives=positives)
    dscale = _through_scaling(blocks, scale, gain, False) / 2  # every pair was counted twice
    need_z, need_scale = needs
    return dz.to(z.dtype) if need_z else None, dscale if need_scale else None


def fixed_keys_lse_fwd(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return lse [M] over cosines and, with gradients, its derivatives by q [M, D] and scale [M].

    Keys that get no gradient need not be kept: the mean of the keys, weighted as the softmax
    weights them, is all that a row's gradient needs, and it is gathered on the way.
    """
    q_rnorm = _rnorm(q)
    dq = fresh_like(q, scale.dtype, zero=True) if gradients else None
    rows = _blocks([q], q_rnorm, scale, row_ids, [dq])
    cols = _blocks([k], _rnorm(k), scale, col_ids)
    unshifted = _unshifted(scale, q, k, True)
    sums = _Sums.none_yet(len(q), scale, unshifted)
    for row, _, scores, _, keys, _ in _tiles(rows, cols):
        if unshifted:
            sums.total[row.rows] += scores.exp_().sum(1)
        else:
            kept = _merge(sums.of(row.rows), scores)
            if row.grad is not None:
                row.grad.mul_(kept[:, None])
        if row.grad is not None:
            row.grad.addmm_(scores, keys)
    if dq is None:
        return sums.lse(), scale.new_empty(0, 0), scale.new_empty(0)
    dq /= sums.total.masked_fill(sums.total == 0, torch.inf)[:, None]
    dscale = torch.cat([_along(row, scale) for row in rows])
    _through_scaling(rows, scale, torch.ones_like(scale), True)
    return sums.lse(), dq.to(q.dtype), dscale


def two_view_lse_fwd(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return lse less the row's positive, its top and total, and the inverse lengths, all [2N].

    Last comes exp(x - top) [2N, 2N] where one tile holds it, else an empty tensor.
    """
    if 2 * len(z0) <= TILE:
        return _one_tile_fwd(z0, z1, scale, ids)
    rnorm = torch.cat([_rnorm(z0), _rnorm(z1)])
    blocks = _blocks([z0, z1], rnorm, scale, _twice(ids))
    sums, _, pairs = _sums(blocks, None, _unshifted(scale, z0, z1, True), first=len(z0))
    return sums.lse(pairs.repeat(2)), *sums, rnorm, scale.new_empty(0, 0)


def two_view_lse_bwd(
    dlse: Tensor,
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    top: Tensor,
    total: Tensor,
    rnorm: Tensor,
    tile: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of z0, z1 and scale, each where ``needs`` asks for it."""
    if len(tile):
        return _one_tile_bwd(dlse, z0, z1, scale, total, rnorm, tile, needs)
    need_0, need_1, need_scale = needs
    dz0 = fresh_like(z0, top.dtype, zero=True) if need_0 or need_scale else None
    dz1 = fresh_like(z1, top.dtype, zero=True) if need_1 or need_scale else None
    blocks = _blocks([z0, z1], rnorm, scale, _twice(ids), [dz0, dz1])
    gain = _gain(dlse)
    share = _Share.of(_Sums(top, total), dlse, gain)
    unshifted = _unshifted(scale, z0, z1, True)
    _add_gradients(blocks, None, share, share, unshifted, first=len(z0))
    dscale = (
        _through_scaling(blocks, scale, gain, True) / 2
    )  # every pair was counted from both ends
    return _as_asked((dz0, dz1, dscale), (z0, z1, top), needs)


def _one_tile_fwd(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, z = len(z0), torch.cat([z0, z1])
    rnorm = _rnorm(z)
    rows = z * (rnorm * scale.sqrt())[:, None]
    scores = rows @ rows.T
    positive = scores.diagonal(n).repeat(2)
    if ids is not None:
        ids = ids.repeat(2)
        scores.masked_fill_(ids[:, None] == ids, -torch.inf)
    else:
        for offset in (0, n, -n):
            scores.diagonal(offset).fill_(-torch.inf)
    if _unshifted(scale, z0, z1, True):
        top = torch.zeros_like(rnorm)
    else:
        top = scores.amax(1)
        scores -= top.masked_fill(top == -torch.inf, 0)[:, None]
    total = _exp_(scores).sum(1)
    return (top - positive) + total.log(), top, total, rnorm, scores


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
    gain = _gain(dlse)
    dlse = dlse / gain
    weight = dlse / total.masked_fill(total == 0, torch.inf)
    if _unshifted(scale, z0, z1, True):
        weights = (weight[:, None] + weight).mul_(tile)
    else:
        weights = tile * weight[:, None]
        weights = drop_negligible_(weights + weights.T)
    both = dlse[:n] + dlse[n:]
    for offset in (n, -n):
        weights.diagonal(offset).copy_(both).neg_()
    factor = (rnorm * scale.sqrt())[:, None]
    dz = weights @ (z * factor)
    dscale = _through_scaling([_Block(slice(0, 2 * n), z, factor, None, dz)], scale, gain, True)
    # Every pair was counted from both of its ends. An operator's results may not share memory.
    return _as_asked((dz[:n].clone(), dz[n:].clone(), dscale / 2), (z0, z1, rnorm), needs)


def _sums(
    rows: list[_Block],
    cols: list[_Block] | None,
    unshifted: bool,
    first: int | None = None,
    columns: bool = False,
    positives: _Positives | None = None,
) -> tuple[_Sums, _Sums, Tensor]:
    """Return the sums of rows and, with columns, of columns, and the scores of the pairs.

    cols=None: the rows with each other, half of the tiles. With first, row i's pair is column
    first + i; it is not part of the sums. With positives of rows, their weighted scores are summed
    in the place of pairs, and their weights are counted.
    """
    like, n_rows = rows[0].factor, rows[-1].rows.stop
    n_cols = cols[-1].rows.stop if cols and columns else 0
    row_sums = _Sums.none_yet(n_rows, like, unshifted)
    col_sums = row_sums if cols is None else _Sums.none_yet(n_cols, like, unshifted)
    pairs = like.new_empty(0 if first is None else n_rows if cols else n_rows - first)
    if positives is not None:
        pairs = like.new_zeros(n_rows)
    for row, col, scores, _, _, _ in _tiles(rows, cols, first=first, pairs=pairs):
        mirror = columns or (cols is None and col is not row)
        if positives is not None:
            _sum_positives(positives, pairs, row, col, scores)
        if unshifted:
            scores.exp_()
            row_sums.total[row.rows] += scores.sum(1)
            if mirror:
                col_sums.total[col.rows] += scores.sum(0)
        elif not mirror:
            _merge(row_sums.of(row.rows), scores)
        elif positives is not None or not _merge_both(
            row_sums.of(row.rows), col_sums.of(col.rows), scores
        ):
            _merge(col_sums.of(col.rows), scores, dim=0, out=torch.empty_like(scores))
            _merge(row_sums.of(row.rows), scores)
    return row_sums, col_sums, pairs


def _sum_positives(
    positives: _Positives, sums: Tensor, row: _Block, col: _Block, scores: Tensor
) -> None:
    """Add a tile's weighted scores to the sums of rows and, mirrored, of columns; count weights."""
    if row is col:
        scores.fill_diagonal_(0)  # of weight 0, but nothing times -inf is 0
    weights = positives.tile(row, col, scores.dtype)
    positives.counts[row.rows] += weights.sum(1)
    sums[row.rows] += (weights * scores).sum(1)
    if row is not col:
        if positives.weights is not None:
            weights = positives.tile(col, row, scores.dtype).T
        positives.counts[col.rows] += weights.sum(0)
        sums[col.rows] += (weights * scores).sum(0)
    else:
        scores.fill_diagonal_(-torch.inf)


def _merge(sums: _Sums, scores: Tensor, dim: int = 1, out: Tensor | None = None) -> Tensor:
    """Take a tile's scores into the maxima and sums of its rows, or with dim=0 columns, in place.

    The scores, or out, become exp(score - top). Returns the factor by which the sums so far shrank.
    """
    larger = torch.maximum(sums.top, scores.amax(dim))
    shift = larger.masked_fill(larger == -torch.inf, 0)  # a row that has seen nothing yet
    kept = torch.exp(sums.top - shift)
    exponentials = torch.sub(scores, shift.unsqueeze(dim), out=scores if out is None else out)
    sums.total.mul_(kept).add_(_exp_(exponentials).sum(dim))
    sums.top.copy_(larger)
    return kept


def _merge_both(rows: _Sums, cols: _Sums, scores: Tensor) -> bool:
    """``_merge`` for rows and columns with one exponential, if their maxima allow; say whether."""
    if scores.device.type != "cpu":  # to ask would be a host synchronisation
        return False
    maxima = scores.amax(1), scores.amax(0)
    shift = maxima[0].max()
    if not shift - min(top.min() for top in maxima) <= MAX_SPREAD:
        return False
    _exp_(scores.sub_(shift))
    for sums, top, dim in zip((rows, cols), maxima, (1, 0), strict=True):
        larger = torch.maximum(sums.top, top)
        sums.total.mul_(torch.exp(sums.top - larger))
        sums.total.add_(scores.sum(dim) * torch.exp(shift - larger))
        sums.top.copy_(larger)
    return True


def _exp_(x: Tensor) -> Tensor:
    """Exponentials, in place; what is negligible beside 1 is 0, since subnormals are slow."""
    return drop_negligible_(x.clamp_min_(LEAST_EXPONENT[x.dtype]).exp_())


def drop_negligible_(weights: Tensor) -> Tensor:
    """Make 0, in place, what is negligible beside 1: products of subnormal numbers are slow."""
    least = 2 * math.exp(LEAST_EXPONENT[weights.dtype])
    dropped: Tensor = torch.ops.aten.hardshrink.out(weights, least, out=weights)
    return dropped


def _has_lone_positives(classes: Tensor, weights: Tensor | None) -> bool:
    """Whether a row may have one positive only, whose softmax can be 1 to the last digit.

    To be as exact, the exponentials of a row are then taken relative to its own maximum.
    """
    if weights is not None or classes.device.type != "cpu":
        return True
    _, members = torch.unique(classes, return_counts=True)
    return bool((members == 2).any())


def _may_be_subnormal(row_share: _Share, col_share: _Share | None) -> bool:
    """Whether a weight times exp(-MAX_UNSHIFTED), the least exponential, is near 0 but not 0."""
    if row_share.weight.device.type != "cpu":
        return False
    least = torch.finfo(row_share.weight.dtype).tiny * math.exp(MAX_UNSHIFTED) * 1e4
    return any(
        bool(((share.weight != 0) & (share.weight.abs() < least)).any())
        for share in (row_share, col_share or row_share)
    )


def _gain(dlse: Tensor) -> Tensor:
    """The power of two next to the largest gradient: weights are taken relative to it."""
    peak = dlse.abs().max()
    usable = peak.isfinite() & (peak > 0)
    one = torch.ones_like(peak)
    return torch.ldexp(one, torch.frexp(torch.where(usable, peak, one)).exponent)


def _add_gradients(
    rows: list[_Block],
    cols: list[_Block] | None,
    row_share: _Share,
    col_share: _Share | None,
    unshifted: bool,
    first: int | None = None,
    positives: _Positives | None = None,
) -> None:
    """Add sum_j W_ij k_j to the rows' gradients and sum_i W_ij q_i to the columns', scaled rows.

    cols, first and positives as in ``_sums``; W holds the share of pairs or positives too.
    """
    like = rows[0].factor
    buffer = like.new_empty(len(rows[0].x) * len((cols or rows)[0].x))
    subnormal = not unshifted or _may_be_subnormal(row_share, col_share)
    for row, col, scores, q, k, pairs in _tiles(rows, cols, first=first, gradients=True):
        row_top, row_weight, row_dlse = (part[row.rows] for part in row_share)
        other = buffer[: scores.numel()].view_as(scores)
        if col_share is None:
            if not unshifted:
                scores.sub_(row_top[:, None]).clamp_min_(LEAST_EXPONENT[scores.dtype])
            scores.exp_().mul_(row_weight[:, None])
        else:
            col_top, col_weight, col_dlse = (part[col.rows] for part in col_share)
            if unshifted:
                scores.exp_().mul_(torch.add(row_weight[:, None], col_weight, out=other))
            elif positives is None and (shift := _common_shift(row_top, col_top)) is not None:
                row_weight = row_weight * torch.exp(shift - row_top)
                col_weight = col_weight * torch.exp(shift - col_top)
                scores.sub_(shift).clamp_min_(LEAST_EXPONENT[scores.dtype]).exp_()
                scores *= torch.add(row_weight[:, None], col_weight, out=other)
            else:
                _exp_(torch.sub(scores, col_top, out=other)).mul_(col_weight)
                _exp_(scores.sub_(row_top[:, None])).mul_(row_weight[:, None]).add_(other)
        if subnormal:
            drop_negligible_(scores)
        if pairs is not None:
            offset, of_rows, of_cols = pairs
            diagonal = scores.diagonal(offset)
            diagonal -= row_dlse[of_rows]
            if col_share is not None:
                diagonal -= col_dlse[of_cols]
        if positives is not None:
            mean = row_share.dlse / positives.counts.masked_fill(positives.counts <= 0, 1)
            i, j = mean[row.rows], mean[col.rows]
            weights = positives.tile(row, col, scores.dtype)
            if positives.weights is None:
                scores -= weights.mul_(torch.add(i[:, None], j, out=other))
            else:
                scores.addcmul_(weights, i[:, None], value=-1)
                scores.addcmul_(positives.tile(col, row, scores.dtype).T, j, value=-1)
        if row.grad is not None:
            row.grad.addmm_(scores, k)
        if col.grad is not None and col is not row:
            col.grad.addmm_(scores.T, q)


def _common_shift(row_top: Tensor, col_top: Tensor) -> Tensor | None:
    """A shift with which one exponential serves rows and columns, if their maxima allow."""
    if row_top.device.type != "cpu":  # to ask would be a host synchronisation
        return None
    (low, high), (col_low, col_high) = row_top.aminmax(), col_top.aminmax()
    low, high = torch.minimum(low, col_low), torch.maximum(high, col_high)
    return high if high - low <= MAX_SPREAD else None


def _tiles(
    rows: list[_Block],
    cols: list[_Block] | None,
    *,
    first: int | None = None,
    pairs: Tensor | None = None,
    gradients: bool = False,
) -> Iterator[_Tile]:
    """Yield the tiles; cols=None: those of the upper half of the rows' matrix with themselves.

    There a row does not see itself. With first, row i does not see column first + i, its pair,
    whose score is copied to pairs. Equal ids do not see each other. gradients=True leaves out tiles
    that nobody needs the gradient of. The scores' memory is used again and again.
    """
    buffer = rows[0].factor.new_empty(len(rows[0].x) * len((cols or rows)[0].x))
    for i, row in enumerate(rows):
        q = row.scaled()
        for col in rows[i:] if cols is None else cols:
            if gradients and row.grad is None and col.grad is None:
                continue
            scores = buffer[: len(row.x) * len(col.x)].view(len(row.x), len(col.x))
            k = q if col is row else col.scaled()
            torch.mm(q, k.T, out=scores)
            found = None if first is None else _pairs(row, col, first)
            if found is not None and pairs is not None:
                pairs[row.rows][found[1]] = scores.diagonal(found[0])
            if row.ids is not None and col.ids is not None:
                scores.masked_fill_(row.ids[:, None] == col.ids, -torch.inf)
            else:
                if cols is None and row is col:
                    scores.fill_diagonal_(-torch.inf)
                if found is not None:
                    scores.diagonal(found[0]).fill_(-torch.inf)
            yield _Tile(row, col, scores, q, k, found)


def _pairs(row: _Block, col: _Block, first: int) -> tuple[int, slice, slice] | None:
    """Which diagonal of a tile holds pairs (i, first + i), and which of its rows and columns."""
    offset = first + row.rows.start - col.rows.start
    begin, end = max(0, -offset), min(len(row.x), len(col.x) - offset)
    if begin >= end:
        return None
    return offset, slice(begin, end), slice(begin + offset, end + offset)


def _through_scaling(blocks: list[_Block], scale: Tensor, gain: Tensor, normalize: bool) -> Tensor:
    """Turn gradients of scaled rows, over gain, into those of the rows; return that of scale."""
    dscale = torch.zeros_like(scale)
    for block in blocks:
        if block.grad is not None:
            along = _along(block, scale)
            if normalize:
                block.grad.addcmul_(block.scaled(), along[:, None], value=-1)
            block.grad.mul_(block.factor * gain)
            dscale += along.sum()
    return dscale * gain


def _along(block: _Block, scale: Tensor) -> Tensor:
    """<x_i, dx_i> / s of the scaled rows [B]: a row's share of the scale's gradient."""
    return torch.linalg.vecdot(block.scaled(), cast(Tensor, block.grad)) / scale


def _gradients(
    q: Tensor, k: Tensor, like: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    need_q, need_k, need_scale = needs
    dq = fresh_like(q, like.dtype, zero=True) if need_q or need_scale else None
    dk = fresh_like(k, like.dtype, zero=True) if need_k else None
    return dq, dk


def _blocks(
    pieces: Sequence[Tensor],
    rnorm: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    grads: Sequence[Tensor | None] = (None, None),
) -> list[_Block]:
    """Cut the pieces, stacked in thought, into blocks of equal size; none spans two pieces."""
    length = sum(map(len, pieces))
    factor = (rnorm * scale.sqrt() if len(rnorm) else scale.sqrt().expand(length))[:, None]
    blocks = []
    offset = 0
    for piece, grad in zip(pieces, grads, strict=False):
        size = math.ceil(len(piece) / math.ceil(len(piece) / tile_rows(piece)))
        for start in range(0, len(piece), size):
            here = slice(start, min(start + size, len(piece)))
            rows = slice(offset + here.start, offset + here.stop)
            blocks.append(
                _Block(
                    rows,
                    piece[here],
                    factor[rows],
                    None if ids is None else ids[rows],
                    None if grad is None else grad[here],
                )
            )
        offset += len(piece)
    return blocks


def tile_rows(x: Tensor) -> int:
    """How many rows of x a tile has at most."""
    return TILE if x.shape[1] < WIDE else 2 * TILE


def _rnorm(x: Tensor, normalize: bool = True) -> Tensor:
    """Inverse lengths [N] of the rows; 0 where the length is at most NORM_EPS; or nothing."""
    if not normalize:
        return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    norm = _lengths(x)
    return norm.reciprocal().masked_fill_(norm <= NORM_EPS, 0)


def _lengths(x: Tensor) -> Tensor:
    lengths = []
    for rows in torch.split(x, TILE):
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(rows, dim=1)
        low, high = SAFE_SQUARES
        if x.device.type != "cpu" or not low < length.min() <= length.max() < high:
            # Squares of the row over its largest entry neither overflow nor vanish.
            largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)
            largest = largest.clamp_min(torch.finfo(rows.dtype).tiny)
            length = largest[:, 0] * torch.linalg.vector_norm(rows / largest, dim=1)
        lengths.append(length)
    return torch.cat(lengths)


def _unshifted(scale: Tensor, q: Tensor, k: Tensor, normalize: bool) -> bool:
    if scale.device.type != "cpu":
        return False
    bound = float(scale)
    if not normalize:
        bound *= float(_lengths(q).max()) * float(_lengths(k).max())
    return bound <= MAX_UNSHIFTED


def _twice(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else torch.cat([ids, ids])


def _as_asked(
    gradients: Gradients, like: tuple[Tensor, Tensor, Tensor], needs: Sequence[bool]
) -> Gradients:
    """Drop the gradients that nobody needs and give the others their input's type."""
    a, b, c = (
        grad.to(x.dtype) if need and grad is not None else None
        for grad, x, need in zip(gradients, like, needs, strict=True)
    )
    return a, b, c
