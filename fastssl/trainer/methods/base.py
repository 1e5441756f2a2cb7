"""What methods that compare two views of each image have in common."""

from typing import Any

import torch
from torch import Tensor, nn


class TwoViews(nn.Module):
    """Both views through backbone and head, and a loss of their two batches of embeddings."""

    views = 2
    head: nn.Module
    loss: nn.Module

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, views: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of the two views, and their embeddings."""
        z0, z1 = self.head(self.backbone(torch.cat(views))).chunk(2)
        return self.loss(z0, z1), (z0, z1)
