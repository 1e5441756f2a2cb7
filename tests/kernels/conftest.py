"""Fixtures of the kernels' tests."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest


@pytest.fixture
def multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a device of so many."""
    gpu = pytest.importorskip("fastssl.kernels.gpu")
    monkeypatch.setattr(gpu, "target", lambda device: ("interpreter", request.param))
    return request.param


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    """A process that compiles kernels, since the interpreter replaces the compiler in this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)
            environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
            pool.submit(os.getpid).result()  # the process has begun, with that environment
        yield pool
