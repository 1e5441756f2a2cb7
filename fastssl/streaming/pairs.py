"""Log-sum-exp of pairs, tile by tile in PyTorch: row i belongs to column p = first + i.

    x_ij = s sim(q_i, k_j)        R_i = log sum_{j != p} exp(x_ij) - x_ip

and on request C_j likewise of the columns, in the same walk. Backward, with the upstream gradients
g of R and h of C:

    W_ij = g_i exp(x_ij - R_i - x_ip) + h_j exp(x_ij - C_j - x_jj)        W_ip = -(g_i + h_p)

and from W on as in similarity.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.streaming.tiles import (
    Gradients,
    Share,
    Sums,
    add_gradients,
    as_asked,
    blocks_of,
    factors_of,
    fresh_gradients,
    gain_of,
    is_unshifted,
    rnorm_of,
    sums_of,
    through_scaling,
)


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
    q_rnorm, k_rnorm = rnorm_of(q, normalize), rnorm_of(k, normalize)
    row_ids = None if ids is None else ids[first : first + len(q)]
    q_factor, k_factor = factors_of(q, q_rnorm, k_rnorm, scale)
    rows, cols = blocks_of([q], q_factor, row_ids), blocks_of([k], k_factor, ids)
    unshifted = is_unshifted(scale, q, k, normalize)
    sums, col_sums, pairs = sums_of(rows, cols, unshifted, first=first, columns=columns)
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
    dq, dk = fresh_gradients(q, k, top, needs)
    row_ids = None if ids is None else ids[first : first + len(q)]
    q_factor, k_factor = factors_of(q, q_rnorm, k_rnorm, scale)
    rows = blocks_of([q], q_factor, row_ids, [dq])
    cols = blocks_of([k], k_factor, ids, [dk])
    gain = gain_of(torch.cat([drows, dcols]) if columns else drows)
    row_share = Share.of(Sums(top, total), drows, gain)
    col_share = Share.of(Sums(col_top, col_total), dcols, gain) if columns else None
    # Then every top is 0. To ask is free on a CPU alone.
    unshifted = top.device.type == "cpu" and not (top.any() or col_top.any())
    add_gradients(rows, cols, row_share, col_share, unshifted, first=first)
    dscale = through_scaling(rows, scale, gain, normalize)
    through_scaling(cols, scale, gain, normalize)
    return as_asked((dq, dk, dscale), (q, k, top), needs)
