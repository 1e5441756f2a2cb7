"""Collects what benchmarks measure, prints it as a table and writes it down on request."""

import json
from pathlib import Path

import measure
import pytest

RESULTS = Path(__file__).parent / "results"
DOCUMENT = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="NAME", help="also write benchmarks/results/NAME.json")


@pytest.fixture(scope="session")
def rate() -> float:
    return measure.matmul_rate()


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest, rate: float):
    """Collect one dictionary per measurement; print and record them when all have run."""
    collected: list[dict] = []
    yield collected
    document = {"machine": measure.describe_machine(), "matmul_rate": rate, "rows": collected}
    request.config.stash[DOCUMENT] = document
    if name := request.config.getoption("--record"):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    document = config.stash.get(DOCUMENT, None)
    if document is None:
        return
    write = terminalreporter.write_line
    machine = document["machine"]
    write("")
    write(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    write(f"float32 matrix products: {document['matmul_rate'] / 1e9:.0f} GFLOP/s")
    ours = {row["case"]: row for row in document["rows"] if row["provider"] == "fastssl"}
    write(f"{'':26}{'time':>12}{'of fastssl':>12}{'extra memory':>14}{'of rate':>9}")
    for row in sorted(document["rows"], key=lambda row: list(ours).index(row["case"])):
        write(
            f"{row['case']:16}{row['provider']:10}{row['seconds'] * 1e3:9.1f} ms"
            f"{row['seconds'] / ours[row['case']]['seconds']:11.1f}x"
            f"{row['extra_bytes'] / 2**20:11.1f} MB{row['share_of_rate']:9.0%}"
        )
