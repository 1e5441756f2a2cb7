"""BYOL: what a network makes of one view predicts what a slower copy of it makes of another."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl import NegativeCosineSimilarity
from fastssl.trainer.datasets import GREY
from fastssl.trainer.methods.base import Method
from fastssl.trainer.methods.ema import follow, frozen_copy
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config

_GREY = {
    "projection_hidden": 512,
    "projection_dim": 128,
    "prediction_hidden": 512,
    "momentum": 0.99,
    "augmentation": "default",
}


class BYOL(Method):
    """Grill et al., Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, 2020.

    The target network is a running mean of backbone and projection head. Its momentum rises from
    ``momentum`` to 1 over the run as half a cosine (section 3.3). Its batch norm takes the
    statistics of its own batch.
    """

    defaults: ClassVar = {
        "projection_hidden": 4096,
        "projection_dim": 256,
        "prediction_hidden": 4096,
        "momentum": 0.996,
        "augmentation": "byol",
    }
    recipes: ClassVar = {
        **dict.fromkeys(GREY, _GREY),
        "digits": {**_GREY, "batch_size": 64, "lr": 2e-3},  # more steps teach more than larger ones
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__()
        self.momentum, self.epochs = config.momentum, config.epochs
        self.backbone = backbone
        width = config.projection_dim
        self.head = ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            width,
            last_norm=False,
            norm=config.head_norm,
        )
        self.predictor = ProjectionHead(
            width, config.prediction_hidden, width, last_norm=False, norm=config.head_norm
        )
        self.target = frozen_copy(nn.Sequential(self.backbone, self.head))
        self.loss = NegativeCosineSimilarity()

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of both directions, and the projections of the views."""
        views = torch.cat(batch.views)
        z = self.head(self.backbone(views))
        with torch.no_grad():
            targets = self.target(views)
        swapped = torch.cat(targets.chunk(2)[::-1])
        # The sum of both directions' 2 - 2 cos (equation 2).
        loss = 4 + 4 * self.loss(self.predictor(z), swapped)
        z0, z1 = z.chunk(2)
        return loss, (z0, z1)

    def after_step(self, step: int, per_epoch: int) -> None:
        """The target follows."""
        share = step / (self.epochs * per_epoch)
        momentum = 1 - (1 - self.momentum) * (math.cos(math.pi * share) + 1) / 2
        follow(self.target, nn.Sequential(self.backbone, self.head), momentum)
