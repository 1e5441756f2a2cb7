"""Where tests run: each backend on a CPU, Triton's in its interpreter, and on a GPU if any."""

import os
from typing import NamedTuple

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")]
NEEDS_INTERPRETER = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled for the GPU here")


class Target(NamedTuple):
    """A backend on a device."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"


TARGETS = [
    pytest.param(Target("torch", "cpu"), id="torch"),
    pytest.param(Target("triton", "cpu"), id="interpreter", marks=NEEDS_INTERPRETER),
    pytest.param(Target("torch", "cuda"), id="torch-gpu", marks=NEEDS_GPU),
    pytest.param(Target("triton", "cuda"), id="triton-gpu", marks=NEEDS_GPU),
]
