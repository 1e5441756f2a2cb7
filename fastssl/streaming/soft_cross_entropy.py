"""Soft cross-entropy, a block of rows at a time in PyTorch.

    loss_b = sum_k t_bk (L_b - x_bk)      x = logits / temperature      L_b = log sum_k exp(x_bk)
    dlogits_bk = dloss_b (exp(x_bk - L_b) sum_k t_bk - t_bk) / temperature

One number per row is kept: L. Beside inputs and gradient a block is held, in a core's cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**19  # numbers of a block of rows


def soft_cross_entropy_fwd(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the loss and L of each row, [B] both."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(len(logits), dtype=dtype, device=logits.device)
    lse = torch.empty_like(loss)
    for rows in _blocks(logits):
        x = logits[rows].to(dtype) / temperature
        torch.logsumexp(x, dim=1, out=lse[rows])
        torch.sub(lse[rows, None], x, out=x).mul_(targets[rows])
        torch.sum(x, dim=1, out=loss[rows])
    return loss, lse


def soft_cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, temperature: float
) -> Tensor:
    """Return the gradient of the logits, in their type."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _blocks(logits):
        x = logits[rows].to(lse.dtype) / temperature
        wanted = targets[rows].to(lse.dtype)
        weight = (dloss[rows] / temperature)[:, None]
        x.sub_(lse[rows, None]).exp_().mul_(weight * wanted.sum(1, keepdim=True))
        dlogits[rows] = x.addcmul_(wanted, weight, value=-1)
    return dlogits


def _blocks(logits: Tensor) -> Iterator[slice]:
    B, K = logits.shape
    size = max(1, BLOCK // K)
    return (slice(start, min(start + size, B)) for start in range(0, B, size))
