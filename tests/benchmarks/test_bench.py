"""The benchmark suite: what it covers, what it says of failures, how it reads what it recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accuracy import check_accuracy
from torch.utils.flop_counter import FlopCounterMode

from fastssl import cli, functional
from fastssl.benchmarks import cases, measure, plot, report

ROOT = Path(__file__).parents[2]
NOT_LOSSES = {"mises_fisher_weights"}
PRIMITIVES = {"similarity_lse", "cross_energy", "soft_cross_entropy"}


# Changes the table: peers of DCL that give another value, need too much, or break; a SigLIP of
# ours that is off by a little.
PLUGIN = """
import dataclasses
import torch
from fastssl.benchmarks import cases

def wrong():
    return lambda z0, z1: 2 * (z0 - z1).square().sum()

def large():
    def loss(z0, z1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    return loss

def broken():
    def loss(z0, z1):
        raise AssertionError
    return loss

at = {case.name: i for i, case in enumerate(cases.CASES)}
cases.CASES[at["dcl"]].peers.update({"lightly": wrong, "open_clip": large, "pml": broken})
right = cases.CASES[at["siglip"]].fused
cases.CASES[at["siglip"]] = dataclasses.replace(
    cases.CASES[at["siglip"]], fused=lambda *inputs: 1.001 * right(*inputs)
)
"""


class Suite(NamedTuple):
    """What a run of the suite printed, recorded and returned."""

    printed: str
    document: dict[str, Any]
    status: int

    def rows(self, loss: str) -> list[dict[str, Any]]:
        return [found for found in self.document["rows"] if found["loss"] == loss]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """The suite at its smallest, with three losses."""
    here = tmp_path_factory.mktemp("suite")
    (here / "plugin.py").write_text(PLUGIN)
    options = "-q -p plugin -p no:cacheprovider --sizes tiny --losses"
    command = [sys.executable, "-m", "pytest", *options.split(), "dcl,siglip,sinkhorn_knopp"]
    providers = "--providers=fastssl,plain,lightly,open_clip,pml"
    done = subprocess.run(
        [*command, providers, f"--record={here / 'rows'}", str(ROOT / "benchmarks")],
        env={**os.environ, "PYTHONPATH": f"{here}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (here / "rows.json").exists(), done.stdout + done.stderr
    return Suite(done.stdout, json.loads((here / "rows.json").read_text()), done.returncode)


def row(loss: str, size: tuple[int, int], provider: str, **measured: Any) -> dict[str, Any]:
    found = {"loss": loss, "rows": size[0], "features": size[1], "pass": report.STEP}
    return {**found, "provider": provider, "launches": None, **measured}


def grown(time_power: float, memory_power: float) -> list[dict[str, Any]]:
    """Rows of a loss that takes these powers of N."""
    return [
        row(
            "NT-Xent",
            (n, 128),
            provider,
            seconds=1e-9 * n**time_power + (1e-4 if n == 256 else 0),  # what a call costs
            percentiles=[0.0, 1.0],
            extra_bytes=1000 * n**memory_power,
            saved_bytes=0,
            share_of_rate=0.5,
        )
        for provider in ("fastssl", "plain")
        for n in (256, 1024, 4096, 16384, 65536)
    ]


def test_every_public_loss_and_primitive_is_measured() -> None:
    names = {case.name for case in cases.CASES}
    assert names == {*functional.__all__, *PRIMITIVES, "routes"} - NOT_LOSSES
    assert len({case.title for case in cases.CASES}) == len(cases.CASES)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: report.slug(case.title))
def test_a_case_is_complete(case: cases.Case) -> None:
    assert set(case.sizes) == set(cases.LEVELS)
    assert set(case.peers) <= set(cases.PROVIDERS)
    leaves, fixed = case.place(case.sizes["tiny"][0], "cpu", torch.float32)
    for x in leaves:
        x.requires_grad_(case.backward)
    assert case.fused(*leaves, *fixed).requires_grad == case.backward
    for sizes in case.sizes.values():
        for size in sizes:
            assert len(size) == len(case.axes)
            alone, both = case.operations(*size)
            assert 0 <= alone <= both
            assert case.matrix(*case.checked(size)) <= cases.CHECKED


@pytest.mark.parametrize(
    "case",
    [case for case in cases.CASES if case.backward],
    ids=lambda case: report.slug(case.title),
)
def test_the_check_accepts_ours_and_not_what_is_a_little_off(case: cases.Case) -> None:
    leaves, fixed = case.place(case.sizes["tiny"][0], "cpu", torch.float32)
    check_accuracy(case.fused, case.plain, leaves, fixed=fixed)
    with pytest.raises(AssertionError, match="error"):
        check_accuracy(lambda *x: 1.001 * case.fused(*x), case.plain, leaves, fixed=fixed)


def test_operations_are_those_of_the_products_that_are_made() -> None:
    def counted(*inputs: torch.Tensor) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            result = case.plain(*inputs)
            alone = counter.get_total_flops()
            result.sum().backward()
        return alone, counter.get_total_flops()

    case = next(case for case in cases.CASES if case.name == "siglip")
    leaves = [x.requires_grad_() for x in case.inputs(32, 16)]
    assert case.operations(32, 16) == counted(*leaves)  # three products, as the plain loss makes
    case = next(case for case in cases.CASES if case.name == "nt_xent")
    leaves = [x.requires_grad_() for x in case.inputs(32, 16)]
    alone, both = counted(*leaves)
    # Half of the products forward; a product less backward, where both sides of it are one matrix.
    assert case.operations(32, 16) == (alone / 2, both - alone)


def test_losses_and_providers_are_chosen_by_name() -> None:
    chosen, providers = cases.choose("clip,dcl", "fastssl,lightly")
    assert [case.title for case in chosen] == ["CLIP at 100", "CLIP at 14.3", "DCL"]
    assert providers == ["fastssl", "lightly"]
    everything, _ = cases.choose(None, None)
    assert not any(case.name == "routes" for case in everything)
    with pytest.raises(ValueError, match=r"losses must be of nt_xent, .*, got 'clap'"):
        cases.choose("clap", None)
    with pytest.raises(ValueError, match=r"providers must be of fastssl, .*, got 'ours'"):
        cases.choose(None, "ours")


@pytest.mark.slow
def test_rows_are_printed_and_recorded(suite: Suite) -> None:
    assert [(x["pass"], x["provider"]) for x in suite.rows("DCL")[:2]] == [
        (report.STEP, "fastssl"),
        (report.STEP, "plain"),
    ]
    assert {x["pass"] for x in suite.rows("Sinkhorn")} == {"forward"}
    for found in suite.document["rows"]:
        assert report.line(found, suite.document["rows"]) in suite.printed
        if "failed" not in found:
            assert found["seconds"] > 0
            assert 0 < found["share_of_rate"] < 1
    assert set(suite.document["ceilings"]) == {"copy", "exp", "float32", "bfloat16"}
    assert {"processor", "torch", "dtype", "commit"} <= set(suite.document["machine"])


@pytest.mark.slow
def test_what_is_wrong_or_too_large_is_a_row_without_a_time(suite: Suite) -> None:
    failed = {x["provider"]: x["failed"] for x in suite.rows("DCL") if "failed" in x}
    assert set(failed) == {"lightly", "open_clip", "pml"}
    assert failed["lightly"].startswith("off by")
    assert failed["open_clip"] == "out of memory"
    assert failed["pml"] == "an assertion failed"
    assert "FAIL: out of memory" in suite.printed
    assert not any("seconds" in x for x in suite.document["rows"] if "failed" in x)


@pytest.mark.slow
def test_ours_being_wrong_is_a_row_and_a_failure(suite: Suite) -> None:
    ours = [x for x in suite.rows("SigLIP") if x["provider"] == "fastssl"]
    assert all("error" in x["failed"] for x in ours)
    assert len(ours) == 2
    assert suite.status == 1
    assert "2 failed" in suite.printed


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_fit_finds_the_power(power: float) -> None:
    sizes = [512, 1024, 4096, 16384]
    noise = (1.03, 0.98, 1.02, 0.97)
    costs = [3e-7 * n**power * x for n, x in zip(sizes, noise, strict=True)]
    assert report.exponent(sizes, costs) == pytest.approx(power, abs=0.03)


def test_the_fit_is_of_the_largest_sizes_and_leaves_out_nothing_at_all() -> None:
    small = [(2**i, 1.0) for i in range(4)]
    large = [(2**i, 4.0 ** (i - 3)) for i in range(4, 8)]
    assert report.exponent(*zip(*small, *large, strict=True)) == pytest.approx(2)
    assert report.exponent([1, 2, 4], [0, 0, 5]) is None
    assert report.exponent([8], [1]) is None


def test_growth_is_a_line_for_each_provider() -> None:
    lines = report.growth(grown(2, 1)).splitlines()[1:]
    assert [line.split()[-3:] for line in lines] == [
        ["fastssl", "2.00", "1.00"],
        ["plain", "2.00", "1.00"],
    ]
    assert all("rows, at 128 features" in line for line in lines)


def test_growth_is_along_the_axis_with_the_most_sizes() -> None:
    sizes = [(512, 512), (512, 1024), (512, 2048), (4096, 1024)]
    costs = {"seconds": 1.0, "extra_bytes": 1, "share_of_rate": 1.0}
    axis, series = report.growing(
        [row("VICReg", size, "plain", **costs) for size in sizes], "VICReg"
    )
    assert axis == "features, at 512 rows"
    assert list(series["plain"]) == [512, 1024, 2048]
    scores = [row("Sinkhorn", size, "plain", **costs) for size in sizes]
    axis, series = report.growing(scores, "Sinkhorn")
    assert axis == "scores B x K"
    assert list(series["plain"]) == [512 * 512, 512 * 1024, 512 * 2048, 4096 * 1024]


def test_recorded_files_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    failed = row("NT-Xent", (65536, 128), "lightly", failed="out of memory")
    alone = row("DCL", (64, 8), "fastssl", seconds=1.0, extra_bytes=1, share_of_rate=1.0)
    machine = {"threads": 2, "dtype": "bfloat16", "device": "a GPU"}
    rows = [*grown(2, 1), failed, alone]
    file.write_text(json.dumps({"machine": machine, "rows": rows}))
    assert cli.main(["bench", "--plot", str(file)]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "gpu-nt_xent.svg") in printed
    drawn = (tmp_path / "gpu-nt_xent.svg").read_text()
    for words in ("fastssl, power 2.00", "plain, power 1.00", "share of the floor", "a GPU"):
        assert words in drawn
    assert not (tmp_path / "gpu-dcl.svg").exists()


def test_what_cannot_be_drawn_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    for content in ('{"knn": 1}', "[1]", "{", '{"rows": [{}]}'):
        file.write_text(content)
        assert cli.main(["bench", "--plot", str(file)]) == 2
        error = capsys.readouterr().err
        assert error == f"fastssl: error: plot: {file} is not a file that bench --record wrote\n"
    alone = row("DCL", (64, 8), "fastssl", seconds=1.0, extra_bytes=1, share_of_rate=1.0)
    file.write_text(json.dumps({"machine": {"threads": 2}, "rows": [alone]}))
    assert cli.main(["bench", "--plot", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{file}: nothing to draw, no loss has times at two sizes\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error == "fastssl: error: device must be cpu on this machine, got 'cuda'\n"


def test_an_interrupted_suite_ends_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "main", lambda _: pytest.ExitCode.INTERRUPTED)
    assert cli.main(["bench", "--sizes", "tiny"]) == 130


def test_tables_hold_what_was_recorded_and_what_failed() -> None:
    rows = [
        *grown(2, 1)[:1],
        row("NT-Xent", (256, 128), "lightly", failed="out of memory"),
    ]
    assert report.table(rows, ["NT-Xent"]).splitlines() == [
        "| NT-Xent | fastssl | lightly | share of the floor |",
        "|---|---|---|---|",
        "| 256 x 128 | 0.2 ms, 0 MiB | out of memory | 50% |",
    ]
    with pytest.raises(ValueError, match="losses must be among those recorded, got 'CLIP'"):
        report.table(rows, ["CLIP"])


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_pages_say_what_was_recorded(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(report.MARKED.findall(text)) == text.count("<!-- table") > 0
    assert report.filled(text, ROOT / "benchmarks" / "results") == text


def test_a_stale_table_is_filled_again(tmp_path: Path) -> None:
    results = tmp_path
    (results / "cpu.json").write_text(json.dumps({"machine": {"threads": 2}, "rows": grown(2, 1)}))
    readme = tmp_path / "README.md"
    figure = "![it](benchmarks/results/cpu-nt_xent.svg)"
    readme.write_text(f"{figure}\n<!-- table cpu: NT-Xent -->\n| old |\n<!-- end -->\nwords\n")
    plot.fill(readme, results)
    text = readme.read_text()
    assert "| old |" not in text
    assert report.table(grown(2, 1), ["NT-Xent"]) + "\n<!-- end -->\nwords" in text
    assert (results / "cpu-nt_xent.svg").exists()


def test_ceilings_are_of_every_type() -> None:
    found = measure.ceilings("cpu", torch.float16, quick=True)
    assert set(found) == {"copy", "exp", "float32", "bfloat16", "float16"}
    assert min(found.values()) > 0


def test_float32_products_may_be_three_of_tf32() -> None:
    rates = {"float32": 50.0, "tf32": 450.0, "bfloat16": 800.0}
    assert measure.product_rate(rates, torch.float32) == 150
    assert measure.product_rate(rates | {"tf32": 120.0}, torch.float32) == 50
    assert measure.product_rate({"float32": 50.0, "bfloat16": 40.0}, torch.float32) == 50
    assert measure.product_rate(rates, torch.bfloat16) == 800


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_launches_are_counted() -> None:
    x = torch.zeros(8, device="cuda")
    assert measure.launches(lambda: [x.add_(1) for _ in range(3)], "cuda") == 3


def test_the_command_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--losses", "clap"]) == 2
    assert "losses must be of" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    assert cli.main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "pytest_benchmark is not installed; fastssl's 'bench' extra has it" in error
