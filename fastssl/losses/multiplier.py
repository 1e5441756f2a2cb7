"""The number that all scores of a loss are multiplied by."""

import torch
from torch import Tensor


def scale_of(temperature: float | Tensor, z: Tensor) -> Tensor:
    """1 / temperature as a 0-dim tensor on z's device, in the type that losses of z have."""
    if isinstance(temperature, Tensor):
        return multiplier(temperature, z).reciprocal()
    return multiplier(1 / float(temperature), z)


def multiplier(value: float | Tensor, z: Tensor) -> Tensor:
    """A value as a 0-dim tensor on z's device, in the type that losses of z have."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.reshape(()).to(z.device, dtype)
    return torch.full((), float(value), dtype=dtype, device=z.device)
