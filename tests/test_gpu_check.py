"""The one call that checks and measures a GPU, rehearsed where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.sh"


def rehearse(out: Path, *parts: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", str(SCRIPT), str(out), *parts],
        env=os.environ | {"SIZE": "tiny", "TRITON_INTERPRET": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (out / "summary.txt").read_text()


def test_parts_are_chosen_and_summed_up(tmp_path: Path) -> None:
    status, summary = rehearse(tmp_path, "tests")
    assert status == 0, (tmp_path / "tests.log").read_text()
    assert "tests: exit 0" in summary
    assert "0 parts failed" in summary
    assert "benchmarks" not in summary


def test_what_fails_is_counted(tmp_path: Path) -> None:
    status, summary = rehearse(tmp_path, "nonsense", "tests")
    assert status == 1
    assert "no part is called nonsense" in summary
    assert "tests: exit 0" in summary


@pytest.mark.slow
def test_every_kernel_runs_and_figures_are_written(tmp_path: Path) -> None:
    status, summary = rehearse(tmp_path, "sanitizer", "launches", "benchmarks")
    assert status == 0, summary + "".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
    assert "every kernel ran" in summary
    assert "0 of the losses' graphs failed" in summary
    document = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert {row["provider"] for row in document["rows"]} == {"fastssl"}
    assert not any("failed" in row for row in document["rows"])


def test_a_part_that_has_no_time_left_fails_and_benchmarks_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTAL", "0")
    status, summary = rehearse(tmp_path, "benchmarks", "tests")
    assert status == 1
    assert "benchmarks-tiny: no time left" in summary
    assert "tests: no time left" in summary
    assert "1 parts failed" in summary
