"""PIRL: an image and its nine patches in any order are told from all other images."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl import InfoNCELoss, SampleMemoryBank
from fastssl.distributed import gather_rows
from fastssl.trainer.methods.base import Method
from fastssl.trainer.networks import LinearHead

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config


class PIRL(Method):
    """Image and patches are attracted to the image's own row of a memory bank, not to other rows.

    Misra and van der Maaten, Self-Supervised Learning of Pretext-Invariant Representations, 2020,
    equation 5, with the jigsaw as the pretext. Where the paper estimates the softmax over the rows
    by binary decisions, here it is one over all of them or over some, drawn at random. The paper's
    heads are ours without a norm (``head_norm`` of "none").
    """

    defaults: ClassVar = {
        "projection_dim": 128,
        "temperature": 0.07,
        "lambda_param": 0.5,
        "negatives": 32000,
        "momentum": 0.5,
    }
    recipes: ClassVar = {
        "digits": {"temperature": 0.2, "negatives": 0},
        "mnist": {"temperature": 0.2},
        "fashion-mnist": {"temperature": 0.2},
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__()
        self.negatives, self.weight = config.negatives, config.lambda_param
        self.backbone = backbone
        features, dim = backbone.out_features, config.projection_dim
        self.head = LinearHead(features, dim, config.head_norm)
        self.patch_head = nn.Linear(features, dim)
        self.patches_head = LinearHead(9 * dim, dim, config.head_norm)
        self.memory = SampleMemoryBank(images, config.projection_dim, config.momentum)
        self.loss = InfoNCELoss(config.temperature, backend=config.backend)

    @staticmethod
    def views(config: "Config", size: int) -> "list[v2.Transform]":
        """The image, and its patches."""
        from fastssl.trainer import augment  # here, so that options are listed without torchvision

        return [augment.default(config.dataset, size), augment.patches(config.dataset, size)]

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The weighted loss of images and patches against the bank, and their embeddings."""
        images, patches = batch.views
        bank, ids = self.memory.bank, self.memory.ids
        if self.negatives:
            bank, ids = self.memory.sample(self.negatives)
        parts = self.patch_head(self.backbone(patches.flatten(0, 1))).view(*patches.shape[:2], -1)
        order = torch.rand(parts.shape[:2], device=parts.device).argsort(1)
        shuffled = parts.take_along_dim(order[:, :, None], 1).flatten(1)
        of_patches = self.patches_head(shuffled).to(bank.dtype)
        of_images = self.head(self.backbone(images)).to(bank.dtype)
        rows = self.memory(batch.index)
        loss_patches, loss_images = (
            self.loss(z, rows, bank, batch.index, ids) for z in (of_patches, of_images)
        )
        self.seen = of_images.detach(), batch.index
        loss = self.weight * loss_patches + (1 - self.weight) * loss_images
        return loss, (of_images, of_patches)

    def after_step(self, step: int, per_epoch: int) -> None:
        """The rows move towards the embeddings of the images."""
        self.memory.update(*(gather_rows(x)[0] for x in self.seen))
