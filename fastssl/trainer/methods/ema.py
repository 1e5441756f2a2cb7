"""Networks that follow another as a running mean of its weights and get no gradient."""

import copy
from typing import TypeVar

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


def frozen_copy(network: Network) -> Network:
    """A copy of a network whose parameters get no gradient, and so are left to `follow`."""
    return copy.deepcopy(network).requires_grad_(False)


def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Make target's parameters momentum target + (1 - momentum) online.

    As in BYOL and MoCo, buffers are left alone: target sees its own batches, in training mode, and
    so has running statistics of its own.
    """
    average = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
    average(list(target.parameters()), list(online.parameters()), 0)
