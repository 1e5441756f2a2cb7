"""The optimisers and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from fastssl.trainer.config import Config


def build(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser of a resolved config; matrices alone get weight decay and LARS's adaptation."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    from timm.optim.lars import Lars

    groups[0]["always_adapt"] = True  # also with a weight decay of zero
    return Lars(groups, lr=config.lr, momentum=0.9)


def schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at a step: a linear rise, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
