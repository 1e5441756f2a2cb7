"""MoCo: a query is told from a queue of earlier keys, which a slowly moving encoder made."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl import InfoNCELoss, MemoryBankModule
from fastssl.trainer.methods.base import Method
from fastssl.trainer.methods.ema import follow, frozen_copy
from fastssl.trainer.networks import ProjectionHead

if TYPE_CHECKING:
    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config

GROUP = 32  # images whose statistics batch norm takes together: those of one of the paper's GPUs
_DIGITS = {"projection_hidden": 256, "momentum": 0.9, "queue_length": 1024}


class MoCo(Method):
    """He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020.

    Head and temperature are those of Chen et al., Improved Baselines with Momentum Contrastive
    Learning, 2020. A query and its key must not share the statistics of a batch norm, by which they
    could know each other. Where the paper shuffles the keys between GPUs, here the batch is divided
    into groups that batch norm sees one at a time, and the keys' groups are of other images, drawn
    at random; with a batch of less than twice ``GROUP`` there is only one.
    """

    whole_batch_norm: ClassVar = False
    defaults: ClassVar = {
        "projection_hidden": 2048,
        "projection_dim": 128,
        "augmentation": "default",
        "temperature": 0.2,
        "queue_length": 65536,
        "momentum": 0.999,
    }
    recipes: ClassVar = {
        "digits": _DIGITS,
        "mnist": {**_DIGITS, "momentum": 0.99, "queue_length": 8192},
        "fashion-mnist": {**_DIGITS, "momentum": 0.99, "queue_length": 8192},
        "cifar10": {"momentum": 0.99, "queue_length": 4096},
        "cifar100": {"momentum": 0.99, "queue_length": 4096},
        "stl10": {"momentum": 0.99, "queue_length": 16384},
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__()
        self.momentum = config.momentum
        self.backbone = backbone
        self.head = ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            config.projection_dim,
            last_norm=False,
            norm=config.head_norm,
        )
        self.key_backbone = frozen_copy(self.backbone)
        self.key_head = frozen_copy(self.head)
        self.queue = MemoryBankModule(
            (config.queue_length, config.projection_dim),
            gather_distributed=True,
            feature_dim_first=False,
            persistent=True,
        )
        self.loss = InfoNCELoss(config.temperature, gather_distributed=True, backend=config.backend)

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of the queries against their keys and the queue, and both."""
        images0, images1 = batch.views
        queries = self._embed(self.backbone, self.head, images0)
        with torch.no_grad():
            shuffled = torch.randperm(len(images1), device=images1.device)
            keys = self._embed(self.key_backbone, self.key_head, images1[shuffled])
            self.keys = keys[shuffled.argsort()]
            negatives = self.queue(self.keys)[1]
        return self.loss(queries, self.keys, negatives), (queries, self.keys)

    def _embed(self, backbone: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        """Embeddings in the queue's type, group by group."""
        groups = images.tensor_split(max(1, len(images) // GROUP))
        return torch.cat([head(backbone(group)) for group in groups]).to(self.queue.bank.dtype)

    def after_step(self, step: int, per_epoch: int) -> None:
        """The key encoder follows, and the keys join the queue."""
        follow(self.key_backbone, self.backbone, self.momentum)
        follow(self.key_head, self.head, self.momentum)
        self.queue(self.keys, update=True)
