"""Pretraining runs: what they leave behind, how they stop, and how they go on."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("torchvision")
import torchvision
from PIL import Image

from fastssl.trainer import Config, checkpoint, data, load_backbone, loop, networks, optim, pretrain
from fastssl.trainer.config import METHOD_OPTIONS, presets, read_options
from fastssl.trainer.methods import METHODS
from fastssl.trainer.methods.base import Method

TIMES = ("seconds", "images_per_second", "loss_share")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# Small networks, and all that a method does within a few epochs of four steps.
SMALL = {
    "simclr": {},
    "supcon": {"projection_hidden": 64, "projection_dim": 16},
    "moco": {"projection_hidden": 64, "projection_dim": 16, "queue_length": 20},
    "instance": {"projection_dim": 16, "negatives": 20},
    "pirl": {"projection_dim": 16, "negatives": 0, "temperature": 0.07},
    "barlow": {"projection_hidden": 64, "projection_dim": 16},
    "vicreg": {"projection_hidden": 64, "projection_dim": 16},
    "swav": {
        **{"projection_hidden": 64, "projection_dim": 16, "prototypes": 8, "local_crops": 2},
        **{"freeze_epochs": 1, "queue_length": 20, "queue_start": 1},
    },
    "byol": {"projection_hidden": 64, "projection_dim": 16, "prediction_hidden": 64},
    "simsiam": {"projection_hidden": 64, "projection_dim": 64, "prediction_hidden": 16},
    "rotation": {"projection_hidden": 64},
    "jigsaw": {"projection_hidden": 64, "projection_dim": 16, "permutations": 4},
    "relative-patch": {"projection_hidden": 64, "projection_dim": 16},
}


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


@pytest.fixture
def at_step(monkeypatch):
    """Do something when a run is about to take a step."""

    def arrange(step, action):
        take = loop.Trainer._train_step

        def step_and_act(trainer, views):
            if trainer.step == step:
                action(trainer)
            return take(trainer, views)

        monkeypatch.setattr(loop.Trainer, "_train_step", step_and_act)

    return arrange


def weights(run):
    return checkpoint.load(run.path / "checkpoint.pt")["method"]


def assert_same_result(run, other):
    for (name, a), (_, b) in zip(weights(run).items(), weights(other).items(), strict=True):
        assert torch.equal(a, b), name
    for row, of_other in zip(run.history, other.history, strict=True):
        assert {k: v for k, v in row.items() if k not in TIMES} == {
            k: v for k, v in of_other.items() if k not in TIMES
        }


def test_a_run_leaves_everything_behind(tiny):
    run = pretrain(Config(**tiny()))
    assert run.complete
    for name in ("backbone.safetensors", "checkpoint.pt", "checkpoint.previous.pt", "tensorboard"):
        assert (run.path / name).exists(), name
    assert json.loads((run.path / "environment.json").read_text())["torch"] == torch.__version__
    assert Config.from_dict(read_options(run.path / "config.yaml")) == Config(**tiny()).resolved()
    with (run.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        measured = {k: float(v) for k, v in row.items() if k != "knn_accuracy"}
        assert all(map(math.isfinite, measured.values()))
        assert measured.keys() >= {"loss", "lr", "embedding_std", "effective_rank", *TIMES}
    assert [bool(row["knn_accuracy"]) for row in rows] == [False, True, True]  # 2 and the last


@pytest.mark.parametrize("method", METHODS)
def test_training_learns(tiny, method):
    run = pretrain(Config(**tiny(method=method, epochs=12, lr=2e-3, **SMALL[method])))
    first, last = run.history[0], run.history[-1]
    assert last["loss"] < 0.9 * first["loss"]
    # Some tell views apart, and pirl's patches in any order do not say where a bar is.
    if method not in ("rotation", "jigsaw", "relative-patch", "pirl"):
        assert last["alignment"] < first["alignment"]
    assert last["knn_accuracy"] == 1.0


@pytest.mark.parametrize("method", [name for name in METHODS if name != "simclr"])
def test_every_other_method_resumes_bit_for_bit(tiny, tmp_path, at_step, method):
    options = {"method": method, **SMALL[method]}
    whole = pretrain(Config(**tiny(**options)))
    options["out"] = str(tmp_path / "interrupted")
    at_step(5, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    assert not pretrain(Config(**tiny(**options))).complete
    assert_same_result(pretrain(Config(**tiny(**options)), resume=True), whole)


def test_swav_keeps_its_prototypes_while_they_are_frozen_and_then_uses_its_queue(tiny, tmp_path):
    runs = {}
    for name, changes in {"queue": {}, "none": {"queue_length": 0}, "late": {"epochs": 1}}.items():
        options = {"method": "swav", **SMALL["swav"], "epochs": 2, **changes}
        runs[name] = pretrain(Config(**tiny(**options, out=str(tmp_path / name))))
    fresh = loop.Trainer(Config(**tiny(method="swav", **SMALL["swav"], out=str(tmp_path / "0"))))
    start = torch.nn.functional.normalize(fresh.method.prototypes.weight.detach())
    torch.testing.assert_close(weights(runs["late"])["prototypes.weight"], start)
    assert not torch.allclose(weights(runs["queue"])["prototypes.weight"], start, atol=1e-3)
    losses = {name: [row["loss"] for row in run.history] for name, run in runs.items()}
    assert losses["queue"][0] == losses["none"][0]
    assert losses["queue"][1] != losses["none"][1]


def test_swav_reports_its_prototypes_each_epoch(tiny, capsys):
    run = pretrain(Config(**tiny(method="swav", **SMALL["swav"])))
    assert capsys.readouterr().out.count("prototypes used ") == 3
    for row in run.history:
        assert 1 <= row["prototypes_used"] <= 8
        assert 0 < row["code_entropy"] <= row["mean_code_entropy"] <= math.log(8) + 1e-6


def test_the_same_seed_gives_the_same_weights_whatever_the_workers(tiny, tmp_path):
    alone = pretrain(Config(**tiny(epochs=1)))
    # One thread for the network in both, since the last bits depend on it.
    config = Config(**tiny(epochs=1, workers=2, out=str(tmp_path / "other")))
    threads = torch.get_num_threads()
    trainer = loop.Trainer(config)
    trainer.threads = checkpoint.load(alone.path / "checkpoint.pt")["threads"]
    try:
        assert_same_result(alone, trainer.run())
    finally:
        torch.set_num_threads(threads)
    other_seed = pretrain(Config(**tiny(epochs=1, seed=1, out=str(tmp_path / "seed"))))
    assert other_seed.history[0]["loss"] != alone.history[0]["loss"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 5])
def test_an_interrupted_run_resumes_bit_for_bit(tiny, tmp_path, at_step, capsys, number, step):
    whole = pretrain(Config(**tiny(out=str(tmp_path / "whole"))))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        take = loop.Trainer._train_step

        def interrupt(trainer, views):
            if trainer.step == step:
                os.kill(os.getpid(), number)
            return take(trainer, views)

        patch.setattr(loop.Trainer, "_train_step", interrupt)
        stopped = pretrain(Config(**tiny()))
    assert not stopped.complete
    assert f"stopped after step {step + 1} of 12" in capsys.readouterr().out
    assert checkpoint.load(stopped.path / "checkpoint.pt")["step"] == step + 1
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    resumed = pretrain(Config(**tiny()), resume=True)
    assert resumed.complete
    assert_same_result(whole, resumed)


@pytest.mark.parametrize("workers", [0, 2])  # which outlive the run by seconds
def test_a_killed_run_resumes_bit_for_bit_from_its_last_checkpoint(tiny, tmp_path, workers):
    script = """
import os, signal, sys
from fastssl.trainer import Config, loop
from fastssl.trainer.config import read_options
take = loop.Trainer._train_step
def kill(trainer, views):
    if trainer.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(trainer, views)
loop.Trainer._train_step = kill
loop.pretrain(Config(**read_options(sys.argv[1])))
"""
    options = tiny(workers=workers)
    Config(**options).save(tmp_path / "options.yaml")
    command = [sys.executable, "-c", script, str(tmp_path / "options.yaml")]
    with (tmp_path / "errors").open("w") as errors:  # a pipe would stay open as long as a worker
        killed = subprocess.run(command, stdout=errors, stderr=errors, check=False)
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "errors").read_text()
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    resumed = pretrain(Config(**options), resume=True)
    options["out"] = str(tmp_path / "whole")
    assert_same_result(resumed, pretrain(Config(**options)))


def test_resuming_a_complete_run_does_nothing(tiny, capsys):
    run = pretrain(Config(**tiny(epochs=1)))
    times = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    again = pretrain(Config(**tiny(epochs=1)), resume=True)
    assert "is complete (1 epochs)" in capsys.readouterr().out
    assert again.complete
    assert again.history == run.history
    assert times == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}


def test_a_run_is_not_overwritten(tiny):
    run = pretrain(Config(**tiny(epochs=1)))
    with pytest.raises(ValueError, match=r"out: .*run holds a run already.*--resume"):
        pretrain(Config(**tiny(epochs=1)))
    for file in run.path.glob("checkpoint*"):  # as before the first checkpoint
        file.unlink()
    with pytest.raises(ValueError, match=r"out: .*run holds a run already.*--resume"):
        pretrain(Config(**tiny(epochs=1)))
    assert pretrain(Config(**tiny(epochs=1)), resume=True).complete


def test_a_folder_takes_one_run_at_a_time(tiny, at_step):
    refused = []

    def start_another(trainer):
        with pytest.raises(ValueError, match=r"out: another run is being written to .*run; wait"):
            pretrain(Config(**tiny(epochs=1)), resume=True)
        refused.append(trainer.step)

    at_step(2, start_another)
    assert pretrain(Config(**tiny(epochs=1))).complete
    assert refused == [2]
    assert pretrain(Config(**tiny(epochs=1)), resume=True).complete


def test_what_is_missing_of_a_complete_run_is_written_anew(tiny):
    run = pretrain(Config(**tiny(epochs=1)))
    options = read_options(run.path / "config.yaml")
    before = load_backbone(run.path).state_dict()
    for name in ("backbone.safetensors", "config.yaml"):
        (run.path / name).unlink()
        assert pretrain(Config(**tiny(epochs=1)), resume=True).complete
        assert read_options(run.path / "config.yaml") == options
        after = load_backbone(run.path).state_dict()
        assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_crash_while_the_config_is_written_keeps_the_old_one(tiny, monkeypatch):
    run = pretrain(Config(**tiny(epochs=1)))
    before = {name: (run.path / name).read_text() for name in ("config.yaml", "environment.json")}
    (run.path / "backbone.safetensors").unlink()
    replace = os.replace

    for name in before:

        def crash(source, target, name=name):
            if target.name == name:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            pretrain(Config(**tiny(epochs=1)), resume=True)
        assert before == {name: (run.path / name).read_text() for name in before}


def test_tensorboard_has_every_step_once_after_a_stop_and_after_a_crash(tiny, at_step, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        at_step(5, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
        assert not pretrain(Config(**tiny())).complete
        save = checkpoint.save
        monkeypatch.undo()

        def crash(folder, state):
            if state["step"] == 8:
                raise OSError("the disk is full")
            save(folder, state)

        patch.setattr(checkpoint, "save", crash)
        time.sleep(1)  # TensorBoard reads files in the order of the seconds in their names
        with pytest.raises(OSError, match="full"):
            pretrain(Config(**tiny()), resume=True)
    time.sleep(1)
    run = pretrain(Config(**tiny()), resume=True)
    logs = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in logs.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in logs.Scalars("epoch/loss")] == [4, 8, 12]
    losses = [event.value for event in logs.Scalars("epoch/loss")]
    assert losses == pytest.approx([row["loss"] for row in run.history])


@pytest.mark.parametrize("writes", [0, 30])
def test_logs_that_cannot_be_written_end_a_run_with_one_error(tiny, monkeypatch, writes):
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, left = RecordWriter.write, iter(range(writes))

    def full(writer, content):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        write(writer, content)

    monkeypatch.setattr(RecordWriter, "write", full)
    hook = threading.excepthook
    says = r"run/tensorboard cannot be written \(No space left on device\); .* --out .*run goes on"
    with pytest.raises(OSError, match=says):
        pretrain(Config(**tiny()))
    assert threading.excepthook is hook
    monkeypatch.undo()
    assert pretrain(Config(**tiny()), resume=True).complete


def test_a_signal_in_the_last_step_ends_as_an_interruption(tiny, at_step, capsys):
    at_step(11, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    run = pretrain(Config(**tiny()))
    assert not run.complete
    assert (run.path / "backbone.safetensors").exists()
    assert "stopped after step 12 of 12; continue with:" in capsys.readouterr().out
    assert pretrain(Config(**tiny()), resume=True).complete


def test_options_that_are_no_config_are_named():
    with pytest.raises(TypeError, match="config must be a Config, got dict"):
        pretrain({"epochs": 1})


def test_float16_is_refused_on_a_cpu(tiny):
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16 on a CPU"):
        pretrain(Config(**tiny(precision="float16")))


@pytest.mark.parametrize(
    ("name", "value"), [("method", "barlow"), ("epochs", 4), ("temperature", 0.1), ("seed", 7)]
)
def test_a_run_does_not_resume_with_another_option(tiny, name, value):
    pretrain(Config(**tiny(epochs=1)))
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, but the run .* was started with"):
        pretrain(Config(**tiny(**{"epochs": 1, name: value})), resume=True)


def test_a_damaged_checkpoint_stops_a_resume_and_the_one_before_works(tiny, tmp_path):
    run = pretrain(Config(**tiny()))
    path = run.path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"truncated.*rename .*checkpoint\.previous\.pt"):
        pretrain(Config(**tiny()), resume=True)
    (run.path / "checkpoint.previous.pt").rename(path)
    resumed = pretrain(Config(**tiny()), resume=True)
    assert resumed.history[:2] == run.history[:2]
    assert_same_result(run, resumed)


@pytest.mark.parametrize(
    ("part", "name"), [("", "threads"), ("method", "head.3.weight"), ("optimizer", "param_groups")]
)
def test_a_checkpoint_that_lacks_something_is_damaged(tiny, part, name):
    run = pretrain(Config(**tiny(epochs=1)))
    (run.path / "backbone.safetensors").unlink()
    state = checkpoint.load(run.path / "checkpoint.pt")
    del (state[part] if part else state)[name]
    torch.save(state, run.path / "checkpoint.pt")
    says = rf"checkpoint\.pt is truncated or not a checkpoint of fastssl .*{name}.*; remove it"
    with pytest.raises(ValueError, match=says):
        pretrain(Config(**tiny(epochs=1)), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_state_is_saved(tiny, at_step):
    good = {}

    def poison(trainer):
        good.update({k: v.clone() for k, v in trainer.method.state_dict().items()})
        trainer.data.mean = (float("nan"),)

    at_step(5, poison)
    with pytest.raises(
        FloatingPointError, match=r"loss is not finite at step 6 \(epoch 2\).*step 5"
    ):
        pretrain(Config(**tiny()))
    saved = checkpoint.load(loop.Path(tiny()["out"]) / "checkpoint.pt")
    assert saved["step"] == 5
    for name, value in saved["method"].items():
        assert torch.equal(value, good[name]), name


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tiny, at_step):
    def poison(trainer):
        trainer.backbone[0].weight.register_hook(lambda gradient: gradient * float("inf"))

    at_step(2, poison)
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 3"):
        pretrain(Config(**tiny()))
    saved = checkpoint.load(loop.Path(tiny()["out"]) / "checkpoint.pt")
    assert all(value.isfinite().all() for value in saved["method"].values())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_every_optimiser_trains(tiny, optimizer):
    run = pretrain(Config(**tiny(epochs=2, optimizer=optimizer, knn_every=0)))
    assert run.complete
    assert all(math.isfinite(row["loss"]) for row in run.history)
    torch.manual_seed(0)
    start = networks.build_backbone("cnn", 1, 28)[0].weight
    assert not torch.equal(load_backbone(run.path)[0].weight, start)


def test_training_off_the_main_thread_works(tiny):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(pretrain(Config(**tiny(epochs=1)))))
    thread.start()
    thread.join()
    assert runs[0].complete


@pytest.fixture
def unlabelled(tmp_path):
    """Options of a run of one epoch of two steps on six tiny images in a folder."""
    for i in range(6):
        image = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    options = {"dataset": "folder", "data_dir": str(tmp_path), "image_size": 8, "device": "cpu"}
    small = {"backbone": "cnn", "epochs": 1, "batch_size": 3, "workers": 0}
    return {**options, **small, "out": str(tmp_path / "run")}


def test_a_folder_without_labels_trains_without_knn(unlabelled):
    run = pretrain(Config(**unlabelled))
    assert run.history[0]["knn_accuracy"] is None
    assert load_backbone(run.path).about["size"] == 8


@pytest.mark.parametrize(
    ("precision", "device"),
    [("bfloat16", "cpu"), pytest.param("float16", "cuda", marks=[pytest.mark.gpu, NO_GPU])],
)
def test_autocast_trains_float32_weights_near_those_of_float32(
    unlabelled, tmp_path, precision, device
):
    options = {**unlabelled, "optimizer": "sgd", "lr": 1e-3, "device": device}
    exact = pretrain(Config(**options))
    run = pretrain(Config(**{**options, "precision": precision, "out": str(tmp_path / precision)}))
    assert run.history[0]["loss"] != exact.history[0]["loss"]
    assert run.history[0]["loss"] == pytest.approx(exact.history[0]["loss"], rel=0.05)
    for name, value in load_backbone(run.path).state_dict().items():
        assert value.dtype in (torch.float32, torch.int64), name


def test_a_gradient_that_overflows_float16_lowers_the_scale_and_training_goes_on(unlabelled):
    trainer = loop.Trainer(Config(**{**unlabelled, "optimizer": "sgd"}))
    trainer.scaler = torch.amp.GradScaler("cpu")  # as float16 has it, in float32 for a CPU's sake
    trainer.backbone[0].weight.register_hook(lambda g: g * (1e38 if trainer.step == 0 else 1))
    before = trainer.backbone[0].weight.clone()
    scale = trainer.scaler.get_scale()
    run = trainer.run()
    assert run.complete
    assert trainer.scaler.get_scale() == scale / 2
    assert not torch.equal(trainer.backbone[0].weight, before)


def test_schedule_rises_and_falls():
    factors = [optim.schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
    assert optim.schedule(0, 1, 0) == 1.0


@pytest.mark.parametrize("preset", presets())
def test_a_preset_is_a_config_of_its_own_method(preset):
    options = read_options(preset)
    assert preset.startswith(options["method"])
    config = Config.from_dict(options).resolved()
    assert {name: getattr(config, name) for name in options} == options


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


@pytest.mark.parametrize("name", [name for name in networks.BACKBONES if name != "cnn"])
def test_resnets_keep_torchvisions_names_and_shapes(name):
    original = getattr(torchvision.models, name)().state_dict()
    ours = networks.build_backbone(name, 3, 224).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in original.items() if not k.startswith("fc.")
    }


def test_resnets_keep_the_resolution_of_small_images():
    for size, side in ((32, 4), (224, 7)):
        backbone = networks.build_backbone("resnet18", 3, size).eval()
        seen = []
        backbone.avgpool.register_forward_hook(lambda *a, seen=seen: seen.append(a[1][0].shape))
        features = backbone(torch.rand(1, 3, size, size))
        assert features.shape == (1, backbone.out_features)
        assert seen[0][-1] == side


@pytest.mark.parametrize(("name", "channels", "size"), [("cnn", 1, 16), ("resnet18", 1, 96)])
def test_an_exported_backbone_computes_the_same(tmp_path, name, channels, size):
    backbone = networks.build_backbone(name, channels, size)
    images = torch.rand(4, channels, size, size)
    backbone(images)  # moves the running statistics
    path = tmp_path / "backbone.safetensors"
    about = {"architecture": name, "channels": channels, "size": size}
    networks.export_backbone(path, backbone, **about, mean=(0.5,), std=(0.25,))
    loaded = load_backbone(tmp_path)
    assert not loaded.training
    assert loaded.about == {**about, "mean": [0.5], "std": [0.25]}
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone.eval()(images))
    written = {path.read_bytes()}
    for _ in range(9):
        networks.export_backbone(path, backbone, **about, mean=(0.5,), std=(0.25,))
        written.add(path.read_bytes())
    assert len(written) == 1
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_backbone(path)
    with pytest.raises(ValueError, match=r"found no .*nowhere"):
        load_backbone(tmp_path / "nowhere")


def test_options_survive_a_file(tmp_path):
    config = Config(dataset="cifar10", lr=0.3, optimizer="lars")
    config.save(tmp_path / "options.yaml")
    assert Config.from_dict(read_options(tmp_path / "options.yaml")) == config


def test_every_data_set_has_a_complete_recipe():
    for name in ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "stl10", "folder"):
        for method, made in METHODS.items():
            config = Config(dataset=name, method=method).resolved()
            missing = {k for k, v in vars(config).items() if v is None}
            assert missing == {"image_size", "workers", *METHOD_OPTIONS} - made.defaults.keys()
            assert config.resolved() == config


def test_learning_rate_follows_the_batch_for_sgd_and_lars():
    for optimizer in ("sgd", "lars"):
        small, large = (
            Config(optimizer=optimizer, batch_size=batch_size).resolved().lr
            for batch_size in (256, 1024)
        )
        assert large == 4 * small


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "options.yaml").write_text("lr: 1e-3\n")
    options = read_options(tmp_path / "options.yaml")
    assert options == yaml.safe_load("lr: '1e-3'")  # what makes this test necessary
    assert Config.from_dict(options).lr == 0.001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "simcrl"}, r"method cannot be 'simcrl'; did you mean 'simclr'\?"),
        ({"dataset": "cifar"}, r"dataset cannot be 'cifar'; did you mean 'cifar10'\? .*digits"),
        ({"backbone": "vgg"}, r"backbone cannot be 'vgg'.*accepted: cnn, resnet18"),
        ({"optimizer": "adam"}, r"optimizer cannot be 'adam'; did you mean 'adamw'"),
        ({"precision": "fp8"}, r"precision cannot be 'fp8'.*bfloat16"),
        ({"backend": "cuda"}, r"backend cannot be 'cuda'.*auto, triton, torch"),
        ({"epochs": 0}, "epochs must be at least 1 and finite, got 0"),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"batch_size": 1}, "batch_size must be at least 2 and finite, got 1"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"temperature": math.nan}, "temperature must be a finite number above 0, got nan"),
        ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
        (
            {"method": "barlow", "temperature": 0.1},
            r"temperature is for method 'simclr', .*'pirl' or 'swav' only, got 0.1 with .*'barlow'",
        ),
        (
            {"lambda_param": 0.1},
            "lambda_param is for method 'pirl', 'barlow' or 'vicreg' only, got 0.1",
        ),
        ({"method": "vicreg", "nu_param": -1}, "nu_param must be at least 0 and finite, got -1"),
        ({"prototypes": 9}, "prototypes is for method 'swav' only, got 9 with method 'simclr'"),
        ({"method": "swav", "prototypes": 1}, "prototypes must be at least 2 and finite, got 1"),
        ({"method": "swav", "epsilon": 0}, "epsilon must be a finite number above 0, got 0"),
        ({"method": "swav", "queue_length": -1}, "queue_length must be at least 0 .* got -1"),
        ({"method": "swav", "local_size": 3}, "local_size must be at least 4 and finite, got 3"),
        (
            {"method": "swav", "local_scale_min": 0.5, "local_scale_max": 0.4},
            r"local_scale_min must be at most local_scale_max \(0.4\), got 0.5",
        ),
        (
            {"method": "swav", "global_scale_min": 1.5},
            "global_scale_min must be a share of the area, above 0 to 1, got 1.5",
        ),
        ({"lr": math.inf}, "lr must be at least 0 and finite, got inf"),
        ({"weight_decay": -1}, "weight_decay must be at least 0 and finite, got -1"),
        ({"seed": 2**64}, r"seed must be less than 2\^64, got 18446744073709551616"),
        ({"out": 3}, "out must be a string, got 3"),
        ({"image_size": 32}, "image_size is for dataset 'folder' only, got 32"),
        ({"epochs": 5, "warmup_epochs": 5}, r"warmup_epochs must be less than epochs \(5\), got 5"),
        ({"epoch": 5}, r"unknown option 'epoch'; did you mean 'epochs'\?"),
    ],
)
def test_a_bad_option_says_what_is_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(options)


def test_a_device_this_machine_lacks_is_an_error(tiny):
    for device in ("cuda:99", "abacus", "meta"):
        with pytest.raises(ValueError, match=rf"device must be auto.*got '{device}'"):
            pretrain(Config(**tiny(device=device)))
    assert not loop.Path(tiny()["out"]).exists()


def test_views_made_on_the_device_are_those_of_the_workers(tiny, tmp_path):
    by_workers = pretrain(Config(**tiny()))
    on_device = pretrain(Config(**tiny(augment_on="device", out=str(tmp_path / "on-device"))))
    assert_same_result(by_workers, on_device)


@pytest.mark.slow
def test_a_compiled_method_trains_as_it_is(tiny, tmp_path):
    plain = pretrain(Config(**tiny(epochs=1)))
    compiled = pretrain(Config(**tiny(epochs=1, compile=True, out=str(tmp_path / "compiled"))))
    assert compiled.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=2e-3)
    assert 0 < compiled.history[0]["loss_share"] < 1


def test_the_share_of_the_loss_is_that_of_its_calls_in_a_step(tiny, monkeypatch):
    class Slow(METHODS["simclr"]):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.loss.register_forward_hook(lambda *_: time.sleep(0.2))

    monkeypatch.setitem(METHODS, "simclr", Slow)
    (row,) = pretrain(Config(**tiny(epochs=1))).history
    assert row["loss_share"] == pytest.approx(0.2 / (row["seconds"] / 4), abs=0.2)


def test_items_of_several_images_give_positives_from_elsewhere(tiny, mnist):
    source = data.load("mnist", mnist)
    pairs = [((image, image.flip(2)), label) for image, label in source.pretrain]
    own = dataclasses.replace(source, pretrain=pairs)
    seen = []

    class Watched(loop.Trainer):
        def _placed(self, loaded):
            seen.append(loaded[0])
            return super()._placed(loaded)

    trainer = Watched(Config(**tiny(epochs=1)), own)
    trainer.views.transforms = [torch.nn.Identity()] * 2
    assert trainer.run().complete
    assert all(torch.equal(a, b.flip(3)) for a, b in seen)
    assert pretrain(Config(**tiny(epochs=1, out=tiny()["out"] + "-own")), data=own).complete


def test_a_backend_that_cannot_run_here_is_an_error(tiny, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: backend='triton' cannot run here"):
        pretrain(Config(**tiny(backend="triton")))


def test_an_unwritable_folder_is_an_error(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"out must be a folder that can be written, got .*file"):
        pretrain(Config(**tiny(out=str(tmp_path / "file" / "run"))))


def test_a_batch_larger_than_the_data_set_is_an_error(tiny):
    with pytest.raises(ValueError, match=r"batch_size must be at most 32.* got 64"):
        pretrain(Config(**tiny(batch_size=64)))
