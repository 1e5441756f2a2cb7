"""A batch spread over processes has the loss and the gradients of the whole batch."""

import datetime
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

import fastssl

SIZES = [5, 9]  # rows of each rank
MODULES = {
    "barlow_twins": lambda **options: fastssl.BarlowTwinsLoss(**options),
    "vicreg": lambda **options: fastssl.VICRegLoss(**options),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 24)).double()


def images() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(2, sum(SIZES), 6, dtype=torch.float64)


def on_one_rank(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=len(SIZES),
        timeout=datetime.timedelta(seconds=60),
    )
    start = sum(SIZES[:rank])
    x_a, x_b = images()[:, start : start + SIZES[rank]]
    results = {}
    for name, make in MODULES.items():
        model = nn.parallel.DistributedDataParallel(network())
        z_a, z_b = model(torch.cat([x_a, x_b])).chunk(2)
        loss = make(gather_distributed=True)(z_a, z_b)
        loss.backward()
        results[name] = loss.detach(), [p.grad for p in model.parameters()]
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(on_one_rank, (folder,), nprocs=len(SIZES))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(SIZES))]


@pytest.mark.parametrize("name", MODULES)
def test_ranks_agree_with_one_process(results: list[dict], name: str) -> None:
    model = network()
    z_a, z_b = model(images().flatten(0, 1)).chunk(2)
    expected = MODULES[name]()(z_a, z_b)
    expected.backward()
    losses, gradients = zip(*(result[name] for result in results), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-10, atol=0)
    for rank in gradients:
        for got, parameter in zip(rank, model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_without_a_process_group_gathering_changes_nothing(name: str) -> None:
    z = torch.randn(2, 8, 12).unbind()
    assert torch.equal(MODULES[name](gather_distributed=True)(*z), MODULES[name]()(*z))
