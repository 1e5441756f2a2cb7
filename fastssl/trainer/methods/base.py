"""What methods have in common."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config


class Method(nn.Module):
    """A pretraining method. What is below suits most; a method overrides what it needs."""

    defaults: ClassVar[dict[str, Any]]
    recipes: ClassVar[dict[str, dict[str, Any]]] = {}
    labelled: ClassVar[bool] = False
    constant_lr: ClassVar[tuple[str, ...]] = ()
    whole_batch_norm: ClassVar[bool] = True

    @staticmethod
    def views(config: "Config", size: int) -> "list[v2.Transform]":
        """One transform for each view of an image: two, those of ``augmentation``."""
        from fastssl.trainer import augment  # here, so that options are listed without torchvision

        if config.augmentation == "byol":
            return augment.byol(size)
        if config.augmentation == "simclr":
            return [augment.simclr(size)] * 2
        return [augment.default(config.dataset, size)] * 2

    def before_step(self, step: int, per_epoch: int) -> None:
        """Called before the forward pass of a step, counted from 0."""

    def after_backward(self) -> None:
        """Called between the backward pass and the optimiser."""

    def after_step(self, step: int, per_epoch: int) -> None:
        """Called after the optimiser, if loss and gradient were finite."""

    def end_epoch(self) -> dict[str, float]:
        """What the method measured in the epoch that has ended, by name."""
        return {}


class TwoViews(Method):
    """Both views through backbone and head, and a loss of their two batches of embeddings."""

    head: nn.Module
    loss: nn.Module

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of the two views, and their embeddings."""
        z0, z1 = self.head(self.backbone(torch.cat(batch.views))).chunk(2)
        return self.loss(z0, z1), (z0, z1)
