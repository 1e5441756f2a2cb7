"""Fixtures of all tests."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from targets import TARGETS, Target

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Processes that share the cores must not each start a thread for every one of them.
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 32 + 16 images in MNIST's format: bars whose place is their class."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("t10k", 16)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 6 * label + 2 : 6 * label + 6] = 250
        header = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">HBBI", 0, 8, 1, count)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return folder


@pytest.fixture
def outputs_begin_as_nan() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
