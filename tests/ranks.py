"""What each process of tests/test_distributed.py runs: a module that processes can import."""

import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

import fastssl
from fastssl import functional

SIZES = [5, 9]  # rows of each rank
BANK = (20, 24)
IDS = torch.arange(sum(SIZES)) * 3 % 8  # some on both ranks


def own(gather_distributed: bool) -> slice:
    """Which rows of the whole batch are here."""
    if not (gather_distributed and dist.is_initialized()):
        return slice(None)
    start = sum(SIZES[: dist.get_rank()])
    return slice(start, start + SIZES[dist.get_rank()])


class SwaV(nn.Module):
    """Of two global crops and a local one."""

    def __init__(self, gather_distributed: bool = False) -> None:
        super().__init__()
        self.loss = fastssl.SwaVLoss(sinkhorn_gather_distributed=gather_distributed)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return self.loss([z_a, z_b], [z_a + z_b])[0]


class Tempered(nn.Module):
    """A loss whose temperature is learned; over duplicates, with_ids."""

    def __init__(
        self, loss: Callable[..., nn.Module], with_ids: bool = False, **options: object
    ) -> None:
        super().__init__()
        torch.manual_seed(3)  # a bank begins with the same rows everywhere
        temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.loss = loss(temperature, **options).double()
        self.ids = (IDS[own(options.get("gather_distributed", False))],) if with_ids else ()

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return self.loss(z_a, z_b, *self.ids)


class Pairs(nn.Module):
    """A loss of open_clip's with the scale and the bias that a model would hold."""

    def __init__(
        self,
        loss: Callable[..., nn.Module],
        with_ids: bool = False,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.loss = loss(world_size=len(SIZES) if gather_distributed else 1)
        self.ids = IDS[own(gather_distributed)] if with_ids else None
        self.scale, self.bias = (
            nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (3.0, -2.0)
        )

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        image, text = (nn.functional.normalize(z, dim=1) for z in (z_a, z_b))
        return self.loss(image, text, self.scale, self.bias, ids=self.ids)


class Terms(nn.Module):
    """The sum of NT-Xent's terms, and each of them weighted by hand."""

    def __init__(self, gather_distributed: bool = False) -> None:
        super().__init__()
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        loss = partial(functional.nt_xent, z_a, z_b, gather_distributed=self.gather_distributed)
        ranks = dist.get_world_size() if self.gather_distributed and dist.is_initialized() else 1
        weights = IDS[own(self.gather_distributed)].repeat(2).double()
        return loss(reduction="sum") + ranks * (weights * loss(reduction="none")).sum()


MODULES = {
    "barlow_twins": fastssl.BarlowTwinsLoss,
    "vicreg": fastssl.VICRegLoss,
    "swav": SwaV,
    "nt_xent": partial(Tempered, fastssl.NTXentLoss),
    "nt_xent with ids": partial(Tempered, fastssl.NTXentLoss, with_ids=True),
    "nt_xent in terms": Terms,
    "nt_xent with a memory bank": partial(Tempered, fastssl.NTXentLoss, memory_bank_size=BANK),
    "dcl": partial(Tempered, fastssl.DCLLoss),
    "dcl with ids": partial(Tempered, fastssl.DCLLoss, with_ids=True),
    "dclw": partial(Tempered, fastssl.DCLWLoss),
    "clip": partial(Pairs, fastssl.ClipLoss),
    "clip with ids": partial(Pairs, fastssl.ClipLoss, with_ids=True),
    "siglip": partial(Pairs, fastssl.SigLipLoss),
    "siglip with ids": partial(Pairs, fastssl.SigLipLoss, with_ids=True),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 24)).double()


def images() -> Tensor:
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
    here = own(gather_distributed=True)
    x_a, x_b = images()[:, here]
    results = {}
    for name, make in MODULES.items():
        model = nn.parallel.DistributedDataParallel(network())
        z_a, z_b = model(torch.cat([x_a, x_b])).chunk(2)
        criterion = make(gather_distributed=True)
        loss = criterion(z_a, z_b)
        loss.backward()
        for p in criterion.parameters():  # which DistributedDataParallel would average
            dist.all_reduce(p.grad)
            p.grad /= len(SIZES)
        parameters = [*model.parameters(), *criterion.parameters()]
        buffers = {key: x.clone() for key, x in criterion.named_buffers()}
        results[name] = loss.detach(), [p.grad for p in parameters], buffers
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
