"""The report of a run: one HTML file that needs nothing else, and what was learned in words."""

import base64
import csv
import dataclasses
import io
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from torchvision.utils import make_grid

from fastssl.trainer import augment, checkpoint, evaluate, networks
from fastssl.trainer.config import Config
from fastssl.trainer.data import Data, Item
from fastssl.trainer.folders import Files
from fastssl.trainer.methods import METHODS

# Petroff 2021 (arXiv:2107.02270): ten colours that people with any colour vision tell apart.
COLORS: list[str] = [
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#52606d",
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": "#1f2933",
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "lines.linewidth": 2,
}
ARMS = {  # in evaluation.json: name, colour, marker
    "fine_tuned": ("pretrained, fine-tuned", COLORS[0], "o"),
    "pretrained_frozen": ("pretrained, frozen", COLORS[4], "D"),
    "from_scratch": ("from scratch", COLORS[6], "s"),
    "random_frozen": ("random, frozen", COLORS[8], "^"),
}
MONITORS = {
    "embedding_std": (
        "standard deviation",
        "How far embeddings differ from one another. 1: spread evenly over the sphere. "
        "0: all the same.",
    ),
    "effective_rank": (
        "effective rank",
        "How many directions the embeddings fill. 1: all on a line. "
        "The dotted line is their full width.",
    ),
    "alignment": (
        "alignment (squared distance)",
        "How far apart two views of one image are: lower is better, as long as the other three "
        "stay healthy.",
    ),
    "uniformity": (
        "uniformity (log potential)",
        "How evenly all images spread over the sphere: lower is better. 0: all in one point.",
    ),
}
PROTOTYPES = {
    "prototypes_used": (
        "prototypes in use",
        "How many are the first choice of some image of the epoch. "
        "The dotted line is all there are.",
    ),
    "code_entropy": (
        "entropy of an image's code",
        "Among how many prototypes an image is shared: 0 is a single one, the dotted line all of "
        "them alike.",
    ),
    "mean_code_entropy": (
        "entropy of the mean code",
        "How evenly the images of the epoch are spread over the prototypes. "
        "The dotted line is perfectly evenly.",
    ),
}
# The other columns of metrics.csv: what a method measures beside these is plotted too.
COMMON = ("epoch", "loss", "lr", "images_per_second", "seconds", "loss_share", "knn_accuracy")
FILES = {
    "backbone.safetensors": "the pretrained backbone",
    "evaluation.json": "every number of the evaluation",
    "metrics.csv": "the metrics, a line for each epoch",
    "config.yaml": "the options, ready for --config",
    "environment.json": "versions and devices",
    "checkpoint.pt": "the last checkpoint, to resume from",
    "checkpoint.best.pt": "the checkpoint of the best nearest-neighbour check",
    "tensorboard": "logs for TensorBoard",
}
GALLERY, QUERIES = 5000, 1500  # images that are compared, at most


class _First(Dataset[Item]):
    """The first image of each item."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        images, label = self.items[index]
        return (images if isinstance(images, Tensor) else images[0]), label


def write_report(run: Path, *, data: Data | None = None, data_dir: Path | None = None) -> Path:
    """Draw the report of a run, finished or not.

    Args:
        run: The folder that ``pretrain`` wrote.
        data: What was given to ``pretrain`` in place of its data set.
        data_dir: Where the data set lies now, if not where the run found it.

    Returns:
        The path of ``report.html`` in that folder. It holds its pictures and asks for nothing from
        elsewhere.

    Raises:
        ValueError: The folder is not a run, or a file in it is damaged.
    """
    run = checkpoint.expanded(run)
    config = evaluate.run_config(run)
    history, results = _history(run), evaluate.read_results(run)
    images = evaluate.load_data(run, data_dir, data)
    method = METHODS[config.method]
    page: dict[str, Any] = {
        "title": f"{config.method} on {images.name}",
        "subtitle": f"{config.backbone}, {len(images.pretrain):,} images of {images.size} x "
        f"{images.size} pixels, {len(history)} of {_counted(config.epochs, 'epoch')}, in {run}",
        "run": run,
        "run_repr": repr(str(run)),
        "go_on": checkpoint.resume_command(run),
        "summary": summary(run),
        "tiles": _tiles(history, results),
        "pixels": images.size <= networks.SMALL,
        "labelled": method.labelled,
        "method": (sys.modules[method.__module__].__doc__ or "").partition("\n")[0],
        "views": _halves(_view_strips(images, config)),
        "files": [
            (name, _size(run / name), what) for name, what in FILES.items() if (run / name).exists()
        ],
        "options": [
            (option.name, getattr(config, option.name), option.metadata["help"])
            for option in dataclasses.fields(config)
            if getattr(config, option.name) is not None
        ],
        "environment": (evaluate.read_json(run / "environment.json") or {}).items(),
    }
    if history:
        page |= _training(history, results, config)
    if results and "skipped" not in results:
        if len(results["stages"]) > 1:
            page["stages"] = _stages(results)
        if results["few_labels"]:  # none of fewer images than the smallest number of labels
            page["few"] = _few_labels(results)
    if (run / "backbone.safetensors").exists():
        shape = f"{images.channels}, {images.size}, {images.size}"
        page["input"] = f"[B, {shape}] -> [B, {networks.load_backbone(run).out_features}]"
        page |= _embedding(run, images, config)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("fastssl.trainer", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    ).get_template("report.html")
    path = run / "report.html"
    checkpoint.write(path, template.render(page).encode())
    return path


def summary(run: Path) -> str:
    """What a run has learned, in two sentences."""
    config, history = evaluate.run_config(run), _history(run)
    results = evaluate.read_results(run)
    if not history:
        return f"The run in {run} has not finished its first epoch. There is nothing to tell yet."
    if not results or "skipped" in results:
        was, now = (f"{row['loss']:.3f}" for row in (history[0], history[-1]))
        moved = f"fell from {was} to" if float(now) < float(was) else f"rose from {was} to"
        left = "The backbone has not been evaluated: "
        if results:
            left += results["skipped"]
        elif (run / "backbone.safetensors").exists():
            left += f"fastssl evaluate {shlex.quote(str(run))} does that"
        else:
            left = f"Pretraining has not finished: {checkpoint.resume_command(run)} goes on"
        return (
            f"After {len(history)} of {_counted(config.epochs, 'epoch')} the loss "
            f"{'is' if now == was else moved} {now}, and the embeddings fill "
            f"{_counted(round(history[-1]['effective_rank']), 'direction')}. {left}."
        )
    knn, epochs = results["knn"], _counted(len(history), "epoch")
    labels = "From labels" if METHODS[config.method].labelled else "Without a single label"
    if round(knn["pretrained"], 3) > round(knn["random"], 3):  # as they are printed
        first = f"{labels}, {epochs} taught the network features by which nearest neighbours"
    else:
        first = f"{labels}, {epochs} did not help: by the network's features nearest neighbours"
    first += (
        f" classify {knn['pretrained']:.1%} of {results['test_images']:,} unseen images, against "
        f"{knn['random']:.1%} with the same network untrained."
    )
    rows = _told(results)
    if not rows:
        return f"{first} A linear classifier on them reaches {results['linear']['pretrained']:.1%}."
    told = [
        f"on {row['labels']} labels {_percent(row['fine_tuned'])} (from scratch "
        f"{_percent(row['from_scratch'])})"
        for row in rows
    ]
    return f"{first} Fine-tuned, it reaches {' and '.join(told)}."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _told(results: dict[str, Any]) -> list[Any]:
    """The two numbers of labels that are told in words."""
    rows = results["few_labels"]
    return [row for row in rows if row["labels"] in (50, 100)] or rows[:2]


def _percent(arm: dict[str, float]) -> str:
    return f"{100 * arm['mean']:.1f} ± {100 * arm['std']:.1f}%"


def _history(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv; what was not measured in an epoch is left out of its row."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def _tiles(
    history: list[dict[str, float]], results: dict[str, Any] | None
) -> list[tuple[str, str]]:
    tiles = []
    if results and "knn" in results:
        knn, linear = results["knn"], results["linear"]
        tiles += [
            (
                f"{knn['pretrained']:.1%}",
                f"nearest neighbours, no training (untrained: {knn['random']:.1%})",
            ),
            (
                f"{linear['pretrained']:.1%}",
                f"linear classifier, all labels (untrained: {linear['random']:.1%})",
            ),
        ]
        for row in _told(results):
            scratch = 100 * row["from_scratch"]["mean"]
            what = f"fine-tuned on {row['labels']} labels (from scratch: {scratch:.1f}%)"
            tiles.append((f"{row['fine_tuned']['mean']:.1%}", what))
    elif history and "knn_accuracy" in history[-1]:
        tiles.append((f"{history[-1]['knn_accuracy']:.1%}", "nearest neighbours, so far"))
    return tiles


def _size(path: Path) -> str:
    paths = path.rglob("*") if path.is_dir() else [path]
    size = sum(p.stat().st_size for p in paths if p.is_file())
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _figure(draw: Callable[[Axes], None], alt: str, height: float = 3.0) -> Markup:
    """An inline SVG, its text left as text, that scales with the page."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": alt}):  # ids of its own, always the same
        figure = Figure(figsize=(5, height), layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, dpi=150)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    label = f'<svg role="img" aria-label="{escape(alt)}" {view[0]}>'
    return Markup(re.sub(r"<svg.*?>", lambda _: label, svg, count=1, flags=re.S))


def _training(
    history: list[dict[str, float]], results: dict[str, Any] | None, config: Config
) -> dict[str, Any]:
    """The curves of loss and accuracy, and the collapse monitors."""

    def line(name: str, label: str, scale: float = 1.0, **marks: float) -> Markup:
        rows = [row for row in history if name in row]
        epochs, values = [row["epoch"] for row in rows], [scale * row[name] for row in rows]

        def draw(ax: Axes) -> None:
            ax.plot(epochs, values, color=COLORS[0], marker="o", ms=6 if len(rows) < 8 else 0)
            for text, height in marks.items():
                ax.axhline(height, color=COLORS[8], ls=":", lw=1.5)
                ax.annotate(
                    text.replace("_", " "),
                    (1, height),
                    (0, 3),
                    color=COLORS[8],
                    ha="right",
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                )
            ax.set(xlabel="epoch", ylabel=label)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            if len(rows) == 1:
                ax.set_xlim(epochs[0] - 1, epochs[0] + 1)
            ax.margins(y=0.12)
            low, high = ax.get_ylim()
            if name in MONITORS or name in PROTOTYPES:  # from zero, which is where a collapse leads
                ax.set_ylim(min(low, 0), max(1.08 * high, 0.1))

        return _figure(draw, f"{label} by epoch: from {values[0]:.3g} to {values[-1]:.3g}", 2.8)

    curves = [(line("loss", "loss"), "The loss, averaged over each epoch.")]
    if any("knn_accuracy" in row for row in history):
        marks = {}
        if results and "knn" in results:
            marks = {"untrained_network": 100 * results["knn"]["random"]}
        what = "Unseen images classified correctly by their nearest training images."
        if not METHODS[config.method].labelled:
            what += " This looks at labels, training does not."
        curves.append((line("knn_accuracy", "kNN accuracy (%)", 100, **marks), what))
    last = history[-1]
    for name in [name for name in last if name not in {*COMMON, *MONITORS, *PROTOTYPES}]:
        label = name.replace("_", " ")
        curves.append((line(name, label), f"What {config.method} measures beside its loss."))
    width = config.projection_dim
    monitors = []
    for name, (label, caption) in MONITORS.items():
        marks = {"full_width": float(width)} if name == "effective_rank" and width else {}
        monitors.append((line(name, label, **marks), caption))
    std, rank = last["embedding_std"], last["effective_rank"]
    verdict = (
        ("It looks as if it did:" if evaluate.collapsed(std, rank) else "It did not:")
        + f" at the end the standard deviation is {std:.2f} and the effective rank {rank:.0f}"
        + (f" of {width}." if width else ".")
    )
    page: dict[str, Any] = {"curves": curves, "monitors": monitors, "verdict": verdict}
    if "prototypes_used" in last:
        figures = []
        for name, (label, caption) in PROTOTYPES.items():
            most = config.prototypes if name == "prototypes_used" else math.log(config.prototypes)
            figures.append((line(name, label, most=most), caption))
        text = (
            f"At the end {last['prototypes_used']:.0f} of {config.prototypes} prototypes are the "
            f"first choice of some image, and the code of an image is spread as over "
            f"{math.exp(last['code_entropy']):.1f} of them."
        )
        page["prototypes"] = {"text": text, "figures": figures}
    return page


def _stages(results: dict[str, Any]) -> dict[str, Any]:
    """The plot of accuracy against depth and what it shows."""
    stages = results["stages"]
    arms = (("pretrained", COLORS[0], "o"), ("random", COLORS[8], "^"))

    def draw(ax: Axes) -> None:
        for arm, color, marker in arms:
            values = [100 * stage[arm] for stage in stages]
            ax.plot(range(len(stages)), values, label=arm, color=color, marker=marker, ms=6)
        ax.set_xticks(range(len(stages)), [f"{s['name']}\n{s['width']} wide" for s in stages])
        ax.set(ylabel="linear probe (%)")
        ax.margins(y=0.12)
        ax.legend(frameon=False, fontsize=10)

    told = "; ".join(
        f"{stage['name']} " + ", ".join(f"{arm} {stage[arm]:.1%}" for arm, _, _ in arms)
        for stage in stages
    )
    best = max(stages, key=lambda stage: stage["pretrained"])
    gains = {s["name"]: round(100 * (s["pretrained"] - s["random"]), 1) for s in stages}
    most, least = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    text = f"The pretrained network's best features are those after {best['name']}"
    if gains[most] > 0:
        text += f"; pretraining adds most after {most}, {gains[most]:.1f} points"
    else:
        text += "; after no stage are they better than those of the random network"
    if gains[least] < 0:
        text += f", and takes most after {least}, {-gains[least]:.1f} points"
    text += "."
    return {"figure": _figure(draw, f"Accuracy by depth. {told}", 3.2), "text": text}


def _few_labels(results: dict[str, Any]) -> dict[str, Any]:
    """The label-efficiency plot and its table."""
    rows = results["few_labels"]
    counts = [row["labels"] for row in rows]

    def draw(ax: Axes) -> None:
        for i, (arm, (name, color, marker)) in enumerate(ARMS.items()):
            means = [100 * row[arm]["mean"] for row in rows]
            stds = [100 * row[arm]["std"] for row in rows]
            shifted = [count * 1.03 ** (i - 1.5) for count in counts]  # so that the bars stay apart
            ax.errorbar(
                shifted,
                means,
                stds,
                label=name,
                color=color,
                marker=marker,
                ms=5,
                capsize=3,
                elinewidth=1.2,
            )
        ax.set(xscale="log", xlabel="labelled images", ylabel="accuracy on unseen images (%)")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.set_xlim(counts[0] / 1.5, 1.5 * counts[-1])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=10)

    told = "; ".join(
        f"{row['labels']} labels: " + ", ".join(f"{ARMS[a][0]} {_percent(row[a])}" for a in ARMS)
        for row in rows
    )
    return {
        "figure": _figure(draw, f"Accuracy by number of labels. {told}", 3.6),
        "arms": [name for name, _, _ in ARMS.values()],
        "rows": [[row["labels"], *(_percent(row[a])[:-1] for a in ARMS)] for row in rows],
        "draws": results["draws"],
        "recipe": results["recipe"],
        "test_images": f"{results['test_images']:,}",
    }


def _image(image: Tensor, caption: str = "", alt: str = "", css: str = "") -> Markup:
    """An image [C, H, W] as an inline PNG with a caption."""
    picture = Image.fromarray(_shown(image))
    if max(picture.size) > 2 * networks.SMALL:
        picture.thumbnail((2 * networks.SMALL, 2 * networks.SMALL))
    content = io.BytesIO()
    picture.save(content, "png", optimize=True)
    source = base64.b64encode(content.getvalue()).decode()
    return Markup(
        '<figure class="{}"><img src="data:image/png;base64,{}" alt="{}"><span>{}</span></figure>'
    ).format(css, source, alt or caption, caption)


def _shown(image: Tensor) -> Any:
    """An image [C, H, W] as an array, uint8 [H, W] or [H, W, 3]; of other channels the first."""
    image = image[: 3 if len(image) >= 3 else 1]
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).to(torch.uint8)
    return image.permute(1, 2, 0).squeeze(-1).numpy()


def _halves(strips: Sequence[Markup]) -> list[Sequence[Markup]]:
    middle = (len(strips) + 1) // 2
    return [strips[:middle], strips[middle:]]


def _view_strips(images: Data, config: Config, count: int = 8, least: int = 5) -> list[Markup]:
    """A strip for each of some training images: the image and what the method sees of it."""
    usual = METHODS[config.method].views(config, images.size)
    transforms = list(augment.chosen(usual, images))
    shown = (transforms * least)[: max(least, len(transforms))]
    dataset = augment.Views(images.pretrain, shown, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    first = _First(images.pretrain)
    strips = []
    for index in torch.randperm(len(first), generator=generator)[:count].tolist():
        original = _image(first[index][0], alt="a training image", css="first")
        views = dataset[0, index][0]
        sizes = [f"{view.shape[-1]} px" for view in views]
        captions = sizes if len(set(sizes)) > 1 else [""] * len(views)
        pictures = [
            _image(_grid(view), caption, "a random view of it")
            for view, caption in zip(views, captions, strict=True)
        ]
        strips.append(Markup().join([original, *pictures]))
    return strips


def _grid(view: Tensor) -> Tensor:
    """A view [C, H, W] as it is, patches [P, C, p, p] side by side in a square."""
    if view.dim() == 3:
        return view
    grid = make_grid(view, nrow=math.ceil(len(view) ** 0.5), padding=1, pad_value=255)
    return grid[: view.shape[1]]  # which made colours of grey patches


def _embedding(run: Path, images: Data, config: Config) -> dict[str, Any]:
    """The map and the nearest neighbours, of unseen images where there is a test split."""
    device = evaluate.device_for(config)
    backbone = networks.load_backbone(run, device)
    gallery, queries = images.train, images.test
    if gallery is None:
        gallery = queries = _First(images.pretrain)
        if isinstance(images.pretrain, Files):  # whose sizes differ
            gallery = queries = Files(images.pretrain.paths, images.pretrain.labels, images.size)

    def some(dataset: Any, most: int) -> Any:
        generator = torch.Generator().manual_seed(config.seed)
        return Subset(dataset, torch.randperm(len(dataset), generator=generator)[:most].tolist())

    gallery, queries = some(gallery, GALLERY), some(queries, QUERIES)
    workers = evaluate.workers_for(config, device)

    def seen(split: Any) -> tuple[Any, Tensor, Tensor]:
        """A split with its features and labels, less what has none where others have one."""
        x, y = evaluate.extract(backbone, split, data=images, device=device, workers=workers)
        shown = (y >= min(0, int(y.max()))).nonzero().flatten()
        return Subset(split, shown.tolist()), x[shown], y[shown]

    (gallery, gallery_x, gallery_y), (queries, x, y) = map(seen, (gallery, queries))
    labelled = METHODS[config.method].labelled
    return _map(x, y, queries, images, labelled) | _neighbours(
        F.normalize(x) @ F.normalize(gallery_x).T, y, gallery_y, queries, gallery, images
    )


def _map(x: Tensor, y: Tensor, queries: Any, images: Data, labelled: bool) -> dict[str, Any]:
    """Two maps of the same points: coloured by class, and with the images themselves.

    There is none of fewer than ten.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(x) < 10:
        text = f"There is no map of so few images: here are {len(x)}, and it takes 10."
        return {"map": {"text": text, "figures": []}}
    x = F.normalize(x)
    perplexity = min(30, len(x) / 4)
    place = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(x.numpy())
    explained = PCA().fit(x.numpy()).explained_variance_ratio_
    directions = int(np.searchsorted(explained.cumsum(), 0.9)) + 1
    known = len(images.classes) > 0 and bool((y >= 0).all())

    def dots(ax: Axes) -> None:
        for label in range(max(1, len(images.classes))):
            of_class = place[(y == label).numpy()] if known else place
            ax.scatter(
                of_class[:, 0],
                of_class[:, 1],
                s=14,
                color=COLORS[label % len(COLORS)],
                lw=0,
                alpha=0.8,
            )
            if 0 < len(images.classes) <= 20 and len(of_class):
                x_middle, y_middle = np.median(of_class, axis=0)
                ax.text(
                    x_middle,
                    y_middle,
                    images.classes[label],
                    ha="center",
                    va="center",
                    weight="bold",
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
                )
        ax.set_axis_off()

    def pictures(ax: Axes) -> None:
        side = np.ptp(place, axis=0).max() / 26
        taken: list[Any] = []
        for i, at in enumerate(place):
            if all(np.abs(at - other).max() > side for other in taken):
                taken.append(at)
                picture = _shown(queries[i][0])
                box = (at[0] - side / 2, at[0] + side / 2, at[1] - side / 2, at[1] + side / 2)
                ax.imshow(picture, extent=box, cmap="gray_r", aspect="auto")
        low, high = place.min(axis=0) - side, place.max(axis=0) + side
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        ax.set_axis_off()

    colored = " Colours and names are the true classes" if known else ""
    if known:
        colored += "." if labelled else ", which pretraining never saw."
    text = (
        f"Each dot is one of {len(x):,} {'unseen ' if known else ''}images, placed by t-SNE so "
        f"that images with similar features lie together.{colored} Some of the same images are "
        f"shown at their places beside it. Of all the variation of the {x.shape[1]} features, "
        f"{directions} directions hold 90%."
    )
    alt = f"Map of {len(x)} images by their features"
    figures = [
        _figure(dots, f"{alt}, coloured by class", 4.4),
        _figure(pictures, f"{alt}, shown as pictures", 4.4),
    ]
    return {"map": {"text": text, "figures": figures}}


def _neighbours(
    similarity: Tensor, y: Tensor, gallery_y: Tensor, queries: Any, gallery: Any, images: Data
) -> dict[str, Any]:
    """A strip for each of some images: the image and the training images most similar to it."""
    known = len(images.classes) > 0 and bool((y >= 0).all())
    best = similarity.topk(min(7, len(gallery)))
    if known:
        wrong = gallery_y[best.indices[:, 0]] != y
        first = [int((y == label).nonzero()[0]) for label in sorted(set(y.tolist()))[:8]]
        shown = first + [i for i in wrong.nonzero().flatten().tolist() if i not in first][:2]
        text = (
            "An unseen image and the training images most similar to it, with their true classes; "
            "other classes than the image's are marked. The last ones are chosen among its "
            f"mistakes: the nearest neighbour of {int(wrong.sum())} of {len(y):,} unseen images is "
            "of another class."
        )
    else:
        shown = list(range(min(8, len(queries))))
        text = "An image and the images most similar to it."

    def name(label: int) -> str:
        return images.classes[label] if known else ""

    strips = []
    for i in shown:
        found = best.indices[i].tolist()
        if not known:  # every image is its own nearest neighbour
            found = found[1:]
        cells: Iterable[Markup] = [
            _image(
                gallery[j][0], name(int(gallery_y[j])), "", "wrong" if gallery_y[j] != y[i] else ""
            )
            for j in found
        ]
        strips.append(Markup().join([_image(queries[i][0], name(int(y[i])), css="first"), *cells]))
    return {"neighbours": {"text": text, "halves": _halves(strips)}}
