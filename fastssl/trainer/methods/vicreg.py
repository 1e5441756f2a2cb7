"""VICReg: features agree between two views, vary over the batch and do not repeat each other."""

from typing import TYPE_CHECKING, Any, ClassVar

from fastssl import VICRegLoss
from fastssl.trainer.methods.base import TwoViews
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from fastssl.trainer.config import Config


class VICReg(TwoViews):
    """Bardes et al., VICReg: Variance-Invariance-Covariance Regularization, 2022."""

    defaults: ClassVar = {
        "projection_hidden": 1024,
        "projection_dim": 1024,
        "augmentation": "default",
        "lambda_param": 25.0,
        "mu_param": 25.0,
        "nu_param": 1.0,
    }

    recipes: ClassVar = {"digits": {"lr": 2e-3}}  # features die at the rate of other methods

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
        self.loss = VICRegLoss(
            config.lambda_param,
            config.mu_param,
            config.nu_param,
            gather_distributed=True,
            backend=config.backend,
        )
