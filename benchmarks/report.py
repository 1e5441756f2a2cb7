"""Recorded rows as text: lines as they come, tables of the README, and how cost grows."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

OURS = ("fastssl", "compiled", "plain")
STEP = "forward + backward"
OF_SCORES = ("Sinkhorn", "SwaV", "soft cross-entropy")
LARGEST = 4  # sizes that a fit is of: small ones cost what a call costs
MARKED = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADER = (
    f"{'':63}{'time':>13}{'20 to 80 %':>16}{'of ours':>8}{'extra MiB':>10}{'saved MiB':>10}"
    f"{'launches':>9}{'of floor':>9}"
)

Row = dict[str, Any]


def slug(words: str) -> str:
    """Words as one that a file name or a test's can hold."""
    return re.sub(r"\W+", "_", words.lower())


def size_of(row: Row) -> str:
    """What a row's shape is, as text."""
    axes = ("rows", "columns", "features")
    return " x ".join(str(row[axis]) for axis in axes if axis in row)


def case_of(row: Row) -> str:
    """What rows have in common that are compared."""
    return ", ".join((row["loss"], size_of(row), *([row["pass"]] if "pass" in row else [])))


def line(row: Row, rows: Sequence[Row]) -> str:
    """A row as it is printed, beside the first of its case, which is ours if that was measured."""
    title = f"{row['loss']} {size_of(row)}{', forward' if row['pass'] == 'forward' else ''}"
    start = f"{title:<45} {row['provider']:<17}"
    if "failed" in row:
        return f"{start}   FAIL: {row['failed']}"
    first = next(x for x in rows if case_of(x) == case_of(row) and "seconds" in x)
    low, high = (_milliseconds(seconds) for seconds in row["percentiles"])
    cells = [
        f"{_milliseconds(row['seconds']):>10} ms",
        f"{low:>8}-{high:<7}",
        f"{row['seconds'] / first['seconds']:7.2f}x",
        f"{row['extra_bytes'] / 2**20:10.1f}",
        f"{row['saved_bytes'] / 2**20:10.1f}" if "saved_bytes" in row else " " * 10,
        f"{'' if row['launches'] is None else row['launches']:>9}",
    ]
    if "share_of_loss" in row:
        cells.append(f"  the loss is {row['share_of_loss']:.1%}")
    else:
        cells.append(f"{row['share_of_rate']:9.0%}")
    return start + "".join(cells)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """The power of the size that a cost grows with, over the largest sizes; None of fewer than two.

    Costs of nothing are left out.
    """
    points = sorted((size, cost) for size, cost in zip(sizes, costs, strict=True) if cost > 0)
    if len({size for size, _ in points}) < 2:
        return None
    x, y = np.log(points[-LARGEST:]).T
    return float(np.polyfit(x, y, 1)[0])


def growing(rows: Sequence[Row], loss: str) -> tuple[str, dict[str, dict[float, Row]]]:
    """A loss's steps along the axis that has the most sizes, the others held.

    Losses without a backward pass have no steps: their forward passes are taken. Prototype scores
    are counted, B x K.

    Returns:
        The axis and what is held, and by provider the rows at each size.
    """
    mine = [row for row in rows if row["loss"] == loss and "seconds" in row]
    mine = [row for row in mine if row.get("pass", STEP) == STEP] or mine
    scores = loss.startswith(OF_SCORES)
    lines: dict[str, dict[str, dict[float, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in mine:
        axes = {axis: row[axis] for axis in ("rows", "columns", "features") if axis in row}
        if scores:
            lines["scores B x K"][row["provider"]][row["rows"] * row["features"]] = row
            continue
        for axis, size in axes.items():
            held = ", ".join(f"{n} {other}" for other, n in axes.items() if other != axis)
            lines[f"{axis}, at {held}"][row["provider"]][size] = row
    if not lines:
        return "", {}
    longest = max(lines, key=lambda name: len({x for found in lines[name].values() for x in found}))
    return longest, lines[longest]


def growth(rows: Sequence[Row]) -> str:
    """How time and memory grow, a line for each loss and provider that has two sizes."""
    found = [f"{'':58}{'time':>8}{'memory':>8}"]
    for loss in dict.fromkeys(row["loss"] for row in rows):
        axis, series = growing(rows, loss)
        for provider, points in series.items():
            powers = [
                exponent(list(points), [row[cost] for row in points.values()])
                for cost in ("seconds", "extra_bytes")
            ]
            if powers[0] is not None:
                cells = (f"{'' if power is None else f'{power:.2f}':>8}" for power in powers)
                found.append(f"{loss + ', ' + axis:<46} {provider:<11}{''.join(cells)}")
    return "\n".join(found)


def table(rows: Sequence[Row], losses: Sequence[str]) -> str:
    """Losses as a table of Markdown: ours, the plain loss and peers at each size.

    A loss may be given with a size, ``NT-Xent, 4096 x 128``.
    """
    cases: dict[str, dict[str, Row]] = defaultdict(dict)
    for loss in losses:
        mine = [row for row in rows if _named(row, [loss])]
        mine = [row for row in mine if row.get("pass", STEP) == STEP] or mine
        if not mine:
            raise ValueError(f"losses must be among those recorded, got {loss!r}")
        for row in mine:
            title = size_of(row) if len(losses) == 1 else f"{row['loss']}, {size_of(row)}"
            cases[title][row["provider"]] = row
    providers = list(dict.fromkeys(name for found in cases.values() for name in found))
    peers = [name for name in providers if name not in OURS]
    ours = [name for name in OURS if name in providers]
    head = [losses[0] if len(losses) == 1 else STEP, *ours]
    head += ["peer" if len(peers) > 1 else name for name in peers[:1]]
    lines = ["| " + " | ".join([*head, "share of the floor"]) + " |"]
    lines.append("|---" * (len(head) + 1) + "|")
    for title, found in cases.items():
        cells = [_cell(found.get(name)) for name in ours]
        theirs = [(name, _cell(found.get(name))) for name in peers if name in found]
        if peers:
            cells.append("; ".join(f"{n} {x}" if len(peers) > 1 else x for n, x in theirs))
        share = found.get("fastssl", {}).get("share_of_rate")
        cells.append("" if share is None else f"{share:.0%}")
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines)


def _named(row: Row, losses: Sequence[str]) -> bool:
    """Whether a row is of one of the losses, some of which may be of a size."""
    return row["loss"] in losses or f"{row['loss']}, {size_of(row)}" in losses


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{3 if seconds < 0.1 else 0}f}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return row["failed"]
    return f"{row['seconds'] * 1e3:,.1f} ms, {row['extra_bytes'] / 2**20:,.0f} MiB"


def filled(text: str, results: Path) -> str:
    """Text with the table of recorded results in the place of what stands between two markers.

    The first marker names files in the folder of results and losses of each, the second is
    ``<!-- end -->``: ``<!-- table cpu: NT-Xent; DCL | gpu: CLIP -->``.
    """

    def fill(found: re.Match[str]) -> str:
        start, named, end = found.groups()
        rows: list[Row] = []
        losses: list[str] = []
        for part in named.split(" | "):
            name, of_file = part.split(": ")
            losses += of_file.split("; ")
            recorded = json.loads((results / f"{name}.json").read_text())["rows"]
            rows += [row for row in recorded if _named(row, of_file.split("; "))]
        return f"{start}{table(rows, losses)}\n{end}"

    return MARKED.sub(fill, text)
