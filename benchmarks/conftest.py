"""Checks and times losses, prints each row as it is measured and writes it down on request."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.benchmarks import cases, measure, report
from fastssl.benchmarks.accuracy import check_accuracy, check_same_function
from fastssl.benchmarks.cases import Case, Size

RESULTS = Path(__file__).parent / "results"
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--losses", metavar="NAME[,...]", help="default: all")
    parser.addoption("--providers", metavar="NAME[,...]", help="whose losses; default: all")
    parser.addoption("--sizes", choices=cases.LEVELS, help="default: full on a GPU, else small")
    parser.addoption("--record", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.addoption("--dtype", choices=DTYPES, default="float32", help="of rows of features")


def device_of(config: pytest.Config) -> str:
    try:
        return measure.device_for(config.getoption("--device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def level_of(config: pytest.Config) -> str:
    return config.getoption("--sizes") or ("small" if device_of(config) == "cpu" else "full")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whole steps first, then forward passes alone; of each size ours before the others."""
    config = metafunc.config
    losses = config.getoption("--losses")
    try:
        chosen, wanted = cases.choose(losses, config.getoption("--providers"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if "network" in metafunc.fixturenames:
        names = (
            (*cases.OURS, "lightly")
            if cases.WHOLE_STEP in (losses or cases.WHOLE_STEP).split(",")
            else ()
        )
        metafunc.parametrize("provider", [name for name in names if name in wanted])
        return
    found = []
    for direction in cases.PASSES:
        for case in chosen:
            for size in case.sizes[level_of(config)] if direction in case.passes() else ():
                for provider in case.providers():
                    if provider in wanted or case.variants:
                        what = (report.slug(case.title), "x".join(map(str, size)), provider)
                        id = "-".join((*what, report.slug(direction)))
                        found.append(pytest.param(case, size, direction, provider, id=id))
    metafunc.parametrize(("case", "size", "direction", "provider"), found)


def pytest_configure(config: pytest.Config) -> None:
    """Our rows stand for pytest-benchmark's table too."""
    config.option.benchmark_quiet = True


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Rows stand for the dots."""
    if report.failed:
        return None
    return (report.outcome if report.skipped or report.when == "call" else "", "", "")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where losses run."""
    return device_of(request.config)


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The type of rows of features."""
    return DTYPES[request.config.getoption("--dtype")]


@pytest.fixture(scope="session")
def level(request: pytest.FixtureRequest) -> str:
    """Which of ``cases.LEVELS`` was chosen."""
    return level_of(request.config)


@pytest.fixture(scope="session")
def write(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line at once, unless this is one of several processes."""
    if hasattr(request.config, "workerinput"):
        return lambda text: None
    plugins: Any = request.config.pluginmanager
    reporter = plugins.get_plugin("terminalreporter")
    capture = plugins.get_plugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(text)

    return line


@pytest.fixture(scope="session")
def document(
    request: pytest.FixtureRequest,
    device: str,
    dtype: torch.dtype,
    level: str,
    write: Callable[[str], None],
) -> dict[str, Any]:
    """What ``--record`` writes: the machine, its ceilings, and one dictionary per measurement."""
    machine = measure.describe_machine(device) | {"dtype": str(dtype)[6:]}
    shared = hasattr(request.config, "workerinput")  # by several processes: nothing is measured
    ceilings = measure.ceilings(device, dtype, quick=level == "tiny" or shared)
    where = machine.get("device", f"{machine['processor']}, {machine['threads']} threads")
    write(f"{where}, {machine['dtype']}, torch {machine['torch']}")
    rates = {name: f"{rate / 1e9:,.1f}" for name, rate in ceilings.items()}
    write(f"copies {rates.pop('copy')} GB/s")
    if "exp" in rates:
        write(f"exponentials {rates.pop('exp')} G/s")
    write(f"products {', '.join(f'{rate} GFLOP/s in {name}' for name, rate in rates.items())}")
    write(report.HEADER)
    return {"machine": machine, "ceilings": ceilings, "rows": []}


@pytest.fixture(scope="session")
def add_row(
    request: pytest.FixtureRequest, document: dict[str, Any], write: Callable[[str], None]
) -> Callable[[dict[str, Any]], None]:
    """Print and record a measurement, at once: a stop loses nothing."""
    record = request.config.getoption("--record")

    def add(row: dict[str, Any]) -> None:
        document["rows"].append(row)
        write(report.line(row, document["rows"]))
        if record:
            path = RESULTS / (record if record.endswith(".json") else f"{record}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1) + "\n")

    return add


@pytest.fixture(scope="session")
def verdicts() -> dict[tuple[object, ...], str]:
    """What is wrong with a provider's function at a size, or nothing."""
    return {}


@pytest.fixture
def compare(
    benchmark: Any,
    device: str,
    dtype: torch.dtype,
    document: dict[str, Any],
    add_row: Callable[[dict[str, Any]], None],
    verdicts: dict[tuple[object, ...], str],
) -> Iterator[Callable[[Case, Size, str, str], None]]:
    """Check one provider's loss at a size, then measure one of its passes."""

    def verdict(case: Case, size: Size, provider: str, loss: cases.Loss) -> str:
        """Ours is held to the rule on rounding, others to being the same function."""
        size = case.checked(size)
        key = case.title, size, provider
        if key not in verdicts:
            leaves, fixed = case.place(size, device, dtype)
            try:
                if provider in ("fastssl", *case.variants) and case.backward:
                    check_accuracy(loss, case.plain, leaves, fixed=fixed)
                else:
                    check_same_function(loss, case.plain, leaves, fixed, backward=case.backward)
                verdicts[key] = ""
            except AssertionError as error:
                verdicts[key] = str(error) or "an assertion failed"
        return verdicts[key]

    def run(case: Case, size: Size, direction: str, provider: str) -> None:
        backward = direction == cases.PASSES[0]
        ours = provider in ("fastssl", *case.variants)
        row = {"loss": case.title, **dict(zip(case.axes, size, strict=True))}
        row |= {"pass": direction, "provider": provider}
        five_matrices = 5 * 4 * case.matrix(*size)  # in float32: what most plain losses take
        needed = case.hungry[provider](*size) if provider in case.hungry else five_matrices
        try:
            if provider in cases.CUDA_ONLY and device == "cpu":
                pytest.skip("runs on CUDA only")
            try:
                loss = case.make(provider)
            except ImportError as error:
                pytest.skip(f"not installed: {error}")
            if device == "cpu" and not ours and needed > measure.memory() / 3:
                raise MemoryError(f"not run: it would take about {needed / 2**30:,.0f} GiB")
            wrong = verdict(case, size, provider, loss)
            assert not wrong, wrong
            leaves, fixed = case.place(size, device, dtype)
            for x in leaves:
                x.requires_grad_(backward)

            def step() -> None:
                for x in leaves:
                    x.grad = None
                with torch.set_grad_enabled(backward):
                    result = loss(*leaves, *fixed)
                if backward:
                    result.backward(torch.ones_like(result))

            step()
            launches = measure.launches(step, device)
            for x in leaves:
                x.grad = None
            saved = measure.saved_bytes(lambda *x: loss(*x, *fixed), leaves) if backward else 0
            grown = measure.extra_bytes(step, device)
            grown -= sum(x.nbytes for x in leaves if backward)
            rounds = measure.rounds_for(measure.seconds_of(step, device), device)
            timed: list[float] = []
            benchmark.group = report.case_of(row)
            benchmark.pedantic(
                lambda: timed.append(measure.seconds_of(step, device)), rounds=rounds
            )
            if device != "cpu":
                alone = [measure.device_seconds_of(step, device) for _ in range(5)]
                row["device_seconds"], _ = measure.quantiles(alone)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                failed = "out of memory"
            else:
                failed = str(error).strip().partition("\n")[0] or type(error).__name__
            add_row(row | {"failed": failed})
            if ours:
                raise
            pytest.skip(f"not timed: {failed}")
        floor = max(
            case.operations(*size)[backward] / measure.product_rate(document["ceilings"], dtype),
            case.traffic[backward] * sum(x.nbytes for x in leaves) / document["ceilings"]["copy"],
        )
        seconds, percentiles = measure.quantiles(timed)
        add_row(
            row
            | {
                "seconds": seconds,
                "percentiles": percentiles,
                "extra_bytes": max(grown, 0),
                "saved_bytes": saved,
                "launches": launches,
                "share_of_rate": floor / seconds,
            }
        )

    yield run
    if device == "cuda":
        torch.cuda.empty_cache()
