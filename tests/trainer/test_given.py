"""Data given from Python: what is accepted, and how anything else is refused."""

import dataclasses
import re

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image
from small_methods import SMALL
from torchvision.transforms import v2

from fastssl.trainer import Config, data, evaluate, given, loop, pretrain, report

CLASSES = tuple("abcdefghij")


def images(count=30, channels=1, labels=None, size=16, dtype=torch.uint8):
    """Noise, of which the mean tells the class."""
    labels = torch.arange(count) % 10 if labels is None else torch.as_tensor(labels)
    noise = torch.randint(0, 30, (count, channels, size, size))
    pixels = (noise + 20 * labels[:, None, None, None].clamp(min=0)).clamp(max=255)
    pixels = pixels.to(dtype) / 255 if dtype.is_floating_point else pixels.to(dtype)
    return data.Images(pixels, labels)


def own(**changes):
    few = images()
    fields = {"name": "own", "pretrain": few, "train": few, "test": few, "classes": CLASSES}
    fields |= {"channels": 1, "size": 16, "mean": (0.5,), "std": (0.5,)}
    return data.Data(**fields | changes)


@pytest.fixture
def small(tmp_path):
    def options(**changes):
        few = {"epochs": 1, "batch_size": 10, "workers": 0, "knn_every": 1, "device": "cpu"}
        return Config(**{**few, "out": str(tmp_path / "run"), **changes})

    return options


class Items(torch.utils.data.Dataset):
    """A data set that makes its items when they are asked for."""

    def __init__(self, item, count=30):
        self.item, self.count = item, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.item(index)


GREY = torch.zeros(1, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize(
    ("split", "item", "says"),
    [
        (
            "train",
            lambda i: (GREY, i % 10 + 1),
            "label of data.train[9] must be a whole number of at most 9",
        ),
        (
            "test",
            lambda i: (GREY, -2),
            "label of data.test[0] must be .* -1 where it is unknown, got -2",
        ),
        ("train", lambda i: (GREY, np.array([3])), "got ndarray of shape (1,) and int64"),
        ("train", lambda i: (GREY, torch.tensor([3])), "got Tensor of shape (1,) and torch.int64"),
        ("test", lambda i: (GREY, "cat"), "got 'cat'"),
        (
            "pretrain",
            lambda i: (GREY, 1.5),
            "label of data.pretrain[0] must be a whole number or -1",
        ),
        ("pretrain", lambda i: (GREY, None), "got NoneType"),
        (
            "train",
            lambda i: (Image.new("L", (16, 16)), 0),
            "a tensor [1, H, W], uint8 or .* got Image",
        ),
        (
            "pretrain",
            lambda i: (np.zeros((16, 16, 1)), 0),
            "got ndarray of shape (16, 16, 1) and float64",
        ),
        (
            "pretrain",
            lambda i: (GREY.expand(3, 16, 16), 0),
            "got Tensor of shape (3, 16, 16) and torch.uint8",
        ),
        ("test", lambda i: (GREY[0], 0), "got Tensor of shape (16, 16) and torch.uint8"),
        (
            "train",
            lambda i: (GREY.long(), 0),
            "[1, H, W], uint8 or floating-point from 0 to 1, got torch.int64",
        ),
        ("train", lambda i: (GREY.float() - 1, 0), "floating-point from 0 to 1, got -1 to -1"),
        ("train", lambda i: (GREY.float() + 200, 0), "floating-point from 0 to 1, got 200 to 200"),
        ("train", lambda i: (GREY, 0, i), "data.train[0] must be (image, label), got a tuple of 3"),
        (
            "pretrain",
            lambda i: GREY,
            "data.pretrain[0] must be (image, label), got Tensor of shape",
        ),
        (
            "train",
            lambda i: ((GREY, GREY), 0),
            "the image of data.train[0] must be a tensor [1, H, W]",
        ),
        (
            "test",
            lambda i: (GREY[:, : 9 + i % 2], 0),
            "images of data.test must have one shape, got (1, 9, 16) and",
        ),
    ],
)
def test_items_that_are_not_what_they_should_be_are_refused(small, split, item, says, as_list):
    items = [item(i) for i in range(30)] if as_list else Items(item)
    pattern = ".*".join(map(re.escape, says.split(".*")))
    with pytest.raises(ValueError, match=pattern):
        pretrain(small(), data=own(**{split: items}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": (0.5,) * 3}, r"data.mean must have a number for each of 1 channels, got \(0.5, "),
        ({"test": None}, "data.train and data.test must be given both, or both be None"),
        ({"classes": ("all",)}, r"data.classes must have at least 2 names .*, got \('all',\)"),
        ({"train": []}, "data.train must have a length of at least 1, got a list of 0"),
        (
            {"pretrain": iter([])},
            "data.pretrain must have a length of at least 1, got list_iterator",
        ),
        (
            {"train": images(labels=[3] * 30)},
            "data.train must have images of at least 2 classes, got 1",
        ),
        (
            {"test": images(labels=[-1] * 30)},
            "data.test must have images of at least 1 classes, got 0",
        ),
        ({"train": images(labels=range(1, 31))}, r"label of data.train.* got 10"),
    ],
)
def test_data_that_do_not_fit_together_are_refused(small, changes, says):
    with pytest.raises(ValueError, match=says):
        pretrain(small(), data=own(**changes))
    with pytest.raises(TypeError, match="data must be a Data, got Images"):
        pretrain(small(), data=images())


def test_a_label_that_was_not_looked_at_is_named_when_it_is_met(small):
    late = Items(lambda i: (GREY, 10 if i == 1 else i % 10), 300)  # of which every fourth is seen
    run = pretrain(small(knn_every=0), data=own(train=late))
    with pytest.raises(ValueError, match=r"labels of data set 'own' must be at most 9, .* got 10"):
        evaluate.evaluate_run(run.path, data=own(train=late))


def test_floats_are_taken_as_they_are(small, tmp_path):
    torch.manual_seed(1)
    few = images()
    scaled = data.Images(few.images / 255, few.labels)
    histories = []
    for name, split in (("bytes", few), ("floats", scaled)):
        given_data = own(pretrain=split, train=split, test=split, transforms=[lambda x: x])
        run = pretrain(small(out=str(tmp_path / name)), data=given_data)
        report.write_report(run.path, data=given_data)
        histories.append(run.history[0])
    for measure in ("loss", "knn_accuracy", "effective_rank"):
        assert histories[0][measure] == pytest.approx(histories[1][measure], rel=1e-4)


def test_images_of_unknown_class_take_no_part_in_an_evaluation(small, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "DRAWS", 2)
    monkeypatch.setitem(evaluate.FEW_LABELS, "steps", 2)
    labels = [i % 10 if i % 3 else -1 for i in range(60)]
    mixed = images(60, labels=labels)
    known = torch.tensor(labels) >= 0
    rest = data.Images(mixed.images[known], mixed.labels[known])
    found = []
    for name, split in (("mixed", mixed), ("rest", rest)):
        whole = own(train=split, test=split)
        run = pretrain(small(out=str(tmp_path / name)), data=whole)
        results = evaluate.evaluate_run(run.path, data=whole, labels=[20])
        assert (results["train_images"], results["test_images"]) == (40, 40)
        assert report.write_report(run.path, data=whole).exists()
        found.append([results["knn"], results["linear"], run.history[0]["knn_accuracy"]])
    assert found[0] == found[1]
    chosen = evaluate.draw_labels(mixed.labels, 20, seed=0)
    assert (mixed.labels[chosen] >= 0).all()


def test_images_of_unknown_class_are_each_a_class_of_their_own_to_supcon(small):
    def loss(labels):
        trainer = loop.Trainer(small(method="supcon"), own())
        torch.manual_seed(0)
        views = [torch.randn(6, 1, 16, 16) for _ in range(2)]
        batch = loop.augment.Batch(views, torch.tensor([4, 0, 9, 2, 7, 5]), torch.tensor(labels))
        return trainer.method(batch)[0].item()

    assert loss([3, 3, -1, -1, 0, -1]) == pytest.approx(loss([3, 3, 11, 12, 0, 13]))
    assert loss([3, 3, -1, -1, 0, -1]) != pytest.approx(loss([3, 3, 9, 9, 0, 9]), rel=1e-3)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_any_number_of_channels_train_with_transforms_of_ones_own(
    small, monkeypatch, channels
):
    monkeypatch.setattr(evaluate, "DRAWS", 2)
    monkeypatch.setitem(evaluate.FEW_LABELS, "steps", 2)
    few = images(30, channels)
    several = own(
        **{"pretrain": few, "train": few, "test": few, "channels": channels},
        **{"mean": (0.5,) * channels, "std": (0.25,) * channels},
    )
    colours = {"dataset": "cifar10", "backbone": "cnn"}
    with pytest.raises(
        ValueError, match=r"views of data.pretrain\[0\] cannot be made .*transforms"
    ):
        pretrain(small(**colours), data=several)
    several.transforms = [v2.Compose([v2.RandomCrop(12), v2.RandomHorizontalFlip()])]
    run = pretrain(small(**colours), data=several)
    assert run.history[0]["knn_accuracy"] is not None
    evaluate.evaluate_run(run.path, data=several, labels=[20])
    assert report.write_report(run.path, data=several).exists()


def test_transforms_of_ones_own_are_one_for_all_views_or_one_for_each(small):
    marks = [lambda x, i=i: torch.full_like(x, i) for i in range(3)]
    assert [
        t(GREY).max() for t in loop.Trainer(small(), own(transforms=marks[1:])).views.transforms
    ] == [1, 2]
    both = loop.Trainer(small(), own(transforms=marks[:1])).views.transforms
    assert both == marks[:1] * 2
    with pytest.raises(
        ValueError, match=r"data.transforms must be 1, or 2 for as many views, got 3"
    ):
        loop.Trainer(small(), own(transforms=marks))
    crops = {"method": "swav", **SMALL["swav"]}  # of two global and two local crops
    assert len(loop.Trainer(small(**crops), own(transforms=marks[:1])).views.transforms) == 4


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (
            lambda x: x[0],
            r"a transform must make a tensor \[1, H, W\] of a view, .* shape \(16, 16\)",
        ),
        (lambda x: x.long(), "uint8 or floating-point from 0 to 1, got Tensor .* torch.int64"),
        (lambda x: v2.functional.to_pil_image(x), "got Image"),
        (
            lambda x: x[:, : 9 + int(x[0, 0, 0]) % 2],
            r"one shape, got \(1, 9, 16\) and \(1, 10, 16\)",
        ),
        (lambda x: x.nothing, "cannot be made .AttributeError"),
    ],
)
def test_transforms_that_make_no_views_are_refused(small, transform, says):
    with pytest.raises(ValueError, match=says):
        loop.Trainer(small(), own(transforms=[transform]))


def test_transforms_that_workers_cannot_be_sent_are_refused_where_they_are_sent(small, monkeypatch):
    local = own(transforms=[lambda x: x])
    monkeypatch.setattr(given.multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(ValueError, match=r"data.transforms cannot be sent .*workers 0"):
        loop.Trainer(small(workers=1), local)
    assert loop.Trainer(small(workers=0), local)
    assert loop.Trainer(small(workers=1), own(transforms=[v2.RandomCrop(12)]))


def test_images_of_several_sizes_need_a_transform_that_crops(small):
    sizes = [(torch.zeros(1, 16 + i % 2, 16, dtype=torch.uint8), -1) for i in range(30)]
    with pytest.raises(
        ValueError, match=r"transform 0 makes must have one shape, .*data.transforms"
    ):
        loop.Trainer(small(), own(pretrain=sizes))
    assert loop.Trainer(small(), own(pretrain=sizes, transforms=[v2.RandomCrop(12)]))


def test_positives_from_elsewhere_are_looked_at_one_by_one():
    pairs = [((GREY, GREY), -1)] * 9
    given.check(own(pretrain=pairs, train=None, test=None))
    with pytest.raises(ValueError, match=r"image of data.pretrain\[0\] .* got ndarray"):
        given.check(own(pretrain=[((GREY, GREY.numpy()), -1)] * 9))
    assert dataclasses.replace(own(), pretrain=pairs).transforms is None
