"""What the losses of similarities share in PyTorch: the walk over tiles, its sums and gradients.

A matrix of scores x_ij = s sim(q_i, k_j) is cut into tiles of a row block and a column block, of
which two are held at a time. They stay in a core's second-level cache, as do the rows that they
multiply. When q is k the matrix is symmetric, and one tile stands for its mirror image too: half of
the tiles serves all rows. Half-precision rows are multiplied, and their gradients accumulated, in
float32.

Kept for the backward pass are a row's top and total, L = top + log(total): exp(x - top) / total
has the digits that a rounded L would cost. Where scores are known to be at most MAX_UNSHIFTED, the
exponentials, their sums and the weights g / total fit float32 with a top of 0: no maximum is looked
for, and one exponential serves a row and a column. So it does in any tile whose rows and columns
have maxima within MAX_SPREAD, relative to the largest of them. To know either is free on a CPU; on
another device it would be a host synchronisation, so there each is shifted by its own.
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


class Block(NamedTuple):
    """Consecutive rows of a matrix."""

    rows: slice  # their place among all rows
    x: Tensor  # [B, D], as given
    factor: Tensor | None  # [B, 1], by which they are scaled; None: they are as they should be
    ids: Tensor | None  # [B]
    grad: Tensor | None  # [B, D], accumulates the gradient of the scaled rows

    def scaled(self) -> Tensor:
        """The rows times their factors, whose products are scores."""
        if self.factor is None:
            return self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        return self.x * self.factor


class Sums(NamedTuple):
    """The exponentials that rows or columns have seen: log-sum-exp = top + log(total)."""

    top: Tensor
    total: Tensor

    @classmethod
    def none_yet(cls, count: int, like: Tensor, unshifted: bool) -> "Sums":
        """Those of rows or columns that have seen nothing."""
        return cls(like.new_full((count,), 0 if unshifted else -torch.inf), like.new_zeros(count))

    def of(self, rows: slice) -> "Sums":
        """Those of some rows, sharing memory."""
        return Sums(self.top[rows], self.total[rows])

    def lse(self, less: Tensor | None = None) -> Tensor:
        """Log-sum-exps, less something."""
        if less is None:
            return self.top + self.total.log()
        # Taken first, the difference of two large numbers is exact. Where the total is as large,
        # with a top of 0, the logarithm of their quotient has the digits.
        shift = self.top - less
        quotient = self.total * shift.exp()
        usable = (quotient > torch.finfo(quotient.dtype).tiny) & (quotient < torch.inf)
        return torch.where(usable, quotient.log(), shift + self.total.log())


class Share(NamedTuple):
    """What rows or columns put into the weights: weight exp(x - top), and dlse of their pairs."""

    top: Tensor
    weight: Tensor
    dlse: Tensor

    @classmethod
    def of(cls, sums: Sums, dlse: Tensor, gain: Tensor) -> "Share":
        """Shares over gain, for the upstream gradients dlse of the sums' log-sum-exps."""
        dlse = dlse / gain
        # What sees nothing has no share in any gradient; without the guards it would be 0 * inf.
        weight = dlse / sums.total.masked_fill(sums.total == 0, torch.inf)
        return cls(sums.top.masked_fill(sums.top == -torch.inf, 0), weight, dlse)


class Positives(NamedTuple):
    """Which rows are a row's positives, and how much."""

    classes: Tensor  # [N]
    weights: Tensor | None  # [C, C]; None: 1 within a class and 0 without
    counts: Tensor  # [N], the sum of a row's weights

    def tile(self, row: Block, col: Block, dtype: torch.dtype) -> Tensor:
        """Weights [B, C] of the columns for the rows; a row is not its own positive."""
        i, j = self.classes[row.rows], self.classes[col.rows]
        if self.weights is None:
            tile = (i[:, None] == j).to(dtype)
        else:
            tile = self.weights[i][:, j].to(dtype)
        return tile.fill_diagonal_(0) if row is col else tile


class Tile(NamedTuple):
    """Scores [B, C] of a row block and a column block, -inf where invisible."""

    row: Block
    col: Block
    scores: Tensor
    q: Tensor  # the scaled rows
    k: Tensor
    pairs: tuple[int, slice, slice] | None  # diagonal with the pairs, their rows and columns


def sums_of(
    rows: list[Block],
    cols: list[Block] | None,
    unshifted: bool,
    first: int | None = None,
    columns: bool = False,
    positives: Positives | None = None,
) -> tuple[Sums, Sums, Tensor]:
    """Return the sums of rows and, with columns, of columns, and the scores of the pairs.

    cols=None: the rows with each other, half of the tiles. With first, row i's pair is column
    first + i; it is not part of the sums. With positives of rows, their weighted scores are summed
    in the place of pairs, and their weights are counted.
    """
    like, n_rows = _nothing_like(rows[0].x), rows[-1].rows.stop
    n_cols = cols[-1].rows.stop if cols and columns else 0
    row_sums = Sums.none_yet(n_rows, like, unshifted)
    col_sums = row_sums if cols is None else Sums.none_yet(n_cols, like, unshifted)
    pairs = like.new_empty(0 if first is None else n_rows if cols else n_rows - first)
    if positives is not None:
        pairs = like.new_zeros(n_rows)
    for row, col, scores, _, _, _ in tiles_of(rows, cols, first=first, pairs=pairs):
        mirror = columns or (cols is None and col is not row)
        if positives is not None:
            _sum_positives(positives, pairs, row, col, scores)
        if unshifted:
            scores.exp_()
            row_sums.total[row.rows] += scores.sum(1)
            if mirror:
                col_sums.total[col.rows] += scores.sum(0)
        elif not mirror:
            merge(row_sums.of(row.rows), scores)
        elif positives is not None or not _merge_both(
            row_sums.of(row.rows), col_sums.of(col.rows), scores
        ):
            merge(col_sums.of(col.rows), scores, dim=0, out=torch.empty_like(scores))
            merge(row_sums.of(row.rows), scores)
    return row_sums, col_sums, pairs


def _sum_positives(
    positives: Positives, sums: Tensor, row: Block, col: Block, scores: Tensor
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


def merge(sums: Sums, scores: Tensor, dim: int = 1, out: Tensor | None = None) -> Tensor:
    """Take a tile's scores into the maxima and sums of its rows, or with dim=0 columns, in place.

    The scores, or out, become exp(score - top). Returns the factor by which the sums so far shrank.
    """
    larger = torch.maximum(sums.top, scores.amax(dim))
    shift = larger.masked_fill(larger == -torch.inf, 0)  # a row that has seen nothing yet
    kept = torch.exp(sums.top - shift)
    exponentials = torch.sub(scores, shift.unsqueeze(dim), out=scores if out is None else out)
    sums.total.mul_(kept).add_(exp_(exponentials).sum(dim))
    sums.top.copy_(larger)
    return kept


def _merge_both(rows: Sums, cols: Sums, scores: Tensor) -> bool:
    """``merge`` for rows and columns with one exponential, if their maxima allow; say whether."""
    if scores.device.type != "cpu":  # to ask would be a host synchronisation
        return False
    maxima = scores.amax(1), scores.amax(0)
    shift = maxima[0].max()
    if not shift - min(top.min() for top in maxima) <= MAX_SPREAD:
        return False
    exp_(scores.sub_(shift))
    for sums, top, dim in zip((rows, cols), maxima, (1, 0), strict=True):
        larger = torch.maximum(sums.top, top)
        sums.total.mul_(torch.exp(sums.top - larger))
        sums.total.add_(scores.sum(dim) * torch.exp(shift - larger))
        sums.top.copy_(larger)
    return True


def exp_(x: Tensor) -> Tensor:
    """Exponentials, in place; what is negligible beside 1 is 0, since subnormals are slow."""
    return drop_negligible_(x.clamp_min_(LEAST_EXPONENT[x.dtype]).exp_())


def drop_negligible_(weights: Tensor) -> Tensor:
    """Make 0, in place, what is negligible beside 1: products of subnormal numbers are slow."""
    least = 2 * math.exp(LEAST_EXPONENT[weights.dtype])
    dropped: Tensor = torch.ops.aten.hardshrink.out(weights, least, out=weights)
    return dropped


def _may_be_subnormal(row_share: Share, col_share: Share | None) -> bool:
    """Whether a weight times exp(-MAX_UNSHIFTED), the least exponential, is near 0 but not 0."""
    if row_share.weight.device.type != "cpu":
        return False
    least = torch.finfo(row_share.weight.dtype).tiny * math.exp(MAX_UNSHIFTED) * 1e4
    return any(
        bool(((share.weight != 0) & (share.weight.abs() < least)).any())
        for share in (row_share, col_share or row_share)
    )


def gain_of(dlse: Tensor) -> Tensor:
    """The power of two next to the largest gradient: weights are taken relative to it."""
    peak = dlse.abs().max()
    usable = peak.isfinite() & (peak > 0)
    one = torch.ones_like(peak)
    exponent = torch.where(usable, peak, one).log2().floor() + 1  # Macs have no frexp
    return exponent.exp2()


def add_gradients(
    rows: list[Block],
    cols: list[Block] | None,
    row_share: Share,
    col_share: Share | None,
    unshifted: bool,
    first: int | None = None,
    positives: Positives | None = None,
) -> None:
    """Write sum_j W_ij k_j to the rows' gradients and sum_i W_ij q_i to the columns', scaled rows.

    cols, first and positives as in ``sums_of``; W holds the share of pairs or positives too.
    """
    first_row, first_col = rows[0], (cols or rows)[0]
    buffer = row_share.top.new_empty(len(first_row.x) * len(first_col.x))
    subnormal = not unshifted or _may_be_subnormal(row_share, col_share)
    for row, col, scores, q, k, pairs in tiles_of(rows, cols, first=first, gradients=True):
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
            elif positives is None and (shift := common_shift(row_top, col_top)) is not None:
                row_weight = row_weight * torch.exp(shift - row_top)
                col_weight = col_weight * torch.exp(shift - col_top)
                scores.sub_(shift).clamp_min_(LEAST_EXPONENT[scores.dtype]).exp_()
                scores *= torch.add(row_weight[:, None], col_weight, out=other)
            else:
                exp_(torch.sub(scores, col_top, out=other)).mul_(col_weight)
                exp_(scores.sub_(row_top[:, None])).mul_(row_weight[:, None]).add_(other)
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
            row.grad.addmm_(scores, k, beta=col is not first_col)
        if col.grad is not None and col is not row:
            col.grad.addmm_(scores.T, q, beta=row is not first_row)


def common_shift(row_top: Tensor, col_top: Tensor) -> Tensor | None:
    """A shift with which one exponential serves rows and columns, if their maxima allow."""
    if row_top.device.type != "cpu":  # to ask would be a host synchronisation
        return None
    (low, high), (col_low, col_high) = row_top.aminmax(), col_top.aminmax()
    low, high = torch.minimum(low, col_low), torch.maximum(high, col_high)
    return high if high - low <= MAX_SPREAD else None


def tiles_of(
    rows: list[Block],
    cols: list[Block] | None,
    *,
    first: int | None = None,
    pairs: Tensor | None = None,
    gradients: bool = False,
) -> Iterator[Tile]:
    """Yield the tiles; cols=None: those of the upper half of the rows' matrix with themselves.

    There a row does not see itself. With first, row i does not see column first + i, its pair,
    whose score is copied to pairs. Equal ids do not see each other. gradients=True leaves out tiles
    that nobody needs the gradient of. The scores' memory is used again and again.
    """
    buffer = _nothing_like(rows[0].x).new_empty(len(rows[0].x) * len((cols or rows)[0].x))
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
            yield Tile(row, col, scores, q, k, found)


def _pairs(row: Block, col: Block, first: int) -> tuple[int, slice, slice] | None:
    """Which diagonal of a tile holds pairs (i, first + i), and which of its rows and columns."""
    offset = first + row.rows.start - col.rows.start
    begin, end = max(0, -offset), min(len(row.x), len(col.x) - offset)
    if begin >= end:
        return None
    return offset, slice(begin, end), slice(begin + offset, end + offset)


def through_scaling(blocks: list[Block], scale: Tensor, gain: Tensor, normalize: bool) -> Tensor:
    """Turn gradients of scaled rows, over gain, into those of the rows; return that of scale."""
    dscale = torch.zeros_like(scale)
    for block in blocks:
        if block.grad is None:
            continue
        if block.factor is None:
            block.grad.mul_(gain)
            continue
        along = scale_shares(block, scale)
        if normalize:
            block.grad.addcmul_(block.scaled(), along[:, None], value=-1)
        block.grad.mul_(block.factor * gain)
        dscale += along.sum()
    return dscale * gain


def pair_blocks(
    pair: Tensor | None, scale: Tensor, normalize: bool, grad: Tensor | None = None
) -> list[Block]:
    """Blocks of the pairs of rows, cut as the rows are; none without pairs."""
    if pair is None:
        return []
    factor = rnorm_of(pair) * scale.sqrt() if normalize else None
    return blocks_of([pair], factor, None, [grad])


def pair_scores(rows: list[Block], pairs: list[Block]) -> Tensor | None:
    """Scores of the rows with their pairs [M], if they have any."""
    if not pairs:
        return None
    both = zip(rows, pairs, strict=True)
    return torch.cat([torch.linalg.vecdot(row.scaled(), pair.scaled()) for row, pair in both])


def take_pairs_off(rows: list[Block], pairs: list[Block], dlse: Tensor) -> None:
    """Take from the gradients of the rows, and write to those of the pairs, what a score gives."""
    for row, pair in zip(rows if pairs else [], pairs, strict=True):
        weight = dlse[row.rows, None]
        if row.grad is not None:
            row.grad.addcmul_(pair.scaled(), weight, value=-1)
        if pair.grad is not None:
            torch.mul(row.scaled(), weight, out=pair.grad).neg_()


def pair_gradient(dlse: Tensor, q: Tensor, pair: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    """Gradient of the pairs of q's rows, whose scores log-sum-exps are less."""
    dpair = fresh_like(pair, scale.dtype)
    factor = rnorm_of(q) * scale.sqrt() if normalize else scale.expand(len(q))
    pairs = pair_blocks(pair, scale, normalize, dpair)
    take_pairs_off(blocks_of([q], factor, None), pairs, dlse)
    through_scaling(pairs, scale, torch.ones_like(scale), normalize)
    return dpair.to(pair.dtype)


def scale_shares(block: Block, scale: Tensor) -> Tensor:
    """<x_i, dx_i> / s of the scaled rows [B]: a row's share of the scale's gradient."""
    return torch.linalg.vecdot(block.scaled(), cast(Tensor, block.grad)) / scale


def fresh_gradients(
    q: Tensor, k: Tensor, like: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the gradients of q and k; that of the scale is made of q's."""
    need_q, need_k, need_scale = needs
    dq = fresh_like(q, like.dtype) if need_q or need_scale else None
    dk = fresh_like(k, like.dtype) if need_k else None
    return dq, dk


def factors_of(
    q: Tensor, q_rnorm: Tensor, k_rnorm: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What the rows of q and of k are scaled by, so that products are scores."""
    if len(q_rnorm):
        root = scale.sqrt()
        return q_rnorm * root, k_rnorm * root
    return scale.expand(len(q)), None


def blocks_of(
    pieces: Sequence[Tensor],
    factor: Tensor | None,
    ids: Tensor | None,
    grads: Sequence[Tensor | None] = (None, None),
) -> list[Block]:
    """Cut the pieces, stacked in thought, into blocks of equal size; none spans two pieces."""
    blocks = []
    offset = 0
    for piece, grad in zip(pieces, grads, strict=False):
        size = math.ceil(len(piece) / math.ceil(len(piece) / tile_rows(piece)))
        for start in range(0, len(piece), size):
            here = slice(start, min(start + size, len(piece)))
            rows = slice(offset + here.start, offset + here.stop)
            blocks.append(
                Block(
                    rows,
                    piece[here],
                    None if factor is None else factor[rows, None],
                    None if ids is None else ids[rows],
                    None if grad is None else grad[here],
                )
            )
        offset += len(piece)
    return blocks


def tile_rows(x: Tensor) -> int:
    """How many rows of x a tile has at most."""
    return TILE if x.shape[1] < WIDE else 2 * TILE


def rnorm_of(x: Tensor, normalize: bool = True) -> Tensor:
    """Inverse lengths [N] of the rows; 0 where the length is at most NORM_EPS; or nothing."""
    if not normalize:
        return _nothing_like(x)
    norm = _lengths(x)
    return norm.reciprocal().masked_fill_(norm <= NORM_EPS, 0)


def _nothing_like(x: Tensor) -> Tensor:
    """An empty tensor of the type in which x's rows are multiplied and summed."""
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


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


def is_unshifted(scale: Tensor, q: Tensor, k: Tensor, normalize: bool) -> bool:
    """Whether no score exceeds MAX_UNSHIFTED, as far as can be told for free."""
    if scale.device.type != "cpu":
        return False
    bound = float(scale)
    if not normalize:
        bound *= float(_lengths(q).max()) * float(_lengths(k).max())
    return bound <= MAX_UNSHIFTED


def as_asked(
    gradients: Gradients, like: tuple[Tensor, Tensor, Tensor], needs: Sequence[bool]
) -> Gradients:
    """Drop the gradients that nobody needs and give the others their input's type."""
    a, b, c = (
        grad.to(x.dtype) if need and grad is not None else None
        for grad, x, need in zip(gradients, like, needs, strict=True)
    )
    return a, b, c
