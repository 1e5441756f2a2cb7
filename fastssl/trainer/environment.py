"""What a run ran on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastssl

PACKAGES = ("triton", "torchvision", "numpy", "scikit-learn", "timm", "safetensors")


def cores() -> int:
    """The processor cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers(device: torch.device, ranks: int = 1) -> int:
    """How many processes read images, for each of several that train."""
    free = cores() // 2 if device.type == "cpu" else cores()  # the network needs some too
    return min(8, max(1, free // ranks))


def environment() -> dict[str, str]:
    """Versions and devices of this machine, by name."""
    found = {"fastssl": fastssl.__version__, "python": platform.python_version()}
    found["torch"] = torch.__version__
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["platform"] = platform.platform()
    found["cpu"] = f"{platform.machine()}, {cores()} cores, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        found[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found
