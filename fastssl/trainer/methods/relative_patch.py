"""Relative patch position: where does a patch lie, seen from the one in the middle?"""

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

# A patch of a digit is a stroke or two: the features that tell its place classify whole digits no
# better than random ones do, whatever the sizes of patches and heads that were tried.
_GREY = {"projection_hidden": 256, "projection_dim": 128}
CENTRE, RIGHT = 4, 5  # of the nine patches


class RelativePatch(Method):
    """Doersch et al., Unsupervised Visual Representation Learning by Context Prediction, 2015.

    Of 3 x 3 patches with gaps between them, the one in the middle makes a pair with each of its
    eight neighbours, and a classifier of both patches' embeddings says which neighbour it is.
    """

    defaults: ClassVar = {"projection_hidden": 4096, "projection_dim": 512}
    recipes: ClassVar = {
        **dict.fromkeys(GREY, _GREY),
        "digits": {**_GREY, "batch_size": 64, "lr": 1e-3},
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__()
        self.backbone = backbone
        width = config.projection_dim
        self.head = ProjectionHead(
            backbone.out_features, width, width, layers=1, norm=config.head_norm
        )
        self.classifier = ProjectionHead(
            2 * width, config.projection_hidden, 8, last_norm=False, norm=config.head_norm
        )
        self.loss = nn.CrossEntropyLoss()

    @staticmethod
    def views(config: "Config", size: int) -> "list[v2.Transform]":
        """Nine patches with a gap of at least a quarter of a cell."""
        from fastssl.trainer import augment  # here, so that options are listed without torchvision

        return [augment.patches(config.dataset, size, patch=0.6, gap=0.25)]

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of all pairs, and the embeddings of the middle and of the patch to its right."""
        (patches,) = batch.views  # [B, 9, C, p, p]
        z = self.head(self.backbone(patches.flatten(0, 1))).unflatten(0, patches.shape[:2])
        around = torch.cat([z[:, :CENTRE], z[:, CENTRE + 1 :]], 1)
        pairs = torch.cat([z[:, CENTRE : CENTRE + 1].expand_as(around), around], 2)
        places = torch.arange(8, device=z.device).repeat(len(z))
        loss = self.loss(self.classifier(pairs.relu().flatten(0, 1)), places)
        return loss, (z[:, CENTRE], z[:, RIGHT])
