"""Times losses, prints what was measured as a table and writes it down on request."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import measure
import pytest
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
DOCUMENT = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="NAME", help="also write benchmarks/results/NAME.json")


@pytest.fixture(scope="session")
def rates() -> dict[str, float]:
    """What the machine can do at best: operations and bytes per second."""
    return {"matmul_rate": measure.matmul_rate(), "copy_rate": measure.copy_rate()}


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest, rates: dict[str, float]):
    """Collect one dictionary per measurement; print and record them when all have run."""
    collected: list[dict] = []
    yield collected
    document = {"machine": measure.describe_machine(), **rates, "rows": collected}
    request.config.stash[DOCUMENT] = document
    if name := request.config.getoption("--record"):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


@pytest.fixture
def time_and_memory(benchmark, rows, rates: dict[str, float]) -> Callable[..., None]:
    """Measure forward and backward of one provider's loss, or forward alone."""

    def run(
        name: str,
        provider: str,
        loss: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        operations: float = 0,
        moved: float = 0,
        backward: bool = True,
        rounds: int,
        warmup: int = 1,
    ) -> None:
        """Add a row: what a step takes, beyond inputs and gradients, and its share of the best.

        Args:
            name: The loss.
            provider: Whose it is.
            loss: Called with the inputs.
            inputs: [N, D] each.
            operations: What the products take that the loss cannot do without.
            moved: The bytes that it cannot do without reading or writing.
            backward: Whether the step has a backward pass.
            rounds: Steps to time; the median counts.
            warmup: Steps before them.
        """
        leaves = [x.requires_grad_(backward) for x in inputs]

        def step() -> None:
            for x in leaves:
                x.grad = None
            result = loss(*leaves)
            if backward:
                result.backward()

        step()
        for x in leaves:
            x.grad = None
        grown = measure.extra_bytes(step) - sum(x.nbytes for x in leaves if backward)
        n, d = leaves[0].shape
        benchmark.group = f"{name}, {n} x {d}"
        benchmark.pedantic(step, rounds=rounds, warmup_rounds=warmup)
        seconds = benchmark.stats.stats.median
        rows.append(
            {
                "loss": name,
                "rows": n,
                "features": d,
                "provider": provider,
                "seconds": seconds,
                "extra_bytes": max(grown, 0),
                "share_of_rate": max(operations / rates["matmul_rate"], moved / rates["copy_rate"])
                / seconds,
            }
        )

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    document = config.stash.get(DOCUMENT, None)
    if document is None:
        return
    write = terminalreporter.write_line
    machine = document["machine"]
    write("")
    write(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    write(
        f"float32 matrix products: {document['matmul_rate'] / 1e9:.0f} GFLOP/s, "
        f"copies: {document['copy_rate'] / 1e9:.0f} GB/s read and written"
    )
    write(f"{'':42}{'time':>11}{'of the first':>13}{'extra memory':>14}{'of rate':>9}")

    def case(row: dict) -> str:
        return f"{row['loss']} {row['rows']} x {row['features']}"

    first: dict[str, dict] = {}  # of each case; that is ours where others are compared
    for row in document["rows"]:
        first.setdefault(case(row), row)
    for row in sorted(document["rows"], key=lambda row: list(first).index(case(row))):
        write(
            f"{case(row):30}{row['provider']:12}{row['seconds'] * 1e3:9.1f} ms"
            f"{row['seconds'] / first[case(row)]['seconds']:11.1f}x"
            f"{row['extra_bytes'] / 2**20:11.1f} MB{row['share_of_rate']:9.0%}"
        )
