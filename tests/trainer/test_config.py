"""The options of a run: what they may be, their recipes, presets and files."""

import math
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torchvision")
from fastssl.trainer import Config, pretrain
from fastssl.trainer.config import METHOD_OPTIONS, presets, read_options
from fastssl.trainer.methods import METHODS


def test_options_that_are_no_config_are_named():
    with pytest.raises(TypeError, match="config must be a Config, got dict"):
        pretrain({"epochs": 1})


@pytest.mark.parametrize("preset", presets())
def test_a_preset_is_a_config_of_its_own_method(preset):
    options = read_options(preset)
    assert preset.startswith(options["method"])
    config = Config.from_dict(options).resolved()
    assert {name: getattr(config, name) for name in options} == options


def test_options_survive_a_file(tmp_path):
    config = Config(dataset="cifar10", lr=0.3, optimizer="lars")
    config.save(tmp_path / "options.yaml")
    assert Config.from_dict(read_options(tmp_path / "options.yaml")) == config


def test_a_tilde_is_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(dataset="folder", data_dir="~/photos", out=Path("~/runs/x"))
    assert (config.data_dir, config.out) == (f"{tmp_path}/photos", f"{tmp_path}/runs/x")


def test_every_data_set_has_a_complete_recipe():
    for name in ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "stl10", "folder"):
        for method, made in METHODS.items():
            config = Config(dataset=name, method=method).resolved()
            missing = {k for k, v in vars(config).items() if v is None}
            of_folders = {"image_size", "train_split", "test_split"}
            assert (
                missing
                == {"workers", "weights", *of_folders, *METHOD_OPTIONS} - made.defaults.keys()
            )
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
        ({"backbone": "tim/vit"}, r"backbone cannot be 'tim/vit'.*resnet50, timm/NAME"),
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
        ({"method": "moco", "momentum": 1.5}, "momentum must be from 0 to 1, got 1.5"),
        ({"method": "pirl", "lambda_param": 1.5}, "lambda_param must be at most 1 .*, got 1.5"),
        ({"method": "instance", "negatives": -1}, "negatives must be at least 0"),
        ({"method": "instance", "projection_hidden": 8}, "projection_hidden is for method"),
        ({"method": "simclr", "momentum": 0.5}, "momentum is for method .*'moco'"),
        ({"method": "jigsaw", "permutations": 1}, "permutations must be at least 2 .* got 1"),
        (
            {"method": "jigsaw", "permutations": 362881},
            "permutations must be at most 362880, all of nine patches, got 362881",
        ),
        ({"permutations": 9}, "permutations is for method 'jigsaw' only, got 9"),
        ({"method": "byol", "momentum": 1.5}, "momentum must be from 0 to 1, got 1.5"),
        ({"method": "byol", "temperature": 0.1}, "temperature is for method .* 'byol'"),
        ({"method": "barlow", "prediction_hidden": 9}, "for method 'byol' or 'simsiam' only, got"),
        ({"method": "rotation", "projection_dim": 9}, "projection_dim is for method 'simclr'"),
        ({"method": "swav", "augmentation": "byol"}, "augmentation is for method 'simclr', "),
        ({"augmentation": "moco"}, "augmentation cannot be 'moco'.*default, simclr, byol"),
        ({"epoch": 5}, r"unknown option 'epoch'; did you mean 'epochs'\?"),
    ],
)
def test_a_bad_option_says_what_is_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(options)


def test_a_learning_rate_tuned_for_adamw_is_for_adamw_alone():
    for method in ("byol", "simsiam", "rotation", "jigsaw", "relative-patch"):
        tuned = Config(method=method).resolved()
        assert (tuned.batch_size, tuned.lr) == (64, METHODS[method].recipes["digits"]["lr"])
        assert Config(method=method, optimizer="sgd").resolved().lr == 0.06 * 64 / 256
        assert Config(method=method, lr=0.7).resolved().lr == 0.7
