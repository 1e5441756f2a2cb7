"""Which backend runs an operation.

``"triton"`` launches the kernels of ``fastssl.kernels``, ``"torch"`` the tiles of
``fastssl.streaming``; both offer the same functions. ``"auto"`` takes Triton for float32, bfloat16
and float16 tensors on a CUDA or ROCm device, and PyTorch for all others. A backend that is named
runs or raises; it is never replaced.
"""

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve(backend: str, x: Tensor) -> str:
    """Return ``"triton"`` or ``"torch"`` for the tensor x.

    Raises:
        ValueError: backend is none of BACKENDS.
        RuntimeError: backend is ``"triton"``, which cannot run on x here.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )
    if backend == "torch":
        return "torch"
    obstacle = _obstacle_to_triton(x)
    if backend == "auto":
        return "torch" if obstacle or x.device.type != "cuda" else "triton"
    if obstacle:
        raise RuntimeError(
            f"backend='triton' cannot run here: {obstacle}; use backend='torch' or 'auto'"
        )
    return "triton"


def launchers(backend: str, name: str) -> ModuleType:
    """Return the module of launchers called ``name`` of a resolved backend."""
    package = "fastssl.kernels" if backend == "triton" else "fastssl.streaming"
    return importlib.import_module(f"{package}.{name}")


def describe() -> dict[str, str]:
    """Name the backend that ``"auto"`` takes for float32 tensors on each device here, and why."""
    lines = {"cpu": "torch (tiles sized for the cache)"}
    if torch.backends.mps.is_available():
        lines["mps"] = "torch (Triton does not run on MPS)"
    for index in range(torch.cuda.device_count()):
        obstacle = _obstacle_to_triton(torch.empty(0, device=f"cuda:{index}"))
        name = torch.cuda.get_device_name(index)
        lines[f"cuda:{index}"] = f"torch ({obstacle})" if obstacle else f"triton (on {name})"
    return lines


def _obstacle_to_triton(x: Tensor) -> str | None:
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if x.dtype not in TRITON_DTYPES:
        return f"its kernels take float32, bfloat16 and float16 tensors, not {x.dtype}"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels run on CUDA and ROCm devices, not on {x.device.type}"
    return None
