"""Jigsaw: in which order have the nine patches of the image been put?"""

import itertools
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
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
_GREY = {"projection_hidden": 256, "projection_dim": 128, "permutations": 100}


@cache
def permutations(count: int) -> Tensor:
    """A set of orders of nine patches, int64 [count, 9], that are far apart.

    It begins with the order as it is. Each next one has the largest least Hamming distance to those
    before it, and of several such the largest sum. Noroozi & Favaro 2016 go by the average alone.
    """
    orders = np.array(list(itertools.permutations(range(9))), dtype=np.int8).T.copy()  # [9, 9!]
    least = np.full(orders.shape[1], 9, dtype=np.int8)
    total = np.zeros(orders.shape[1], dtype=np.int32)
    chosen = [0]
    while len(chosen) < count:
        distance = (orders != orders[:, chosen[-1:]]).sum(0, dtype=np.int8)
        np.minimum(least, distance, out=least)
        total += distance
        chosen.append(int(np.argmax(np.where(least == least.max(), total, -1))))
    return torch.from_numpy(orders[:, chosen].T).long()


class Jigsaw(Method):
    """Nine patches in one of ``permutations`` orders, which are the same in every run: which is it?

    Noroozi & Favaro, Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles,
    2016. Each patch, normalised by its own mean and deviation, passes through the backbone by
    itself; a classifier sees their embeddings side by side.
    """

    order: Tensor

    defaults: ClassVar = {
        "projection_hidden": 4096,
        "projection_dim": 1024,
        "permutations": 1000,
    }
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
            9 * width,
            config.projection_hidden,
            config.permutations,
            last_norm=False,
            norm=config.head_norm,
        )
        self.register_buffer("order", permutations(config.permutations).clone())
        self.loss = nn.CrossEntropyLoss()

    @staticmethod
    def views(config: "Config", size: int) -> "list[v2.Transform]":
        """Nine patches."""
        from fastssl.trainer import augment  # here, so that options are listed without torchvision

        return [augment.patches(config.dataset, size)]

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of one order of each image, and the embeddings of two of its patches."""
        (patches,) = batch.views  # [B, 9, C, p, p]
        std, mean = torch.std_mean(patches, (2, 3, 4), keepdim=True)
        patches = (patches - mean) / (std + 1e-2)  # a patch of one colour has none
        z = self.head(self.backbone(patches.flatten(0, 1))).unflatten(0, patches.shape[:2])
        which = torch.randint(len(self.order), (len(z),), device=z.device)
        shuffled = z.relu().gather(1, self.order[which][:, :, None].expand_as(z))
        return self.loss(self.classifier(shuffled.flatten(1)), which), (z[:, 4], z[:, 5])
