"""The data sets: every one as uint8 images and whole-number labels."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from fastssl.trainer.datasets import STATISTICS
from fastssl.trainer.environment import cores

Item = tuple[Tensor, int]

ENDINGS: tuple[str, ...] = datasets.folder.IMG_EXTENSIONS
# What torchvision raises where a data set's files are missing, cut short or of another format.
DAMAGED = (OSError, RuntimeError, ValueError, AssertionError, EOFError, LookupError)


class Images(Dataset[Item]):
    """Images held in memory, uint8 [N, C, H, W], with labels [N]; -1 is an unknown label."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return self.images[index], int(self.labels[index])


class Files(Dataset[Item]):
    """Image files as RGB uint8 [3, H, W]: a centred square, or as they are if size is None."""

    def __init__(self, paths: list[str], labels: list[int], size: int | None) -> None:
        self.paths, self.labels = paths, labels
        self.resize = v2.Compose([v2.Resize(size), v2.CenterCrop(size)]) if size else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        try:
            with Image.open(self.paths[index]) as file:
                image = _rgb(file)
        except Exception as error:  # Pillow raises almost anything, by the file's format
            raise ValueError(f"{self.paths[index]} cannot be read as an image ({error})") from None
        image = v2.functional.pil_to_tensor(image)
        return (self.resize(image) if self.resize else image), self.labels[index]


@dataclass
class Data:
    """One data set, ready for pretraining and evaluation.

    Attributes:
        name: Its name.
        pretrain: What to pretrain on. Items are (uint8 [C, H, W], label), like those of the other
            two; the labels are not used, and -1 where there are none. Instead of one image an item
            may have a tuple of them that show the same thing: a method's views take turns with
            them, the first view with the first image.
        train: The labelled training split; None if the data set has no labels.
        test: The labelled test split; None if the data set has no labels.
        classes: The names of the labels.
        channels: Channels of the images.
        size: Side of the images a network sees.
        mean: Per channel, of images scaled to [0, 1].
        std: Likewise.
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

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W], on any device, to the float32 that a network takes."""
        mean, std = (images.new_tensor(x, dtype=torch.float32) for x in (self.mean, self.std))
        return (images / 255 - mean[:, None, None]) / std[:, None, None]


def load(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    damaged: str = "refuse",
) -> Data:
    """Load a data set, downloading it into data_dir if it is not there.

    Args:
        name: digits, mnist, fashion-mnist, cifar10, cifar100, stl10 or folder.
        data_dir: Where data sets are kept; with folder, the image folder itself.
        image_size: Side of a folder's images, 224 if None.
        damaged: What becomes of a folder's images that cannot be read. "refuse": nothing is looked
            at in advance, and the first one that is asked for raises a ValueError that names it.
            "skip": all files are read once now, on every core, and those that cannot be decoded to
            their end are named and left out. Either way wrong pixels that the format's decoder
            accepts go unnoticed: a JPEG has no checksum.

    Returns:
        The Data.

    Raises:
        ValueError: The data set is unknown, missing or damaged; or the folder holds no images, or
            classes of one image alone.
    """
    if name not in STATISTICS:
        raise ValueError(f"dataset must be one of {', '.join(STATISTICS)}, got {name!r}")
    if name == "folder":
        splits = _folder(Path(data_dir), image_size or 224, skip=damaged == "skip")
    elif name == "digits":
        splits = _digits()
    else:
        splits = _torchvision(name, Path(data_dir))
    pretrain, train, test, classes, size = splits
    mean, std = STATISTICS[name]
    return Data(name, pretrain, train, test, tuple(classes), len(mean), size, mean, std)


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


def _folder(root: Path, size: int, *, skip: bool) -> Splits:
    """An image folder, without its damaged images if they are to be skipped.

    ``root/train/CLASS`` and ``root/test/CLASS`` (or ``val``) are taken as they are; of
    ``root/CLASS`` every fifth image is the test split; anything else is images without labels.
    """
    if not root.is_dir():
        raise ValueError(
            f"data_dir must be a folder of images for dataset 'folder', found no {root}"
        )
    paths = []
    for name, folders, files in os.walk(root, followlinks=True):  # a class may lie elsewhere
        here = Path(name)
        folders[:] = [f for f in folders if not here.resolve().is_relative_to((here / f).resolve())]
        paths += [here / file for file in files if Path(file).suffix.lower() in ENDINGS]
    paths.sort()
    if skip:
        paths = _whole(paths)
    if not paths:
        raise ValueError(f"data_dir: no images in {root} (looked for {', '.join(ENDINGS)})")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and held_out:
        train, classes = _labelled(root / "train", paths)
        test, test_classes = _labelled(held_out, paths)
        if classes != test_classes or not train or not test:
            raise ValueError(
                f"data_dir: {root / 'train'} and {held_out} must hold images of the same classes, "
                f"got {classes} and {test_classes}"
            )
    else:
        found, classes = _labelled(root, paths)
        if len(classes) < 2:
            return Files([str(p) for p in paths], [-1] * len(paths), None), None, None, (), size
        train, test = [], []
        for label in range(len(classes)):
            of_class = [item for item in found if item[1] == label]
            test += of_class[1::5]
            train += [item for i, item in enumerate(of_class) if i % 5 != 1]
        if not test:
            raise ValueError(
                f"data_dir: each of the {len(classes)} classes in {root} has one image, which "
                f"leaves none to test on; a class must have at least 2, or all images lie in one "
                f"folder, to be taken without labels"
            )
    splits = [
        Files([path for path, _ in split], [label for _, label in split], side)
        for split, side in ((train, None), (train, size), (test, size))
    ]
    return splits[0], splits[1], splits[2], classes, size


def _labelled(root: Path, paths: list[Path]) -> tuple[list[tuple[str, int]], list[str]]:
    """Those of the images that lie in a folder of root, with its number, and the folders' names."""
    found = [(path, path.relative_to(root).parts) for path in paths if path.is_relative_to(root)]
    inside = [(str(path), parts[0]) for path, parts in found if len(parts) > 1]
    numbers = {name: i for i, name in enumerate(sorted({name for _, name in inside}))}
    return [(path, numbers[name]) for path, name in inside], list(numbers)


def _rgb(image: Image.Image) -> Image.Image:
    """A decoded image as RGB of 8 bits; of 16 bits, which convert would clip, the upper ones."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
            raise ValueError("its values are not whole numbers of 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def _whole(paths: list[Path]) -> list[Path]:
    """The images that can be decoded to their end; the others are printed with the reason."""

    def damage(path: Path) -> str:
        try:
            with Image.open(path) as image:
                # A header alone does not tell that a file was cut off. All of a JPEG is read, but
                # most of the arithmetic is left out where an eighth of the size will do.
                image.draft(image.mode, (1, 1))
                _rgb(image)
        except Exception as error:  # Pillow raises almost anything, by the file's format
            return str(error) or type(error).__name__
        return ""

    with ThreadPoolExecutor(cores()) as pool:
        found = list(zip(paths, pool.map(damage, paths), strict=True))
    damaged = [(path, reason) for path, reason in found if reason]
    if damaged:
        print(f"{len(damaged)} of {len(paths)} images are damaged and left out:")
    for path, reason in damaged:
        print(f"  {path} ({reason})")
    return [path for path, reason in found if not reason]
