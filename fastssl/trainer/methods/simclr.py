"""SimCLR: two views of an image attract, all other images of the batch repel."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastssl import NTXentLoss
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from fastssl.trainer.config import Config


class SimCLR(nn.Module):
    """Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020."""

    views = 2

    def __init__(self, backbone: Any, config: "Config") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ProjectionHead(
            backbone.out_features, config.projection_hidden, config.projection_dim
        )
        self.loss = NTXentLoss(config.temperature, backend=config.backend)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The NT-Xent loss of the two views, and their embeddings."""
        z0, z1 = self.head(self.backbone(torch.cat(views))).chunk(2)
        return self.loss(z0, z1), (z0, z1)
