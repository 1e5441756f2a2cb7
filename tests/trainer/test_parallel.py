"""A run in several processes is the run of one."""

import copy
import csv
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from torch import multiprocessing, nn
from torch.distributed.elastic.utils.distributed import get_free_port

pytest.importorskip("torchvision")

from fastssl.trainer import Config, checkpoint, data, evaluate, loop, networks, parallel
from fastssl.trainer.methods import METHODS

RANKS = 2
SMALL = {
    **{"epochs": 2, "batch_size": 16, "optimizer": "sgd", "lr": 0.05, "warmup_epochs": 0},
    **{"workers": 0, "knn_every": 2, "device": "cpu"},
}
OPTIONS = {
    "swav": {"prototypes": 20, "freeze_epochs": 0, "queue_length": 40, "queue_start": 0},
    "barlow": {"projection_hidden": 64, "projection_dim": 64},
    "vicreg": {"projection_hidden": 64, "projection_dim": 64},
}
# What these draw differs: patches of each process, the images that batch norm groups.
OWN_DRAWS = {"moco", "jigsaw", "relative-patch", "pirl"}


def options(method: str, folder: Path) -> dict[str, object]:
    return {"method": method, **SMALL, **OPTIONS.get(method, {}), "out": str(folder / method)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("alone")
    return {method: processes.train(options(method, folder)) for method in METHODS}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    folder = tmp_path_factory.mktemp("together")
    runs = {method: options(method, folder) for method in METHODS}
    arguments = (RANKS, get_free_port(), folder, runs)
    multiprocessing.spawn(processes.run, arguments, nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_hold_the_same(together: list[dict[str, dict]], method: str) -> None:
    first, *others = (result[method] for result in together)
    for other in others:
        assert first["losses"] == other["losses"]
        for name, x in first["state"].items():
            if METHODS[method].whole_batch_norm or "running" not in name:
                assert torch.equal(x, other["state"][name]), name


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_one_process(
    alone: dict[str, dict], together: list[dict[str, dict]], method: str
) -> None:
    expected, found = alone[method], together[0][method]
    tolerance = 0.3 if method in OWN_DRAWS else 1e-3
    assert len(found["losses"]) == 2 * (processes.IMAGES // 16)
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance, abs=1e-4)
    if method not in OWN_DRAWS:
        assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5, abs=1e-6)
    for row, own in zip(expected["history"], found["history"], strict=True):
        assert own["effective_rank"] == pytest.approx(
            row["effective_rank"], rel=max(tolerance, 0.02)
        )


def test_a_run_goes_on_in_one_process_and_in_two_again(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by torchrun, ended early by a signal; the loss is that of one undisturbed process."""
    run = tmp_path / "run"
    small = {"dataset": "mnist", "data_dir": str(mnist), "epochs": 30, "batch_size": 8}
    small |= {"optimizer": "sgd", "lr": 0.01, "workers": 0, "knn_every": 0, "device": "cpu"}
    whole = loop.pretrain(Config(**small, out=str(tmp_path / "whole"))).history

    words = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "fastssl", "pretrain", *words, f"--out={run}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (run / checkpoint.NAME).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate()[0]
    assert printed.count("stopped after step") == 1  # the lead alone speaks
    step = int(re.search(r"stopped after step (\d+) of 120", printed)[1])
    assert checkpoint.load(run / checkpoint.NAME)["step"] == step

    own = Config(**small, out=str(run))
    take = loop.Trainer._train_step

    def interrupt(trainer: loop.Trainer, loaded: object) -> tuple[float, object]:
        if trainer.step == 90:
            os.kill(os.getpid(), signal.SIGINT)
        return take(trainer, loaded)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", interrupt)
        assert not loop.pretrain(own, resume=True).complete
    assert checkpoint.load(run / checkpoint.NAME)["step"] == 91

    arguments = (RANKS, get_free_port(), dataclasses.asdict(own))
    multiprocessing.spawn(processes.go_on, arguments, nprocs=RANKS)
    with (run / "metrics.csv").open() as file:
        found = [float(row["loss"]) for row in csv.DictReader(file)]
    assert found == pytest.approx([row["loss"] for row in whole], rel=0.05)
    assert found[:2] == pytest.approx([row["loss"] for row in whole[:2]], rel=1e-4)
    assert (run / "backbone.safetensors").exists()
    events = [path.read_bytes() for path in (run / "tensorboard").iterdir()]
    assert len(events) == 3  # one for each time


def test_a_check_that_takes_longer_than_the_processes_wait_ends_no_run(tmp_path: Path) -> None:
    """Nor does one that fails in another process than the lead."""
    run = options("simclr", tmp_path) | {"epochs": 1, "knn_every": 1}
    arguments = (RANKS, get_free_port(), tmp_path, run)
    multiprocessing.spawn(processes.check, arguments, nprocs=RANKS)
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    digits = data.load("digits")
    few = torch.utils.data.Subset(digits.train, range(processes.IMAGES))
    alone = dataclasses.replace(digits, train=few)
    network = networks.load_backbone(tmp_path / "simclr" / "backbone.epoch-1.safetensors")
    for history in (first, *others):
        measured = [row["knn_accuracy"] for row in history]
        assert measured == [evaluate.knn_check(network, alone, "cpu"), measured[0], None]


@pytest.mark.parametrize("world", [None, "", "1"])
def test_a_single_process_is_the_lead_whatever_its_cluster_calls_it(
    tiny: Callable[..., dict], monkeypatch: pytest.MonkeyPatch, world: str | None
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert parallel.local_device(torch.device("cuda")) == torch.device("cuda")
    run = loop.pretrain(Config(**tiny(epochs=1)))
    assert run.complete
    assert (run.path / checkpoint.NAME).exists()


def test_a_batch_that_does_not_divide_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "world_size", lambda: RANKS)
    with pytest.raises(ValueError, match=r"multiple of .* 2, got 15"):
        loop.Trainer(Config(**options("simclr", tmp_path) | {"batch_size": 15}))


def test_a_batch_norm_of_timms_keeps_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers import BatchNormAct2d

    monkeypatch.setattr(parallel, "world_size", lambda: RANKS)
    for kind, device in ((parallel._WholeBatchNorm, "cpu"), (nn.SyncBatchNorm, "cuda")):
        network = nn.Sequential(BatchNormAct2d(3), nn.BatchNorm2d(3))
        x = torch.randn(4, 3, 5, 5)
        expected = copy.deepcopy(network).eval()(x)
        parallel.convert_batch_norm(network, torch.device(device))
        assert all(isinstance(module, kind) for module in network)
        torch.testing.assert_close(network.eval()(x), expected)
        if device == "cpu":
            assert (network[0].train()(x) >= 0).all()


def test_whole_batch_norm_is_batch_norm_without_other_processes() -> None:
    norm = nn.BatchNorm2d(3)
    norm.weight.data.uniform_()
    norm.bias.data.uniform_()
    whole = copy.deepcopy(norm)
    whole.__class__ = parallel._WholeBatchNorm
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    weights = torch.randn_like(x)
    results = []
    for module in (norm, whole):
        y = module(x)
        (gradient,) = torch.autograd.grad((weights * y).sum(), x)
        results.append((y, gradient, *module.buffers(), module.eval()(x)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
