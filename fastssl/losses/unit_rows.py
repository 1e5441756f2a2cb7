"""Rows at unit length, and their cosines."""

import torch
from torch import Tensor


def unit_rows(x: Tensor) -> Tensor:
    """Rows at unit length, in the type that losses have; one of length at most 1e-12 is zero."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # Over their largest entry first, so that no square over- or underflows.
        tiny = torch.finfo(x.dtype).tiny
        top = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1, keepdim=True).clamp_min(tiny)
        x = x / top
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        zero = norm * top <= 1e-12
        return (x / norm.masked_fill(zero, 1)).masked_fill(zero, 0)


def cosines_of(x: Tensor, y: Tensor) -> Tensor:
    """Cosine similarities of rows with rows, broadcast."""
    return (unit_rows(x) * unit_rows(y)).sum(-1)
