"""The sigmoid loss over all pairs, tile by tile in PyTorch.

    y_ij = s q_i.k_j + b        term_i = sum_j softplus(y_ij) + softplus(-y_ip) - softplus(y_ip)

where column p = first + i is row i's pair. The derivative of a term needs nothing of other tiles,
g_ij = sigmoid(y_ij), less 1 at the pair, so gradients are taken while the tile is at hand: three
products in all, and nothing is left for the backward pass but to multiply.

    dq_i = s sum_j g_ij k_j        dk_j = s sum_i g_ij q_i        ds = sum_ij g_ij q_i.k_j
    db = sum_ij g_ij
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like
from fastssl.streaming.tiles import LEAST_EXPONENT, drop_negligible_, tile_rows

MAX_EXPONENT = 40.0


def sigmoid_fwd(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    first: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the terms [M] and the gradients of their sum by q, k, scale and bias.

    first=-1, or N with ids [N + M]: no row has a pair. Other rows and columns with equal ids are
    left out. Gradients are of scale's type, and empty where ``needs`` does not ask for them.
    """
    need_q, need_k, need_scale, need_bias = needs
    dtype, nothing = scale.dtype, scale.new_empty(0)
    terms = scale.new_zeros(len(q))
    row_gradients = need_q or need_scale
    dq = fresh_like(q, dtype) if row_gradients else nothing
    dk = fresh_like(k, dtype) if need_k else nothing
    dscale = torch.zeros_like(scale) if need_scale else nothing
    dbias = torch.zeros_like(scale) if need_bias else nothing
    least, most = _range(q, k, scale, bias)
    bounded = least >= -MAX_EXPONENT and most <= MAX_EXPONENT
    halvings = 2 if most <= MAX_EXPONENT / 2 else 1  # products of 4 or 2 exponentials are finite
    size = tile_rows(q)
    buffers = scale.new_empty(2, min(size, len(q)) * min(size, len(k)))

    for i in range(0, len(q), size):
        rows = q[i : i + size].to(dtype) * scale
        for j in range(0, len(k), size):
            cols = k[j : j + size].to(dtype)
            y, other = (
                buffer[: len(rows) * len(cols)].view(len(rows), len(cols)) for buffer in buffers
            )
            torch.mm(rows, cols.T, out=y).add_(bias)
            pair_offset = first + i - j if first >= 0 else len(cols)  # no such diagonal
            pairs = y.diagonal(pair_offset) if -len(rows) < pair_offset < len(cols) else y[0, :0]
            paired = pairs.clone()
            if ids is not None:
                hidden = ids[first + i :][: len(rows), None] == ids[j : j + len(cols)]
                y.masked_fill_(hidden, -torch.inf)
                pairs.copy_(paired)

            pairs.neg_()
            if not bounded:
                y.clamp_min_(LEAST_EXPONENT[dtype])
            small = bounded or (y.device.type == "cpu" and bool(y.max() <= MAX_EXPONENT))
            if small:  # exponentials are far from overflow
                softplus = _log1p(y.exp_(), other, halvings)
            else:
                softplus = torch.ops.aten.log_sigmoid.out(-y, out=other).neg_()
            terms[i : i + size] += softplus.sum(1)
            if not any(needs):
                continue
            if small:
                y /= torch.add(y, 1, out=other)
            else:
                y.sigmoid_()
            if not bounded:
                drop_negligible_(y)
            pairs.neg_()
            if need_bias:
                dbias += y.sum()
            if row_gradients:
                dq[i : i + size].addmm_(y, cols, beta=j > 0)
            if need_k:
                dk[j : j + size].addmm_(y.T, rows, beta=i > 0)
        if row_gradients:
            found = dq[i : i + size]
            if need_scale:
                dscale += torch.linalg.vecdot(q[i : i + size].to(dtype), found).sum()
            found *= scale

    return terms, dq if need_q else nothing, dk, dscale, dbias


def _log1p(e: Tensor, out: Tensor, halvings: int) -> Tensor:
    """Numbers in out's memory, fewer than those of e, with the row sums of log(1 + e).

    (1 + a) (1 + b) = 1 + (a + b + ab): one logarithm serves both, and small ones keep their digits.
    """
    sums = e
    while halvings and sums.shape[1] % 2 == 0:
        a, b = sums.tensor_split(2, dim=1)
        place = out.view(-1)[: a.numel()].view_as(a) if sums is e else a  # e itself is still needed
        sums = torch.addcmul(a, a, b, out=place).add_(b)
        halvings -= 1
    return torch.log1p(sums, out=out if sums is e else sums)


def _range(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> tuple[float, float]:
    """The least and the largest score there can be; to ask is free on a CPU alone."""
    if scale.device.type != "cpu":
        return -torch.inf, torch.inf
    lengths = [torch.linalg.vector_norm(x, dim=1, dtype=scale.dtype).max() for x in (q, k)]
    most = float(scale.abs() * lengths[0] * lengths[1])
    return float(bias) - most, float(bias) + most
