"""Figures of recorded results.

``python benchmarks/plot.py`` fills the tables of README.md and docs/speed.md and draws their
figures from what is in ``results/``. ``fastssl bench --plot FILES`` draws each loss of any files.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from fastssl.benchmarks import report

# Okabe and Ito's palette: told apart with any colour vision.
STYLE = {
    "fastssl": ("#0072B2", "o"),
    "compiled": ("#009E73", "^"),
    "plain": ("#7F7F7F", "s"),
    "lightly": ("#D55E00", "D"),
    "open_clip": ("#CC79A7", "v"),
    "pml": ("#E69F00", "P"),
    "siglip-kernel": ("#D55E00", "D"),
    "inf-cl": ("#56B4E9", "X"),
    "cut-cross-entropy": ("#000000", "*"),
}
PANELS = {  # what is drawn of a row, and what it is called
    "seconds": "seconds",
    "extra_bytes": "extra memory (MiB)",
    "share_of_rate": "share of the floor",
}


def draw(document: dict[str, Any], loss: str, target: Path) -> bool:
    """Draw a loss's time, memory and share of the floor against its size; False of one size alone.

    The legend says with which power of the size time and memory grow.
    """
    axis, series = report.growing(document["rows"], loss)
    ticks = sorted({size for points in series.values() for size in points})
    if len(ticks) < 2:
        return False
    plt.rcParams |= {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": target.stem}
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 3.6), layout="constrained")
    for panel, (key, label) in zip(panels, PANELS.items(), strict=True):
        for provider, points in series.items():
            sizes = sorted(points)
            unit = 2**20 if key == "extra_bytes" else 1
            values = [points[size][key] / unit for size in sizes]
            power = report.exponent(sizes, values) if key != "share_of_rate" else None
            name = provider if power is None else f"{provider}, power {power:.2f}"
            colour, marker = STYLE.get(provider, (None, "o"))
            panel.plot(sizes, values, marker=marker, markersize=5, color=colour, label=name)
        panel.set_xscale("log")
        if key != "share_of_rate":
            panel.set_yscale("log")
            panel.legend(frameon=False, fontsize=8)
        else:
            panel.set_ylim(0, None)
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
        panel.set_xlabel(axis)
        panel.set_ylabel(label)
        panel.set_xticks(ticks)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        panel.xaxis.set_minor_formatter("")
        panel.tick_params(axis="x", labelrotation=30)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    machine = document["machine"]
    where = machine.get("device", f"{machine['threads']} CPU threads")
    figure.suptitle(f"{loss}, {machine.get('dtype', 'float32')}, {where}", size=11)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
    return True


def draw_files(files: Sequence[Path]) -> None:
    """Draw every loss of these results that has two sizes beside them, and print how cost grows."""
    for file in files:
        try:
            document = json.loads(file.read_text())
            growth = report.growth(document["rows"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"plot: {file} is not a file that bench --record wrote") from None
        losses = dict.fromkeys(row["loss"] for row in document["rows"])
        targets = {loss: file.with_name(f"{file.stem}-{report.slug(loss)}.svg") for loss in losses}
        drawn = [target for loss, target in targets.items() if draw(document, loss, target)]
        if not drawn:
            print(f"{file}: nothing to draw, no loss has times at two sizes")
            continue
        print(f"{file}: powers of the size over the {report.LARGEST} largest")
        print(growth)
        print(*drawn, sep="\n")


def fill(page: Path, results: Path) -> None:
    """Put what is recorded into a page's tables and draw the figures that it shows."""
    text = page.read_text()
    page.write_text(report.filled(text, results))
    for name, figure in re.findall(r"benchmarks/results/([^)]+)-([^-)]+)\.svg\)", text):
        document = json.loads((results / f"{name}.json").read_text())
        losses = {report.slug(row["loss"]): row["loss"] for row in document["rows"]}
        draw(document, losses[figure], results / f"{name}-{figure}.svg")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    for page in (here.parent / "README.md", here.parent / "docs" / "speed.md"):
        fill(page, here / "results")
