"""Similarity log-sum-exp, tile by tile in PyTorch.

    x_ij = s cos(q_i, k_j)        L_i = log sum_j exp(x_ij)        over the j with row_id_i !=
    col_id_j

Backward, with g = dL, p_ij = exp(x_ij - L_i) and ^ for a row at unit length:

    dq^_i = s g_i sum_j p_ij k^_j          dk^_j = s sum_i g_i p_ij q^_i          ds = sum_ij g_i
    p_ij cos(q_i, k_j)

and through the norm dq_i = (dq^_i - q^_i <q^_i, dq^_i>) / |q_i|. When q is k the matrix is
symmetric: one tile stands for its mirror image too, with weights g_i p_ij + g_j p_ji, so that half
of the tiles serve all rows.

Kept for the backward pass are a row's top and total, L = top + log(total): exp(x - top) / total
has the digits that a rounded L would cost. A score never exceeds s. Up to s = MAX_UNSHIFTED the
exponentials, their sums and the weights g / total fit float32 with a top of 0: no maximum is looked
for, and one exponential serves a row and a column. To read s is free on a CPU; on another device it
would be a host synchronisation, so there every tile is shifted.

Where one tile holds all scores of two views, its exponentials are kept for the backward pass.
Otherwise, beside rows and gradients, two tiles are held at a time. They stay in a core's
second-level cache, as do the rows that they multiply. Half-precision rows are multiplied, and their
gradients accumulated, in float32.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 512
MAX_UNSHIFTED = 40.0
NORM_EPS = 1e-12
SAFE_SQUARES = 1e-15, 1e15  # lengths between which float32 squares can be summed as they stand

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Block(NamedTuple):
    """At most TILE consecutive rows of a matrix."""

    rows: slice  # their place among all rows
    x: Tensor  # [B, D], as given
    factor: Tensor  # [B, 1], sqrt(s) over their lengths
    ids: Tensor | None  # [B]
    grad: Tensor | None  # [B, D], accumulates the gradient of the scaled rows

    def scaled(self) -> Tensor:
        """The rows at length sqrt(s): their products are scores, the same bits from either side."""
        return self.x * self.factor


def similarity_lse_fwd(
    q: Tensor, k: Tensor, scale: Tensor, row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return lse, its top and total [M], and the inverse lengths of q's rows [M] and k's [N]."""
    q_rnorm, k_rnorm = _rnorm(q), _rnorm(k)
    rows, cols = _blocks([q], q_rnorm, scale, row_ids), _blocks([k], k_rnorm, scale, col_ids)
    top, total = _lse_fwd(rows, cols, scale)
    return top + total.log(), top, total, q_rnorm, k_rnorm


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
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of q, k and scale, each where ``needs`` asks for it."""
    need_q, need_k, need_scale = needs
    dq = torch.zeros_like(q, dtype=top.dtype) if need_q or need_scale else None
    dk = torch.zeros_like(k, dtype=top.dtype) if need_k else None
    rows = _blocks([q], q_rnorm, scale, row_ids, [dq])
    cols = _blocks([k], k_rnorm, scale, col_ids, [dk])
    _lse_bwd(rows, cols, scale, top, total, dlse)
    dscale = _through_norm(rows, scale)
    _through_norm(cols, scale)
    return _as_asked((dq, dk, dscale), (q, k, top), needs)


def two_view_lse_fwd(
    z0: Tensor, z1: Tensor, scale: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return lse less the row's positive, its top and total, and the inverse lengths, all [2N].

    Last comes exp(x - top) [2N, 2N] where one tile holds it, else an empty tensor.
    """
    if 2 * len(z0) <= TILE:
        return _one_tile_fwd(z0, z1, scale, ids)
    rnorm = torch.cat([_rnorm(z0), _rnorm(z1)])
    positive = scale.new_empty(len(z0))
    blocks = _blocks([z0, z1], rnorm, scale, _twice(ids))
    top, total = _lse_fwd(blocks, None, scale, positive)
    # Taken first, the difference of two large numbers is exact; the logarithm is small beside them.
    lse = (top - positive.repeat(2)) + total.log()
    return lse, top, total, rnorm, scale.new_empty(0, 0)


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
    dz0 = torch.zeros_like(z0, dtype=top.dtype) if need_0 or need_scale else None
    dz1 = torch.zeros_like(z1, dtype=top.dtype) if need_1 or need_scale else None
    blocks = _blocks([z0, z1], rnorm, scale, _twice(ids), [dz0, dz1])
    _lse_bwd(blocks, None, scale, top, total, dlse)
    dscale = _through_norm(blocks, scale) / 2  # every pair was counted from both of its ends
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
    if _unshifted(scale):
        top = torch.zeros_like(rnorm)
    else:
        top = scores.amax(1)
        scores -= top.masked_fill(top == -torch.inf, 0)[:, None]
    total = scores.exp_().sum(1)
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
    weight = dlse / total.masked_fill(total == 0, torch.inf)
    if _unshifted(scale):
        weights = (weight[:, None] + weight).mul_(tile)
    else:
        weights = tile * weight[:, None]
        weights = weights + weights.T
    both = dlse[:n] + dlse[n:]
    for offset in (n, -n):
        weights.diagonal(offset).copy_(both).neg_()
    factor = (rnorm * scale.sqrt())[:, None]
    dz = weights @ (z * factor)
    dscale = _through_norm([_Block(slice(0, 2 * n), z, factor, None, dz)], scale)
    # Every pair was counted from both of its ends. An operator's results may not share memory.
    return _as_asked((dz[:n].clone(), dz[n:].clone(), dscale / 2), (z0, z1, rnorm), needs)


def _lse_fwd(
    rows: list[_Block], cols: list[_Block] | None, scale: Tensor, positive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return top and total [M], L = top + log(total).

    cols=None: two views' rows with each other, half of the tiles; positive [N] receives the scores
    of the pairs.
    """
    total = scale.new_zeros(rows[-1].rows.stop)
    unshifted = _unshifted(scale)
    top = torch.zeros_like(total) if unshifted else torch.full_like(total, -torch.inf)
    for row, col, scores, _, _, _ in _tiles(rows, cols, positive=positive):
        mirror = cols is None and col is not row
        if unshifted:
            scores.exp_()
            total[row.rows] += scores.sum(1)
            if mirror:
                total[col.rows] += scores.sum(0)
        else:
            _merge(top[row.rows], total[row.rows], scores)
            if mirror:
                _merge(top[col.rows], total[col.rows], scores.T)
    return top, total


def _merge(top: Tensor, total: Tensor, scores: Tensor) -> None:
    """Take a tile's scores [B, C] into the rows' maxima and sums [B], in place."""
    larger = torch.maximum(top, scores.amax(1))
    shift = larger.masked_fill(larger == -torch.inf, 0)  # a row that has seen nothing yet
    total.mul_(torch.exp(top - shift)).add_((scores - shift[:, None]).exp_().sum(1))
    top.copy_(larger)


def _lse_bwd(
    rows: list[_Block],
    cols: list[_Block] | None,
    scale: Tensor,
    top: Tensor,
    total: Tensor,
    dlse: Tensor,
) -> None:
    """Add sum_j W_ij k^_j to the rows' gradients and sum_i W_ij q^_i to the columns'.

    cols=None: two views' rows with each other; W holds their positives' share too.
    """
    # A row that sees nothing has no share in any gradient; without the guards it would be 0 * inf.
    weight = dlse / total.masked_fill(total == 0, torch.inf)
    top = top.masked_fill(top == -torch.inf, 0)
    unshifted = _unshifted(scale)
    buffer = torch.empty(TILE * TILE, dtype=top.dtype, device=top.device)
    for row, col, scores, q, k, paired in _tiles(rows, cols, gradients=True):
        i, j = row.rows, col.rows
        other = buffer[: scores.numel()].view_as(scores)
        if unshifted:
            scores.exp_()
            if cols is None:
                scores *= torch.add(weight[i, None], weight[j], out=other)
            else:
                scores *= weight[i, None]
        else:
            if cols is None:
                torch.sub(scores, top[j], out=other).exp_().mul_(weight[j])
            scores.sub_(top[i, None]).exp_().mul_(weight[i, None])
            if cols is None:
                scores += other
        if paired:
            scores.diagonal().sub_(dlse[i] + dlse[j])
        if row.grad is not None:
            row.grad.addmm_(scores, k)
        if col.grad is not None and col is not row:
            col.grad.addmm_(scores.T, q)


def _tiles(
    rows: list[_Block],
    cols: list[_Block] | None,
    positive: Tensor | None = None,
    gradients: bool = False,
) -> Iterator[tuple[_Block, _Block, Tensor, Tensor, Tensor, bool]]:
    """Yield a row block, a column block, their scores [B, C], -inf where excluded, and scaled rows.

    cols=None: the upper half of the two views' matrix with itself. There a tile is paired, as the
    last item says, when its diagonal holds positives; they are copied to positive [N]. Without ids
    a row then sees neither itself nor its positive. gradients=True leaves out tiles that nobody
    needs the gradient of. The scores' memory is used again and again.
    """
    buffer = rows[0].factor.new_empty(TILE * TILE)
    for i, row in enumerate(rows):
        q = row.scaled()
        for j, col in enumerate(rows[i:] if cols is None else cols):
            if gradients and row.grad is None and col.grad is None:
                continue
            scores = buffer[: len(row.x) * len(col.x)].view(len(row.x), len(col.x))
            k = q if col is row else col.scaled()
            torch.mm(q, k.T, out=scores)
            paired = cols is None and j == len(rows) // 2
            if paired and positive is not None:
                positive[row.rows] = scores.diagonal()
            if row.ids is not None and col.ids is not None:
                scores.masked_fill_(row.ids[:, None] == col.ids, -torch.inf)
            elif paired or (cols is None and row is col):
                scores.fill_diagonal_(-torch.inf)
            yield row, col, scores, q, k, paired


def _through_norm(blocks: list[_Block], scale: Tensor) -> Tensor:
    """Turn gradients of the scaled rows into those of the rows, in place; return that of scale."""
    dscale = torch.zeros_like(scale)
    for block in blocks:
        if block.grad is not None:
            rows = block.scaled()
            along = (rows * block.grad).sum(1, keepdim=True) / scale
            block.grad.addcmul_(rows, along, value=-1).mul_(block.factor)
            dscale += along.sum()
    return dscale


def _blocks(
    pieces: Sequence[Tensor],
    rnorm: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    grads: Sequence[Tensor | None] = (None, None),
) -> list[_Block]:
    """Cut the pieces, stacked in thought, into blocks of equal size; none spans two pieces."""
    factor = (rnorm * scale.sqrt())[:, None]
    blocks = []
    offset = 0
    for piece, grad in zip(pieces, grads, strict=False):
        size = math.ceil(len(piece) / math.ceil(len(piece) / TILE))
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


def _rnorm(x: Tensor) -> Tensor:
    """Inverse lengths [N] of the rows; 0 where the length is at most NORM_EPS."""
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
    norm = torch.cat(lengths)
    return norm.reciprocal().masked_fill_(norm <= NORM_EPS, 0)


def _unshifted(scale: Tensor) -> bool:
    return scale.device.type == "cpu" and float(scale) <= MAX_UNSHIFTED


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
