"""CLIP's loss with a teacher, tile by tile in PyTorch: row i belongs to column p = first + i.

    x_ij = s q_i.k_j, with softmax p_ij over j        y_ij = t a_i.b_j, the teacher's, with P_ij
    R_i = log sum_{j != p} exp(x_ij) - x_ip           H_i = log sum_j exp(x_ij) - sum_j P_ij x_ij

and on request of the columns likewise, in the same walk. Backward, with the upstream gradients g of
R and h of H, and n_ij the softmax over a row's negatives, which is -1 at its pair:

    W_ij = g_i n_ij + h_i (p_ij - P_ij), and the columns' in the same way

and from W on as in similarity.py; the teacher gets no gradient. Of x it is the distance below the
largest that is averaged by the teacher, so that what scores have in common costs no digits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.streaming.tiles import (
    Block,
    Gradients,
    Tile,
    as_asked,
    blocks_of,
    common_shift,
    drop_negligible_,
    exp_,
    fresh_gradients,
    gain_of,
    through_scaling,
    tiles_of,
)


class _Seen(NamedTuple):
    """What rows or columns have seen, but for their pairs; the student's first."""

    top: Tensor  # [2, N]
    total: Tensor  # [2, N], sum_j exp(score - top)
    below: Tensor  # [N], sum_j exp(y_ij - top) (x_ij - top)

    @classmethod
    def nothing(cls, count: int, like: Tensor) -> "_Seen":
        top = like.new_full((2, count), -torch.inf)
        return cls(top, torch.zeros_like(top), like.new_zeros(count))

    def of(self, rows: slice) -> "_Seen":
        """Those of some rows, sharing memory."""
        return _Seen(self.top[:, rows], self.total[:, rows], self.below[rows])

    def add(self, top: Tensor, shift: Tensor, total: Tensor, below: Tensor) -> None:
        """Take in a tile: its largest scores, and its sums relative to a shift in their place."""
        top = torch.maximum(self.top, top)
        finite = _finite(top)
        fallen = (self.top - finite).masked_fill_(self.top == -torch.inf, 0)
        kept, new = torch.exp(self.top - finite), torch.exp(shift - finite)
        self.below.add_(self.total[1] * fallen[0]).mul_(kept[1])
        self.below.add_((below + total[1] * (shift - finite)[0]) * new[1])
        self.total.mul_(kept).add_(total * new)
        self.top.copy_(top)

    def terms(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """R and H [2, N] with these scores of the pairs; what the backward pass needs [6, N]."""
        softmax = _Softmax(self.top, self.total, pairs)
        fallen = (self.top - softmax.highest).masked_fill_(self.top == -torch.inf, 0)
        others = softmax.factor[1] * (self.below + self.total[1] * fallen[0])
        mean = others + softmax.pair[1] * (pairs - softmax.highest)[0]
        # Taken first, the difference of two large numbers is exact; the logarithm is small.
        negatives = (self.top - pairs)[0] + self.total[0].log()
        terms = torch.stack([negatives, softmax.whole[0].log() - mean])
        return terms, torch.cat([self.top, self.total, pairs])


class _Softmax:
    """Of the student and of the teacher [2, N]: factor exp(score - top), and at the pair pair."""

    def __init__(self, top: Tensor, total: Tensor, pairs: Tensor) -> None:
        self.highest = torch.maximum(top, pairs)
        shrunk, pair = (torch.exp(each - self.highest) for each in (top, pairs))
        self.whole = total * shrunk + pair
        self.factor, self.pair = shrunk / self.whole, pair / self.whole
        self.others = total * self.factor  # 1 - pair, with its digits


class _Share(NamedTuple):
    """What rows or columns put into the weights, over gain."""

    top: Tensor  # [2, N]
    weight: Tensor  # [2, N], of exp(score - top)
    pair: Tensor  # [N], at the pair

    def of_rows(self, rows: slice) -> "_Share":
        """Those of some rows."""
        return _Share(self.top[:, rows], self.weight[:, rows], self.pair[rows])

    @classmethod
    def of(cls, dterms: Tensor, stats: Tensor, gain: Tensor) -> "_Share":
        top, total, pairs = stats.view(3, 2, -1)
        g, h = dterms / gain
        softmax = _Softmax(top, total, pairs)
        # What sees nothing has no share in any gradient; without the guard it would be 0 * inf.
        negatives = g / total[0].masked_fill(total[0] == 0, torch.inf)
        weight = torch.stack([negatives + h * softmax.factor[0], -h * softmax.factor[1]])
        # Where the pair has nearly all probability, p - P is the others', to the last digit.
        pair = h * (softmax.others[1] - softmax.others[0]) - g
        return cls(_finite(top), weight, pair)


def distill_clip_fwd(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    teacher_scale: Tensor,
    first: int,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return R and H of rows [2, M] and columns [2, N], and statistics [6, M] and [6, N].

    What belongs to columns is empty without columns.
    """
    rows, cols = _blocks(q, k, scale)
    seen = [_Seen.nothing(len(x), scale) for x in ((q, k) if columns else (q,))]
    pairs = scale.new_empty(2, len(q))
    teacher = _Teacher(teacher_q, teacher_k, teacher_scale, rows, cols)
    buffers = scale.new_empty(2, len(teacher.buffer))
    for tile in tiles_of(rows, cols, first=first, pairs=pairs[0]):
        scores = tile.scores, teacher.scores(tile, pairs[1])
        diagonal = None if tile.pairs is None else tile.pairs[0]
        here = [each.of(at) for each, at in zip(seen, _places(tile), strict=False)]
        dims = (1, 0)[: len(seen)]
        tops = [torch.stack([x.amax(dim) for x in scores]) for dim in dims]
        shared = _common_shifts(tops) if columns else None
        if shared is not None:
            shift = shared[:, None]
            sums = _sums(*scores, shift[..., None], dims, diagonal, buffers)
            for side, top, found in zip(here, tops, sums, strict=True):
                side.add(top, shift, *found)
        else:
            for side, dim, top in zip(here, dims, tops, strict=True):
                shift = _finite(torch.maximum(side.top, top))
                (found,) = _sums(*scores, shift.unsqueeze(1 + dim), (dim,), diagonal, buffers)
                side.add(top, shift, *found)
    terms, stats = seen[0].terms(pairs)
    if not columns:
        return terms, terms.new_empty(2, 0), stats, stats.new_empty(6, 0)
    col_terms, col_stats = seen[1].terms(pairs)
    return terms, col_terms, stats, col_stats


def distill_clip_bwd(
    dterms: Tensor,
    dcol_terms: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    teacher_scale: Tensor,
    stats: Tensor,
    col_stats: Tensor,
    first: int,
    columns: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of q, k and scale, each where ``needs`` asks for it."""
    dq, dk = fresh_gradients(q, k, scale, needs)
    rows, cols = _blocks(q, k, scale, dq, dk)
    gain = gain_of(torch.cat([dterms, dcol_terms], 1) if columns else dterms)
    shares = [_Share.of(dterms, stats, gain)]
    if columns:
        shares.append(_Share.of(dcol_terms, col_stats, gain))
    teacher = _Teacher(teacher_q, teacher_k, teacher_scale, rows, cols)
    buffers = scale.new_empty(2, len(teacher.buffer))
    for tile in tiles_of(rows, cols, first=first, gradients=True):
        scores = tile.scores, teacher.scores(tile)
        here = [each.of_rows(at) for each, at in zip(shares, _places(tile), strict=False)]
        weights = _weights(scores, here, buffers)
        if tile.pairs is not None:
            diagonal, *paired = tile.pairs
            for share, at in zip(here, paired, strict=False):
                weights.diagonal(diagonal).add_(share.pair[at])
        if tile.row.grad is not None:
            tile.row.grad.addmm_(weights, tile.k, beta=tile.col is not cols[0])
        if tile.col.grad is not None:
            tile.col.grad.addmm_(weights.T, tile.q, beta=tile.row is not rows[0])
    dscale = through_scaling(rows, scale, gain, normalize=False)
    through_scaling(cols, scale, gain, normalize=False)
    return as_asked((dq, dk, dscale), (q, k, scale), needs)


def _blocks(
    q: Tensor, k: Tensor, scale: Tensor, dq: Tensor | None = None, dk: Tensor | None = None
) -> tuple[list[Block], list[Block]]:
    factor = scale.expand(len(q))
    return blocks_of([q], factor, None, [dq]), blocks_of([k], None, None, [dk])


def _places(tile: Tile) -> tuple[slice, slice]:
    """Those of a tile's rows and columns."""
    return tile.row.rows, tile.col.rows


class _Teacher:
    """Its scores, for the tiles of the student's."""

    def __init__(
        self, q: Tensor, k: Tensor, scale: Tensor, rows: list[Block], cols: list[Block]
    ) -> None:
        self.q, self.k, self.scale = q, k, scale
        self.buffer = scale.new_empty(len(rows[0].x) * len(cols[0].x))

    def scores(self, tile: Tile, pairs: Tensor | None = None) -> Tensor:
        """Those of a tile, its pairs' copied to pairs and hidden; the next takes their memory."""
        scores = self.buffer[: tile.scores.numel()].view_as(tile.scores)
        q, k = (x[at].to(self.scale) for x, at in zip((self.q, self.k), _places(tile), strict=True))
        torch.mm(q * self.scale, k.T, out=scores)
        if tile.pairs is not None:
            diagonal, rows, _ = tile.pairs
            if pairs is not None:
                pairs[tile.row.rows][rows] = scores.diagonal(diagonal)
            scores.diagonal(diagonal).fill_(-torch.inf)
        return scores


def _common_shifts(tops: Sequence[Tensor]) -> Tensor | None:
    """A shift of the student's scores, and of the teacher's, with which rows and columns agree."""
    shifts = [common_shift(*both) for both in zip(*tops, strict=True)]
    found = [shift for shift in shifts if shift is not None]
    return torch.stack(found) if len(found) == len(shifts) else None


def _sums(
    x: Tensor,
    y: Tensor,
    shift: Tensor,
    dims: Sequence[int],
    pairs: int | None,
    buffers: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Sums over each of dims of exp(x - shift) and exp(y - shift) [2, B], and of the latter x."""
    part, weights = (each[: x.numel()].view_as(x) for each in buffers)
    exp_(torch.sub(y, shift[1], out=weights))
    of_teacher = [weights.sum(dim) for dim in dims]
    torch.sub(x, shift[0], out=part)
    if pairs is not None:
        part.diagonal(pairs).fill_(0)  # of weight 0, but nothing times -inf is 0
    weights *= part
    below = [weights.sum(dim) for dim in dims]
    if pairs is not None:
        part.diagonal(pairs).fill_(-torch.inf)
    exp_(part)
    total = [torch.stack([part.sum(dim), y]) for dim, y in zip(dims, of_teacher, strict=True)]
    return list(zip(total, below, strict=True))


def _weights(scores: Sequence[Tensor], shares: Sequence[_Share], buffers: Tensor) -> Tensor:
    """W of a tile, but for its pairs: the shares of rows, or those of rows and columns."""
    weights, part = (each[: scores[0].numel()].view_as(scores[0]) for each in buffers)
    weights.zero_()
    for dim, share in zip((1, 0), shares, strict=False):
        for x, top, weight in zip(scores, share.top, share.weight, strict=True):
            exp_(torch.sub(x, top.unsqueeze(dim), out=part))
            weights.addcmul_(part, weight.unsqueeze(dim))
    return drop_negligible_(weights)


def _finite(top: Tensor) -> Tensor:
    """Tops to take exponentials relative to, of what has seen nothing too."""
    return top.masked_fill(top == -torch.inf, 0)
