"""The fastssl command: what it prints, and how it ends."""

import dataclasses
import os
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("torchvision")
from PIL import Image

from fastssl import cli
from fastssl.trainer import Config, data, evaluate, loop, pretrain, report, verify


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of 30 small images, and short few-label training."""
    for label, colour in (("blue", (20, 40, 230)), ("red", (230, 40, 20))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(30):
            noise = np.random.default_rng(i).integers(-20, 20, (16, 16, 3))
            image = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "images" / label / f"{i}.png")
    monkeypatch.setattr(evaluate, "DRAWS", 2)
    monkeypatch.setitem(evaluate.FEW_LABELS, "steps", 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPTIONS = [
    *("--dataset", "folder", "--data-dir", "images", "--image-size", "16"),
    *("--backbone", "cnn", "--batch-size", "12", "--workers", "0"),
]


def test_pretrain_goes_from_images_to_a_report_and_does_nothing_twice(folder, capsys):
    arguments = ["pretrain", *OPTIONS, "--epochs", "2", "--out", "run", "--resume"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed
    assert "linear probe" in printed
    assert "trained on 20 labels" in printed
    assert "report: run/report.html" in printed
    assert (folder / "run" / "report.html").stat().st_size > 1000

    written = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    assert cli.main(["pretrain", "--resume", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "is complete" in printed
    assert "linear probe" in printed
    assert written == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}

    (folder / "run" / "evaluation.json").unlink()
    assert cli.main(["evaluate", "run", "--labels", "50%", "20"]) == 0
    printed = capsys.readouterr().out
    assert "trained on 20 labels" in printed
    assert "trained on 24 labels" in printed  # half of the training split
    assert "linear probe after block3" in printed
    assert cli.main(["report", "run"]) == 0
    assert (folder / "run" / "evaluation.json").exists()


def test_an_interrupted_command_says_how_to_go_on_and_that_works(folder, capsys, monkeypatch):
    take = loop.Trainer._train_step

    def interrupt(trainer, views):
        os.kill(os.getpid(), signal.SIGINT)
        return take(trainer, views)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", interrupt)
        assert cli.main(["pretrain", *OPTIONS, "--epochs", "1", "--out", "run"]) == 130
    hint = capsys.readouterr().out.splitlines()[-1]
    assert hint.strip() == "fastssl pretrain --resume --out run"
    assert cli.main(hint.split()[1:]) == 0
    assert "continuing run at step 1 of 4" in capsys.readouterr().out


def test_a_longer_run_is_evaluated_and_drawn_anew(folder, capsys):
    assert cli.main(["pretrain", *OPTIONS, "--epochs", "1", "--out", "run"]) == 0
    page = (folder / "run" / "report.html").read_text()
    assert cli.main(["pretrain", "--resume", "--epochs", "2", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "continuing run at step 4 of 8" in printed
    assert printed.count("accuracy on the test split") == 2
    assert (folder / "run" / "report.html").read_text() != page
    assert cli.main(["pretrain", "--resume", "--epochs", "1", "--out", "run"]) == 2
    assert "epochs must be at least 2, those that the run in run" in capsys.readouterr().err


def test_a_few_labelled_images_have_a_report_without_label_efficiency(folder, capsys):
    for label in ("blue", "red"):
        for i in range(2, 30):
            (folder / "images" / label / f"{i}.png").unlink()
    arguments = ["pretrain", *OPTIONS, "--batch-size", "2", "--epochs", "1", "--out", "run"]
    assert cli.main(arguments) == 0
    assert "left out 20, 50, 100, 200 labels" in capsys.readouterr().out
    page = (folder / "run" / "report.html").read_text()
    assert "At which depth is it known?" in page
    assert "Learning from few labels" not in page


@pytest.mark.parametrize(("module", "name"), [(evaluate, "evaluate_run"), (report, "write_report")])
def test_an_interrupted_evaluation_says_how_to_go_on(folder, capsys, monkeypatch, module, name):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, mock.Mock(side_effect=KeyboardInterrupt))
        assert cli.main(["pretrain", *OPTIONS, "--epochs", "1", "--out", "run"]) == 130
    said, hint = capsys.readouterr().out.splitlines()[-2:]
    assert said == "stopped after pretraining; continue with:"
    assert cli.main(hint.split()[1:]) == 0
    assert (folder / "run" / "report.html").exists()


def test_an_option_of_the_runs_own_method_may_be_said_again(folder, capsys):
    own = ["--method", "moco", "--queue-length", "24"]
    assert cli.main(["pretrain", *OPTIONS, *own, "--epochs", "1", "--out", "run"]) == 0
    again = ["pretrain", "--resume", "--out", "run", "--queue-length"]
    assert cli.main([*again, "24"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert cli.main([*again, "36"]) == 2
    error = capsys.readouterr().err
    assert "queue_length is 36, but the run in run was started with 24" in error
    (folder / "run" / "config.yaml").unlink()
    assert cli.main([*again, "24"]) == 0


def test_a_run_of_other_data_is_refused_where_they_cannot_be_given(folder, capsys):
    digits = data.load("digits")
    few = [digits.train[i] for i in range(24)]
    own = dataclasses.replace(digits, name="own", pretrain=few, train=None, test=None)
    config = Config(epochs=1, batch_size=8, knn_every=0, workers=0, out="run")
    pretrain(config, data=own)
    assert "simclr on own: 24 images" in capsys.readouterr().out
    for command in ("evaluate run", "report run", "pretrain --resume --out run"):
        assert cli.main(command.split()) == 2
        error = capsys.readouterr().err
        assert "data: the run in run was given its data from Python" in error
        assert error.count("\n") == 1
    assert pretrain(config, resume=True, data=own).complete
    assert evaluate.evaluate_run("run", data=own) == {"skipped": "data set 'own' has no labels"}
    assert "simclr on own" in report.write_report("run", data=own).read_text()


def test_an_error_without_a_word_is_named_by_its_kind(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr(verify, "verify", fail)
    assert cli.main(["verify"]) == 2
    assert capsys.readouterr().err == "fastssl: error: OSError\n"


def test_the_command_line_overrides_the_file(folder, capsys):
    (folder / "options.yaml").write_text("epochs: 0\nout: elsewhere\n")
    arguments = ["pretrain", "--config", "options.yaml", *OPTIONS]
    assert cli.main(arguments) == 2
    assert "epochs must be at least 1" in capsys.readouterr().err
    assert cli.main([*arguments, "--epochs", "1", "--lr", "-1"]) == 2
    assert "lr must be at least 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrain --method simclr3", "method cannot be 'simclr3'; did you mean 'simclr'?"),
        ("pretrain --dataset digit", "did you mean 'digits'?"),
        ("pretrain --epochs ten", "argument --epochs: invalid int value: 'ten'"),
        (
            "pretrain --epoch 3",
            "unrecognized arguments: --epoch 3 (see fastssl pretrain --help)",
        ),
        ("pretrain --prototypes 9", "prototypes is for method 'swav' only, got 9 with method"),
        (
            "pretrain --method swav --local-scale-min 0.9",
            "local_scale_min must be at most local_scale_max (0.6), got 0.9",
        ),
        ("pretrain --temperature 0", "temperature must be a finite number above 0, got 0.0"),
        ("pretrain --config nothing.yaml", "config file nothing.yaml cannot be read"),
        (
            "pretrain --config byol-imagenett",
            "there is none, and no preset 'byol-imagenett'; did you mean 'byol-imagenet'?",
        ),
        ("pretrain --config broken.yaml", 'in "broken.yaml", line 2'),
        ("pretrain --config words.yaml", "config file words.yaml must hold lines such as"),
        ("pretrain --config typo.yaml", "unknown option 'epohcs'; did you mean 'epochs'?"),
        ("pretrain --dataset folder --data-dir empty", "data_dir: no images in empty"),
        ("pretrain --out words.yaml/run", "out must be a folder that can be written"),
        ("evaluate nothing", "nothing"),
        ("report nothing", "nothing"),
        ("verify --method simclr3", "simclr3"),
        ("verify --out words.yaml/run", "out must be a folder that can be written"),
        ("evaluate", "arguments are required: RUN"),
        ("pretrane", "invalid choice: 'pretrane'"),
        ("", "arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.yaml").write_text("just words")
    (tmp_path / "typo.yaml").write_text("epohcs: 3")
    (tmp_path / "broken.yaml").write_text("epochs: 3\nlr: [1, 2\n")
    try:
        status = cli.main(arguments.split())
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("fastssl")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("pretrain --dataset folder --data-dir=~/photos", "photos"),
        ("pretrain --config options.yaml", "photos of the file"),
        ("pretrain --config=~/none.yaml", "none.yaml"),
        ("pretrain --out=~/file/run", "file/run"),
        ("pretrain --resume --out=~/file/run", "file/run"),
        ("evaluate ~/run", "run"),
        ("report ~/run", "run"),
        ("verify --out ~/file/run", "file/run"),
    ],
)
def test_a_tilde_is_the_users_folder(tmp_path, monkeypatch, capsys, arguments, name):
    home = tmp_path / "home"
    home.mkdir()
    (home / "file").write_text("in the way")
    (tmp_path / "options.yaml").write_text("dataset: folder\ndata_dir: ~/photos of the file")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    assert str(home / name) in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


def test_images_that_moved_are_found_by_data_dir(folder, capsys):
    arguments = ["pretrain", *OPTIONS, "--epochs", "1", "--out", "run"]
    assert cli.main(arguments) == 0
    (folder / "images").rename(folder / "moved")
    (folder / "run" / "evaluation.json").unlink()
    for command in ("evaluate run --labels 20", "report run", "pretrain --resume --out run"):
        capsys.readouterr()
        assert cli.main(command.split()) == 2
        assert "data_dir must be a folder of images" in capsys.readouterr().err
        assert cli.main([*command.split(), "--data-dir", "moved"]) == 0
    assert cli.main(["report", "run"]) == 0  # the run knows the place now


def test_damaged_images_are_looked_for_once(folder, capsys):
    (folder / "images" / "red" / "bad.png").write_bytes(b"")
    arguments = ["pretrain", *OPTIONS, "--damaged", "skip", "--epochs", "1", "--out", "run"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("images are damaged and left out") == 1


def test_a_folder_without_classes_is_told_once(folder, capsys):
    assert cli.main(["pretrain", *OPTIONS, "--data-dir", "images/red", "--epochs", "1"]) == 0
    assert capsys.readouterr().out.count("has no labels") == 1


def test_a_run_of_another_method_is_named_before_its_options(folder, capsys):
    arguments = ["pretrain", *OPTIONS, "--epochs", "1", "--out", "run"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    assert cli.main(["pretrain", "--method", "barlow", "--resume", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert "method is 'barlow', but the run in run was started with 'simclr'" in error


def test_a_lost_config_is_taken_from_the_checkpoint(folder, capsys):
    assert cli.main(["pretrain", *OPTIONS, "--epochs", "1", "--out", "a run"]) == 0
    before = (folder / "a run" / "config.yaml").read_text()
    (folder / "a run" / "config.yaml").unlink()
    capsys.readouterr()
    assert cli.main(["report", "a run"]) == 2
    assert "fastssl pretrain --resume --out 'a run' writes it anew" in capsys.readouterr().err
    assert cli.main(["pretrain", "--resume", "--out", "a run"]) == 0
    assert (folder / "a run" / "config.yaml").read_text() == before


def test_help_tells_defaults_and_choices(capsys):
    told = {}
    for command in ("pretrain", "verify", "reproduce"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        told[command] = " ".join(capsys.readouterr().out.split())
    assert "--seed N seed of weights, order and views (default 0)" in told["pretrain"]
    assert "--data-dir DIR" in told["pretrain"]
    assert "simclr, barlow, vicreg" in told["verify"]
    assert "few-labels, methods, collapse" in told["reproduce"]
    assert "barlow, vicreg with head" in told["reproduce"]


def test_an_error_in_a_worker_is_one_line_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(b"not an image")
    arguments = "pretrain --dataset folder --data-dir images --batch-size 2 --epochs 1 --workers 1"
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastssl: error: images/")
    assert "cannot be read as an image" in error


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in cli.COMMANDS)],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    assert "usage: fastssl" in capsys.readouterr().out


def test_info_names_versions_devices_and_the_backend(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("fastssl", "torch", "python", "cores", "backend 'auto'", "cpu"):
        assert word in printed


def test_verify_ends_with_its_verdict(monkeypatch, tmp_path):
    for verdict, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(verify, "verify", lambda *a, verdict=verdict, **k: verdict)
        assert cli.main(["verify", "--out", str(tmp_path)]) == status


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fastssl.trainer.config")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert cli.main(["pretrain"]) == 2
    error = capsys.readouterr().err
    assert "yaml is not installed; fastssl's 'train' extra has it" in error


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "fastssl.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: fastssl" in done.stdout
