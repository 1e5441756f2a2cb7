"""Folders of images: which files are images, what is a class, a split, or left out."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from fastssl.trainer.environment import cores

# What the folders of splits are called, in any case; of several test splits the first one counts.
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation", "dev", "eval")
SPLITS = (*TRAIN, *TEST, "unlabeled", "unlabelled")
# What systems and archives leave behind, beside names that begin with a dot.
NOBODYS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
# Formats that Pillow knows by name alone, or that it has another program draw.
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
TOLD = 5  # names of a kind that are told; the others are counted

Parts = tuple[str, ...]  # of an image's path, seen from the root


class Files(Dataset[tuple[Tensor, int]]):
    """Image files as RGB uint8 [3, H, W]: a centred square, or as they are if size is None.

    Photographs are turned as their EXIF data say.
    """

    def __init__(
        self, paths: list[str], labels: list[int], size: int | None, root: str = ""
    ) -> None:
        self.paths, self.labels, self.root = paths, labels, root
        self.resize = v2.Compose([v2.Resize(size), v2.CenterCrop(size)]) if size else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            with Image.open(self.paths[index]) as file:
                image = _rgb(file)
        except Exception as error:  # Pillow raises almost anything, by the file's format
            raise ValueError(f"{self.paths[index]} cannot be read as an image ({error})") from None
        image = v2.functional.pil_to_tensor(image)
        return (self.resize(image) if self.resize else image), self.labels[index]

    def names(self) -> list[str]:
        """The paths as seen from the root, the same on every system."""
        return [path[len(self.root) :].replace(os.sep, "/").lstrip("/") for path in self.paths]


@dataclass
class Folder:
    """What there is in a folder of images.

    Attributes:
        pretrain: The images to pretrain on, as they are; labels are -1 where there are none.
        train: The images to train on; None without labels.
        test: The images to test on; None without labels.
        classes: The names of the labels.
        notes: What was taken for what, and what was left out, a line each.
    """

    pretrain: Files
    train: Files | None = None
    test: Files | None = None
    classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@cache
def endings() -> frozenset[str]:
    """The endings of the image files that Pillow reads, in lower case."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(name for name, kind in known if kind in Image.OPEN and kind not in NOT_READ)


def read(
    root: Path,
    size: int,
    skip: bool = False,
    labels: bool = True,
    train_split: str | None = None,
    test_split: str | None = None,
) -> Folder:
    """Find the images, classes and splits of a folder.

    ``root/train/CLASS`` and ``root/test/CLASS`` are taken as they are, by the names in `TRAIN` and
    `TEST` or by those given; of ``root/CLASS`` every fifth image is the test split; anything else
    is images without labels. Names that begin with a dot, and `NOBODYS`, are passed over.

    Args:
        root: The folder.
        size: Side of the images to train and to test on.
        skip: Whether to read every file now and to leave out those that are damaged.
        labels: Whether subfolders are classes; if not, all images are taken without labels.
        train_split: Name of the folder with the classes to train on.
        test_split: Name of the folder with the classes to test on.

    Raises:
        ValueError: There are no images, or their classes or splits cannot be told.
    """
    if not root.is_dir():
        raise ValueError(
            f"data_dir must be a folder of images for dataset 'folder', found no {root}"
        )
    images, notes = _images(root)
    if skip:
        images, damaged = _whole(root, images)
        notes += damaged
    if not images:
        looked = f"data_dir: no images in {root} (looked for {', '.join(sorted(endings()))})"
        raise ValueError("; ".join([looked, *notes]))

    def files(chosen: Mapping[Parts, int], side: int | None) -> Files:
        paths = [str(root.joinpath(*parts)) for parts in chosen]
        return Files(paths, list(chosen.values()), side, str(root))

    unlabelled = dict.fromkeys(images, -1)
    if not labels:
        return Folder(files(unlabelled, None), notes=[*notes, "no labels, as asked for"])
    splits = _splits(root, images, train_split, test_split)
    if splits:
        (train, classes), (test, _) = (_labelled(images, name) for name in splits)
        notes.append(f"splits: {splits[0]} to train on, {splits[1]} to test on")
        unlabelled = dict.fromkeys(train, -1)
    else:
        train, test, classes = _every_fifth(root, images)
    if len(classes) < 2:
        return Folder(files(unlabelled, None), notes=[*notes, _unclassed(root, images, classes)])
    if not splits:
        notes.append("splits: every fifth image of a class is to test on")
    others = (x for x in images if x not in train and x not in test)
    tops = Counter(x[0] if len(x) > 1 else "." for x in others)
    notes += _left_out("in no class of the splits" if splits else "in no class", tops)
    return Folder(files(train, None), files(train, size), files(test, size), classes, notes)


def _images(root: Path) -> tuple[list[Parts], list[str]]:
    """The images anywhere in root, in order, and what else there is."""
    images: list[Parts] = []
    empty: set[Parts] = set()  # folders
    full: set[Parts] = set()
    others, hidden = Counter[str](), Counter[str]()
    for name, folders, files in os.walk(root, followlinks=True):  # a class may lie elsewhere
        here = Path(name)
        parts = here.relative_to(root).parts
        for entry in filter(_is_hidden, (*folders, *files)):
            hidden["._*" if entry.startswith("._") else entry] += 1
        folders[:] = [
            folder
            for folder in folders
            if not _is_hidden(folder)
            and not here.resolve().is_relative_to((here / folder).resolve())
        ]
        empty.add(parts)
        for file in files:
            ending = Path(file).suffix
            if _is_hidden(file):
                continue
            if ending.lower() in endings():
                images.append((*parts, file))
                full.update(parts[:i] for i in range(len(parts) + 1))
            else:
                others[ending or "no ending"] += 1
    empty -= full
    notes = _left_out("no images", others) + _left_out("hidden", hidden)
    if empty and full:
        notes.append(f"no images in {told('/'.join(parts) for parts in sorted(empty))}")
    return sorted(images), notes


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NOBODYS


def _left_out(why: str, counts: Counter[str]) -> list[str]:
    """A line on what was left out, if anything was."""
    names = told(f"{name} ({count})" for name, count in counts.most_common())
    return [f"left out, {why}: {names}"] if counts else []


def told(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def _splits(
    root: Path, images: list[Parts], train_split: str | None, test_split: str | None
) -> tuple[str, str] | None:
    """The names of the folders that are the splits; None if the folders of root are classes."""
    tops = sorted({parts[0] for parts in images if len(parts) > 1})
    for option, name in (("train_split", train_split), ("test_split", test_split)):
        if name is not None and name not in tops:
            raise ValueError(
                f"{option} must be a folder with images in {root}, got {name!r} (there are "
                f"{told(tops) or 'none'})"
            )
    usual = {name: name.lower() for name in tops}
    trains = [train_split] if train_split else [x for x in tops if usual[x] in TRAIN]
    tests = [test_split] if test_split else [x for x in tops if usual[x] in TEST]
    tests = sorted({*tests} - {*trains}, key=lambda x: (*TEST, usual[x]).index(usual[x]))
    if not (trains and tests):
        if given := train_split or test_split:
            other = "test_split" if train_split else "train_split"
            raise ValueError(
                f"{other} must be named beside the other split, {given!r}: no other folder in "
                f"{root} has a usual name for it (there are {told(tops)})"
            )
        _refuse_splits(root, images, tops)
        return None
    if len(trains) > 1:
        raise ValueError(
            f"train_split must be named where several folders look like it: in {root} there are "
            f"{told(trains)}"
        )
    classes = {name: _labelled(images, name)[1] for name in (*trains, *tests)}
    train, test = trains[0], next((x for x in tests if classes[x] == classes[trains[0]]), None)
    if test is None or not classes[train]:
        raise ValueError(
            f"data_dir: {root / train} and {root / tests[0]} must hold images of the same classes, "
            f"got {classes[train]} and {classes[tests[0]]}; --no-labels takes all images without "
            f"labels"
        )
    return train, test


def _refuse_splits(root: Path, images: list[Parts], tops: list[str]) -> None:
    """Raise ValueError if folders that would be classes look like splits."""
    inside = {name: {x[1] for x in images if len(x) > 2 and x[0] == name} for name in tops}
    named = [name for name in tops if name.lower() in SPLITS]
    alike = {x for name in named for x in tops if x != name and inside[x] & inside[name]}
    if alike or (len(tops) > 1 and named == tops):
        raise ValueError(
            f"data_dir: the folders {told(sorted({*named, *alike}))} in {root} look like splits, "
            f"not like classes; name them with train_split and test_split (--train-split, "
            f"--test-split), or take all images without labels (--no-labels)"
        )


def _labelled(images: list[Parts], *inside: str) -> tuple[dict[Parts, int], list[str]]:
    """The images in the folders of a folder, with the folder's number, and the folders' names."""
    depth = len(inside)
    found = [x for x in images if len(x) > depth + 1 and x[:depth] == inside]
    numbers = {name: i for i, name in enumerate(sorted({x[depth] for x in found}))}
    return {x: numbers[x[depth]] for x in found}, list(numbers)


def _every_fifth(
    root: Path, images: list[Parts]
) -> tuple[dict[Parts, int], dict[Parts, int], list[str]]:
    """The images to train on, every fifth of each class to test on, and the classes."""
    found, classes = _labelled(images)
    seen = Counter[int]()
    train: dict[Parts, int] = {}
    test: dict[Parts, int] = {}
    for image, label in found.items():
        (test if seen[label] % 5 == 1 else train)[image] = label
        seen[label] += 1
    if len(classes) > 1 and not test:
        raise ValueError(
            f"data_dir: each of the {len(classes)} classes in {root} has one image, which leaves "
            f"none to test on; a class must have at least 2, or --no-labels takes all images "
            f"without labels"
        )
    return train, test, classes


def _unclassed(root: Path, images: list[Parts], classes: list[str]) -> str:
    """Why there are no labels in a folder of at most one class, and where they might be."""
    if not classes:
        return "no labels: there are no folders of classes"
    _, inside = _labelled(images, classes[0])
    hint = f"; with data_dir {root / classes[0]}, {told(inside)} would be the classes"
    return f"no labels: {classes[0]} is the only class{hint if len(inside) > 1 else ''}"


def _rgb(image: Image.Image) -> Image.Image:
    """An image, upright, as RGB of 8 bits; of 16 bits, which convert would clip, the upper ones."""
    image.load()
    # EXIF data that cannot be read, or cannot be written back, are no damage.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
            raise ValueError("its values are not whole numbers of 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def _whole(root: Path, images: list[Parts]) -> tuple[list[Parts], list[str]]:
    """The images that can be decoded to their end, and a line on each of the others."""

    def damage(image: Parts) -> str:
        try:
            with Image.open(root.joinpath(*image)) as file:
                # A header alone does not tell that a file was cut off. All of a JPEG is read, but
                # most of the arithmetic is left out where an eighth of the size will do.
                file.draft(file.mode, (1, 1))
                _rgb(file)
        except Exception as error:  # Pillow raises almost anything, by the file's format
            return str(error) or type(error).__name__
        return ""

    with ThreadPoolExecutor(cores()) as pool:
        found = dict(zip(images, pool.map(damage, images), strict=True))
    damaged = {image: reason for image, reason in found.items() if reason}
    notes = [f"{len(damaged)} of {len(images)} images are damaged and left out:"] if damaged else []
    notes += [f"  {root.joinpath(*image)} ({reason})" for image, reason in damaged.items()]
    return [image for image in images if image not in damaged], notes
