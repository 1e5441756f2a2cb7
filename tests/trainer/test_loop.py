"""Pretraining runs: what they leave behind, how they stop, and how they go on."""

import copy
import csv
import dataclasses
import itertools
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
from small_methods import SMALL

pytest.importorskip("torchvision")
from PIL import Image

from fastssl.trainer import (
    Config,
    checkpoint,
    data,
    evaluate,
    load_backbone,
    loop,
    networks,
    optim,
    pretrain,
)
from fastssl.trainer.config import read_options
from fastssl.trainer.methods import METHODS

TIMES = ("seconds", "images_per_second", "loss_share")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


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

        def crash(folder, state, **options):
            if state["step"] == 8:
                raise OSError("the disk is full")
            save(folder, state, **options)

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


def test_float16_is_refused_on_a_cpu(tiny):
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16 on a CPU"):
        pretrain(Config(**tiny(precision="float16")))


@pytest.mark.parametrize(
    ("name", "value"), [("method", "barlow"), ("temperature", 0.1), ("seed", 7), ("lr", 0.5)]
)
def test_a_run_does_not_resume_with_another_option(tiny, name, value):
    pretrain(Config(**tiny(epochs=1)))
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, but the run .* was started with"):
        pretrain(Config(**tiny(**{"epochs": 1, name: value})), resume=True)


def test_a_finished_run_is_trained_for_longer(tiny, capsys):
    """With the schedule of all its epochs, and the warm-up that it had."""
    short = pretrain(Config(**tiny(epochs=2, warmup_epochs=1)))
    backbone = (short.path / "backbone.safetensors").read_bytes()
    for name in ("evaluation.json", "report.html"):
        (short.path / name).write_text("of the short run")
    run = pretrain(Config(**tiny(epochs=20)), resume=True)
    printed = capsys.readouterr().out
    assert "continuing" in printed
    assert "the backbone after epoch 2 is kept as backbone.epoch-2.safetensors" in printed
    assert len(run.history) == 20
    assert run.history[:2] == short.history
    rates = [row["lr"] for row in run.history]
    peak = Config(**tiny()).resolved().lr
    expected = [peak * optim.schedule(4 * epoch + 3, 80, 4) for epoch in range(20)]
    assert rates[2:] == pytest.approx(expected[2:])
    assert rates[1] < rates[2]  # the short one had come to its end
    assert (run.path / "backbone.epoch-2.safetensors").read_bytes() == backbone
    assert not (run.path / "evaluation.json").exists()
    assert not (run.path / "report.html").exists()
    options = read_options(run.path / "config.yaml")
    assert (options["epochs"], options["warmup_epochs"]) == (20, 1)
    with pytest.raises(
        ValueError, match=r"epochs must be at least 20, .*run was started with, got"
    ):
        pretrain(Config(**tiny(epochs=19)), resume=True)


def test_checkpoints_are_kept_by_epoch_and_by_accuracy(tiny, monkeypatch):
    accuracies = iter([0.2, 0.6, 0.6, 0.5, 0.4])
    monkeypatch.setattr(evaluate, "knn_check", lambda *_: next(accuracies))
    run = pretrain(Config(**tiny(epochs=5, knn_every=1, keep_best=True, keep_every=2)))
    kept = {path.name: checkpoint.load(path) for path in run.path.glob("checkpoint.*.pt")}
    steps = {name: state["step"] for name, state in kept.items()}
    assert steps == {
        **{"checkpoint.best.pt": 8, "checkpoint.epoch-2.pt": 8, "checkpoint.epoch-4.pt": 16},
        "checkpoint.previous.pt": 16,
    }
    assert kept["checkpoint.best.pt"]["history"][-1]["knn_accuracy"] == 0.6
    backbone = load_backbone(run.path / "checkpoint.epoch-4.pt")
    assert backbone.about == load_backbone(run.path).about
    assert torch.equal(
        backbone[0].weight, kept["checkpoint.epoch-4.pt"]["method"]["backbone.0.weight"]
    )


def test_a_kept_checkpoint_is_a_run_to_go_on_with(tiny, tmp_path):
    whole = pretrain(Config(**tiny(keep_every=1)))
    (tmp_path / "other").mkdir()
    (whole.path / "checkpoint.epoch-1.pt").rename(tmp_path / "other" / "checkpoint.pt")
    other = pretrain(Config(**tiny(out=str(tmp_path / "other"))), resume=True)
    assert_same_result(other, whole)


def test_an_early_checkpoint_says_that_it_does_not_tell_of_its_backbone(tiny):
    run = pretrain(Config(**tiny(epochs=1)))
    state = checkpoint.load(run.path / "checkpoint.pt")
    del state["about"]
    torch.save(state, run.path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of an early version"):
        load_backbone(run.path / "checkpoint.pt")


def test_a_longer_run_resumes_bit_for_bit(tiny, tmp_path, at_step):
    runs = []
    for name, stop in (("whole", None), ("stopped", 17)):
        options = tiny(out=str(tmp_path / name))
        pretrain(Config(**options))
        options["epochs"] = 6
        if stop:
            at_step(stop, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
            assert not pretrain(Config(**options), resume=True).complete
        runs.append(pretrain(Config(**options), resume=True))
    assert_same_result(*runs)


def test_other_images_of_the_same_number_are_refused(unlabelled, tmp_path):
    pretrain(Config(**unlabelled))
    (tmp_path / "run" / "backbone.safetensors").unlink()
    (tmp_path / "0.png").rename(tmp_path / "moved.png")
    with pytest.raises(ValueError, match=r"data_dir: .* as many images as .* not the same ones"):
        pretrain(Config(**unlabelled), resume=True)
    (tmp_path / "moved.png").rename(tmp_path / "0.png")
    (tmp_path / "elsewhere").mkdir()
    for image in tmp_path.glob("*.png"):
        image.rename(tmp_path / "elsewhere" / image.name)
    moved = {**unlabelled, "data_dir": str(tmp_path / "elsewhere")}
    assert pretrain(Config(**moved), resume=True).complete


def test_a_checkpoint_without_a_checksum_goes_on_by_the_number_of_images(unlabelled, tmp_path):
    run = pretrain(Config(**unlabelled))
    (tmp_path / "run" / "backbone.safetensors").unlink()
    state = checkpoint.load(run.path / "checkpoint.pt")
    for name in loop.LATER:
        del state[name]
    state["config"] = {k: v for k, v in state["config"].items() if k not in ("labels", "weights")}
    torch.save(state, run.path / "checkpoint.pt")
    (tmp_path / "0.png").rename(tmp_path / "moved.png")
    assert pretrain(Config(**unlabelled), resume=True).complete


@pytest.fixture
def cut_off(unlabelled, tmp_path):
    """Options of a run whose test split has a damaged image."""
    for i, (split, label) in enumerate(itertools.product(("train", "test"), ("cat", "dog"))):
        folder = tmp_path / "images" / split / label
        folder.mkdir(parents=True)
        for j in range(4):
            pixels = np.random.default_rng(4 * i + j).integers(0, 255, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{j}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    return {**unlabelled, "data_dir": str(tmp_path / "images"), "epochs": 4, "knn_every": 2}


def test_a_check_that_fails_is_told_and_training_goes_on(cut_off, capsys):
    run = pretrain(Config(**cut_off))
    assert run.complete
    assert [row["knn_accuracy"] for row in run.history] == [None] * 4
    told = [x for x in capsys.readouterr().out.splitlines() if x.startswith("no nearest neigh")]
    assert [line.split(" (")[0][-7:] for line in told] == ["epoch 2", "epoch 4"]
    assert all("test/dog/3.png cannot be read as an image" in line for line in told)


def test_what_made_a_check_fail_may_be_left_out_on_resuming(cut_off, tmp_path, at_step):
    at_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGINT))  # the last of epoch 2
    assert not pretrain(Config(**cut_off)).complete
    run = pretrain(Config(**{**cut_off, "damaged": "skip"}), resume=True)
    assert [row["knn_accuracy"] is None for row in run.history] == [True, False, True, False]
    assert read_options(run.path / "config.yaml")["damaged"] == "skip"
    (tmp_path / "images/train/cat/0.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"has 7 images, but the run in .* was started with 8"):
        pretrain(Config(**{**cut_off, "damaged": "skip"}), resume=True)


def test_how_often_neighbours_are_looked_for_may_change_on_resuming(tiny, at_step):
    at_step(5, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    assert not pretrain(Config(**tiny(knn_every=0))).complete
    run = pretrain(Config(**tiny(knn_every=1)), resume=True)
    assert [row["knn_accuracy"] is None for row in run.history] == [True, False, False]
    complete = pretrain(Config(**tiny(knn_every=2)), resume=True)
    assert complete.history == run.history
    assert read_options(run.path / "config.yaml")["knn_every"] == 2


def test_an_epoch_is_saved_before_its_check_which_a_resumed_run_makes_up_for(
    tiny, tmp_path, monkeypatch
):
    whole = pretrain(Config(**tiny(out=str(tmp_path / "whole"))))

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "knn_check", kill)
        with pytest.raises(KeyboardInterrupt):
            pretrain(Config(**tiny()))
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == 8
    assert saved["history"][1]["knn_accuracy"] is None
    resumed = pretrain(Config(**tiny()), resume=True)
    assert_same_result(resumed, whole)
    with (resumed.path / "metrics.csv").open(newline="") as file:
        assert [bool(row["knn_accuracy"]) for row in csv.DictReader(file)] == [False, True, True]


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


def test_a_run_begins_with_the_classes_and_what_was_left_out(unlabelled, tmp_path, capsys):
    for i, label in enumerate(("cat", "dog", ".ipynb_checkpoints") * 5):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), i).save(tmp_path / "images" / label / f"{i}.png")
    (tmp_path / "images" / "notes.txt").write_text("about them")
    pretrain(Config(**{**unlabelled, "data_dir": str(tmp_path / "images"), "knn_every": 0}))
    started, *told = capsys.readouterr().out.splitlines()[:5]
    assert started.startswith("simclr on folder: 8 images")
    assert told == [
        "2 classes, with images to train on + to test on: cat 4 + 1, dog 4 + 1",
        "left out, no images: .txt (1)",
        "left out, hidden: .ipynb_checkpoints (1)",
        "splits: every fifth image of a class is to test on",
    ]


@pytest.mark.parametrize("method", ["simclr", "swav"])
def test_a_transformer_of_timms_trains(unlabelled, method):
    options = {**unlabelled, "backbone": "timm/test_vit", "image_size": 32, "method": method}
    if method == "swav":
        options |= {**SMALL["swav"], "queue_length": 0, "local_size": 16}
    run = pretrain(Config(**options))
    assert load_backbone(run.path).about["architecture"] == "timm/test_vit"
    options |= {"out": str(run.path / "other"), "image_size": 24}
    with pytest.raises(ValueError, match=r"'timm/test_vit' does not take images \[3, 24, 24\]"):
        pretrain(Config(**options))
    if method == "swav":
        options |= {"image_size": 32, "local_size": 20}
        with pytest.raises(ValueError, match=r"'timm/test_vit' does not take images \[3, 20, 20\]"):
            pretrain(Config(**options))
    options |= {"backbone": "timm/test_vitt", "data_dir": "nowhere"}
    with pytest.raises(ValueError, match="did you mean timm/test_vit"):
        pretrain(Config(**options))


@pytest.mark.parametrize("method", ["simclr", "byol", "moco"])
def test_a_run_begins_with_the_weights_it_is_given_and_resumes_without_them(
    tiny, tmp_path, at_step, capsys, method
):
    first = pretrain(Config(**tiny(epochs=1, seed=3, out=str(tmp_path / "first"))))
    begun = load_backbone(first.path).state_dict()
    options = {"method": method, **SMALL[method], "weights": str(first.path)}
    seen = []

    def look(trainer):
        copies = [trainer.backbone, getattr(trainer.method, "key_backbone", None)]
        copies.append(trainer.method.target[0] if method == "byol" else None)
        seen.extend(copy.deepcopy(x.state_dict()) for x in copies if x is not None)

    at_step(0, look)
    capsys.readouterr()
    whole = pretrain(Config(**tiny(**options, out=str(tmp_path / "whole"))))
    assert f"beginning with the weights of {first.path}" in capsys.readouterr().out
    assert len(seen) == (1 if method == "simclr" else 2)
    for state in seen:
        assert all(torch.equal(x, begun[name]) for name, x in state.items())
    at_step(5, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    assert not pretrain(Config(**tiny(**options))).complete
    first.path.rename(tmp_path / "gone")
    assert_same_result(pretrain(Config(**tiny(**options)), resume=True), whole)


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
