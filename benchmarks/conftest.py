"""Checks and times losses, prints what was measured as a table and writes it down on request."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import measure
import pytest
import torch
from accuracy import check_accuracy, check_same_function
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
DOCUMENT = pytest.StashKey[dict]()
PEERS = ("plain", "compiled", "lightly", "open_clip", "pml")
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.addoption("--dtype", choices=DTYPES, default="float32", help="of rows of features")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where losses run."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return request.config.getoption("--device") or default


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The type of rows of features."""
    return DTYPES[request.config.getoption("--dtype")]


@pytest.fixture(scope="session")
def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do at best: operations, bytes and exponentials per second."""
    return {
        "matmul_rate": measure.matmul_rate(device, dtype),
        "copy_rate": measure.copy_rate(device),
        "exp_rate": measure.exp_rate(device),
    }


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest, device: str, dtype: torch.dtype, rates: dict[str, float]):
    """Collect one dictionary per measurement; print and record them as they come."""
    machine = measure.describe_machine(device) | {"dtype": str(dtype)[6:]}
    document = {"machine": machine, **rates, "rows": []}
    request.config.stash[DOCUMENT] = document
    return document["rows"]


@pytest.fixture
def compare(
    request: pytest.FixtureRequest,
    benchmark,
    rows: list[dict],
    device: str,
    dtype: torch.dtype,
    rates: dict[str, float],
) -> Callable[..., None]:
    """Check one provider's loss, then measure its forward and backward pass, or forward alone."""

    def placed(inputs: Sequence[Tensor]) -> list[Tensor]:
        """Put tensors on the device, and those of features in their type."""
        return [x.to(device, dtype if x.dim() > 1 else x.dtype).clone() for x in inputs]

    def run(
        name: str,
        provider: str,
        loss: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        few: Sequence[Tensor],
        inputs: Sequence[Tensor],
        *,
        operations: float = 0,
        moved: float = 0,
        backward: bool = True,
        rounds: int,
        warmup: int = 1,
        few_loss: Callable[..., Tensor] | None = None,
    ) -> None:
        """Add a row: what a step takes, beyond inputs and gradients, and its share of the best.

        Ours is held to the rule on rounding and others to being the same function, on few rows.
        One that is not, or that runs out of memory, is a row without a time.

        Args:
            name: The loss.
            provider: Whose it is.
            loss: Called with the inputs.
            plain: What it must agree with.
            few: The inputs to check it with.
            inputs: [N, D] first of all.
            operations: What the products take that the loss cannot do without.
            moved: The bytes that it cannot do without reading or writing.
            backward: Whether the step has a backward pass.
            rounds: Steps to time; the median counts.
            warmup: Steps before them.
            few_loss: The loss to check, where it is not the one to measure.
        """
        leaves = [x.requires_grad_(backward) for x in placed(inputs)]
        n, d = leaves[0].flatten(0, -2).shape
        row = {"loss": name, "rows": n, "features": d, "provider": provider}

        def step() -> None:
            for x in leaves:
                x.grad = None
            result = loss(*leaves)
            if backward:
                result.backward()

        timed: list[float] = []
        try:
            if provider in PEERS or not backward:
                check_same_function(few_loss or loss, plain, placed(few), backward=backward)
            else:
                check_accuracy(few_loss or loss, plain, placed(few))
            step()
            for x in leaves:
                x.grad = None
            saved = measure.saved_bytes(loss, leaves) if backward else 0
            grown = measure.extra_bytes(step, device)
            grown -= sum(x.nbytes for x in leaves if backward)
            benchmark.group = f"{name}, {n} x {d}"
            benchmark.pedantic(
                lambda: timed.append(measure.seconds_of(step, device)),
                rounds=rounds,
                warmup_rounds=warmup,
            )
        except (AssertionError, torch.OutOfMemoryError) as error:
            if provider not in PEERS:
                raise
            failed = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            rows.append(row | {"failed": failed})
            pytest.skip(f"not timed: {failed}")
        times = torch.tensor(timed[warmup:] or timed)  # all, where pytest-benchmark is disabled
        low, seconds, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        share = max(operations / rates["matmul_rate"], moved / rates["copy_rate"]) / seconds
        rows.append(
            row
            | {
                "seconds": seconds,
                "percentiles": [low, high],
                "extra_bytes": max(grown, 0),
                "saved_bytes": saved,
                "share_of_rate": share,
            }
        )
        if name := request.config.getoption("--record"):  # at once: a stop loses nothing
            RESULTS.mkdir(exist_ok=True)
            document = json.dumps(request.config.stash[DOCUMENT], indent=1)
            (RESULTS / f"{name}.json").write_text(document + "\n")

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    document = config.stash.get(DOCUMENT, None)
    if document is None:
        return
    write = terminalreporter.write_line
    machine = document["machine"]
    write("")
    where = machine.get("device", f"{machine['processor']}, {machine['threads']} threads")
    write(f"{where}, {machine['dtype']}, torch {machine['torch']}")
    write(
        f"matrix products: {document['matmul_rate'] / 1e9:,.0f} GFLOP/s, "
        f"copies: {document['copy_rate'] / 1e9:,.0f} GB/s read and written, "
        f"exponentials: {document['exp_rate'] / 1e9:,.1f} G/s"
    )
    columns = f"{'time':>14}{'of the first':>13}{'extra memory':>14}{'saved':>11}{'of rate':>9}"
    write(f"{'':42}{columns}")

    def case(row: dict) -> str:
        return f"{row['loss']} {row['rows']} x {row['features']}"

    first: dict[str, dict] = {}  # of each case; that is ours where others are compared
    for row in document["rows"]:
        first.setdefault(case(row), row)
    for row in sorted(document["rows"], key=lambda row: list(first).index(case(row))):
        title = f"{case(row):34}{row['provider']:10}"
        if "failed" in row:
            write(f"{title}  FAIL: {row['failed']}")
            continue
        ratio = row["seconds"] / first[case(row)]["seconds"]
        write(
            f"{title}{row['seconds'] * 1e3:9.2f} ms{ratio:11.1f}x"
            f"{row['extra_bytes'] / 2**20:11.1f} MB{row['saved_bytes'] / 2**20:8.1f} MB"
            f"{row['share_of_rate']:9.0%}"
        )
