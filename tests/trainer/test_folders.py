"""Image folders: what is taken for an image, a class or a split, and what is left out."""

import struct

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image

from fastssl.trainer import Config, data


def random_images(count, *shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_pngs(folder, count, size=(12, 10), start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        image = np.full((*size, 3), i * 5 % 256, dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i:03}.png")


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
    assert "splits: train to train on, val to test on" in found.notes
    write_pngs(tmp_path / "val" / "c", 1)
    with pytest.raises(ValueError, match=r"same classes.*'a', 'b'.*'a', 'b', 'c'"):
        data.load("folder", tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("train", name) for name in ("test", "valid", "validation", "dev", "eval")),
        *(("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Testing")),
    ],
)
def test_splits_have_many_names_in_any_case(tmp_path, train, test):
    for split, count in ((train, 3), (test, 2)):
        for label in ("cat", "dog"):
            write_pngs(tmp_path / split / label, count)
    found = data.load("folder", tmp_path, image_size=8)
    assert (len(found.train), len(found.test), found.classes) == (6, 4, ("cat", "dog"))
    assert len(found.pretrain) == 6


def test_a_flat_test_split_gives_way_to_a_labelled_one_and_what_is_left_out_is_told(tmp_path):
    for split in ("train", "val", "extra"):
        for label in ("cat", "dog"):
            write_pngs(tmp_path / split / label, 2)
    write_pngs(tmp_path / "test", 3)
    write_pngs(tmp_path / "unlabeled", 4)
    write_pngs(tmp_path / "train", 1)  # beside the folders of its classes
    found = data.load("folder", tmp_path, image_size=8)
    assert (len(found.train), len(found.test), found.classes) == (4, 4, ("cat", "dog"))
    assert found.notes == (
        "splits: train to train on, val to test on",
        "left out, in no class of the splits: extra (4), unlabeled (4), test (3), train (1)",
    )


def test_splits_may_be_named(tmp_path):
    for split, count in (("train", 1), ("mine", 3), ("held out", 2)):
        for label in ("cat", "dog"):
            write_pngs(tmp_path / split / label, count)
    found = data.load("folder", tmp_path, 8, train_split="mine", test_split="held out")
    assert (len(found.train), len(found.test)) == (6, 4)
    assert len(data.load("folder", tmp_path, 8, test_split="mine").train) == 2
    with pytest.raises(ValueError, match=r"test_split must be named beside .*'mine'.*held out, mi"):
        data.load("folder", tmp_path, 8, train_split="mine")
    with pytest.raises(ValueError, match=r"train_split must be a folder .* got 'yours' \(.*mine"):
        data.load("folder", tmp_path, 8, train_split="yours")
    with pytest.raises(ValueError, match="test_split must be named beside"):
        data.load("folder", tmp_path, 8, train_split="train", test_split="train")
    write_pngs(tmp_path / "Train" / "cat", 1)
    with pytest.raises(ValueError, match=r"train_split must be named .* there are Train, train"):
        data.load("folder", tmp_path, 8, test_split="mine")


@pytest.mark.parametrize(
    "splits", [("train", "holdout"), ("test", "val"), ("train", "unlabeled"), ("other", "VALID")]
)
def test_splits_are_not_taken_for_classes(tmp_path, splits):
    for split in splits:
        for label in ("cat", "dog"):
            write_pngs(tmp_path / split / label, 2)
    with pytest.raises(ValueError, match=r"look like splits.*--train-split, .*--no-labels"):
        data.load("folder", tmp_path)
    found = data.load("folder", tmp_path, labels=False)
    assert (len(found.pretrain), found.train, found.classes) == (8, None, ())


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    for label in ("train", "bus", "test"):  # vehicles
        write_pngs(tmp_path / label, 5)
    with pytest.raises(ValueError, match="must hold images of the same classes"):
        data.load("folder", tmp_path)
    for image in (tmp_path / "test").iterdir():
        image.unlink()
    found = data.load("folder", tmp_path)
    assert found.classes == ("bus", "train")
    assert "no images in test" in found.notes


@pytest.mark.parametrize("splits", [False, True])
def test_a_single_class_is_no_label(tmp_path, splits):
    for split in ("train", "test") if splits else (".",):
        write_pngs(tmp_path / split / "cat", 3)
    found = data.load("folder", tmp_path)
    assert (len(found.pretrain), found.pretrain[0][1], found.train) == (3, -1, None)
    assert found.notes[-1] == "no labels: cat is the only class"


def test_classes_one_folder_further_down_are_pointed_out(tmp_path):
    for label in ("cat", "dog"):
        write_pngs(tmp_path / "photos" / label, 3)
    found = data.load("folder", tmp_path)
    assert len(found.pretrain) == 6
    assert found.notes[-1].endswith(
        f"with data_dir {tmp_path / 'photos'}, cat, dog would be the classes"
    )


def test_hidden_names_are_nobodys_pictures(tmp_path):
    for label in ("cat", "dog"):
        write_pngs(tmp_path / label, 5)
    for hidden in (".ipynb_checkpoints", "__MACOSX/cat", "cat/.ipynb_checkpoints", ".git"):
        write_pngs(tmp_path / hidden, 2)
    for hidden in ("cat/._000.png", "dog/._001.png", "dog/.002.png"):
        (tmp_path / hidden).write_bytes(b"of a Mac")
    found = data.load("folder", tmp_path, image_size=8)
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (8, 2)
    assert all(split[i] for split in (found.train, found.test) for i in range(len(split)))
    note = next(note for note in found.notes if note.startswith("left out, hidden: "))
    for name in (".ipynb_checkpoints (2)", "._* (2)", "__MACOSX (1)", ".git (1)", ".002.png (1)"):
        assert name in note


def test_a_hidden_folder_may_be_the_one_that_is_meant(tmp_path):
    write_pngs(tmp_path / ".cache" / "cat", 3)
    assert len(data.load("folder", tmp_path / ".cache").pretrain) == 3


def test_every_ending_that_pillow_reads_is_an_image(tmp_path):
    shade = Image.new("RGB", (12, 10), (200, 100, 50))
    names = ["cat/0.JPG", "cat/1.jpe", "cat/2.avif", "dog/0.jfif", "dog/1.gif", "dog/2.jp2"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        kind = {"jfif": "JPEG", "jpe": "JPEG"}.get(name[-4:].strip("."))
        shade.save(tmp_path / name, kind)
    found = data.load("folder", tmp_path, image_size=8)
    assert found.classes == ("cat", "dog")
    assert len(found.train) + len(found.test) == len(names)
    for image, _ in found.train:
        assert (image.float().mean((1, 2)) - torch.tensor([200, 100, 50])).abs().max() < 25


def test_what_is_no_image_and_what_is_empty_is_told(tmp_path):
    for label in ("cat", "dog"):
        write_pngs(tmp_path / label, 5)
    for name in ("labels.csv", "cat/a.txt", "cat/b.txt", "bird/a.heic", "dog/film.mpg", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    write_pngs(tmp_path, 1)
    notes = data.load("folder", tmp_path).notes
    (others,) = (note for note in notes if note.startswith("left out, no images: "))
    for kind in (".txt (2)", ".csv (1)", ".heic (1)", ".mpg (1)", "no ending (1)"):
        assert kind in others
    assert "no images in bird" in notes
    assert "left out, in no class: . (1)" in notes


def test_photographs_are_upright(tmp_path):
    """Each of EXIF's eight orientations of one picture is that picture."""
    upright = torch.arange(6 * 4, dtype=torch.uint8).view(6, 4) * 10
    stored = {  # what a camera writes, by the number that says how to turn it
        **{1: upright, 2: upright.flip(1), 3: upright.rot90(2), 4: upright.flip(0)},
        **{5: upright.T, 6: upright.rot90(1), 7: upright.rot90(2).T, 8: upright.rot90(-1)},
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{orientation}.png", exif=exif)
    found = data.load("folder", tmp_path, damaged="skip").pretrain
    assert len(found) == 8
    for image, _ in found:
        assert torch.equal(image[0], upright)


def test_exif_data_that_cannot_be_written_again_are_no_damage(tmp_path):
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    broken = struct.pack("<HHI4s", 0x0103, 7, 4, b"text")  # where a number belongs
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + broken + turned + bytes(4)
    Image.new("RGB", (12, 10)).save(tmp_path / "a.jpg", exif=exif)
    for damaged in ("refuse", "skip"):
        assert data.load("folder", tmp_path, damaged=damaged).pretrain[0][0].shape == (3, 12, 10)


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
def test_images_of_other_numbers_are_refused_by_name(tmp_path, kind):
    Image.fromarray(np.full((3, 4), 10**6, dtype=kind)).save(tmp_path / "wide.tif")
    with pytest.raises(
        ValueError, match=r"wide\.tif cannot be read .*not whole numbers of 8 or 16"
    ):
        data.load("folder", tmp_path).pretrain[0]
    write_pngs(tmp_path, 1)
    found = data.load("folder", tmp_path, damaged="skip")
    assert len(found.pretrain) == 1
    assert "wide.tif (its values are not whole numbers" in found.notes[1]


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


def test_damaged_images_are_named_counted_and_left_out(damage):
    folder, damaged = damage
    found = data.load("folder", folder, 8, damaged="skip")
    printed = "\n".join(found.notes)
    assert f"{len(damaged)} of {15 + len(damaged)} images are damaged and left out" in printed
    assert printed.count("\n  ") == len(damaged)
    paths = {*found.train.paths, *found.test.paths}
    assert len(paths) == 15
    for path in damaged:
        assert f"  {path} (" in printed
        assert str(path) not in paths
    for split in (found.pretrain, found.train, found.test):
        for i in range(len(split)):
            assert split[i][0].dtype == torch.uint8


def test_damaged_images_are_refused_by_name_when_they_are_met(damage):
    folder, damaged = damage
    found = data.load("folder", folder, 8)
    assert not any("damaged" in note for note in found.notes)
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


@pytest.mark.parametrize(
    ("option", "value"),
    [("damaged", "skip"), ("labels", False), ("train_split", "a"), ("test_split", "b")],
)
def test_the_choices_are_for_folders_alone(option, value):
    with pytest.raises(ValueError, match=f"{option} is for dataset 'folder' only, got {value}"):
        Config(**{option: value})
    assert getattr(Config(dataset="folder", **{option: value}), option) == value


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
