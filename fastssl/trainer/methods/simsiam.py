"""SimSiam: each view predicts the other, whose gradient is stopped; nothing else is needed."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastssl import NegativeCosineSimilarity
from fastssl.trainer.datasets import GREY
from fastssl.trainer.methods.base import Method
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config

_GREY = {"projection_hidden": 512, "projection_dim": 512, "prediction_hidden": 128}


class SimSiam(Method):
    """Chen & He, Exploring Simple Siamese Representation Learning, 2021.

    The predictor is a bottleneck, and its learning rate stays as it is (section 4.2).
    """

    defaults: ClassVar = {
        "projection_hidden": 2048,
        "projection_dim": 2048,
        "prediction_hidden": 512,
        "augmentation": "default",
    }
    recipes: ClassVar = {
        **dict.fromkeys(GREY, _GREY),
        "digits": {**_GREY, "batch_size": 64, "lr": 2e-3},
    }
    constant_lr: ClassVar = ("predictor",)

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__()
        self.backbone = backbone
        width = config.projection_dim
        self.head = ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            width,
            layers=3,
            norm=config.head_norm,
        )
        self.predictor = ProjectionHead(
            width, config.prediction_hidden, width, last_norm=False, norm=config.head_norm
        )
        self.loss = NegativeCosineSimilarity()

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss, the mean of both directions, and the projections of the views."""
        z = self.head(self.backbone(torch.cat(batch.views)))
        z0, z1 = z.chunk(2)
        return self.loss(self.predictor(z), torch.cat([z1, z0]).detach()), (z0, z1)
