"""Barlow Twins: each feature agrees between two views and repeats no other feature."""

from typing import TYPE_CHECKING, Any, ClassVar

from fastssl import BarlowTwinsLoss
from fastssl.trainer.methods.base import TwoViews
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from fastssl.trainer.config import Config


class BarlowTwins(TwoViews):
    """Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021."""

    defaults: ClassVar = {
        "projection_hidden": 1024,
        "projection_dim": 1024,
        "augmentation": "default",
        "lambda_param": 5e-3,
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__(backbone)
        self.head = ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            config.projection_dim,
            layers=3,
            last_norm=False,
            norm=config.head_norm,
        )
        self.loss = BarlowTwinsLoss(
            config.lambda_param, gather_distributed=True, backend=config.backend
        )
