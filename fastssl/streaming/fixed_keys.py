"""Similarity log-sum-exp over keys that get no gradient, tile by tile in PyTorch.

    x_ij = s cos(q_i, k_j)               L_i = log sum_j exp(x_ij)
    dL_i / dq^_i = s sum_j exp(x_ij - L_i) k^_j

The derivatives are made with the sums, and the backward pass multiplies them: two products in all.
"""

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like
from fastssl.streaming.tiles import (
    Sums,
    blocks_of,
    factors_of,
    is_unshifted,
    merge,
    pair_blocks,
    pair_scores,
    rnorm_of,
    scale_shares,
    take_pairs_off,
    through_scaling,
    tiles_of,
)


def fixed_keys_lse_fwd(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pair: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return lse [M] over cosines and, with gradients, its derivatives by q [M, D] and scale [M].

    With pairs [M, D] of the rows, all are of lse less their scores. Keys that get no gradient need
    not be kept: the mean of the keys, weighted as the softmax weights them, is all that a row's
    gradient needs, and it is gathered on the way.
    """
    q_factor, k_factor = factors_of(q, rnorm_of(q), rnorm_of(k), scale)
    dq = fresh_like(q, scale.dtype).zero_() if gradients else None
    rows = blocks_of([q], q_factor, row_ids, [dq])
    cols = blocks_of([k], k_factor, col_ids)
    unshifted = is_unshifted(scale, q, k, True)
    sums = Sums.none_yet(len(q), scale, unshifted)
    for row, _, scores, _, keys, _ in tiles_of(rows, cols):
        if unshifted:
            sums.total[row.rows] += scores.exp_().sum(1)
        else:
            kept = merge(sums.of(row.rows), scores)
            if row.grad is not None:
                row.grad.mul_(kept[:, None])
        if row.grad is not None:
            row.grad.addmm_(scores, keys)
    pairs = pair_blocks(pair, scale, True)
    lse = sums.lse(pair_scores(rows, pairs))
    if dq is None:
        return lse, scale.new_empty(0, 0), scale.new_empty(0)
    alone = sums.total == 0
    dq /= sums.total.masked_fill(alone, torch.inf)[:, None]
    take_pairs_off(rows, pairs, (~alone).to(scale.dtype))
    dscale = torch.cat([scale_shares(row, scale) for row in rows])
    through_scaling(rows, scale, torch.ones_like(scale), True)
    return lse, dq.to(q.dtype), dscale
