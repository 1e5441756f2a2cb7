"""What a run takes of the machine it runs on."""

import os

import pytest

pytest.importorskip("torchvision")

from fastssl.trainer import Config, loop
from fastssl.trainer.environment import cores, environment


@pytest.mark.parametrize(("allowed", "workers"), [({3}, 1), (set(range(6)), 3)])
def test_cores_are_those_that_the_process_may_use(tiny, monkeypatch, allowed, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    assert cores() == len(allowed)
    assert f", {len(allowed)} cores, " in environment()["cpu"]
    assert loop.Trainer(Config(**tiny(workers=None))).workers == workers


def test_where_a_system_cannot_tell_all_cores_count(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores() == 64
