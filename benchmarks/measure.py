"""Measurements that benchmarks and tests share, on a CPU and on a GPU."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import fastssl

FLUSHED = 2**28  # bytes written before a step on a GPU: more than its cache holds


def seconds_of(step: Callable[[], object], device: str) -> float:
    """What one step takes; on a GPU by its own clock, with a cache that holds nothing of it."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    torch.empty(FLUSHED, dtype=torch.uint8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of the best of many matrix products."""
    size = 2048 if device == "cpu" else 8192
    a, b, out = torch.randn(3, size, size, device=device).to(dtype).unbind()
    best = min(seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(20))
    return 2 * size**3 / best


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of the best of many copies of a large array."""
    a, out = torch.randn(2, 2**26, device=device).unbind()
    return 2 * a.nbytes / min(seconds_of(lambda: out.copy_(a), device) for _ in range(10))


def exp_rate(device: str) -> float:
    """Exponentials per second of the best of many, on float32 numbers that a cache holds."""
    x = torch.randn(2**18 if device == "cpu" else 2**22, device=device)
    out = torch.empty_like(x)

    def step() -> None:
        for _ in range(20):
            torch.exp(x, out=out)

    return 20 * len(x) / min(seconds_of(step, device) for _ in range(10))


def extra_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """By how much memory grows at most while step runs (on a CPU: Linux with glibc)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed must not be found again for nothing
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def saved_bytes(loss: Callable[..., Tensor], leaves: Sequence[Tensor]) -> int:
    """What autograd keeps between forward and backward, beside the leaves themselves."""
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = loss(*leaves)
    for x in leaves:
        saved.pop(x.untyped_storage().data_ptr(), None)
    assert result.requires_grad
    return sum(saved.values())


def _resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def describe_machine(device: str) -> dict[str, str | int]:
    """Device, versions and commit."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastssl": fastssl.__version__,
        "commit": _output("git", "describe", "--always", "--dirty"),
    }
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name()
        found["triton"] = importlib.metadata.version("triton")
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = _output(*query)
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return "unknown"


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor()
