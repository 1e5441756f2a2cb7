"""Measurements that benchmarks and tests share."""

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastssl


def matmul_rate() -> float:
    """Operations per second of the best of many float32 matrix products."""
    a, b, out = torch.randn(3, 2048, 2048).unbind()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def copy_rate() -> float:
    """Bytes per second, read and written, of the best of many copies of a large array."""
    a, out = torch.randn(2, 2**26).unbind()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        out.copy_(a)
        seconds.append(time.perf_counter() - start)
    return 2 * a.nbytes / min(seconds)


def extra_bytes(step: Callable[[], None]) -> int:
    """By how much the process grows at most while step runs (Linux with glibc)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed must not be found again for nothing
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def describe_machine() -> dict[str, str | int]:
    """Processor, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastssl": fastssl.__version__,
        "commit": commit.stdout.strip(),
    }


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor()
