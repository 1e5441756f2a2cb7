"""Optimisers and the schedule."""

import pytest
import torch

pytest.importorskip("torchvision")
from fastssl.trainer import Config, loop, optim
from fastssl.trainer.methods import METHODS
from fastssl.trainer.methods.base import Method


def test_schedule_rises_and_falls():
    factors = [optim.schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
    assert optim.schedule(0, 1, 0) == 1.0


def test_vectors_and_chosen_networks_have_learning_rates_of_their_own(tiny, monkeypatch):
    class Constant(METHODS["simclr"]):
        constant_lr = ("head",)

    monkeypatch.setitem(METHODS, "simclr", Constant)
    trainer = loop.Trainer(Config(**tiny(optimizer="lars", lr=0.5, vector_lr_scale=0.1)))
    trainer.run()
    head = {id(p) for p in trainer.method.head.parameters()}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            peak = 0.5 if p.ndim > 1 else 0.05
            assert (group["lr"] == peak) == (id(p) in head)
            assert group["lr"] <= peak
            seen.add(id(p))
    assert seen == {id(p) for p in trainer.method.parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_only_matrices_decay(optimizer):
    module = Method()
    module.layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    built = optim.build(module, Config(optimizer=optimizer, lr=0.1, weight_decay=0.5).resolved())
    decayed = [p for group in built.param_groups if group["weight_decay"] for p in group["params"]]
    assert [id(p) for p in decayed] == [id(module.layers[0].weight)]
    assert sum(len(group["params"]) for group in built.param_groups) == 4
    # A zero gradient moves matrices alone.
    before = [p.clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    moved = [not torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True)]
    assert moved == [True, False, False, False]
