"""The data sets as they lie on disk, the views made of them, and the order they are seen in."""

import hashlib
import pickle
import shutil
import struct
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
from torchvision import datasets

from fastssl.trainer import data


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def random_images(count, *shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def test_digits_are_split_once_and_for_all():
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.pretrain is digits.train
    assert digits.test.labels.bincount().min() >= 34  # stratified: 360 / 10, and 8s are rare
    image, label = digits.train[0]
    assert image.dtype == torch.uint8
    assert image.shape == (digits.channels, digits.size, digits.size)
    assert isinstance(label, int)
    again = data.load("digits")
    assert torch.equal(digits.train.images, again.train.images)
    seen = {image.numpy().tobytes() for image in digits.train.images}
    assert not any(image.numpy().tobytes() in seen for image in digits.test.images)


def test_digits_are_normalised_to_mean_0_and_deviation_1():
    digits = data.load("digits")
    x = digits.normalize(digits.train.images)
    assert x.dtype == torch.float32
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")]
)
def test_idx_files_are_read(tmp_path, offline, name, folder):
    raw = tmp_path / folder
    raw.mkdir(parents=True)
    images, labels = random_images(7, 28, 28), np.arange(7, dtype=np.uint8)
    for split, count in (("train", 7), ("t10k", 3)):
        write_idx(raw / f"{split}-images-idx3-ubyte", images[:count])
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels[:count])
    found = data.load(name, tmp_path)
    assert torch.equal(found.train.images, torch.from_numpy(images)[:, None])
    assert found.train.labels.tolist() == list(range(7))
    assert len(found.test) == 3
    assert (found.channels, found.size, len(found.classes)) == (1, 28, 10)


@pytest.mark.parametrize(
    ("name", "kind", "folder", "key", "files"),
    [
        (
            "cifar10",
            datasets.CIFAR10,
            "cifar-10-batches-py",
            "labels",
            (("data_batch_1", "data_batch_2"), "test_batch", "batches.meta"),
        ),
        (
            "cifar100",
            datasets.CIFAR100,
            "cifar-100-python",
            "fine_labels",
            (("train",), "test", "meta"),
        ),
    ],
)
def test_cifar_batches_are_read(tmp_path, monkeypatch, offline, name, kind, folder, key, files):
    root = tmp_path / folder
    root.mkdir()
    (train_files, test_file, meta_file), checksums = files, {}

    def write(file, content):
        content = pickle.dumps(content)
        (root / file).write_bytes(content)
        checksums[file] = hashlib.md5(content).hexdigest()

    images = random_images(4, 3, 32, 32)
    for file in (*train_files, test_file):
        write(file, {"data": images.reshape(4, -1), key: [3, 1, 0, 2]})
    write(meta_file, {key.replace("labels", "label") + "_names": ["a", "b", "c", "d"]})
    # torchvision's own check of the files runs, against the checksums of these files.
    monkeypatch.setattr(kind, "train_list", [[file, checksums[file]] for file in train_files])
    monkeypatch.setattr(kind, "test_list", [[test_file, checksums[test_file]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksums[meta_file]})

    found = data.load(name, tmp_path)
    expected = torch.from_numpy(images)
    assert torch.equal(found.train.images, torch.cat([expected] * len(train_files)))
    assert torch.equal(found.test.images, expected)
    assert found.test.labels.tolist() == [3, 1, 0, 2]
    assert found.classes == ("a", "b", "c", "d")

    (root / test_file).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{name}.*{folder}.*no network"):
        data.load(name, tmp_path)


def test_stl10_adds_its_unlabelled_images_to_pretraining(tmp_path, monkeypatch, offline):
    root = tmp_path / "stl10_binary"
    root.mkdir()
    upright = random_images(6, 3, 96, 96)
    stored = upright.transpose(0, 1, 3, 2)  # its files run down the columns
    files = {
        "train_X.bin": stored[:2].tobytes(),
        "train_y.bin": bytes([1, 10]),  # its labels count from 1
        "unlabeled_X.bin": stored[2:5].tobytes(),
        "test_X.bin": stored[5:].tobytes(),
        "test_y.bin": bytes([4]),
        "class_names.txt": b"\n".join(b"class%d" % i for i in range(10)),
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    for attribute in ("train_list", "test_list"):
        checksums = [
            [name, hashlib.md5(files[name]).hexdigest()]
            for name, _ in getattr(datasets.STL10, attribute)
        ]
        monkeypatch.setattr(datasets.STL10, attribute, checksums)
    found = data.load("stl10", tmp_path)
    assert torch.equal(found.pretrain.images, torch.from_numpy(upright[:5]))
    assert torch.equal(found.train.images, torch.from_numpy(upright[:2]))
    assert found.train.labels.tolist() == [0, 9]
    assert found.test[0][1] == 3


@pytest.mark.parametrize("name", ["mnist", "cifar10", "stl10"])
def test_a_missing_data_set_says_where_its_files_go(tmp_path, offline, name):
    with pytest.raises(
        ValueError, match=rf"{name}.* is missing or .* in {tmp_path}.*put the files of http"
    ):
        data.load(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-images-idx3-ubyte", b"words, not images"),
        ("train-labels-idx1-ubyte", b""),
        ("t10k-images-idx3-ubyte", struct.pack(">HBB3I", 0, 8, 3, 16, 28, 28) + bytes(999)),
    ],
)
def test_a_damaged_data_set_is_named(tmp_path, mnist, offline, file, content):
    shutil.copytree(mnist, tmp_path, dirs_exist_ok=True)
    (tmp_path / "MNIST" / "raw" / file).write_bytes(content)
    says = rf"'mnist' is missing or damaged in {tmp_path}.*put the files of http.*another data_dir"
    with pytest.raises(ValueError, match=says):
        data.load("mnist", tmp_path)


def test_an_unknown_data_set_is_an_error():
    with pytest.raises(ValueError, match=r"digits, mnist.*got 'imagenet'"):
        data.load("imagenet")
