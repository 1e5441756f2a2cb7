"""What each process of tests/test_distributed.py runs: a module that processes can import."""

import datetime
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn

import fastssl

SIZES = [5, 9]  # rows of each rank


def swav(gather_distributed: bool = False):
    """SwAV of two global crops and a local one."""
    loss = fastssl.SwaVLoss(sinkhorn_gather_distributed=gather_distributed)
    return lambda z_a, z_b: loss([z_a, z_b], [z_a + z_b])[0]


MODULES = {
    "barlow_twins": fastssl.BarlowTwinsLoss,
    "vicreg": fastssl.VICRegLoss,
    "swav": swav,
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 24)).double()


def images() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(2, sum(SIZES), 6, dtype=torch.float64)


def run(rank: int, folder: Path) -> None:
    """Write the loss and the averaged gradients of each module, on this rank's rows."""
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
