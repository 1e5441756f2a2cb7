"""SupCon: all views of a class attract, those of other classes repel."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl import SupConLoss
from fastssl.trainer.methods.base import TwoViews
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config


class SupCon(TwoViews):
    """Khosla et al., Supervised Contrastive Learning, 2020.

    It pretrains with labels: this is the first of the paper's two stages. The second, a linear
    classifier on the frozen backbone, is the linear probe of ``fastssl evaluate``.
    """

    labelled: ClassVar = True
    defaults: ClassVar = {
        "projection_hidden": 256,
        "projection_dim": 128,
        "augmentation": "default",
        "temperature": 0.1,
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__(backbone)
        self.head = ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            config.projection_dim,
            last_norm=False,
            norm=config.head_norm,
        )
        self.loss = SupConLoss(
            config.temperature,
            base_temperature=config.temperature,
            gather_distributed=True,
            backend=config.backend,
        )

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of the two views with the labels, and their embeddings."""
        z0, z1 = F.normalize(self.head(self.backbone(torch.cat(batch.views)))).chunk(2)
        unknown = -1 - batch.index  # each a class of its own
        labels = torch.where(batch.labels < 0, unknown, batch.labels)
        return self.loss(torch.stack([z0, z1], 1), labels), (z0, z1)
