"""Random views of images, and the order in which images are seen.

Both follow from (seed, epoch, index) alone: neither the number of workers nor where a run was
resumed changes them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from fastssl.trainer.data import Item

Key = tuple[int, int]  # epoch, index


@dataclass
class Batch:
    """What a step sees of B images.

    Attributes:
        views: One for each transform, [B, C, H, W]; sizes may differ.
        index: [B], which image of the data set each is.
        labels: [B], -1 where there is none.
    """

    views: list[Tensor]
    index: Tensor
    labels: Tensor


def default(dataset: str, size: int, scale: tuple[float, float] | None = None) -> v2.Transform:
    """The random augmentation of a data set: uint8 [C, H, W] -> uint8 [C, size, size].

    Digit-like images are moved, sheared, seen from an angle and blurred, or else cropped; colour
    images are augmented as in SimCLR.

    Args:
        dataset: Its name.
        size: Side of a view.
        scale: The least and the largest share of the image's area that a view shows; (0.2, 1) for
            colour images and (1, 1), which does not crop, for digit-like ones if None.
    """
    blur = v2.GaussianBlur(size // 20 * 2 + 3, sigma=(0.1, 2.0))
    if dataset in ("digits", "mnist", "fashion-mnist"):
        bilinear = v2.InterpolationMode.BILINEAR
        steps = [
            v2.RandomAffine(20, (0.1, 0.1), (0.75, 1.2), shear=15, interpolation=bilinear),
            v2.RandomApply([v2.RandomPerspective(0.3, p=1.0)], p=0.3),
            v2.RandomApply([blur], p=0.3),
        ]
        if scale and scale != (1.0, 1.0):
            steps = [v2.RandomResizedCrop(size, scale=scale, antialias=True)]
        if dataset == "fashion-mnist":
            steps.append(v2.RandomHorizontalFlip())
        return v2.Compose(steps)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=scale or (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([blur], p=0.5),
        ]
    )


class Views(Dataset[tuple[list[Tensor], int, int]]):
    """(A random view of an image for each transform, index, label) by (epoch, index).

    Where the data set gives several images as one item, the transforms take turns with them: that
    is where positives from elsewhere come in.
    """

    def __init__(
        self, images: Dataset[Item], transforms: Sequence[v2.Transform], seed: int
    ) -> None:
        self.images, self.transforms, self.seed = images, transforms, seed

    def __getitem__(self, key: Key) -> tuple[list[Tensor], int, int]:
        image, label = self.images[key[1]]
        images = [image] if isinstance(image, Tensor) else image
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, *key))
            views = [
                transform(images[i % len(images)]) for i, transform in enumerate(self.transforms)
            ]
        return views, key[1], label


class Batches(Sampler[list[Key]]):
    """The batches of every step from ``start`` to ``stop``.

    Each epoch is a new order of the images, less those that do not fill a batch.
    """

    def __init__(self, images: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.images // self.batch_size
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, per_epoch)
            if step == self.start or batch == 0:
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                order = torch.randperm(self.images, generator=generator).tolist()
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in indices]


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
