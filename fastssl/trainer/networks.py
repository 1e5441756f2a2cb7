"""Backbones, the projection head, and the exported backbone file."""

import difflib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.trainer import checkpoint

BACKBONES = ("cnn", "resnet18", "resnet34", "resnet50")
TIMM = "timm/"  # begins the names of timm's networks
SMALL = 64  # images up to this side get a stem that keeps their resolution
FORMAT = "fastssl backbone 1"


class CNN(nn.Sequential):
    """Four convolutions for digit-like images: [B, C, H, W] -> [B, 128]."""

    out_features = 128

    def __init__(self, channels: int) -> None:
        layers: list[nn.Module] = []
        for width, stride in ((32, 2), (64, 1), (64, 2), (128, 1)):
            layers += [
                nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


HEAD_NORMS = ("batch", "layer", "group", "none")


def _norm(name: str, width: int) -> nn.Module:
    if name == "none":
        return nn.Identity()
    if name == "batch":
        return nn.BatchNorm1d(width)
    return nn.LayerNorm(width) if name == "layer" else nn.GroupNorm(math.gcd(32, width), width)


class LinearHead(nn.Sequential):
    """A projection head of one layer, whose norm keeps embeddings from leaning to one side."""

    def __init__(self, in_features: int, out_features: int, norm: str) -> None:
        super().__init__(
            nn.Linear(in_features, out_features, bias=norm == "none"), _norm(norm, out_features)
        )


class ProjectionHead(nn.Sequential):
    """The perceptron between backbone and loss, thrown away after pretraining."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        *,
        layers: int = 2,
        last_norm: bool = True,
        norm: str = "batch",
    ) -> None:
        widths = [in_features, *[hidden] * (layers - 1), out_features]
        modules: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            modules += [
                nn.Linear(width, following, bias=norm == "none"),
                _norm(norm, following),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*modules[: -1 if last_norm else -2])


def build_backbone(name: str, channels: int, size: int) -> Any:
    """An untrained backbone: images [B, channels, size, size] -> features [B, out_features].

    A ResNet is torchvision's, with its key names, less the classifier. For images of at most 64
    pixels its stem is a 3x3 convolution and the max-pool is left out, as SimCLR's appendix B.9 has
    it for CIFAR-10.

    Args:
        name: One of `BACKBONES`, or timm/NAME for any network of timm's, less its classifier.
        channels: Channels of the images.
        size: Side of the images.

    Returns:
        A Module with an integer attribute ``out_features``.

    Raises:
        ValueError: There is no such backbone, or it does not take such images.
    """
    check_backbone(name)
    if name == "cnn":
        return CNN(channels)
    if name.startswith(TIMM):
        network = _of_timm(name, channels, size)
        network.out_features = try_on(network, name, (channels, size, size))
        return network
    import torchvision  # here, so that the names above can be listed without it

    network = getattr(torchvision.models, name)(weights=None)
    network.out_features = network.fc.in_features
    network.fc = nn.Identity()
    if size <= SMALL:
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return network


def check_backbone(name: str) -> None:
    """Raise ValueError if there is no backbone of that name."""
    if name in BACKBONES:
        return
    if not name.startswith(TIMM):
        known = f"{', '.join(BACKBONES)} or {TIMM}NAME"
        raise ValueError(f"backbone must be {known}, got {name!r}")
    import timm

    if not timm.is_model(name.removeprefix(TIMM)):
        plain = name.removeprefix(TIMM).partition(".")[0]
        close = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(TIMM + other for other in close)}?" if close else ""
        raise ValueError(f"backbone {name!r} is none of timm {timm.__version__}{hint}")


def _of_timm(name: str, channels: int, size: int, pretrained: bool = False) -> Any:
    """A network of timm's without its classifier, and for this size if it is made for one."""
    import timm

    # Some that are made for a size take others too, and most are made for none.
    sizes: list[dict[str, Any]] = [{"img_size": size, "dynamic_img_size": True}]
    sizes += [{"img_size": size}, {}]
    for options in sizes:
        options |= {"in_chans": channels, "num_classes": 0, "pretrained": pretrained}
        try:
            return timm.create_model(name.removeprefix(TIMM), **options)
        except TypeError as error:
            problem: Exception = error
            if "unexpected keyword" not in str(error):
                break
        except (AssertionError, RuntimeError, ValueError) as error:
            if pretrained:  # it may be the download
                raise
            problem = error
            break
    raise _unfit(name, (channels, size, size), problem) from None


def try_on(network: nn.Module, name: str, shape: tuple[int, ...]) -> int:
    """How many features a network makes of images of a shape [C, H, W], which it may refuse."""
    network.eval()
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            features = network(torch.zeros(1, *shape, device=device))
        if features.dim() != 2:
            raise ValueError(f"its features have the shape {tuple(features.shape)}")
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        raise _unfit(name, shape, error) from None
    network.train()
    return int(features.shape[1])


def _unfit(name: str, shape: tuple[int, ...], error: Exception) -> ValueError:
    images = f"[{', '.join(map(str, shape))}]"
    return ValueError(f"backbone {name!r} does not take images {images} ({error})")


def load_weights(
    backbone: nn.Module, name: str, source: str, channels: int, size: int
) -> list[str]:
    """Put the weights to begin with into a backbone.

    Args:
        backbone: What `build_backbone` made.
        name: Its name.
        source: A safetensors file, a run or a checkpoint; or timm/NAME, for the weights that timm
            has for that network, which it may have to download.
        channels: Channels of the images.
        size: Side of the images.

    Returns:
        The names of what is in the source and not in the backbone, a classifier for example.

    Raises:
        ValueError: They cannot be had, or do not fit.
    """
    try:
        if source.startswith(TIMM):
            weights = _of_timm(source, channels, size, pretrained=True).state_dict()
        else:
            weights, _ = read_weights(checkpoint.expanded(source))
    except Exception as error:  # what timm or its downloads raise is of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"weights {source!r} cannot be read ({reason})") from None
    own = backbone.state_dict()
    counts = ".num_batches_tracked"  # which nothing depends on
    faults = [f"{x} is missing" for x in own if x not in weights and not x.endswith(counts)]
    faults += [
        f"{key} is {list(weights[key].shape)} there and {list(x.shape)} here"
        for key, x in own.items()
        if key in weights and weights[key].shape != x.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"weights {source!r} do not fit backbone {name!r} for images [{channels}, {size}, "
            f"{size}]: {', '.join(faults[:3])}{more}"
        )
    backbone.load_state_dict({key: weights.get(key, x) for key, x in own.items()})
    return sorted(weights.keys() - own.keys())


def stages(backbone: Any) -> dict[str, nn.Module]:
    """The modules of a backbone after which a probe may look, by name, the first layer first.

    They are the four blocks of the ``cnn``, and the stem and the four layers of a ResNet; of timm's
    networks none is known. Each returns feature maps [B, C, H, W]; the average of the last one over
    the image is what the backbone returns.
    """
    if isinstance(backbone, CNN):
        ends = [module for module in backbone if isinstance(module, nn.ReLU)]
        return {f"block{i}": module for i, module in enumerate(ends, 1)}
    if not type(backbone).__module__.startswith("torchvision."):
        return {}
    layers = {f"layer{i}": getattr(backbone, f"layer{i}") for i in (1, 2, 3, 4)}
    return {"stem": backbone.maxpool, **layers}


class StageFeatures(nn.Module):
    """The features of every stage of a backbone, averaged over the image and side by side.

    After a forward pass ``widths`` says how many features each stage has, by its name.
    """

    widths: dict[str, int]

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, sum of the widths]."""
        found: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(
                lambda _, __, out, name=name: found.update({name: out.mean((2, 3))})
            )
            for name, module in stages(self.backbone).items()
        ]
        try:
            features = self.backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        found[next(reversed(found), "features")] = features  # the backbone's own average
        self.widths = {name: part.shape[1] for name, part in found.items()}
        return torch.cat(list(found.values()), dim=1)


def export_backbone(
    path: str | Path,
    backbone: nn.Module,
    *,
    architecture: str,
    channels: int,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Write a backbone, with what it takes to rebuild and feed it, to a safetensors file."""
    from safetensors.torch import save

    about = {"architecture": architecture, "channels": channels, "size": size}
    about |= {"mean": mean, "std": std}
    weights = {name: value.cpu().contiguous() for name, value in backbone.state_dict().items()}
    checkpoint.write(Path(path), save(weights, {FORMAT: json.dumps(about)}))


def load_backbone(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """The pretrained backbone of a run, in eval mode.

    Its attribute ``about`` holds what it was built from (architecture, channels, size) and the
    ``mean`` and ``std`` its images, scaled to [0, 1], were normalised with.

    Args:
        path: A ``backbone.safetensors``, the folder of the run that wrote it, or a checkpoint.
        device: Where to put it.

    Returns:
        The Module: images [B, channels, size, size] -> features [B, out_features].

    Example:
        >>> backbone = load_backbone("runs/simclr-digits")  # doctest: +SKIP
    """
    path = checkpoint.expanded(path)
    weights, about = read_weights(path)
    if about is None:
        raise ValueError(f"{path} is not a backbone that fastssl exported")
    backbone = build_backbone(about["architecture"], about["channels"], about["size"])
    backbone.load_state_dict(weights)
    backbone.about = about
    return backbone.to(device).eval()


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights of a backbone by name, and what is told about it where fastssl wrote the file.

    Args:
        path: A safetensors file, the folder of a run, or a checkpoint.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        run, path = path, path / "backbone.safetensors"
        if (run / "config.yaml").is_file() and not path.is_file():
            raise ValueError(
                f"the run in {run} is not finished, it has no {path.name} yet; "
                f"{checkpoint.resume_command(run)} goes on"
            )
    if not path.is_file():
        raise ValueError(f"path must be a backbone.safetensors or a run's folder, found no {path}")
    if path.suffix == ".pt":
        try:
            state, own = checkpoint.load(path), "backbone."
        except ValueError:
            raise ValueError(
                f"{path} is damaged or not a checkpoint of fastssl; weights of other programs are "
                f"read from safetensors files"
            ) from None
        if "about" not in state:
            raise ValueError(f"{path} is of an early version, which did not tell of its backbone")
        weights = {k.removeprefix(own): x for k, x in state["method"].items() if k.startswith(own)}
        return weights, state["about"]
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error})"
            f"{checkpoint.remedy(path.parent)}"
        ) from None
    return weights, json.loads(metadata[FORMAT]) if FORMAT in metadata else None
