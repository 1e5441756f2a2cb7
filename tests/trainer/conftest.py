"""Fixtures of the trainer's tests."""

import pytest


@pytest.fixture
def tiny(mnist, tmp_path):
    """Options of a run of 3 epochs of 4 steps."""

    def options(**changes):
        small = {
            "dataset": "mnist",
            "data_dir": str(mnist),
            "epochs": 3,
            "batch_size": 8,
            "workers": 0,
            "knn_every": 2,
            "device": "cpu",
            "out": str(tmp_path / "run"),
        }
        return {**small, **changes}

    return options
