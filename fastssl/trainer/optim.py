"""The optimisers and the learning-rate schedule."""

import math
from typing import Any

import torch

from fastssl.trainer.config import Config
from fastssl.trainer.methods.base import Method


def build(method: Method, config: Config) -> torch.optim.Optimizer:
    """The optimiser of a resolved config; matrices alone get weight decay and LARS's adaptation.

    A group's learning rate is ``peak_lr``, times what `schedule` says where it is ``scheduled``.
    """
    constant = {id(p) for name in method.constant_lr for p in getattr(method, name).parameters()}
    groups: list[dict[str, Any]] = []
    for scheduled in (True, False):
        own = [
            p for p in method.parameters() if p.requires_grad and (id(p) in constant) != scheduled
        ]
        for matrix in (True, False):
            params = [p for p in own if (p.ndim > 1) == matrix]
            if params:
                groups.append(
                    {
                        "params": params,
                        "weight_decay": config.weight_decay if matrix else 0.0,
                        "always_adapt": matrix,  # of LARS: also with a weight decay of zero
                        "peak_lr": config.lr * (1 if matrix else config.vector_lr_scale),
                        "scheduled": scheduled,
                    }
                )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    from timm.optim.lars import Lars

    return Lars(groups, lr=config.lr, momentum=0.9)


def schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at a step: a linear rise, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
