"""SimCLR: two views of an image attract, all other images of the batch repel."""

from typing import TYPE_CHECKING, Any, ClassVar

from fastssl import NTXentLoss
from fastssl.trainer.methods.base import TwoViews
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from fastssl.trainer.config import Config


class SimCLR(TwoViews):
    """Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020."""

    defaults: ClassVar = {
        "projection_hidden": 256,
        "projection_dim": 128,
        "temperature": 0.5,
        "augmentation": "default",
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__(backbone)
        self.head = ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            config.projection_dim,
            norm=config.head_norm,
        )
        self.loss = NTXentLoss(config.temperature, gather_distributed=True, backend=config.backend)
