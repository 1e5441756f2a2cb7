"""Soft cross-entropy, a block of rows at a time in PyTorch.

    top_b = max_k logits_bk       x_bk = (logits_bk - top_b) / temperature
    total_b = sum_k exp(x_bk)     loss_b = sum_k t_bk (log total_b - x_bk)
    dlogits_bk = dloss_b (exp(x_bk) / total_b sum_k t_bk - t_bk) / temperature

Two numbers per row are kept, top and total: their log-sum-exp, rounded, would not tell large logits
apart. Beside inputs and gradient two blocks are held, in a core's cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like

BLOCK = 2**18  # numbers of a block of rows


def soft_cross_entropy_fwd(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, top and total of each row, [B] each."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(len(logits), dtype=dtype, device=logits.device)
    top, total = torch.empty_like(loss), torch.empty_like(loss)
    x, product = _buffers(logits, dtype)
    for rows in _blocks(logits):
        block, wanted = logits[rows].to(dtype), targets[rows].to(dtype)
        high = torch.amax(block, 1, out=top[rows])[:, None]
        below = torch.sub(block, high, out=x[: len(block)]).mul_(1 / temperature)
        # Neither log total nor -x is negative: their sum loses no digits.
        distance = torch.mul(below, wanted, out=product[: len(block)]).sum(1)
        rest = torch.sum(below.exp_(), 1, out=total[rows]).log()
        torch.sub(rest * wanted.sum(1), distance, out=loss[rows])
    return loss, top, total


def soft_cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    top: Tensor,
    total: Tensor,
    temperature: float,
) -> Tensor:
    """Return the gradient of the logits, in their type."""
    dlogits = fresh_like(logits)
    x = dlogits if logits.dtype == top.dtype else _buffers(logits, top.dtype)[0]
    for rows in _blocks(logits):
        block, wanted = logits[rows].to(top.dtype), targets[rows].to(top.dtype)
        weight = (dloss[rows] / temperature)[:, None]
        share = wanted.sum(1, keepdim=True) / total[rows, None]
        out = x[rows] if x is dlogits else x[: len(block)]
        torch.sub(block, top[rows, None], out=out).mul_(1 / temperature).exp_()
        out.mul_(weight * share).addcmul_(wanted, weight, value=-1)
        if x is not dlogits:
            dlogits[rows] = out
    return dlogits


def _buffers(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Two blocks to work in."""
    B, K = logits.shape
    return logits.new_empty(2, min(B, max(1, BLOCK // K)), K, dtype=dtype)


def _blocks(logits: Tensor) -> Iterator[slice]:
    B, K = logits.shape
    size = max(1, BLOCK // K)
    return (slice(start, min(start + size, B)) for start in range(0, B, size))
