"""Experiments that anyone can repeat: networks are trained, measured, drawn, and told about.

An `Experiment` says which networks (`Arm`) are trained with every seed, what is measured of them,
how that is drawn (`Panel`) and what is said for which numbers. They are declared in
``experiments.py``.
"""

import contextlib
import dataclasses
import io
import json
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastssl.trainer import checkpoint, data, evaluate, loop, networks
from fastssl.trainer.config import RECIPES, Config
from fastssl.trainer.data import Data
from fastssl.trainer.methods import METHODS
from fastssl.trainer.methods.base import Method
from fastssl.trainer.report import COLORS, STYLE

DATASETS = [name for name in RECIPES if name != "folder"]
UNTRAINED = "untrained"  # the arm that is measured as it is before pretraining


@dataclass(frozen=True)
class Arm:
    """A network that is trained with every seed.

    Attributes:
        name: Of its folders and its numbers.
        place: Where the figure has it: a word, or a number on the horizontal axis.
        method: The name of a method, or a method that has none, which then goes by the arm's.
        series: Which colour it has in the figure.
        options: Of its Config.
    """

    name: str
    place: str | float
    method: str | type[Method]
    series: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """A part of the figure: its label, and the series by the name of the measure they show."""

    label: str
    series: Mapping[str, str]
    percent: bool = True


@dataclass(frozen=True)
class Ask:
    """What a reader may choose; the defaults of the rest are the experiment's."""

    dataset: str
    method: str
    labels: int


@dataclass(frozen=True)
class Trial:
    """An arm that was trained with one seed on images."""

    config: Config
    ask: Ask
    images: Data
    run: loop.Run
    device: torch.device


class Found(dict[str, dict[str, list[float]]]):
    """The values that were found, one for each seed: ``found[arm][measure]``."""

    def add(self, arm: str, measures: dict[str, float]) -> None:
        """Add the values of one more seed."""
        for name, value in measures.items():
            self.setdefault(arm, {}).setdefault(name, []).append(value)

    def told(self, arm: str, measure: str, percent: bool = True) -> str:
        """Their mean and deviation."""
        scale, digits, unit = (100, 1, "%") if percent else (1, 2, "")
        values = [scale * value for value in self[arm][measure]]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}{unit}"

    def lead(self, arm: str, other: str, measure: str, of_other: str = "") -> float:
        """How far the first is ahead, below 0 if behind, and 0 if deviation may be the reason.

        That is where the means differ by no more than the deviation of a difference, the root of
        the sum of both variances. A single seed has no deviation and shows nothing.
        """
        a, b = self[arm][measure], self[other][of_other or measure]
        if len(a) < 2:
            return 0.0
        difference = statistics.mean(a) - statistics.mean(b)
        deviation = math.hypot(statistics.stdev(a), statistics.stdev(b))
        return difference if abs(difference) > deviation else 0.0

    def compare(
        self, arm: str, other: str, measure: str, names: Sequence[str] = (), of_other: str = ""
    ) -> str:
        """A sentence on two arms, or on two measures of them, for which more is better."""
        of_other = of_other or measure
        first, second = names or (arm, other)
        a = f"{first} ({self.told(arm, measure)})"
        b = f"{second} ({self.told(other, of_other)})"
        if len(self[arm][measure]) < 2:
            return f"{a} stands beside {b}."
        lead = self.lead(arm, other, measure, of_other)
        if not lead:
            return f"{a} and {b} differ by no more than deviation."
        ahead, behind = (a, b) if lead > 0 else (b, a)
        return f"{ahead} is ahead of {behind} by {abs(100 * lead):.1f} points."


class Experiment(ABC):
    """What is trained, measured, drawn and told; a subclass overrides what it needs."""

    name: ClassVar[str]
    line: ClassVar[str]  # what it asks
    takes: ClassVar[str]  # how long
    epochs: ClassVar[int]  # on digits; elsewhere the data set's own
    panels: ClassVar[tuple[Panel, ...]]
    axis: ClassVar[str] = ""  # what places are, if they are numbers
    methods: ClassVar[tuple[str, ...]] = ()  # to choose from, the default first
    labels: ClassVar[int] = 0  # how many by default, if it takes that option

    @abstractmethod
    def arms(self, ask: Ask) -> list[Arm]:
        """The networks to train."""

    def images(self, images: Data, ask: Ask, seed: int) -> Data:
        """What the arms of a seed are pretrained on."""
        return images

    def measure(self, trial: Trial) -> dict[str, float]:
        """What is measured of an arm: here its frozen backbone, and how its embeddings ended."""
        backbone = networks.load_backbone(trial.run.path, trial.device)
        last = trial.run.history[-1]
        return {
            **frozen_accuracies(backbone, trial.images, trial.device),
            "embedding_std": last["embedding_std"],
            "effective_rank": last["effective_rank"],
        }

    @abstractmethod
    def text(self, found: Found, ask: Ask) -> list[str]:
        """What the numbers say, a sentence or two each."""


def frozen_accuracies(
    network: torch.nn.Module, images: Data, device: torch.device
) -> dict[str, float]:
    """Of nearest neighbours and a linear probe on the features of a network as it is."""
    (train_x, train_y), (test_x, test_y) = (
        evaluate.extract(network, split, data=images, device=device)
        for split in (images.train, images.test)
    )
    return {
        "knn": evaluate.knn_accuracy(train_x, train_y, test_x, test_y),
        "linear": evaluate.linear_probe(train_x, train_y, test_x, test_y),
    }


def reproduce(
    experiment: Experiment,
    *,
    dataset: str = "digits",
    data_dir: str | Path = "data",
    method: str | None = None,
    labels: int | None = None,
    epochs: int | None = None,
    seeds: int = 3,
    out: str | Path | None = None,
) -> bool:
    """Run an experiment, or go on with it.

    It ends with ``figure.svg``, ``text.md`` and ``results.json`` in its folder. Every network is a
    run in a folder of its own, and what is finished is not trained again.

    Args:
        experiment: What to do.
        dataset: On which data set, one with labels.
        data_dir: Where data sets are kept.
        method: With which method, where the experiment lets one choose.
        labels: How many labelled images, where the experiment takes any.
        epochs: How long to pretrain.
        seeds: How often.
        out: Folder of everything, ``runs/NAME-DATASET`` by default.

    Returns:
        False if it was interrupted.

    Raises:
        ValueError: The experiment does not take an option, or not that value.
    """
    for option, value, accepted in (
        ("dataset", dataset, DATASETS),
        ("method", method, experiment.methods),
    ):
        if value is not None and value not in accepted:
            choice = f"be one of {', '.join(accepted)}" if accepted else "be left out"
            raise ValueError(
                f"{option} of experiment {experiment.name!r} must {choice}, got {value!r}"
            )
    if labels is not None and not experiment.labels:
        raise ValueError(f"labels of experiment {experiment.name!r} must be left out, got {labels}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if epochs is None and dataset == "digits":
        epochs = experiment.epochs
    if labels is None:
        labels = experiment.labels
    ask = Ask(dataset, method or (*experiment.methods, "")[0], labels)
    out = checkpoint.expanded(out or f"runs/{experiment.name}-{dataset}")
    started, whole = time.perf_counter(), data.load(dataset, data_dir)

    found = Found()
    arms = experiment.arms(ask)
    todo = [(seed, arm) for seed in range(seeds) for arm in arms]
    for number, (seed, arm) in enumerate(todo, 1):
        folder = out / f"{arm.name.replace(',', '').replace(' ', '-')}-{seed}"
        images = experiment.images(whole, ask, seed)
        with _registered(arm) as arm_method:
            options: dict[str, Any] = {"method": arm_method, "dataset": dataset, "epochs": epochs}
            options |= {"data_dir": data_dir, "knn_every": 0, "seed": seed, "out": folder}
            config = Config.from_dict({**options, **arm.options}).resolved()
            if (folder / "config.yaml").exists():  # more epochs would go on with it
                before = {"epochs": evaluate.run_config(folder).epochs}
                loop.check_same({"epochs": config.epochs}, before, ("epochs",), folder)
            with contextlib.redirect_stdout(io.StringIO()):
                run = loop.pretrain(config, resume=True, data=images)
            if not run.complete:
                print(f"stopped; the same command goes on in {out}")
                return False
            trial = Trial(config, ask, images, run, evaluate.device_for(config))
            measures = _once(folder / "measures.json", experiment.measure, trial)
        found.add(arm.name, measures)
        line = ", ".join(f"{name.replace('_', ' ')} {x:.3g}" for name, x in measures.items())
        print(f"{number}/{len(todo)} {arm.name}, seed {seed}: {line}", flush=True)
        if arm is arms[0]:
            found.add(UNTRAINED, _once(out / f"{UNTRAINED}-{seed}.json", _as_it_was, trial))

    sentences = experiment.text(found, ask)
    if seeds == 1:
        sentences.append("With a single seed there is no deviation, and nothing is claimed.")
    how: dict[str, Any] = {"experiment": experiment.name, **dataclasses.asdict(ask)}
    how |= {"epochs": config.epochs, "seeds": seeds}
    checkpoint.write(out / "figure.svg", draw(experiment, arms, found))
    results = json.dumps({**how, "text": sentences, "found": found}, indent=2)
    checkpoint.write(out / "results.json", (results + "\n").encode())
    told = "Mean and standard deviation" if seeds > 1 else "Trained once"
    blocks = [
        f"# {experiment.name}",
        experiment.line,
        "![figure](figure.svg)",
        *sentences,
        table(experiment, arms, found),
        f"{told}: {', '.join(f'{name} {value}' for name, value in how.items() if value)}.",
    ]
    checkpoint.write(out / "text.md", ("\n\n".join(blocks) + "\n").encode())
    print("\n".join(["", *sentences, "", f"figure: {out / 'figure.svg'}"]))
    print(f"text and numbers: {out / 'text.md'} ({time.perf_counter() - started:.0f} s)")
    return True


@contextlib.contextmanager
def _registered(arm: Arm) -> Iterator[str]:
    """The name under which an arm's method is known; one without a name has the arm's meanwhile."""
    if isinstance(arm.method, str):
        yield arm.method
        return
    METHODS[arm.name] = arm.method
    try:
        yield arm.name
    finally:
        del METHODS[arm.name]


def _once(
    path: Path, measure: Callable[[Trial], dict[str, float]], trial: Trial
) -> dict[str, float]:
    """What is measured of a trial, or was before."""
    measures = evaluate.read_json(path)
    if measures is None:
        measures = measure(trial)
        checkpoint.write(path, json.dumps(measures).encode())
    return measures


def _as_it_was(trial: Trial) -> dict[str, float]:
    """What the backbone of a trial was good for before it was trained."""
    config, images, device = trial.config, trial.images, trial.device
    backbone = evaluate.untrained(config.backbone, images, config.seed, device)
    return frozen_accuracies(backbone, images, device)


def table(experiment: Experiment, arms: list[Arm], found: Found) -> str:
    """The numbers of the figure as a table in Markdown."""
    columns = [(panel, measure) for panel in experiment.panels for measure in panel.series]
    titles = [" ".join(filter(None, (p.label, p.series[m]))) for p, m in columns]
    rows = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for arm in (*(arm.name for arm in arms), UNTRAINED):
        cells = [found.told(arm, m, p.percent) if m in found[arm] else "" for p, m in columns]
        if any(cells):
            rows.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(experiment: Experiment, arms: list[Arm], found: Found) -> bytes:
    """The figure as SVG: lines where places are numbers, else a row for each place."""
    lines = bool(experiment.axis)
    places = list(dict.fromkeys(arm.place for arm in arms))
    height = 3.6 if lines else 1.2 + 0.42 * len(places)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": experiment.line}):
        figure = Figure(figsize=(1.5 + 3.5 * len(experiment.panels), height), layout="constrained")
        axes = figure.subplots(1, len(experiment.panels), squeeze=False, sharey=not lines)[0]
        for ax, panel in zip(axes, experiment.panels, strict=True):
            (_lines if lines else _rows)(ax, panel, arms, places, found)
            label = f"{panel.label} (%)" if panel.percent else panel.label
            ax.set(xlabel=experiment.axis or label, ylabel=label if lines else "")
            for measure in panel.series:
                if measure in found[UNTRAINED]:
                    level = statistics.mean(_scaled(found[UNTRAINED][measure], panel))
                    mark = ax.axhline if lines else ax.axvline
                    mark(level, color=COLORS[8], ls=":", lw=1.5, label=UNTRAINED)
            handles, labels = ax.get_legend_handles_labels()
            if any(labels):
                above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
                ax.legend(handles, labels, frameon=False, fontsize=9, ncols=4, **above)
            if not panel.percent:
                ax.set_xlim(left=0)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _scaled(values: list[float], panel: Panel) -> list[float]:
    return [100 * value for value in values] if panel.percent else values


def _series(
    panel: Panel, arms: list[Arm], found: Found
) -> dict[str, list[tuple[Any, list[float]]]]:
    """The points of each series of a panel: place and the values of all seeds."""
    series: dict[str, list[tuple[Any, list[float]]]] = {}
    for arm in arms:
        for measure, name in panel.series.items():
            label = " ".join(filter(None, (arm.series, name)))
            values = _scaled(found[arm.name][measure], panel)
            series.setdefault(label, []).append((arm.place, values))
    return series


def _lines(ax: Axes, panel: Panel, arms: list[Arm], places: list[Any], found: Found) -> None:
    for color, (label, points) in zip(COLORS, _series(panel, arms, found).items(), strict=False):
        x = [place for place, _ in points]
        means = [statistics.mean(values) for _, values in points]
        deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
        ax.errorbar(x, means, deviations, label=label, color=color, marker="o", ms=5, capsize=3)
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.minorticks_off()


def _rows(ax: Axes, panel: Panel, arms: list[Arm], places: list[Any], found: Found) -> None:
    series = _series(panel, arms, found)
    for i, (label, points) in enumerate(series.items()):
        rows = [places.index(place) + 0.25 * (i - (len(series) - 1) / 2) for place, _ in points]
        means = [statistics.mean(values) for _, values in points]
        deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
        ax.errorbar(
            means, rows, xerr=deviations, fmt="o", label=label or None, color=COLORS[i], capsize=3
        )
        for row, (_, values) in zip(rows, points, strict=True):
            ax.plot(values, [row] * len(values), "|", color=COLORS[i], ms=7)
    ax.set_yticks(range(len(places)), places)
    ax.set_ylim(len(places) - 0.5, -0.5)
