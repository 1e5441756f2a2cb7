"""Random views of images, and the order in which images are seen.

Both follow from (seed, epoch, index) alone: neither the number of workers nor where a run was
resumed changes them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from fastssl.trainer.data import Data, Item
from fastssl.trainer.datasets import GREY
from fastssl.trainer.networks import SMALL

Transform = Callable[[Tensor], Tensor]
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


def chosen(usual: Sequence[Transform], data: Data) -> Sequence[Transform]:
    """The transforms of a method's views: its usual ones, or those that were given with the data.

    Raises:
        ValueError: They are not one, nor as many as the usual ones.
    """
    if data.transforms is None:
        return usual
    own = list(data.transforms)
    if len(own) not in (1, len(usual)):
        raise ValueError(
            f"data.transforms must be 1, or {len(usual)} for as many views, got {len(own)}"
        )
    return own if len(own) == len(usual) else own * len(usual)


def default(dataset: str, size: int, scale: tuple[float, float] | None = None) -> v2.Transform:
    """The random augmentation of a data set: uint8 [C, H, W] -> uint8 [C, size, size].

    Digit-like images are moved, sheared, seen from an angle and blurred, or else cropped; colour
    images are augmented as in MoCo v2.

    Args:
        dataset: Its name.
        size: Side of a view.
        scale: The least and the largest share of the image's area that a view shows; (0.2, 1) for
            colour images and (1, 1), which does not crop, for digit-like ones if None.
    """
    blur = v2.GaussianBlur(size // 20 * 2 + 3, sigma=(0.1, 2.0))
    if dataset in GREY:
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
            *_colours(0.5),
            v2.RandomApply([blur], p=0.5),
        ]
    )


def _colours(strength: float) -> list[v2.Transform]:
    """SimCLR's distortion of colours."""
    jitter = v2.ColorJitter(*(strength * x for x in (0.8, 0.8, 0.8, 0.2)))
    return [v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(0.2)]


def simclr(size: int) -> v2.Transform:
    """A view of a colour image in SimCLR on ImageNet (Chen et al. 2020, appendix A).

    Args:
        size: Side of a view; the blur's kernel is a tenth of it.
    """
    blur = v2.GaussianBlur(size // 10 | 1, sigma=(0.1, 2.0))
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            *_colours(1.0),
            v2.RandomApply([blur], p=0.5),
        ]
    )


def byol(size: int) -> list[v2.Transform]:
    """The two views of a colour image in BYOL, which differ (Grill et al. 2020, appendix B).

    Barlow Twins takes the same two on ImageNet, and so does VICReg's code.

    Args:
        size: Side of a view; the blur's kernel is a tenth of it.
    """
    jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)  # the four in random order
    blur = v2.GaussianBlur(size // 10 | 1, sigma=(0.1, 2.0))
    bicubic = v2.InterpolationMode.BICUBIC
    return [
        v2.Compose(
            [
                v2.RandomResizedCrop(size, (0.08, 1.0), (3 / 4, 4 / 3), bicubic, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([jitter], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([blur], p=blurred),
                v2.RandomSolarize(128, p=solarised),
            ]
        )
        for blurred, solarised in ((1.0, 0.0), (0.1, 0.2))
    ]


def patches(dataset: str, size: int, *, patch: float = 64 / 85, gap: float = 0.0) -> v2.Transform:
    """Nine patches of a random view: uint8 [C, H, W] -> uint8 [9, C, p, p], p = 64 if size is 224.

    As in PIRL the view shows at least 0.6 of a colour image, and each patch has colours of its own.
    Of a small image the view is twice as large, so that a patch is no mere dot.

    Args:
        dataset: Name of the data set.
        size: Side of the images.
        patch: Side of a patch, as a share of its cell, a third of the view.
        gap: Least distance between two patches, likewise.
    """
    side = 2 * size if size <= SMALL else size * 255 // 224
    pixels, between = (round(share * (side // 3)) for share in (patch, gap))
    if dataset in GREY:
        return v2.Compose([default(dataset, size), Patches(side, pixels, gap=between)])
    crop = v2.RandomResizedCrop(side, scale=(0.6, 1.0), antialias=True)
    cut = Patches(side, pixels, gap=between, each=v2.Compose(_colours(0.5)))
    return v2.Compose([crop, v2.RandomHorizontalFlip(), cut])


class Patches(nn.Module):
    """The nine patches of an image, row by row: uint8 [C, H, W] -> uint8 [9, C, patch, patch].

    The image is resized to a square of 3 x 3 cells. Each patch lies somewhere in its own cell, no
    closer than ``gap`` to the next one.

    Args:
        size: Side of the square.
        patch: Side of a patch.
        gap: Least number of pixels between two patches.
        each: A transform for each patch by itself.

    Raises:
        ValueError: A patch and the gap do not fit into a cell.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        *,
        gap: int = 0,
        each: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.patch, self.gap, self.each = size, patch, gap, each
        self.room = size // 3 - patch - gap
        if self.room < 0:
            raise ValueError(
                f"patch and gap must fit into a cell of {size // 3} pixels, got {patch} and {gap}"
            )

    def forward(self, image: Tensor) -> Tensor:
        """Cut the patches out."""
        image = v2.functional.resize(image, [self.size, self.size], antialias=True)
        cells = torch.cartesian_prod(*[torch.arange(3) * (self.size // 3)] * 2)
        corners = cells + self.gap // 2 + torch.randint(self.room + 1, cells.shape)
        patches = [image[:, y : y + self.patch, x : x + self.patch] for y, x in corners.tolist()]
        return torch.stack([self.each(patch) for patch in patches] if self.each else patches)


class Originals(Dataset[tuple[list[Tensor], Key, int]]):
    """(The images of an item as they are, key, label) by key, for `Views.of` to go on with."""

    def __init__(self, images: Dataset[Item]) -> None:
        self.images = images

    def __getitem__(self, key: Key) -> tuple[list[Tensor], Key, int]:
        image, label = self.images[key[1]]
        return [image] if isinstance(image, Tensor) else list(image), key, label


class Views(Dataset[tuple[list[Tensor], int, int]]):
    """(A random view of an image for each transform, index, label) by (epoch, index).

    Where the data set gives several images as one item, the transforms take turns with them: that
    is where positives from elsewhere come in.
    """

    def __init__(self, images: Dataset[Item], transforms: Sequence[Transform], seed: int) -> None:
        self.originals, self.transforms, self.seed = Originals(images), transforms, seed

    def __getitem__(self, key: Key) -> tuple[list[Tensor], int, int]:
        images, _, label = self.originals[key]
        return self.of(images, key), key[1], label

    def of(self, images: list[Tensor], key: Key) -> list[Tensor]:
        """The views of the images of one item."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, *key))
            return [
                transform(images[i % len(images)]) for i, transform in enumerate(self.transforms)
            ]


class Batches(Sampler[list[Key]]):
    """The batches of every step from ``start`` to ``stop``, or the share of one of several ranks.

    Each epoch is a new order of the images, less those that do not fill a batch.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.start, self.stop = start, stop
        self.share = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)

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
            yield [(epoch, index) for index in indices[self.share]]


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
