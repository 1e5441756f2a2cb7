"""Draw recorded results as a plot and print them as a table: python benchmarks/plot.py NAME."""

import json
import sys

import matplotlib

matplotlib.use("svg")

from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

RESULTS = Path(__file__).parent / "results"
# Okabe and Ito's palette: told apart with any colour vision.
STYLE = {
    "fastssl": ("#0072B2", "o"),
    "compiled": ("#009E73", "^"),
    "plain": ("#7F7F7F", "s"),
    "lightly": ("#D55E00", "D"),
    "open_clip": ("#CC79A7", "v"),
    "pml": ("#E69F00", "P"),
}


# What is drawn: the losses of a figure, the axis they are drawn against, and what stays fixed.
FIGURES = {
    "nt_xent": (["NT-Xent"], "rows", "pairs N", "D = 128", {"features": 128}),
    "redundancy": (["Barlow Twins", "VICReg"], "features", "features D", "N = 512", {"rows": 512}),
}


def plot(document: dict, name: str, figure_name: str) -> Path:
    losses, axis_key, axis_label, held, fixed = FIGURES[figure_name]
    plt.rcParams |= {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": name}
    figure, axes = plt.subplots(
        len(losses), 2, figsize=(9, 3.3 * len(losses)), layout="constrained", squeeze=False
    )
    for loss, (time, memory) in zip(losses, axes, strict=True):
        series: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        for row in document["rows"]:
            if row["loss"] == loss and "seconds" in row and fixed.items() <= row.items():
                point = row[axis_key], row["seconds"], row["extra_bytes"] / 2**20
                series[row["provider"]].append(point)
        for provider, points in series.items():
            colour, marker = STYLE[provider]
            sizes, seconds, megabytes = zip(*sorted(points), strict=True)
            for axis, values in ((time, seconds), (memory, megabytes)):
                axis.loglog(
                    sizes, values, marker=marker, markersize=5, color=colour, label=provider
                )
        for axis, label in ((time, "seconds"), (memory, "extra memory (MiB)")):
            axis.set_xlabel(axis_label)
            axis.set_ylabel(label)
            axis.set_title(loss, size=10)
            axis.set_xticks(sorted({x for points in series.values() for x, *_ in points}))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axis.xaxis.set_minor_formatter("")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    threads = document["machine"]["threads"]
    figure.suptitle(f"forward + backward, float32, {held}, {threads} CPU threads", size=11)
    target = RESULTS / f"{name}-{figure_name}.svg"
    figure.savefig(target, metadata={"Date": None})
    return target


def table(document: dict, loss: str) -> str:
    cases: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in document["rows"]:
        if row["loss"] == loss:
            cases[f"{row['rows']} x {row['features']}"][row["provider"]] = row
    providers = [name for name in STYLE if any(name in rows for rows in cases.values())]
    lines = [
        f"| {loss} | " + " | ".join(providers) + " | of the machine's rate |",
        "|---" * (len(providers) + 2) + "|",
    ]
    for case, rows in cases.items():
        cells = [
            f"{rows[name]['seconds'] * 1e3:,.1f} ms, {rows[name]['extra_bytes'] / 2**20:,.0f} MiB"
            if "seconds" in rows.get(name, {})
            else rows.get(name, {}).get("failed", "")
            for name in providers
        ]
        lines.append(f"| {case} | {' | '.join(cells)} | {rows['fastssl']['share_of_rate']:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    recorded = json.loads((RESULTS / f"{sys.argv[1]}.json").read_text())
    losses = list(dict.fromkeys(row["loss"] for row in recorded["rows"]))
    for loss in losses:
        if not loss.endswith("routes"):
            print(table(recorded, loss), end="\n\n")
    for chosen, (drawn, *_) in FIGURES.items():
        if set(drawn) <= set(losses):
            print(plot(recorded, sys.argv[1], chosen))
