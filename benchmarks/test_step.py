"""A whole step of SimCLR, and which part of it is the loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastssl.benchmarks import cases, measure

NETWORKS = {  # by level: a network of torchvision, pairs of images, pixels
    "tiny": ("resnet18", 4, 32),
    "small": ("resnet18", 64, 32),
    "key": ("resnet50", 256, 224),
    "full": ("resnet50", 256, 224),
}
FEATURES = 128


@pytest.fixture
def network(level: str, device: str) -> torch.nn.Module:
    """A backbone with SimCLR's head of two layers."""
    models = pytest.importorskip("torchvision.models")
    network: Any = models.get_model(NETWORKS[level][0])
    width = network.fc.in_features
    network.fc = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, FEATURES)
    )
    moved: torch.nn.Module = network.to(device, memory_format=torch.channels_last)
    return moved


def test_step(
    benchmark: Any,
    add_row: Callable[[dict[str, Any]], None],
    network: torch.nn.Module,
    level: str,
    device: str,
    provider: str,
) -> None:
    """In bfloat16 autocast on a GPU, in float32 on a CPU."""
    name, pairs, pixels = NETWORKS[level]
    case = next(case for case in cases.CASES if case.name == "nt_xent")
    try:
        loss = case.make(provider)
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(2 * pairs, 3, pixels, pixels, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    projections = torch.randn(2, pairs, FEATURES, device=device)
    views = [x.requires_grad_() for x in projections.to(_type(device)).unbind()]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            result = loss(*network(images).chunk(2))
        result.backward()
        optimizer.step()
        optimizer.zero_grad()

    def loss_alone() -> None:
        torch.autograd.grad(loss(*views), views)

    row = {"loss": f"SimCLR step, {name} at {pixels}", "rows": pairs, "features": FEATURES}
    row |= {"pass": cases.PASSES[0], "provider": provider}
    try:
        for warm in (step, loss_alone):
            warm()
        launches, grown = measure.launches(step, device), measure.extra_bytes(step, device)
        rounds = measure.rounds_for(measure.seconds_of(step, device), device)
        timed: list[float] = []
        benchmark.pedantic(lambda: timed.append(measure.seconds_of(step, device)), rounds=rounds)
    except torch.OutOfMemoryError:
        add_row(row | {"failed": "out of memory"})
        pytest.skip("out of memory")
    of_loss, _ = measure.quantiles([measure.seconds_of(loss_alone, device) for _ in timed])
    seconds, percentiles = measure.quantiles(timed)
    add_row(
        row
        | {"seconds": seconds, "percentiles": percentiles}
        | {"extra_bytes": grown, "launches": launches, "share_of_loss": of_loss / seconds}
    )


def _type(device: str) -> torch.dtype:
    """What the network's projections are."""
    return torch.float32 if device == "cpu" else torch.bfloat16
