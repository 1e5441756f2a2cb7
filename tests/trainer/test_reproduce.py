"""Experiments: what they train, measure and say."""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch

pytest.importorskip("torchvision")
from torch.utils.data import Subset

from fastssl import cli
from fastssl.trainer import augment, data, evaluate, experiments, loop, networks
from fastssl.trainer.config import RECIPES, Config
from fastssl.trainer.data import Images
from fastssl.trainer.experiments import EXPERIMENTS
from fastssl.trainer.methods import METHODS
from fastssl.trainer.reproduce import UNTRAINED, Arm, Ask, Experiment, Found, Panel, reproduce


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A few digits, short runs, short fine-tuning."""
    digits = data.load("digits")
    some = Images(digits.train.images[:80], digits.train.labels[:80])
    few = Images(digits.test.images[:30], digits.test.labels[:30])
    digits = dataclasses.replace(digits, pretrain=some, train=some, test=few)
    monkeypatch.setattr(data, "load", lambda *_: digits)
    recipe = {"backbone": "cnn", "epochs": 1, "batch_size": 32, "workers": 0}
    monkeypatch.setitem(RECIPES, "digits", recipe)
    monkeypatch.setitem(evaluate.FEW_LABELS, "steps", 2)
    monkeypatch.setattr(experiments.BatchSize, "sizes", (16, 32))
    monkeypatch.setattr(experiments.ProjectionWidth, "widths", (4, 8))
    monkeypatch.chdir(tmp_path)
    return digits


class Pair(Experiment):
    """Two arms, one of a method without a name."""

    name = "pair"
    line = "Which?"
    takes = "no time"
    epochs = 1
    panels = (Panel("neighbours", {"knn": ""}),)

    def arms(self, ask):
        return [Arm("first", "first", "simclr"), Arm("own", "own", experiments.AttractOnly)]

    def text(self, found, ask):
        return [found.compare("first", "own", "knn")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_ends_with_a_figure_a_text_and_numbers(small, tmp_path, capsys, name):
    arguments = ["reproduce", name, "--epochs", "1", "--seeds", "2", "--out", "here"]
    assert cli.main([*arguments, *(["--labels", "20"] if name == "few-labels" else [])]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "here" / "results.json").read_text())
    text = (tmp_path / "here" / "text.md").read_text()
    assert (results["experiment"], results["epochs"], results["seeds"]) == (name, 1, 2)
    for sentence in results["text"]:
        assert sentence in printed
        assert sentence in text
    experiment = EXPERIMENTS[name]
    ask = Ask("digits", (*experiment.methods, "")[0], 20)
    arms = {arm.name for arm in experiment.arms(ask)}
    assert set(results["found"]) == arms | {UNTRAINED}
    for arm in arms:
        for panel in experiment.panels:
            for measure in panel.series:
                assert len(results["found"][arm][measure]) == 2
        assert f"| {arm} |" in text
    figure = (tmp_path / "here" / "figure.svg").read_text()
    assert figure.count('<g id="axes_') == len(experiment.panels)
    assert METHODS.keys().isdisjoint(arms - set(METHODS))
    assert not any("," in method for method in METHODS)  # what was registered is gone


def test_what_is_finished_is_not_repeated(small, tmp_path, monkeypatch):
    assert reproduce(Pair(), seeds=1)
    written = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "runs" / "pair-digits").rglob("*")
        if path.parent.name != "pair-digits" and path.is_file()
    }
    assert len(written) > 10
    trained = []
    run = loop.Trainer.run
    monkeypatch.setattr(loop.Trainer, "run", lambda t: (trained.append(t.out.name), run(t))[1])
    assert reproduce(Pair(), seeds=2)
    assert trained == ["first-1", "own-1"]
    assert written == {path: path.stat().st_mtime_ns for path in written}
    with pytest.raises(ValueError, match=r"epochs is 2, but the run in .* was started with 1"):
        reproduce(Pair(), epochs=2)
    assert "own" not in METHODS


def test_a_single_seed_is_said_once_and_has_no_deviation(small, tmp_path):
    assert reproduce(Pair(), out="once", seeds=1)
    text = (tmp_path / "once" / "text.md").read_text()
    assert text.count("nothing is claimed") == 1
    assert "standard deviation" not in text
    assert "\nTrained once: experiment pair," in text
    assert reproduce(Pair(), out="once", seeds=2)
    text = (tmp_path / "once" / "text.md").read_text()
    assert "nothing is claimed" not in text
    assert "\nMean and standard deviation: experiment pair," in text


def test_a_signal_in_the_last_step_stops_the_experiment(small, capsys, monkeypatch):
    take = loop.Trainer._train_step

    def interrupt(trainer, batch):
        if trainer.step + 1 == trainer.steps:
            os.kill(os.getpid(), signal.SIGINT)
        return take(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", interrupt)
        assert not reproduce(Pair(), out="parts", seeds=1)
    assert reproduce(Pair(), out="parts", seeds=1)


def test_an_interrupted_experiment_goes_on_to_the_same_numbers(small, capsys, monkeypatch):
    assert reproduce(Pair(), out="whole", seeds=2)
    take = loop.Trainer._train_step

    def interrupt(trainer, batch):
        if trainer.out.name == "own-0":
            os.kill(os.getpid(), signal.SIGINT)
        return take(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", interrupt)
        assert not reproduce(Pair(), out="parts", seeds=2)
    assert "the same command goes on" in capsys.readouterr().out
    assert reproduce(Pair(), out="parts", seeds=2)
    files = [loop.Path(folder) / "results.json" for folder in ("whole", "parts")]
    assert files[0].read_text() == files[1].read_text()


def found(**arms):
    return Found({arm: {"knn": values} for arm, values in arms.items()})


def test_nothing_is_claimed_within_deviation():
    near = found(a=[0.90, 0.92], b=[0.91, 0.93])
    assert near.lead("a", "b", "knn") == 0
    assert near.compare("a", "b", "knn") == (
        "a (91.0 ± 1.4%) and b (92.0 ± 1.4%) differ by no more than deviation."
    )
    far = found(a=[0.90, 0.92], b=[0.95, 0.97])
    assert far.lead("a", "b", "knn") == pytest.approx(-0.05)
    said = "b (96.0 ± 1.4%) is ahead of a (91.0 ± 1.4%) by 5.0 points."
    assert far.compare("a", "b", "knn") == far.compare("b", "a", "knn") == said
    alone = found(a=[0.1], b=[0.9])
    assert alone.lead("a", "b", "knn") == 0
    said = "a (10.0%) stands beside b (90.0%)."
    assert alone.compare("a", "b", "knn") == said


def test_the_deviation_is_that_of_a_difference():
    a, b = [0.80, 0.84], [0.85, 0.89]  # deviations of 2.83 points each: 4.0 together, 5 apart
    assert found(a=a, b=b).lead("b", "a", "knn") == pytest.approx(0.05)
    assert found(a=a, b=[x - 0.015 for x in b]).lead("b", "a", "knn") == 0


@pytest.mark.parametrize(
    ("std", "rank", "says"),
    [
        ([0.01, 0.02], [1.1, 1.2], "collapsed with 2 of 2 seeds"),
        ([0.9, 0.02], [30.0, 1.2], "collapsed with 1 of 2 seeds"),
        ([0.9, 0.8], [30.0, 20.0], "did not collapse"),
    ],
)
def test_a_collapse_is_told_as_it_was(std, rank, says):
    collapse = EXPERIMENTS["collapse"]
    ask = Ask("digits", "", 0)
    values = {"knn": [0.9, 0.9], "embedding_std": std, "effective_rank": rank}
    numbers = Found({arm.name: dict(values) for arm in collapse.arms(ask)})
    numbers[UNTRAINED] = {"knn": [0.8, 0.8]}
    for sentence in collapse.text(numbers, ask):
        assert says in sentence


def test_the_part_that_is_missed_is_named():
    experiment, ask = EXPERIMENTS["augmentation"], Ask("digits", "simclr", 0)
    numbers = Found({a.name: {"knn": [0.9, 0.9]} for a in experiment.arms(ask)})
    numbers[UNTRAINED] = {"knn": [0.8, 0.8]}
    assert "Of no single part is it shown that it is missed." in experiment.text(numbers, ask)
    numbers["simclr, without affine"] = {"knn": [0.7, 0.71]}
    assert "What is missed most is affine." in experiment.text(numbers, ask)


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_augmentations_are_alone_or_left_out(dataset):
    ask = Ask(dataset, "simclr", 0)
    config, size = Config(dataset=dataset).resolved(), 24
    steps = {
        arm.place: [str(step) for step in arm.method.views(config, size)[0].transforms]
        for arm in EXPERIMENTS["augmentation"].arms(ask)
    }
    whole = [str(step) for step in augment.default(dataset, size).transforms]
    assert steps["all"] == whole
    assert steps["none"] == ["Identity()"]
    parts = [place.removesuffix(" alone") for place in steps if place.endswith(" alone")]
    assert len(set(parts)) == len(whole)
    for part, step in zip(parts, whole, strict=True):
        assert steps[f"{part} alone"] == [step]
        assert steps[f"without {part}"] == [other for other in whole if other != step]


@pytest.mark.parametrize("method", experiments.TWO_VIEWS)
def test_heads_are_none_linear_and_the_methods_own(method):
    ask = Ask("digits", method, 0)
    config = Config(method=method, projection_hidden=16, projection_dim=4).resolved()
    heads = {}
    for arm in EXPERIMENTS["head"].arms(ask):
        made = METHODS[arm.method] if isinstance(arm.method, str) else arm.method
        model = made(networks.build_backbone("cnn", 1, 16), config, 10)
        heads[arm.place] = model.head
        assert model.head(torch.randn(3, 128)).shape == (3, 128 if "no" in arm.place else 4)
    assert [sum(1 for _ in head.parameters()) for head in heads.values()][:2] == [0, 1]
    assert isinstance(heads["perceptron"], networks.ProjectionHead)


def test_attraction_alone_has_no_negatives_and_moves_both_views():
    config = Config(projection_hidden=16, projection_dim=4).resolved()
    model = experiments.AttractOnly(networks.build_backbone("cnn", 1, 16), config, 10)
    views = [torch.randn(6, 1, 16, 16) for _ in range(2)]
    batch = augment.Batch(views, torch.arange(6), torch.zeros(6))
    loss, (z0, z1) = model(batch)
    torch.testing.assert_close(loss, -torch.cosine_similarity(z0, z1).mean())
    gradients = torch.autograd.grad(loss, (z0, z1))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_pretraining_never_sees_the_labelled_images(small):
    experiment, ask = EXPERIMENTS["few-labels"], Ask("digits", "simclr", 20)
    seen = experiment.images(small, ask, seed=1)
    labelled = evaluate.draw_labels(small.train.labels, 20, seed=1).tolist()
    assert isinstance(seen.pretrain, Subset)
    assert not set(seen.pretrain.indices) & set(labelled)
    assert len(seen.pretrain) == 60
    assert seen.train is small.train
    assert experiment.images(small, ask, seed=2).pretrain.indices != seen.pretrain.indices


def test_other_numbers_of_labels_are_networks_of_their_own(small, tmp_path, monkeypatch):
    trained = []
    run = loop.Trainer.run
    monkeypatch.setattr(loop.Trainer, "run", lambda t: (trained.append(t.out.name), run(t))[1])
    for labels in (20, 30, 20):
        assert reproduce(EXPERIMENTS["few-labels"], labels=labels, epochs=1, seeds=1)
        results = json.loads((tmp_path / "runs" / "few-labels-digits" / "results.json").read_text())
        assert set(results["found"]) == {f"simclr, {labels} labels", UNTRAINED}
    assert trained == ["simclr-20-labels-0", "simclr-30-labels-0"]


def test_features_of_the_head_are_those_after_training(small, monkeypatch):
    seen = []
    extract = evaluate.extract

    def spy(network, *args, **options):
        seen.append({k: v.clone() for k, v in network.state_dict().items()})
        return extract(network, *args, **options)

    monkeypatch.setattr(
        EXPERIMENTS["backbone-or-head"].__class__, "arms", lambda *_: Pair.arms(0, 0)[:1]
    )
    monkeypatch.setattr(evaluate, "extract", spy)
    assert reproduce(EXPERIMENTS["backbone-or-head"], seeds=1)
    trained = networks.load_backbone("runs/backbone-or-head-digits/first-0").state_dict()
    with_head = next(s for s in seen if any(k.startswith("1.") for k in s) and "0.0.weight" in s)
    assert torch.equal(with_head["0.0.weight"], trained["0.weight"])


def test_without_a_name_they_are_listed(capsys):
    assert cli.main(["reproduce"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert all(re.search(r"\(about (\d+ minutes|an hour)\)$", line) for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("colapse", "experiment must be one of few-labels, .* got 'colapse'"),
        ("head --method byol", "method of experiment 'head' must be one of simclr, .* got 'byol'"),
        ("collapse --method byol", "method of experiment 'collapse' must be left out, got 'byol'"),
        ("collapse --labels 9", "labels of experiment 'collapse' must be left out, got 9"),
        ("collapse --seeds 0", "seeds must be at least 1, got 0"),
        ("collapse --dataset folder", "dataset of experiment 'collapse' must be one of digits"),
        ("few-labels --labels 0", "labels must be 2 to 80, .* got '0'"),
        ("few-labels --labels 999", "labels must be 2 to 80, the number of labelled images"),
        (
            "few-labels --labels 49",
            "labels must be at most 48, which leaves a batch of 32 .* got 49",
        ),
        ("few-labels --method supcon", "must be one of simclr"),
        ("collapse --epochs 0", "epochs must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(small, capsys, arguments, message):
    assert cli.main(["reproduce", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastssl: error: ")
    assert re.search(message, error)
    assert error.count("\n") == 1
