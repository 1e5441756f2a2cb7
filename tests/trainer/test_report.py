import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastssl.trainer import data, evaluate, networks, report
from fastssl.trainer.config import Config
from fastssl.trainer.folders import Files
from fastssl.trainer.methods import METHODS


class Page(HTMLParser):
    """What a page asks for, shows, and leaves open."""

    VOID = ("meta", "img", "br", "link", "path", "use", "rect", "image")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.figures: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        for name in ("src", "href", "xlink:href", "data", "action"):
            if name in named:
                self.addresses.append(named[name] or "")
        if tag == "img":
            self.images.append(named)
        if tag == "svg":
            self.figures.append(named)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.words.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


HISTORY = """epoch,loss,lr,seconds,knn_accuracy,embedding_std,effective_rank,alignment,uniformity
1,5.1234,0.001,1.4,0.8123,0.91,55.5,0.5,-2.5
2,4.5678,0.0005,1.3,,0.95,61.2,0.4,-2.75
3,4.4321,0.0001,1.2,0.9345,0.97,66.6,0.3,-3.0
"""


def arm(mean: float) -> dict[str, object]:
    return {"mean": mean, "std": 0.0123, "accuracies": [mean - 0.0123, mean + 0.0123]}


RESULTS = {
    "train_images": 1437,
    "test_images": 360,
    "classes": 10,
    "draws": 5,
    "recipe": evaluate.FEW_LABELS,
    "knn": {"pretrained": 0.9712, "random": 0.8817},
    "linear": {"pretrained": 0.9856, "random": 0.9434},
    "stages": [
        {"name": "block1", "width": 32, "pretrained": 0.8111, "random": 0.8444},
        {"name": "block2", "width": 128, "pretrained": 0.9856, "random": 0.9434},
    ],
    "few_labels": [
        {
            "labels": labels,
            "fine_tuned": arm(0.9111 + shift),
            "from_scratch": arm(0.8222 + shift),
            "pretrained_frozen": arm(0.9 + shift),
            "random_frozen": arm(0.7333 + shift),
        }
        for labels, shift in ((20, 0.0), (50, 0.01), (100, 0.03))
    ],
}


def make_run(folder: Path, *files: str, **options: object) -> Path:
    folder.mkdir()
    Config(epochs=3, out=str(folder), **options).resolved().save(folder / "config.yaml")
    if "history" in files:
        (folder / "metrics.csv").write_text(HISTORY)
    if "backbone" in files:
        torch.manual_seed(0)
        networks.export_backbone(
            folder / "backbone.safetensors",
            networks.build_backbone("cnn", 1, 16),
            architecture="cnn",
            channels=1,
            size=16,
            mean=(0.3,),
            std=(0.3,),
        )
    if "results" in files:
        evaluate._write(folder, RESULTS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("report") / "run"
    path = report.write_report(make_run(folder, "history", "backbone", "results"))
    assert path == folder / "report.html"
    return folder, path.read_text()


def test_the_report_asks_for_nothing_from_elsewhere(whole: tuple[Path, str]) -> None:
    _, html = whole
    assert "http" not in html
    assert "<script" not in html
    assert "@import" not in html
    assert all(address.startswith(("data:", "#")) for address in Page(html).addresses)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", html))


def test_the_report_is_whole_html_and_every_picture_has_words(whole: tuple[Path, str]) -> None:
    page = Page(whole[1])
    assert page.open == []
    assert len(page.figures) == 10  # stages, few labels, loss, accuracy, four monitors, two maps
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in page.figures)
    assert len(page.images) > 100
    assert all(image["alt"] for image in page.images)


def test_the_report_holds_the_numbers_of_the_run(whole: tuple[Path, str]) -> None:
    folder, html = whole
    text = Page(html).text
    for number in (
        "97.1%",
        "88.2%",
        "98.6%",
        "92.1%",
        "94.1%",
        "92.1 ± 1.2",
        "83.2 ± 1.2",
        "74.3 ± 1.2",
        "best features are those after block2; pretraining adds most after block2, 4.2 points, "
        "and takes most after block1, 3.3 points.",
    ):
        assert number in text, number
    assert "standard deviation is 0.97 and the effective rank 67 of" in text
    assert "loss by epoch: from 5.12 to 4.43" in html
    assert f"load_backbone({str(folder)!r})" in text
    assert "[B, 1, 16, 16] -> [B, 128]" in text


def test_the_summary_tells_what_was_measured(whole: tuple[Path, str]) -> None:
    told = report.summary(whole[0])
    assert told == (
        "Without a single label, 3 epochs taught the network features by which nearest neighbours "
        "classify 97.1% of 360 unseen images, against 88.2% with the same network untrained. "
        "Fine-tuned, it reaches on 50 labels 92.1 ± 1.2% "
        "(from scratch 83.2 ± 1.2%) and on 100 labels 94.1 ± 1.2% (from scratch 85.2 ± 1.2%)."
    )
    assert told in Page(whole[1]).text


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "has not finished its first epoch"),
        (("history",), "There is no pretrained backbone in this folder yet"),
        (("history",), "from 5.123 to 4.432"),
        (("history",), "Pretraining has not finished: fastssl pretrain --resume --out "),
        (("history", "backbone"), "The backbone has not been evaluated: fastssl evaluate "),
    ],
)
def test_a_part_of_a_run_has_a_report(tmp_path: Path, files: tuple[str, ...], says: str) -> None:
    page = Page(report.write_report(make_run(tmp_path / "run", *files)).read_text())
    assert says in page.text
    assert page.open == []


def test_a_run_with_prototypes_tells_how_they_are_used(
    tmp_path: Path, whole: tuple[Path, str]
) -> None:
    run = make_run(tmp_path / "run", method="swav", prototypes=50, local_crops=3, local_size=9)
    columns = ("prototypes_used,code_entropy,mean_code_entropy", "12,3.5,3.9", "40,2.5,3.8")
    lines = zip(HISTORY.splitlines(), (*columns, "47,1.25,3.7"), strict=True)
    (run / "metrics.csv").write_text("\n".join(",".join(pair) for pair in lines))
    html = report.write_report(run).read_text()
    page = Page(html)
    assert page.open == []
    assert len(page.figures) == 9  # loss, accuracy, four monitors, three of the prototypes
    assert "47 of 50 prototypes are the first choice of some image" in page.text
    assert "spread as over 3.5 of them" in page.text  # exp(1.25)
    assert "prototypes in use by epoch: from 12 to 47" in html
    assert html.count("16 px") == 8 * 2
    assert html.count("9 px") == 8 * 3
    assert "prototypes" not in Page(whole[1]).text
    assert " px" not in Page(whole[1]).text


def test_random_features_that_are_better_are_told() -> None:
    stages = [{"name": "stem", "width": 8, "pretrained": 0.5, "random": 0.6}]
    told = report._stages({**RESULTS, "stages": stages})["text"]
    assert "after no stage are they better than those of the random network" in told
    assert told.endswith(", and takes most after stem, 10.0 points.")


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ("4.4321", "After 3 of 3 epochs the loss fell from 5.123 to 4.432"),
        ("5.9", "After 3 of 3 epochs the loss rose from 5.123 to 5.900"),
        ("5.12341", "After 3 of 3 epochs the loss is 5.123, and"),
    ],
)
def test_the_summary_says_where_the_loss_went(tmp_path: Path, last: str, says: str) -> None:
    run = make_run(tmp_path / "run", "history")
    (run / "metrics.csv").write_text(HISTORY.replace("4.4321", last))
    assert report.summary(run).startswith(says)


def test_pretraining_that_did_not_help_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "history", "backbone", "results")
    evaluate._write(run, {**RESULTS, "knn": {"pretrained": 0.8, "random": 0.9}})
    told = report.summary(run)
    assert "3 epochs did not help: by the network's features nearest neighbours classify" in told
    assert "80.0% of 360 unseen images, against 90.0% with the same network untrained" in told
    evaluate._write(run, {**RESULTS, "knn": {"pretrained": 0.90004, "random": 0.9}})
    assert "did not help" in report.summary(run)  # 90.0% against 90.0%


def test_an_unfinished_run_is_told_no_command_that_fails(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", "history")
    text = Page(report.write_report(run).read_text()).text
    assert "load_backbone" not in text
    assert "fastssl evaluate" not in text
    assert text.count(f"fastssl pretrain --resume --out '{run}'") == 2  # to be pasted


def test_one_epoch_and_one_number_of_labels_stand_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.csv").write_text("\n".join(HISTORY.splitlines()[:2]))
    monkeypatch.setattr(report, "_figure", lambda draw, *_: draw)
    loss = report._training(report._history(run), None, evaluate.run_config(run))["curves"][0][0]
    few = report._few_labels({**RESULTS, "few_labels": RESULTS["few_labels"][:1]})["figure"]
    for draw, limits in ((loss, (0, 2)), (few, (20 / 1.5, 20 * 1.5))):
        ax = Figure().add_subplot()
        draw(ax)
        assert ax.get_xlim() == pytest.approx(limits)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_report(tmp_path: Path, method: str) -> None:
    run = make_run(tmp_path / "run", method=method)
    page = Page(report.write_report(run).read_text())
    assert page.open == []
    assert page.images  # its views
    said = "Pretraining also saw its label" if METHODS[method].labelled else "never saw a label"
    assert said in page.text


class Pieces(METHODS["simclr"]):
    """A method of one view, four patches, that takes no option."""

    defaults: ClassVar = {}

    @staticmethod
    def views(config: Config, size: int) -> list[object]:
        return [lambda image: torch.stack([image[:, : size // 2, : size // 2]] * 4)]


def test_patches_other_measures_and_no_projection_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "pieces", Pieces)
    run = make_run(tmp_path / "run", method="pieces")
    columns = zip(HISTORY.splitlines(), ("share_right", "0.25", "0.5", "0.75"), strict=True)
    (run / "metrics.csv").write_text("\n".join(",".join(pair) for pair in columns))
    html = report.write_report(run).read_text()
    page = Page(html)
    assert page.open == []
    assert "share right by epoch: from 0.25 to 0.75" in html
    assert "effective rank 67." in page.text
    pictures = [
        Image.open(io.BytesIO(base64.b64decode((image["src"] or "").split(",")[1])))
        for image in page.images
        if image["alt"] == "a random view of it"
    ]
    assert len(pictures) == 8 * 5
    assert {(picture.size, picture.mode) for picture in pictures} == {((19, 19), "L")}


def test_data_of_ones_own_are_drawn(tmp_path: Path) -> None:
    digits = data.load("digits")
    pairs = [((image, 255 - image), label) for image, label in (digits.train[i] for i in range(40))]
    own = dataclasses.replace(digits, name="pairs", pretrain=pairs, train=None, test=None)
    run = make_run(tmp_path / "run", "history", "backbone")
    assert evaluate.evaluate_run(run, data=own) == {"skipped": "data set 'pairs' has no labels"}
    page = Page(report.write_report(run, data=own).read_text())
    assert "simclr on pairs" in page.text
    assert "40 images of 16 x 16 pixels" in page.text
    assert len(page.figures) == 8  # loss, accuracy, four monitors, two maps


def test_a_collapse_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "history")
    (run / "metrics.csv").write_text(HISTORY.replace("0.97,66.6", "0.02,1.3"))
    assert "It looks as if it did: at the end" in Page(report.write_report(run).read_text()).text


def test_names_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", "history")
    html = report.write_report(run).read_text()
    assert "<b>run" not in html
    assert "&lt;b&gt;run" in html


def test_images_without_labels_have_a_map_and_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    paths = []
    for i in range(12):
        paths.append(str(tmp_path / f"{i}.png"))
        size = (20 + i, 18, 3)  # no two alike
        Image.fromarray(np.random.default_rng(i).integers(0, 255, size, np.uint8)).save(paths[-1])
    unlabelled = data.Data(
        "folder", Files(paths, [-1] * 12, None), None, None, (), 3, 16, (0.5,) * 3, (0.5,) * 3
    )
    run = make_run(tmp_path / "run", "history")
    networks.export_backbone(
        run / "backbone.safetensors",
        networks.build_backbone("cnn", 3, 16),
        architecture="cnn",
        channels=3,
        size=16,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    Config(dataset="folder", backbone="cnn", epochs=3).resolved().save(run / "config.yaml")
    evaluate._write(run, {"skipped": "data set 'folder' has no labels"})
    monkeypatch.setattr(data, "load", lambda *_, **__: unlabelled)
    text = Page(report.write_report(run).read_text()).text
    assert "has not been evaluated: data set 'folder' has no labels" in text
    assert "An image and the images most similar to it." in text


def test_few_images_have_neighbours_and_a_word_on_the_map(tmp_path: Path) -> None:
    digits = data.load("digits")
    own = dataclasses.replace(
        digits, pretrain=[digits.train[i] for i in range(6)], train=None, test=None, classes=()
    )
    run = make_run(tmp_path / "run", "history", "backbone")
    text = Page(report.write_report(run, data=own).read_text()).text
    assert "There is no map of so few images: here are 6, and it takes 10." in text
    assert "An image and the images most similar to it." in text
    assert "no pretrained backbone" not in text


def test_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no .*nowhere/config\.yaml"):
        report.write_report(tmp_path / "nowhere")
    run = make_run(tmp_path / "run", "history")
    (run / "metrics.csv").write_text("epoch,loss\n1,many\n")
    with pytest.raises(ValueError, match=r"run/metrics\.csv is damaged"):
        report.write_report(run)
    (run / "evaluation.json").write_text("{")
    (run / "metrics.csv").write_text(HISTORY)
    with pytest.raises(ValueError, match=r"run/evaluation\.json is damaged"):
        report.write_report(run)
