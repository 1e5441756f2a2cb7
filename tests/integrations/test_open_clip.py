"""Our losses in open_clip's place: its arguments and values, its factory, and its own training."""

import importlib
import importlib.util
import inspect
import json
import logging
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accuracy import value_and_gradients
from PIL import Image
from torch import Tensor, nn

import fastssl
from fastssl import functional
from fastssl.integrations.open_clip import REPLACEMENTS, CoCaLoss, DistillClipLoss

pytest.importorskip("open_clip")
import open_clip

DOUBLE = torch.float64
CLASSES = REPLACEMENTS["open_clip.loss"]
WEIGHTS = {CoCaLoss: (2.0, 0.5)}  # what must be given


def features(n: int, d: int) -> list[Tensor]:
    image = torch.randn(n, d, dtype=DOUBLE)
    return [nn.functional.normalize(x, dim=1) for x in (image, image + torch.randn_like(image))]


def captions(n: int) -> tuple[Tensor, Tensor]:
    """Scores of 11 tokens at 5 places, and tokens of which some are padding."""
    return torch.randn(n, 5, 11, dtype=DOUBLE), torch.randint(11, (n, 5))


@pytest.mark.parametrize("ours", CLASSES)
def test_arguments_are_open_clips(ours: type[nn.Module]) -> None:
    theirs = getattr(open_clip.loss, ours.__name__)
    for pair in ((ours, theirs), (ours.forward, theirs.forward)):
        found, expected = (
            [(p.name, p.default) for p in inspect.signature(each).parameters.values()]
            for each in pair
        )
        assert found[: len(expected)] == expected


@pytest.mark.parametrize("ours", CLASSES)
def test_options_are_attributes_as_open_clips_are(ours: type[nn.Module]) -> None:
    given = WEIGHTS.get(ours, ())
    options = {"rank": 1, "world_size": 3, "cache_labels": True}
    criterion = ours(*given, **options)
    theirs = getattr(open_clip.loss, ours.__name__)(*given, **options)
    for name in inspect.signature(theirs.__class__).parameters:
        if name not in ("use_horovod", "dist_impl", "pad_id"):
            assert getattr(criterion, name) == getattr(theirs, name)
    assert "world_size=3" in repr(criterion)


def test_clips_relatives_are_clips() -> None:
    """As open_clip's are, for who asks."""
    assert issubclass(CoCaLoss, fastssl.ClipLoss)
    assert issubclass(DistillClipLoss, fastssl.ClipLoss)


@pytest.mark.parametrize("chunk_size", [None, 0, 4, 1000])
def test_chunks_change_nothing(chunk_size: int | None) -> None:
    z = features(9, 6)
    criterion = fastssl.SigLipLoss(chunk_size=chunk_size)
    assert criterion.chunk_size == chunk_size
    assert torch.equal(criterion(*z, 5.0, -1.0), fastssl.SigLipLoss()(*z, 5.0, -1.0))


def test_bad_chunks_are_named() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 0, got -1"):
        fastssl.SigLipLoss(chunk_size=-1)
    with pytest.raises(TypeError, match="chunk_size must be a whole number, got float"):
        fastssl.SigLipLoss(chunk_size=1.5)


def of_coca(criterion: nn.Module) -> Callable[..., Tensor]:
    return lambda image, text, logits, scale, labels: sum(
        criterion(image, text, logits, labels, scale)
    )


@pytest.mark.parametrize("pad_id", [0, 3])
@pytest.mark.parametrize("weights", [(2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_coca_is_open_clips(weights: tuple[float, float], pad_id: int) -> None:
    logits, labels = captions(17)
    scale = torch.tensor(14.3, dtype=DOUBLE)
    ours, theirs = (cls(*weights, pad_id=pad_id) for cls in (CoCaLoss, open_clip.loss.CoCaLoss))
    given = [*features(17, 9), logits, scale] if weights[1] else [logits]
    if weights[1]:
        found, expected = (
            value_and_gradients(of_coca(each), given, fixed=[labels]) for each in (ours, theirs)
        )
    else:  # features get no gradient
        pair = features(17, 9)
        found, expected = (
            value_and_gradients(lambda x, each=each: sum(each(*pair, x, labels, scale)), given)
            for each in (ours, theirs)
        )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    named = ours(*features(17, 9), logits, labels, scale, output_dict=True)
    assert list(named) == ["contrastive_loss", "caption_loss"]


def test_coca_names_bad_options() -> None:
    with pytest.raises(TypeError, match="caption_loss_weight must be a number, got str"):
        CoCaLoss("x", 1.0)
    with pytest.raises(ValueError, match="clip_loss_weight must be finite, got nan"):
        CoCaLoss(1.0, float("nan"))
    with pytest.raises(TypeError, match="pad_id must be a whole number, got float"):
        CoCaLoss(1.0, 1.0, 0.5)
    assert "clip_loss_weight=0.5" in repr(CoCaLoss(2.0, 0.5))


@pytest.mark.parametrize("scales", [(1.0, 1.0), (14.3, 100.0), (100.0, 50.0)])
def test_distillation_is_open_clips(scales: tuple[float, float]) -> None:
    scale, dist_scale = (torch.tensor(x, dtype=DOUBLE) for x in scales)
    student, teacher = [*features(17, 9), scale], [*features(17, 5), dist_scale]
    ours, theirs = DistillClipLoss(), open_clip.loss.DistillClipLoss()
    for weights in ((1, 0), (0, 1), (1, 3)):

        def weighed(criterion: nn.Module, *given: Tensor, weights=weights) -> Tensor:
            return sum(w * x for w, x in zip(weights, criterion(*given), strict=True))

        found, expected = (
            value_and_gradients(partial(weighed, each), student, fixed=teacher)
            for each in (ours, theirs)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    named = ours(*student, *teacher, output_dict=True)
    torch.testing.assert_close(named, theirs(*student, *teacher, output_dict=True))
    losses = functional.distill_clip(*student, *teacher)
    assert tuple(named.values()) == losses


def test_distillation_takes_scales_of_one_element() -> None:
    """Those of models made with nonscalar_logit_scale."""
    student, teacher = features(8, 4), features(8, 4)
    expected = DistillClipLoss()(*student, 5.0, *teacher, 7.0)
    given = (torch.tensor([x], dtype=DOUBLE) for x in (5.0, 7.0))
    found = DistillClipLoss()(*student, next(given), *teacher, next(given))
    torch.testing.assert_close(found, expected)


def test_distillation_goes_in_no_ring() -> None:
    with pytest.raises(ValueError, match="exchange must be 'auto' or 'gather' with a teacher"):
        DistillClipLoss(exchange="ring")


def test_distillation_needs_as_many_ranks_as_it_was_told() -> None:
    with pytest.raises(ValueError, match=r"world_size must be .* process group, 1, got 2"):
        DistillClipLoss(world_size=2)(*features(6, 4), 5.0, *features(6, 4), 5.0)


def arguments(**options: object) -> Namespace:
    """What open_clip's training hands to its factory."""
    given = {
        "distill": False,
        "model": "ViT-B-32",
        "siglip": False,
        "local_loss": False,
        "gather_with_grad": False,
        "rank": 0,
        "world_size": 1,
        "horovod": False,
        "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
        "loss_dist_impl": None,
    }
    return Namespace(**given | options)


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({}, fastssl.ClipLoss),
        ({"siglip": True}, fastssl.SigLipLoss),
        ({"model": "coca_ViT-B-32"}, CoCaLoss),
        ({"distill": True}, DistillClipLoss),
    ],
)
def test_the_factory_makes_our_losses(options: dict[str, object], ours: type[nn.Module]) -> None:
    with fastssl.patch("open_clip", verbose=False):
        assert type(open_clip.create_loss(arguments(**options))) is ours
        assert getattr(open_clip.loss, ours.__name__) is ours
    assert type(open_clip.create_loss(arguments(**options))).__module__ == "open_clip.loss"


VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
MODELS = {
    "tiny": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "coca_tiny": {
        "embed_dim": 32,
        "vision_cfg": VISION | {"output_tokens": True, "attentional_pool": True},
        "text_cfg": TEXT | {"output_tokens": True, "embed_cls": True},
        "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
        "custom_text": True,
    },
}
READERS = {"braceexpand": (), "pandas": (), "webdataset": ("filters", "tariterators")}


class Absent(ModuleType):
    """A reader of files that training on synthetic data imports, but does not need."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """open_clip's training, with tiny models and images and captions that differ."""
    if importlib.util.find_spec("open_clip_train") is None:
        pytest.skip("open_clip_train is not installed")
    for reader, parts in READERS.items():
        if importlib.util.find_spec(reader) is None:
            for name in (reader, *(f"{reader}.{part}" for part in parts)):
                monkeypatch.setitem(sys.modules, name, Absent(name))
    before = set(sys.modules)
    handlers = list(logging.root.handlers)
    levels = {
        name: logging.getLogger(name).level for name in ["root", *logging.root.manager.loggerDict]
    }
    main = importlib.import_module("open_clip_train.main")
    data = importlib.import_module("open_clip_train.data")

    def draw(self: torch.utils.data.Dataset, index: int) -> tuple[Tensor, Tensor]:
        noise = np.random.default_rng(index)
        image = Image.fromarray(noise.integers(256, size=(32, 32, 3), dtype=np.uint8))
        return self.transform(image), torch.from_numpy(noise.integers(1, 50, size=8))

    monkeypatch.setattr(data.SyntheticDataset, "__getitem__", draw)
    models = tmp_path / "models"
    models.mkdir()
    for name, model in MODELS.items():
        (models / f"{name}.json").write_text(json.dumps(model))
    open_clip.add_model_config(models)
    yield main
    open_clip.factory._MODEL_CONFIG_PATHS.remove(models)
    for name in MODELS:
        del open_clip.factory._MODEL_CONFIGS[name]
    for name in set(sys.modules) - before:
        if name.startswith("open_clip_train"):
            del sys.modules[name]
    logging.root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def save_weights(name: str, file: Path) -> None:
    """Every one drawn: open_clip leaves some of a captioner's as memory held them."""
    torch.manual_seed(1)
    state = open_clip.create_model(name).state_dict()
    torch.save({key: 0.1 * torch.randn_like(x) for key, x in state.items()}, file)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip", "coca", "distill"])
def test_open_clips_training_prints_the_same_losses(
    kind: str, train: ModuleType, tmp_path: Path
) -> None:
    model, weights = "coca_tiny" if kind == "coca" else "tiny", tmp_path / "weights.pt"
    save_weights(model, weights)
    more = {
        "siglip": "--siglip",
        "coca": f"--pretrained {weights}",
        "distill": f"--distill-model tiny --distill-pretrained {weights}",
    }.get(kind, "")

    def losses(name: str) -> list[tuple[str, float]]:
        given = (
            f"--dataset-type synthetic --train-num-samples 32 --batch-size 8 --epochs 1 --workers 0"
            f" --warmup 0 --lr 1e-2 --precision fp32 --device cpu --log-every-n-steps 1"
            f" --model {model} --logs {tmp_path} --name {name} {more}"
        )
        train.main(given.split())
        printed = (tmp_path / name / "out.log").read_text()
        return re.findall(r"(\w+_loss|Loss): (\d\.\d+|\d\d\.\d+)", printed)

    theirs = losses("theirs")
    with fastssl.patch("open_clip", verbose=False) as done:
        assert "open_clip.factory.ClipLoss" in done.swapped
        ours = losses("ours")
    names = {"clip": 2, "siglip": 2, "coca": 3, "distill": 3}
    assert len(theirs) == 4 * names[kind]
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [float(x) for _, x in ours] == pytest.approx([float(x) for _, x in theirs], rel=2e-4)
    assert len({x for _, x in theirs}) >= 4  # something is learned
