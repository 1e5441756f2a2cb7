"""Soft cross-entropy, a block of rows at a time in PyTorch.

    loss_b = sum_k t_bk (L_b - x_bk)      x = logits / temperature      L_b = log sum_k exp(x_bk)
    dlogits_bk = dloss_b (exp(x_bk - L_b) sum_k t_bk - t_bk) / temperature

One number per row is kept: L. Beside inputs and gradient two blocks are held, in a core's cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.streaming.memory import fresh_like

BLOCK = 2**18  # numbers of a block of rows


def soft_cross_entropy_fwd(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the loss and L of each row, [B] both."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(len(logits), dtype=dtype, device=logits.device)
    lse = torch.empty_like(loss)
    x, product = _buffers(logits, dtype)
    for rows in _blocks(logits):
        block, wanted = logits[rows].to(dtype), targets[rows].to(dtype)
        top = block.amax(1) / temperature
        below = torch.add(-top[:, None], block, alpha=1 / temperature, out=x[: len(block)])
        # Neither L - max x nor max x - x is negative: their sum loses no digits.
        distance = torch.mul(below, wanted, out=product[: len(block)]).sum(1)
        rest = below.exp_().sum(1).log_()
        torch.sub(rest * wanted.sum(1), distance, out=loss[rows])
        torch.add(rest, top, out=lse[rows])
    return loss, lse


def soft_cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, temperature: float
) -> Tensor:
    """Return the gradient of the logits, in their type."""
    dlogits = fresh_like(logits)
    x = dlogits if logits.dtype == lse.dtype else _buffers(logits, lse.dtype)[0]
    for rows in _blocks(logits):
        block, wanted = logits[rows].to(lse.dtype), targets[rows].to(lse.dtype)
        weight = (dloss[rows] / temperature)[:, None]
        out = x[rows] if x is dlogits else x[: len(block)]
        torch.add(-lse[rows, None], block, alpha=1 / temperature, out=out).exp_()
        out.mul_(weight * wanted.sum(1, keepdim=True)).addcmul_(wanted, weight, value=-1)
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
