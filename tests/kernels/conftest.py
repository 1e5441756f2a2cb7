"""Fixtures of the kernels' tests."""

import pytest


@pytest.fixture
def multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a device of so many."""
    gpu = pytest.importorskip("fastssl.kernels.gpu")
    monkeypatch.setattr(gpu, "target", lambda device: ("interpreter", request.param))
    return request.param
