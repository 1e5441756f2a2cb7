"""The data sets: every one as uint8 images and whole-number labels."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, Subset
from torchvision import datasets

from fastssl.trainer import checkpoint, folders
from fastssl.trainer.datasets import FOLDER_OPTIONS, STATISTICS
from fastssl.trainer.folders import told

if TYPE_CHECKING:
    from fastssl.trainer.config import Config

Item = tuple[Tensor, int]

# What torchvision raises where a data set's files are missing, cut short or of another format.
DAMAGED = (OSError, RuntimeError, ValueError, AssertionError, EOFError, LookupError)


class Images(Dataset[Item]):
    """Images held in memory [N, C, H, W] with labels [N]; -1 is an unknown label."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return self.images[index], int(self.labels[index])


def labels_of(split: Any) -> Tensor | None:
    """The labels [N] of a data set, if they are known without its images being read."""
    if isinstance(split, Subset):
        of_all = labels_of(split.dataset)
        return None if of_all is None else of_all[list(split.indices)]
    if isinstance(split, (list, tuple)):
        return torch.as_tensor([label for _, label in split])
    return torch.as_tensor(split.labels) if isinstance(split, (Images, folders.Files)) else None


def in_memory(split: Any) -> bool:
    """Whether nothing has to be read or decoded for an image."""
    while isinstance(split, Subset):
        split = split.dataset
    return isinstance(split, (Images, list, tuple))


def checksum(split: Any) -> str | None:
    """What tells a data set from another of its size, if no image has to be read for it.

    It is made of the names of files, or of some hundred images in memory.
    """
    if isinstance(split, Subset):
        of_all = checksum(split.dataset)
        if of_all is None:
            return None
        parts: list[Any] = [of_all, *split.indices]
    elif isinstance(split, folders.Files):
        parts = [*split.names()]
    elif in_memory(split):
        some = range(0, len(split), max(1, len(split) // 500))
        parts = [part for i in some for part in tree_leaves(split[i])]
    else:
        return None
    found = hashlib.sha256()
    for part in parts:
        is_tensor = isinstance(part, Tensor)
        found.update(part.numpy().tobytes() if is_tensor else os.fsencode(f"{part}\0"))
    return found.hexdigest()


@dataclass
class Data:
    """One data set, ready for pretraining and evaluation.

    Attributes:
        name: Its name.
        pretrain: What to pretrain on. Items are ([C, H, W], label), like those of the other two:
            images are uint8, or floating-point from 0 to 1; the labels are not used, and -1 where
            there are none. Instead of one image an item may have a tuple of them that show the
            same thing: a method's views take turns with them, the first view with the first image.
        train: The labelled training split, images of one shape; None if the data set has no labels.
            Images with a label of -1, an unknown one, take no part in an evaluation, and each is a
            class of its own to a method that learns from labels.
        test: The labelled test split, likewise.
        classes: The names of the labels.
        channels: Channels of the images.
        size: Side of the images a network sees.
        mean: Per channel, of images scaled to [0, 1].
        std: Likewise.
        notes: What was taken for what and what was left out, a line each.
        transforms: What makes the views, in place of the method's augmentation: one for all of
            them or one for each, as many as the method has. Each takes an image and returns a view
            [C, H, W], or [P, C, H, W] where the method sees P patches. Random numbers should come
            from PyTorch's global generator, which a run seeds for each image.
    """

    name: str
    pretrain: Any
    train: Any
    test: Any
    classes: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    transforms: Sequence[Callable[[Tensor], Tensor]] | None = None

    def normalize(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], on any device, to the float32 that a network takes."""
        mean, std = (images.new_tensor(x, dtype=torch.float32) for x in (self.mean, self.std))
        scaled = images / 255 if images.dtype == torch.uint8 else images.float()
        return (scaled - mean[:, None, None]) / std[:, None, None]

    def described(self) -> list[str]:
        """The classes, with how many images they have where that is known, and the notes."""
        if self.train is None:
            return list(self.notes)
        labels = [labels_of(split) for split in (self.train, self.test)]
        names, what = list(self.classes), f"{len(self.classes)} classes"
        if all(x is not None for x in labels):
            train, test = (Counter(x.tolist()) for x in labels if x is not None)
            names = [f"{name} {train[i]} + {test[i]}" for i, name in enumerate(names)]
            what += ", with images to train on + to test on"
            if unknown := train[-1] + test[-1]:
                names.append(f"unknown {unknown}")
        return [f"{what}: {told(names)}", *self.notes]


def load(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    damaged: str = "refuse",
    labels: bool = True,
    train_split: str | None = None,
    test_split: str | None = None,
) -> Data:
    """Load a data set, downloading it into data_dir if it is not there.

    Args:
        name: digits, mnist, fashion-mnist, cifar10, cifar100, stl10 or folder.
        data_dir: Where data sets are kept; with folder, the image folder itself.
        image_size: Side of a folder's images, 224 if None.
        damaged: What becomes of a folder's images that cannot be read. "refuse": nothing is looked
            at in advance, and the first one that is asked for raises a ValueError that names it.
            "skip": all files are read once now, on every core, and those that cannot be decoded to
            their end are left out and named in the notes. Either way wrong pixels that the format's
            decoder accepts go unnoticed: a JPEG has no checksum.
        labels: Whether a folder's subfolders are its classes; if not, it has no labels.
        train_split: Name of the folder of a folder's classes to train on; by its usual names if
            None.
        test_split: Name of the folder of those to test on, likewise.

    Returns:
        The Data.

    Raises:
        ValueError: The data set is unknown, missing or damaged; or the folder holds no images, or
            its classes or splits cannot be told.
    """
    if name not in STATISTICS:
        raise ValueError(f"dataset must be one of {', '.join(STATISTICS)}, got {name!r}")
    root, notes = checkpoint.expanded(data_dir), []
    if name == "folder":
        size, skip = image_size or 224, damaged == "skip"
        found = folders.read(root, size, skip, labels, train_split, test_split)
        splits = found.pretrain, found.train, found.test, found.classes, size
        notes = found.notes
    elif name == "digits":
        splits = _digits()
    else:
        splits = _torchvision(name, root)
    pretrain, train, test, classes, size = splits
    mean, std = STATISTICS[name]
    channels = len(mean)
    return Data(
        name, pretrain, train, test, tuple(classes), channels, size, mean, std, tuple(notes)
    )


def of_config(config: "Config", data_dir: str | Path | None = None) -> Data:
    """The data set of a run, from where it lies now if that is another folder."""
    options = {name: getattr(config, name) for name in FOLDER_OPTIONS}
    return load(config.dataset, data_dir or config.data_dir, **options)


Splits = tuple[Any, Any, Any, Any, int]  # pretrain, train, test, classes, size


def _digits() -> Splits:
    """The 1797 digits of scikit-learn, 8 x 8, enlarged to 16 x 16 so that augmentation has room."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear")
    images, labels = images.round().to(torch.uint8), torch.from_numpy(bunch.target).long()
    train, test = train_test_split(
        np.arange(len(images)), test_size=360, random_state=0, stratify=bunch.target
    )
    train_split, test_split = (
        Images(images[train], labels[train]),
        Images(images[test], labels[test]),
    )
    return train_split, train_split, test_split, [str(digit) for digit in range(10)], 16


def _torchvision(name: str, root: Path) -> Splits:
    kind, place, site = {
        "mnist": (datasets.MNIST, "MNIST/raw", "http://yann.lecun.com/exdb/mnist"),
        "fashion-mnist": (
            datasets.FashionMNIST,
            "FashionMNIST/raw",
            "https://github.com/zalandoresearch/fashion-mnist",
        ),
        "cifar10": (
            datasets.CIFAR10,
            "cifar-10-batches-py",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
        "cifar100": (
            datasets.CIFAR100,
            "cifar-100-python",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
        "stl10": (datasets.STL10, "stl10_binary", "https://cs.stanford.edu/~acoates/stl10"),
    }[name]

    def split(**which: Any) -> Any:
        try:
            return kind(root, **which)
        except DAMAGED:
            try:
                return kind(root, download=True, **which)
            except DAMAGED as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(
                    f"data set {name!r} is missing or damaged in {root / place} and was not "
                    f"downloaded ({reason}); put the files of {site} there, or name another "
                    f"data_dir"
                ) from None

    if name == "stl10":
        both, test = split(split="train+unlabeled"), split(split="test")
        images, labels = torch.from_numpy(both.data), torch.from_numpy(both.labels).long()
        known = labels >= 0
        pretrain = Images(images, labels)
        train = Images(images[known], labels[known])
        return pretrain, train, _images(test.data, test.labels), both.classes, 96
    both, test = split(train=True), split(train=False)
    train = _images(both.data, both.targets)
    return train, train, _images(test.data, test.targets), both.classes, train.images.shape[-1]


def _images(images: Any, labels: Any) -> Images:
    """Arrays of torchvision, [N, H, W], [N, H, W, 3] or [N, 3, H, W], as Images."""
    images, labels = torch.as_tensor(images), torch.as_tensor(np.asarray(labels)).long()
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    return Images(images, labels)
