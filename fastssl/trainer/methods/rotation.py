"""Rotation: which way up is the image?"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl.trainer.datasets import GREY
from fastssl.trainer.methods.base import Method
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config

_GREY = {"projection_hidden": 256}


class Rotation(Method):
    """Gidaris et al., Unsupervised Representation Learning by Predicting Image Rotations, 2018.

    Every image is in the batch in all four rotations. A perceptron of three layers, as on top of
    the paper's AlexNet, tells them apart: the backbone's own last layer then need not become a
    detector of rotations, which is a poor feature for anything else.
    """

    defaults: ClassVar = {"projection_hidden": 4096}
    recipes: ClassVar = {
        **dict.fromkeys(GREY, _GREY),
        "digits": {**_GREY, "batch_size": 64, "lr": 1e-3},
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            4,
            layers=3,
            last_norm=False,
            norm=config.head_norm,
        )
        self.loss = nn.CrossEntropyLoss()

    @staticmethod
    def views(config: "Config", size: int) -> "list[v2.Transform]":
        """One."""
        from fastssl.trainer import augment  # here, so that options are listed without torchvision

        return [augment.default(config.dataset, size)]

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of all rotations, and the features of the image and of it turned once."""
        (images,) = batch.views
        features = self.backbone(torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)]))
        turns = torch.arange(4, device=images.device).repeat_interleave(len(images))
        upright, turned, *_ = features.chunk(4)
        return self.loss(self.head(features), turns), (upright, turned)
