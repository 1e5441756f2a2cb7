"""Data given from Python: whether they are what a run takes, told before anything is computed."""

import multiprocessing
import numbers
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.trainer.augment import Views
from fastssl.trainer.data import Data, labels_of

LOOKED_AT = 64  # items of a split, where they are not in a list
VIEWED = 16  # items of which views are made


def check(data: Data) -> None:
    """Look at a part of data, and at all labels that are in memory.

    Raises:
        TypeError: It is something else than a Data.
        ValueError: It is not as `Data` says.
    """
    if not isinstance(data, Data):
        raise TypeError(f"data must be a Data, got {type(data).__name__}")
    for name in ("mean", "std"):
        found = getattr(data, name)
        if len(found) != data.channels:
            raise ValueError(
                f"data.{name} must have a number for each of {data.channels} channels, got {found}"
            )
    if (data.train is None) != (data.test is None):
        raise ValueError("data.train and data.test must be given both, or both be None")
    if data.train is not None and len(data.classes) < 2:
        raise ValueError(
            f"data.classes must have at least 2 names where data.train is given, got {data.classes}"
        )
    for name in ("pretrain", "train", "test"):
        if (split := getattr(data, name)) is not None:
            _check_split(f"data.{name}", split, data, labelled=name != "pretrain")


def _check_split(name: str, split: Any, data: Data, labelled: bool) -> None:
    """Look at some items of a split; a labelled one has single images of one shape."""
    if not hasattr(split, "__len__") or not len(split):
        raise ValueError(f"{name} must have a length of at least 1, got {_described(split)}")
    shapes = set()
    for index in range(len(split)) if isinstance(split, list) else _some(split, LOOKED_AT):
        item, where = split[index], f"{name}[{index}]"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(f"{where} must be (image, label), got {_described(item)}")
        images, label = item
        several = isinstance(images, (tuple, list)) and not labelled
        for image in images if several else [images]:
            _check_image(image, where, data)
            shapes.add(tuple(image.shape))
        _check_label(label, where, data.classes if labelled else None)
    if not labelled:
        return
    if len(shapes) > 1:
        raise ValueError(f"images of {name} must have one shape, got {_listed(shapes)}")
    labels = labels_of(split)
    if labels is None:
        return
    for extreme in (labels.min(), labels.max()):
        _check_label(int(extreme), name, data.classes)
    least = 2 if name == "data.train" else 1
    if (found := len({*labels.tolist()} - {-1})) < least:
        raise ValueError(f"{name} must have images of at least {least} classes, got {found}")


def _some(split: Any, count: int) -> range:
    return range(0, len(split), max(1, len(split) // count))


def _check_image(image: Any, where: str, data: Data) -> None:
    accepted = f"a tensor [{data.channels}, H, W], uint8 or floating-point from 0 to 1"
    if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != data.channels:
        raise ValueError(f"the image of {where} must be {accepted}, got {_described(image)}")
    if image.dtype == torch.uint8:
        return
    if not image.is_floating_point():
        raise ValueError(f"the image of {where} must be {accepted}, got {image.dtype}")
    low, high = image.min().item(), image.max().item()
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the image of {where} must be {accepted}, got {low:g} to {high:g}")


def _check_label(label: Any, where: str, classes: Sequence[str] | None) -> None:
    if isinstance(label, Tensor) and label.ndim == 0:
        label = label.item()
    most = "" if classes is None else f" of at most {len(classes) - 1}, the last of data.classes,"
    number = isinstance(label, numbers.Integral) and not isinstance(label, bool)
    if not number or label < -1 or (classes is not None and label >= len(classes)):
        raise ValueError(
            f"the label of {where} must be a whole number{most} or -1 where it is unknown, got "
            f"{label if number else _described(label)}"
        )


def check_views(views: Views, data: Data, workers: int) -> None:
    """Make the views of some items.

    Raises:
        ValueError: A transform cannot be applied or be sent to workers, or what it makes cannot be
            put into a batch.
    """
    if workers and multiprocessing.get_start_method() != "fork":  # as on Macs
        try:
            pickle.dumps(views.transforms)
        except Exception as error:  # whatever a transform raises
            raise ValueError(
                f"data.transforms cannot be sent to the processes that make views ({error}); take "
                f"functions and classes of a module, or no such processes (workers 0)"
            ) from None
    shapes: list[set[tuple[int, ...]]] = [set() for _ in views.transforms]
    advice = "; data.transforms may have others"
    for index in _some(views.originals.images, VIEWED):
        try:
            made = views[0, index][0]
        except Exception as error:  # whatever a transform raises
            raise ValueError(
                f"the views of data.pretrain[{index}] cannot be made "
                f"({type(error).__name__}: {error}){advice}"
            ) from error
        for view, seen in zip(made, shapes, strict=True):
            if (
                not isinstance(view, Tensor)
                or view.ndim not in (3, 4)
                or view.shape[-3] != data.channels
                or not (view.dtype == torch.uint8 or view.is_floating_point())
            ):
                raise ValueError(
                    f"a transform must make a tensor [{data.channels}, H, W] of a view, or [P, "
                    f"{data.channels}, H, W] of P patches, uint8 or floating-point from 0 to 1, "
                    f"got {_described(view)}"
                )
            seen.add(tuple(view.shape))
    for number, seen in enumerate(shapes):
        if len(seen) > 1:
            raise ValueError(
                f"the views that transform {number} makes must have one shape, got {_listed(seen)}"
                f"{advice}"
            )


def _described(x: Any) -> str:
    """What something is, for an error."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{type(x).__name__} of shape {tuple(x.shape)} and {x.dtype}"
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)}"
    return repr(x) if isinstance(x, (str, float, bool)) else type(x).__name__


def _listed(shapes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join(map(str, sorted(shapes)[:3]))
