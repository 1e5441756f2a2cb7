"""The one call that checks and measures a GPU, rehearsed where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"

# Runs nothing: memcheck finds nothing, initcheck an error, and racecheck's process ends too early.
SANITIZER = """#!/bin/sh
echo "no caching ${PYTORCH_NO_CUDA_MEMORY_CACHING:-0}: $*"
[ "$2" = racecheck ] || echo "every kernel ran"
[ "$2" != initcheck ]
"""


def rehearse(out: Path, *parts: str, python: str = sys.executable) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", str(SCRIPT), str(out), *parts],
        env=os.environ | {"SIZE": "tiny", "TRITON_INTERPRET": "1", "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (out / "summary.txt").read_text()


def test_parts_are_chosen_and_what_fails_is_counted(tmp_path: Path) -> None:
    status, summary = rehearse(tmp_path, "nonsense", "tests")
    assert status == 1
    assert "no part is called nonsense" in summary
    assert "tests: exit 0" in summary, (tmp_path / "tests.log").read_text()
    assert "1 parts failed" in summary
    assert "benchmarks" not in summary


@pytest.mark.slow
def test_every_kernel_runs_and_figures_are_written(tmp_path: Path) -> None:
    status, summary = rehearse(tmp_path, "sanitizer", "compile", "launches", "benchmarks")
    assert status == 0, summary + "".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
    assert "1 of 1 runs of every kernel without compute-sanitizer" in summary
    assert "compile-float32: exit 0" in summary
    assert "0 of the losses' graphs failed" in summary
    document = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert {row["provider"] for row in document["rows"]} == {"fastssl"}
    assert not any("failed" in row for row in document["rows"])


def test_what_a_sanitizer_finds_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sanitizer.parent}:{os.environ['PATH']}")
    status, summary = rehearse(tmp_path, "sanitizer")
    assert status == 1
    assert "1 of 3 runs of every kernel under compute-sanitizer are clean, 2 failed" in summary
    log = (tmp_path / "sanitizer.log").read_text()
    for tool, exit_status in (("memcheck", 0), ("initcheck", 1), ("racecheck", 0)):
        assert f"== {tool} float32 14x20: exit status {exit_status}" in log
        assert f"no caching 1: --tool {tool} --error-exitcode 1" in log
    assert log.count("every_kernel.py float32 14x20") == 3


@pytest.mark.slow  # it waits
def test_a_stopped_part_says_what_it_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "python"
    hangs.write_text(
        "#!/bin/sh\ntrap 'echo 1 failed so far; exit 2' INT\n[ $1 = -c ] || sleep 60\n"
    )
    hangs.chmod(0o755)
    monkeypatch.setenv("TOTAL", "12")
    status, summary = rehearse(tmp_path, "tests", python=str(hangs))
    assert status == 1
    assert "tests: exit 124, 12 s: 1 failed so far" in summary


def test_a_part_that_has_no_time_left_fails_and_benchmarks_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTAL", "0")
    status, summary = rehearse(tmp_path, "benchmarks", "tests")
    assert status == 1
    assert "benchmarks-tiny: no time left" in summary
    assert "tests: no time left" in summary
    assert "1 parts failed" in summary
