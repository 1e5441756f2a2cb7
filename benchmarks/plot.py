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
}


def plot(document: dict, name: str) -> Path:
    series: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for row in document["rows"]:
        pairs = int(row["case"].split()[0])
        series[row["provider"]].append((pairs, row["seconds"], row["extra_bytes"] / 2**20))

    plt.rcParams |= {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": name}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for provider, points in series.items():
        colour, marker = STYLE[provider]
        pairs, seconds, megabytes = zip(*sorted(points), strict=True)
        for axis, values in zip(axes, (seconds, megabytes), strict=True):
            axis.loglog(pairs, values, marker=marker, markersize=5, color=colour, label=provider)
    for axis, label in zip(axes, ("seconds", "extra memory (MiB)"), strict=True):
        axis.set_xlabel("pairs N")
        axis.set_ylabel(label)
        axis.set_xticks(sorted({x for points in series.values() for x, *_ in points}))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    machine = document["machine"]
    figure.suptitle(
        f"NT-Xent forward + backward, float32, D = 128, {machine['threads']} CPU threads", size=11
    )
    target = RESULTS / f"{name}.svg"
    figure.savefig(target, metadata={"Date": None})
    return target


def table(document: dict) -> str:
    cases: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in document["rows"]:
        cases[row["case"]][row["provider"]] = row
    lines = [
        "| pairs x D | " + " | ".join(STYLE) + " | of the matrix-product rate |",
        "|---" * (len(STYLE) + 2) + "|",
    ]
    for case, rows in cases.items():
        cells = [
            f"{rows[name]['seconds'] * 1e3:,.1f} ms, {rows[name]['extra_bytes'] / 2**20:,.0f} MiB"
            if name in rows
            else ""
            for name in STYLE
        ]
        lines.append(f"| {case} | {' | '.join(cells)} | {rows['fastssl']['share_of_rate']:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    recorded = json.loads((RESULTS / f"{sys.argv[1]}.json").read_text())
    print(table(recorded))
    print(plot(recorded, sys.argv[1]))
