"""Every option of a pretraining run, its default, and what it may be."""

import dataclasses
import difflib
import math
import typing
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastssl.ops.backend import BACKENDS
from fastssl.trainer import checkpoint
from fastssl.trainer.datasets import FOLDER_OPTIONS, GREY
from fastssl.trainer.methods import METHODS
from fastssl.trainer.networks import BACKBONES, HEAD_NORMS, TIMM

PATHS = ("data_dir", "out", "weights")  # options in which ~ is the user's folder
PRESETS = Path(__file__).parent / "presets"
# What an option left at None becomes, by data set.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"backbone": "cnn", "epochs": 50, "batch_size": 256, "knn_every": 1},
    "mnist": {"backbone": "cnn", "epochs": 20, "batch_size": 512, "knn_every": 5},
    "fashion-mnist": {"backbone": "cnn", "epochs": 40, "batch_size": 512, "knn_every": 5},
    "cifar10": {"backbone": "resnet18", "epochs": 200, "batch_size": 512, "knn_every": 5},
    "cifar100": {"backbone": "resnet18", "epochs": 200, "batch_size": 512, "knn_every": 5},
    "stl10": {"backbone": "resnet18", "epochs": 100, "batch_size": 256, "knn_every": 5},
    "folder": {"backbone": "resnet18", "epochs": 100, "batch_size": 256, "knn_every": 5},
}
# Learning rate, which for SGD and LARS is per 256 images of the batch, and weight decay.
OPTIMIZERS = {"adamw": (1e-3, 1e-4), "sgd": (0.06, 5e-4), "lars": (0.3, 1e-6)}
# Each is taken by some methods, those that have a default for it.
METHOD_OPTIONS = (
    *("temperature", "lambda_param", "mu_param", "nu_param", "epsilon", "prototypes"),
    *("freeze_epochs", "queue_length", "queue_start", "negatives", "momentum"),
    *("local_crops", "local_size", "local_scale_min", "local_scale_max", "global_scale_min"),
    *("projection_hidden", "projection_dim", "prediction_hidden", "permutations", "augmentation"),
)


def _option(default: Any, help: str, choices: Any = None, least: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass
class Config:
    """The options of a run.

    An option left at None has a default that depends on another one. `resolved` fills it in, and
    the types below are those that it then has.

    Example:
        >>> Config(dataset="cifar10", epochs=100).resolved().backbone
        'resnet18'
    """

    method: str = _option("simclr", "how to pretrain", METHODS)
    dataset: str = _option("digits", "what to pretrain on", RECIPES)
    data_dir: str = _option("data", "where data sets are kept, or the image folder itself")
    image_size: int = _option(None, "side of a folder's images (default 224)", least=8)
    damaged: str = _option(
        "refuse",
        "a folder's images that cannot be read: stop at the first, or look for them at the start "
        "and leave them out",
        ("refuse", "skip"),
    )
    labels: bool = _option(
        True, "a folder's subfolders are its classes; if not, all of its images have no labels"
    )
    train_split: str = _option(
        None, "the subfolder with a folder's classes to train on (default by its usual names)"
    )
    test_split: str = _option(None, "the subfolder with those to test on, likewise")
    backbone: str = _option(
        None,
        "network to pretrain, any of timm's as timm/NAME (default by data set)",
        (*BACKBONES, f"{TIMM}NAME"),
    )
    weights: str = _option(
        None,
        "weights to begin with: a safetensors file, a run, a checkpoint, or timm/NAME for those "
        "that timm has or downloads (default random ones)",
    )
    epochs: int = _option(None, "passes over the images (default by data set)", least=1)
    batch_size: int = _option(None, "images per step (default by data set)", least=2)
    temperature: float = _option(
        None, "temperature of a contrastive loss and of swav's (default by method and data set)"
    )
    lambda_param: float = _option(
        None,
        "weight of barlow's redundancy (default 5e-3), of vicreg's invariance (25), of pirl's "
        "patches (0.5)",
        least=0,
    )
    mu_param: float = _option(None, "weight of vicreg's variance (default 25)", least=0)
    nu_param: float = _option(None, "weight of vicreg's covariance (default 1)", least=0)
    prototypes: int = _option(None, "swav's prototypes (default by data set)", least=2)
    epsilon: float = _option(None, "of swav's codes: smaller is sharper (default by data set)")
    freeze_epochs: int = _option(
        None, "epochs in which swav's prototypes stay as they are (default 1)", least=0
    )
    queue_length: int = _option(
        None,
        "earlier images in swav's assignment, or as moco's negatives, 0 for none (default by data "
        "set)",
        least=0,
    )
    negatives: int = _option(
        None,
        "rows of the memory bank that are negatives in a step, 0 for all (default by data set)",
        least=0,
    )
    momentum: float = _option(
        None,
        "what moco's key encoder, byol's target (at first) or a row of a memory bank keeps in a "
        "step (default by method and data set)",
    )
    queue_start: int = _option(None, "epochs before swav's queue is used (default 15)", least=0)
    local_crops: int = _option(
        None, "swav's local crops of an image (default by data set)", least=0
    )
    local_size: int = _option(None, "side of a local crop (default by data set)", least=4)
    local_scale_min: float = _option(
        None, "least share of an image's area in a local crop (default by data set)"
    )
    local_scale_max: float = _option(None, "largest share (default by data set)")
    global_scale_min: float = _option(
        None, "least share in a global crop, 1 for no crop (default by data set)"
    )
    projection_hidden: int = _option(
        None, "hidden width of the projection head (default by method)", least=1
    )
    projection_dim: int = _option(
        None, "width of the embeddings the loss sees (default by method)", least=1
    )
    prediction_hidden: int = _option(
        None, "hidden width of the predictor of byol and simsiam (default by data set)", least=1
    )
    permutations: int = _option(
        None, "orders of jigsaw's nine patches to tell apart (default by data set)", least=2
    )
    augmentation: str = _option(
        None,
        "the data set's views, or for colour images those of simclr or the two of byol on ImageNet "
        "(default by method and data set)",
        ("default", "simclr", "byol"),
    )
    head_norm: str = _option("batch", "normalisation in the projection head", HEAD_NORMS)
    optimizer: str = _option("adamw", "optimiser", OPTIMIZERS)
    lr: float = _option(None, "peak learning rate (default by optimiser and batch)", least=0)
    weight_decay: float = _option(None, "weight decay (default by optimiser)", least=0)
    vector_lr_scale: float = _option(
        1.0, "learning rate of biases and norms, as a share of that of weights", least=0
    )
    warmup_epochs: int = _option(
        None, "epochs of linear warm-up (default a tenth of them, at most 10)", least=0
    )
    precision: str = _option("float32", "autocast precision", ("float32", "bfloat16", "float16"))
    seed: int = _option(0, "seed of weights, order and views", least=0)
    workers: int = _option(
        None, "processes that make views, 0 for none (default by number of cores)", least=0
    )
    augment_on: str = _option(
        "workers",
        "where views are made: by the workers, or image by image on the device, which pays where "
        "cores are few",
        ("workers", "device"),
    )
    compile: bool = _option(False, "compile the networks and the loss with torch.compile")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps ...")
    backend: str = _option("auto", "what runs the loss", BACKENDS)
    knn_every: int = _option(
        None, "epochs between nearest-neighbour checks, 0 for none (default by data set)", least=0
    )
    keep_best: bool = _option(
        False, "keep the checkpoint of the best nearest-neighbour check, as checkpoint.best.pt"
    )
    keep_every: int = _option(
        0, "epochs between checkpoints that are kept, as checkpoint.epoch-N.pt, 0 for none", least=0
    )
    out: str = _option(None, "folder of the run (default runs/METHOD-DATASET)")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Config)
        for option in dataclasses.fields(self):
            value = _checked(option, hints[option.name], getattr(self, option.name))
            setattr(self, option.name, value)
        for name in METHOD_OPTIONS:
            if getattr(self, name) is not None and name not in METHODS[self.method].defaults:
                takers = [key for key, method in METHODS.items() if name in method.defaults]
                raise ValueError(
                    f"{name} is for method {_listed(takers)} only, got "
                    f"{getattr(self, name)} with method {self.method!r}"
                )
        for name in ("temperature", "epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be less than 2^64, got {self.seed}")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {self.momentum}")
        if self.method == "pirl" and (self.lambda_param or 0) > 1:
            raise ValueError(
                f"lambda_param must be at most 1 with method 'pirl', got {self.lambda_param}"
            )
        if (self.permutations or 0) > math.factorial(9):
            raise ValueError(
                f"permutations must be at most {math.factorial(9)}, all of nine patches, "
                f"got {self.permutations}"
            )
        if self.augmentation in ("simclr", "byol") and self.dataset in GREY:
            raise ValueError(
                f"augmentation {self.augmentation!r} is for colour images only, got it with "
                f"dataset {self.dataset!r}"
            )
        for name in ("local_scale_min", "local_scale_max", "global_scale_min"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be a share of the area, above 0 to 1, got {value}")
        if (self.local_scale_min or 0) > (self.local_scale_max or 1):
            raise ValueError(
                f"local_scale_min must be at most local_scale_max ({self.local_scale_max}), "
                f"got {self.local_scale_min}"
            )
        for name in FOLDER_OPTIONS:
            value = getattr(self, name)
            if value != getattr(Config, name) and self.dataset != "folder":
                raise ValueError(
                    f"{name} is for dataset 'folder' only, got {value} with dataset "
                    f"{self.dataset!r}"
                )
        epochs = self.epochs or self._recipe()["epochs"]
        if self.warmup_epochs is not None and self.warmup_epochs >= epochs:
            raise ValueError(
                f"warmup_epochs must be less than epochs ({epochs}), got {self.warmup_epochs}"
            )

    def _recipe(self) -> dict[str, Any]:
        """The defaults of the method and of the data set, and those of the one on the other."""
        method = METHODS[self.method]
        of_both = method.recipes.get(self.dataset, {})
        return {**method.defaults, **RECIPES[self.dataset], **of_both}

    def resolved(self) -> "Config":
        """A copy in which every default that depends on another option is filled in."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        recipe = self._recipe()
        if self.optimizer != "adamw":
            recipe.pop("lr", None)  # those of recipes are AdamW's
        full = {**recipe, **given}
        lr, weight_decay = OPTIMIZERS[self.optimizer]
        if self.optimizer == "adamw":
            lr *= 5 if full["backbone"] == "cnn" else 1  # a small network takes large steps
        else:
            lr *= full["batch_size"] / 256
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "warmup_epochs": min(10, full["epochs"] // 10),
            "out": f"runs/{self.method}-{self.dataset}",
        }
        return Config(**{**defaults, **full})

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "Config":
        """The Config with these options; an unknown one raises ValueError, naming the closest."""
        names = [option.name for option in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"unknown option {_unknown(str(name), names)}")
        return cls(**options)

    def save(self, path: str | Path) -> None:
        """Write the options to a YAML file, whole or not at all."""
        checkpoint.write(Path(path), self.text())

    def text(self) -> bytes:
        """The content of that file."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False).encode()


def presets() -> list[str]:
    """The names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_options(path: str | Path) -> dict[str, Any]:
    """The options that a YAML file, or the preset of that name, sets."""
    path = PRESETS / f"{path}.yaml" if str(path) in presets() else checkpoint.expanded(path)
    try:
        with open(path, encoding="utf-8") as file:  # whose name and line an error then has
            options = yaml.safe_load(file)
    except FileNotFoundError:
        raise ValueError(
            f"config file {path} cannot be read: there is none, and no preset "
            f"{_unknown(str(path), presets())}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"config file {path} cannot be read: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(options, dict):
        raise ValueError(
            f"config file {path} must hold lines such as 'epochs: 20', got {type(options).__name__}"
        )
    return options


def _listed(names: list[str]) -> str:
    *rest, last = map(repr, names)
    return f"{', '.join(rest)} or {last}" if rest else last


def _unknown(name: str, names: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name!r}{hint} (accepted: {', '.join(names)})"


def _checked(option: "dataclasses.Field[Any]", kind: Any, value: Any) -> Any:
    """The value of one option as its type, or a ValueError that says what is accepted."""
    if value is None and option.default is None:
        return None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError):  # YAML reads 1e-3 as a string
            value = float(value)
    if option.name in PATHS and isinstance(value, (Path, str)):
        value = str(checkpoint.expanded(value))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ValueError(f"{option.name} must be {words[kind]}, got {value!r}")
    choices, least = option.metadata["choices"], option.metadata["least"]
    free = tuple(x.removesuffix("NAME") for x in choices or () if x.endswith("/NAME"))
    if choices and value not in choices and not value.startswith(free):
        raise ValueError(f"{option.name} cannot be {_unknown(value, choices)}")
    if least is not None and not least <= value < math.inf:
        raise ValueError(f"{option.name} must be at least {least} and finite, got {value}")
    return value
