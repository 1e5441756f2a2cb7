"""SwAV: each view of an image predicts to which prototypes the other views are assigned."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl import SwaVLoss
from fastssl.distributed import gather_rows, world_size
from fastssl.functional import sinkhorn_knopp
from fastssl.trainer.methods.base import Method
from fastssl.trainer.networks import ProjectionHead
from fastssl.trainer.parallel import rank

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config


# Tuned on digits, where a queue of 1024 made features worse. The others are where to begin.
_GREY = {
    "projection_hidden": 256,
    "epsilon": 0.03,
    "prototypes": 100,
    "queue_length": 0,
    "local_crops": 4,
    "local_scale_min": 0.3,
    "local_scale_max": 0.6,
    "global_scale_min": 1.0,
}
_CIFAR = {
    "local_size": 16,
    "local_scale_min": 0.1,
    "local_scale_max": 0.3,
    "global_scale_min": 0.3,
}


class SwAV(Method):
    """Two global crops of each image are assigned to prototypes, and all crops predict it.

    Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2020.
    """

    queue: Tensor
    used: Tensor
    code_sum: Tensor
    entropy_sum: Tensor

    # What the authors take for ImageNet in batches of 256.
    defaults: ClassVar = {
        "projection_hidden": 2048,
        "projection_dim": 128,
        "temperature": 0.1,
        "epsilon": 0.05,
        "prototypes": 3000,
        "freeze_epochs": 1,
        "queue_length": 3840,
        "queue_start": 15,
        "local_crops": 6,
        "local_size": 96,
        "local_scale_min": 0.05,
        "local_scale_max": 0.14,
        "global_scale_min": 0.14,
    }
    recipes: ClassVar = {
        "digits": {**_GREY, "local_size": 8},
        "mnist": {**_GREY, "local_size": 12},
        "fashion-mnist": {**_GREY, "local_size": 12},
        "cifar10": _CIFAR,
        "cifar100": _CIFAR,
        "stl10": {"local_size": 40},
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = ProjectionHead(
            backbone.out_features,
            config.projection_hidden,
            config.projection_dim,
            last_norm=False,
            norm=config.head_norm,
        )
        self.prototypes = nn.Linear(config.projection_dim, config.prototypes, bias=False)
        self.loss = SwaVLoss(
            config.temperature,
            sinkhorn_epsilon=config.epsilon,
            sinkhorn_gather_distributed=True,
            backend=config.backend,
        )
        # Embeddings of earlier global crops, the newest first.
        self.register_buffer("queue", torch.zeros(2, config.queue_length, config.projection_dim))
        # Of the codes of this epoch.
        self.register_buffer("used", torch.zeros(config.prototypes, dtype=torch.bool))
        self.register_buffer("code_sum", torch.zeros(config.prototypes))
        self.register_buffer("entropy_sum", torch.zeros(()))

    @staticmethod
    def views(config: "Config", size: int) -> "list[v2.Transform]":
        """Two global crops and the local ones."""
        from fastssl.trainer import augment  # here, so that options are listed without torchvision

        local_scale = (config.local_scale_min, config.local_scale_max)
        whole = augment.default(config.dataset, size, (config.global_scale_min, 1.0))
        part = augment.default(config.dataset, config.local_size, local_scale)
        return [whole] * 2 + [part] * config.local_crops

    def before_step(self, step: int, per_epoch: int) -> None:
        """Put the prototypes at unit length; see whether they are frozen and the queue is used."""
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
        self.frozen = step < self.config.freeze_epochs * per_epoch
        late = step >= self.config.queue_start * per_epoch
        self.queued = min(step * self.config.batch_size, self.config.queue_length) if late else 0

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of all crops, and the embeddings of the global ones."""
        views, B = batch.views, len(batch.index)
        groups = [crops for crops in (views[:2], views[2:]) if crops]  # each of one size
        features = torch.cat([self.backbone(torch.cat(crops)) for crops in groups])
        z = F.normalize(self.head(features).to(self.queue.dtype))
        scores = self.prototypes(z).split(B)
        queue = None
        with torch.no_grad():
            if self.queued:  # of which each of several processes takes its share
                ranks = world_size()
                queue = self.prototypes(self.queue[:, rank() : self.queued : ranks]).unbind()
            rows = scores[0] if queue is None else torch.cat([scores[0], queue[0]])
            codes = sinkhorn_knopp(
                rows.float(),
                self.config.epsilon,
                gather_distributed=True,
                backend=self.config.backend,
            )
            self.seen = codes[:B], z[: 2 * B].detach().view(2, B, -1).transpose(0, 1)
        return self.loss(scores[:2], scores[2:], queue).squeeze(), (z[:B], z[B : 2 * B])

    def after_backward(self) -> None:
        """Frozen prototypes get no gradient, and so no weight decay either."""
        if self.frozen:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, step: int, per_epoch: int) -> None:
        """The codes are counted and the embeddings join the queue."""
        codes, latest = (gather_rows(x)[0] for x in self.seen)
        latest = latest.transpose(0, 1)
        self.used[codes.argmax(1)] = True
        self.code_sum += codes.sum(0)
        self.entropy_sum += torch.special.entr(codes).sum()
        self.queue.copy_(torch.cat([latest, self.queue], 1)[:, : self.config.queue_length])

    def end_epoch(self) -> dict[str, float]:
        """How many prototypes are some image's first choice, and how sharp the codes are."""
        images = self.code_sum.sum()  # each has codes of sum 1
        found = {
            "prototypes_used": self.used.sum().item(),
            "code_entropy": (self.entropy_sum / images).item(),
            "mean_code_entropy": torch.special.entr(self.code_sum / images).sum().item(),
        }
        for buffer in (self.used, self.code_sum, self.entropy_sum):
            buffer.zero_()
        return found
