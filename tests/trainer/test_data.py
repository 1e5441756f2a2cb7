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
from PIL import Image
from torchvision import datasets

from fastssl.trainer import Config, data


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


def write_pngs(folder, count, size=(12, 10), start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        image = np.full((*size, 3), i * 5 % 256, dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i:03}.png")


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


def test_classes_of_an_image_folder_are_its_subfolders(tmp_path):
    write_pngs(tmp_path / "cat", 10)
    write_pngs(tmp_path / "dog", 5, start=10)
    found = data.load("folder", tmp_path, image_size=8)
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (12, 3)
    assert not set(found.train.paths) & set(found.test.paths)
    assert found.test[2][1] == 1
    assert found.test[0][0].shape == (3, 8, 8)
    assert found.pretrain[0][0].shape == (3, 12, 10)  # augmentation crops from the whole image


def test_classes_of_one_image_leave_none_to_test_on(tmp_path):
    for label in "abc":
        write_pngs(tmp_path / label, 1)
    with pytest.raises(ValueError, match=rf"each of the 3 classes in {tmp_path} has one image"):
        data.load("folder", tmp_path)
    write_pngs(tmp_path / "a", 2)
    assert len(data.load("folder", tmp_path).test) == 1


def test_a_class_may_be_a_link_and_a_link_may_lead_back(tmp_path):
    write_pngs(tmp_path / "elsewhere", 5)
    write_pngs(tmp_path / "images" / "cat", 5)
    (tmp_path / "images" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "cat" / "back").symlink_to(tmp_path / "images")
    found = data.load("folder", tmp_path / "images", image_size=8)
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (8, 2)


def test_an_image_folder_may_bring_its_own_split(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for label in ("a", "b"):
            write_pngs(tmp_path / split / label, count)
    found = data.load("folder", tmp_path, image_size=8)
    assert (len(found.train), len(found.test), found.classes) == (6, 4, ("a", "b"))
    write_pngs(tmp_path / "val" / "c", 1)
    with pytest.raises(ValueError, match=r"same classes.*'a', 'b'.*'a', 'b', 'c'"):
        data.load("folder", tmp_path)


def test_a_flat_image_folder_has_no_labels(tmp_path):
    write_pngs(tmp_path, 3)
    found = data.load("folder", tmp_path)
    assert len(found.pretrain) == 3
    assert found.pretrain[1][1] == -1
    assert found.train is None
    assert found.test is None
    assert found.size == 224


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_images_of_16_bits_keep_their_shades(tmp_path, ending):
    shades = np.linspace(0, 2**16 - 1, 12, dtype=np.uint16).reshape(3, 4)
    Image.fromarray(shades).save(tmp_path / f"grey.{ending}")
    for damaged in ("refuse", "skip"):
        image, _ = data.load("folder", tmp_path, damaged=damaged).pretrain[0]
        assert torch.equal(image, torch.from_numpy((shades >> 8).astype(np.uint8)).expand(3, 3, 4))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_images_of_other_numbers_are_refused_by_name(tmp_path, kind, capsys):
    Image.fromarray(np.full((3, 4), 10**6, dtype=kind)).save(tmp_path / "wide.tif")
    with pytest.raises(
        ValueError, match=r"wide\.tif cannot be read .*not whole numbers of 8 or 16"
    ):
        data.load("folder", tmp_path).pretrain[0]
    write_pngs(tmp_path, 1)
    assert len(data.load("folder", tmp_path, damaged="skip").pretrain) == 1
    assert "wide.tif (its values are not whole numbers" in capsys.readouterr().out


def test_an_unreadable_image_is_named(tmp_path):
    write_pngs(tmp_path, 1)
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read as an image"):
        data.load("folder", tmp_path).pretrain[1]


@pytest.fixture
def damage(tmp_path):
    """Ten whole images in two classes, and files in true formats that are not whole."""
    noise = random_images(1, 60, 50, 3)[0]
    for label in ("a", "b"):
        write_pngs(tmp_path / label, 5)
    whole = {}
    for ending in ("jpg", "png", "webp", "tif", "bmp"):
        path = tmp_path / "a" / f"whole.{ending}"
        Image.fromarray(noise).save(path)
        content = path.read_bytes()
        whole[ending] = content
        if ending == "tif":
            path.unlink()
    damaged = {
        "cut.jpg": whole["jpg"][: len(whole["jpg"]) // 2],
        "cut.png": whole["png"][: len(whole["png"]) // 2],
        "cut.webp": whole["webp"][: len(whole["webp"]) // 2],
        "cut.tif": whole["tif"][: len(whole["tif"]) // 2],
        "cut.bmp": whole["bmp"][: len(whole["bmp"]) // 2],
        "zeros.png": whole["png"][:60] + bytes(200) + whole["png"][260:],
        "header.jpg": whole["jpg"][:30],
        "empty.png": b"",
        "words.jpg": b"not an image",
    }
    for name, content in damaged.items():
        (tmp_path / "b" / name).write_bytes(content)
    (tmp_path / "a" / "a png.jpg").write_bytes(whole["png"])  # what it is called is no matter
    return tmp_path, [tmp_path / "b" / name for name in damaged]


def test_damaged_images_are_named_counted_and_left_out(damage, capsys):
    folder, damaged = damage
    found = data.load("folder", folder, 8, damaged="skip")
    printed = capsys.readouterr().out
    assert f"{len(damaged)} of {15 + len(damaged)} images are damaged and left out" in printed
    assert printed.count("\n") == 1 + len(damaged)
    paths = {*found.train.paths, *found.test.paths}
    assert len(paths) == 15
    for path in damaged:
        assert f"  {path} (" in printed
        assert str(path) not in paths
    for split in (found.pretrain, found.train, found.test):
        for i in range(len(split)):
            assert split[i][0].dtype == torch.uint8


def test_damaged_images_are_refused_by_name_when_they_are_met(damage, capsys):
    folder, damaged = damage
    found = data.load("folder", folder, 8)
    assert capsys.readouterr().out == ""
    where = {
        path: (split, i)
        for split in (found.train, found.test)
        for i, path in enumerate(split.paths)
    }
    assert len(where) == 15 + len(damaged)
    for path in damaged:
        split, i = where[str(path)]
        with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
            split[i]


def test_the_choice_is_for_folders_alone():
    with pytest.raises(ValueError, match="damaged is for dataset 'folder' only, got skip"):
        Config(damaged="skip")
    assert Config(dataset="folder", damaged="skip").damaged == "skip"


def test_a_folder_of_damaged_images_alone_is_an_error(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no images in"):
        data.load("folder", tmp_path, damaged="skip")


def test_an_image_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(ValueError, match=rf"data_dir: no images in {tmp_path}.*\.jpg"):
        data.load("folder", tmp_path)
    with pytest.raises(ValueError, match=r"found no .*nowhere"):
        data.load("folder", tmp_path / "nowhere")


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
