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
from torch.autograd import DeviceType  # type: ignore[attr-defined] # it is there
from torch.profiler import ProfilerActivity, profile

import fastssl

HERE = Path(__file__).resolve().parent
FLUSHED = 2**28  # bytes written before a step on a GPU: more than its cache holds
AHEAD = 10**7  # cycles that a GPU idles while Python launches a step: some milliseconds
BUDGET = {"cpu": 2.0, "cuda": 0.3}  # seconds to spend on the steps of one row
LIBRARIES = (
    *("lightly", "open_clip_torch", "pytorch-metric-learning"),
    *("inf-cl", "siglip-kernel", "cut-cross-entropy"),
)


def device_for(name: str | None) -> str:
    """The device of that name, if this machine has it, or without a name the best that it has."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu on this machine, got 'cuda'")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(step: Callable[[], object], device: str) -> float:
    """What one step takes, from its call until its results are there.

    On a GPU the step begins with the GPU at rest and a cache that holds nothing of it, and takes
    what Python needs to launch it or what the GPU needs to run it, whichever is longer.
    """
    if device != "cpu":
        torch.empty(FLUSHED, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_seconds_of(step: Callable[[], object], device: str) -> float:
    """What the device alone takes for one step: that a GPU waits for Python does not count."""
    if device == "cpu":
        return seconds_of(step, device)
    torch.empty(FLUSHED, dtype=torch.uint8, device=device).zero_()
    torch.cuda._sleep(AHEAD)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def rounds_for(seconds: float, device: str) -> int:
    """How many steps of this length to time."""
    return max(3, min(100, int(BUDGET[device] / seconds)))


def quantiles(seconds: Sequence[float]) -> tuple[float, list[float]]:
    """The median of what steps took, and the 20th and 80th percentiles."""
    low, middle, high = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return middle, [low, high]


def ceilings(device: str, dtype: torch.dtype, *, quick: bool = False) -> dict[str, float]:
    """What the machine can do at best.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of the rows that are measured beside it.
        quick: Whether arrays are small, for a rehearsal that means nothing.

    Returns:
        Bytes read and written per second by a copy ("copy"), on a CPU exponentials per second
        ("exp"), and operations per second of a matrix product in each type, float32 at "highest".
    """
    found = {"copy": copy_rate(device, quick)}
    if device == "cpu":  # PyTorch's own on a GPU say how fast its cache and its launches are
        found["exp"] = exp_rate()
    for kind in dict.fromkeys((torch.float32, torch.bfloat16, dtype)):
        found[str(kind)[6:]] = matmul_rate(device, kind, quick)
    if device != "cpu":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        found["tf32"] = matmul_rate(device, torch.float32, quick)
        torch.set_float32_matmul_precision(before)
    return found


def matmul_rate(device: str, dtype: torch.dtype, quick: bool) -> float:
    """Operations per second of the best of many matrix products."""
    size = 256 if quick else 8192 if device != "cpu" else 2048 if dtype == torch.float32 else 512
    a, b, out = torch.randn(3, size, size, device=device).to(dtype).unbind()
    best = min(device_seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(20))
    return 2 * size**3 / best


def product_rate(ceilings: dict[str, float], dtype: torch.dtype) -> float:
    """Operations per second of the products of rows of a type.

    Float32 rows may also be multiplied by three products in tf32 at float32's precision.
    """
    rate = ceilings[str(dtype)[6:]]
    return max(rate, ceilings.get("tf32", 0) / 3) if dtype == torch.float32 else rate


def copy_rate(device: str, quick: bool) -> float:
    """Bytes per second, read and written, of the best of many copies of a large array."""
    a, out = torch.randn(2, 2**20 if quick else 2**26, device=device).unbind()
    return 2 * a.nbytes / min(device_seconds_of(lambda: out.copy_(a), device) for _ in range(10))


def exp_rate() -> float:
    """Exponentials per second of the best of many, on float32 numbers that a CPU's cache holds."""
    x = torch.randn(2**18)
    out = torch.empty_like(x)

    def step() -> None:
        for _ in range(20):
            torch.exp(x, out=out)

    return 20 * len(x) / min(seconds_of(step, "cpu") for _ in range(10))


def launches(step: Callable[[], object], device: str) -> int | None:
    """How many kernels, copies and fills a GPU runs in one step; None on a CPU."""
    if device == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(
        event.device_type == DeviceType.CUDA and not event.is_user_annotation
        for event in profiler.events()
    )


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


def memory() -> int:
    """Bytes that this machine has beside a GPU."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    }
    if (HERE.parent / "setup.py").exists():  # in a checkout
        found["commit"] = _output("git", "-C", str(HERE), "describe", "--always", "--dirty")
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name()
        found["triton"] = importlib.metadata.version("triton")
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = _output(*query)
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
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
