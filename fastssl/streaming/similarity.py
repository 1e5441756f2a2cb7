"""Similarity log-sum-exp, tile by tile in PyTorch.

    x_ij = s sim(q_i, k_j)        L_i = log sum_j exp(x_ij)

over the pairs (i, j) that are visible, with the cosine or the plain product for sim. Backward, with
the upstream gradient g of L, and ^ for a row at unit length where sim is the cosine:

    W_ij = g_i exp(x_ij - L_i)
    dq^_i = s sum_j W_ij k^_j        dk^_j = s sum_i W_ij q^_i        ds = sum_ij W_ij sim(q_i, k_j)

and through the norm dq_i = (dq^_i - q^_i <q^_i, dq^_i>) / |q_i|. Rows of classes meet each other,
so half of the tiles serves them all; their positives' scores are summed on the way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like
from fastssl.streaming.tiles import (
    Gradients,
    Positives,
    Share,
    Sums,
    add_gradients,
    as_asked,
    blocks_of,
    factors_of,
    fresh_gradients,
    gain_of,
    is_unshifted,
    pair_blocks,
    pair_scores,
    rnorm_of,
    sums_of,
    take_pairs_off,
    through_scaling,
)


def similarity_lse_fwd(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pair: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return lse, its top and total [M], and the inverse lengths of q's rows [M] and k's [N].

    With pairs [M, D] of the rows, lse is less their scores. Without normalize the inverse lengths
    are empty.
    """
    q_rnorm, k_rnorm = rnorm_of(q, normalize), rnorm_of(k, normalize)
    q_factor, k_factor = factors_of(q, q_rnorm, k_rnorm, scale)
    rows, cols = blocks_of([q], q_factor, row_ids), blocks_of([k], k_factor, col_ids)
    sums, _, _ = sums_of(rows, cols, is_unshifted(scale, q, k, normalize))
    pairs = pair_scores(rows, pair_blocks(pair, scale, normalize))
    return sums.lse(pairs), *sums, q_rnorm, k_rnorm


def similarity_lse_bwd(
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pair: Tensor | None,
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
    dq, dk = fresh_gradients(q, k, top, needs)
    q_factor, k_factor = factors_of(q, q_rnorm, k_rnorm, scale)
    rows = blocks_of([q], q_factor, row_ids, [dq])
    cols = blocks_of([k], k_factor, col_ids, [dk])
    gain = gain_of(dlse)
    unshifted = is_unshifted(scale, q, k, normalize)
    alone = total == 0
    if unshifted:  # top may be that of more columns, if these are some of a ring's
        top, total = torch.zeros_like(top), total * top.exp()
    share = Share.of(Sums(top, total), dlse, gain)
    add_gradients(rows, cols, share, None, unshifted)
    take_pairs_off(rows, pair_blocks(pair, scale, normalize), share.dlse.masked_fill(alone, 0))
    dscale = through_scaling(rows, scale, gain, normalize)
    through_scaling(cols, scale, gain, normalize)
    return as_asked((dq, dk, dscale), (q, k, top), needs)


def class_lse_fwd(
    z: Tensor, scale: Tensor, classes: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lse over the other rows, less the mean score of the row's positives; top and total.

    Positives of a row are the other rows of its class, or with weights [C, C] the other rows by the
    weights of their classes. Last come the positives' summed weights; where they are 0 the first
    result is 0. All are [N], and similarities are plain products.
    """
    blocks = blocks_of([z], scale.sqrt().expand(len(z)), None)
    positives = Positives(classes, weights, torch.zeros_like(z[:, 0], dtype=scale.dtype))
    unshifted = not _has_lone_positives(classes, weights) and is_unshifted(scale, z, z, False)
    sums, _, seen = sums_of(blocks, None, unshifted, positives=positives)
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
    dz = fresh_like(z, top.dtype)
    blocks = blocks_of([z], scale.sqrt().expand(len(z)), None, [dz])
    dlse = dlse.masked_fill(count <= 0, 0)
    gain = gain_of(dlse)
    share = Share.of(Sums(top, total), dlse, gain)
    positives = Positives(classes, weights, count)
    unshifted = not _has_lone_positives(classes, weights) and is_unshifted(scale, z, z, False)
    add_gradients(blocks, None, share, share, unshifted, positives=positives)
    dscale = through_scaling(blocks, scale, gain, False) / 2  # every pair was counted twice
    need_z, need_scale = needs
    return dz.to(z.dtype) if need_z else None, dscale if need_scale else None


def _has_lone_positives(classes: Tensor, weights: Tensor | None) -> bool:
    """Whether a row may have one positive only, whose softmax can be 1 to the last digit.

    To be as exact, the exponentials of a row are then taken relative to its own maximum.
    """
    if weights is not None or classes.device.type != "cpu":
        return True
    _, members = torch.unique(classes, return_counts=True)
    return bool((members == 2).any())
