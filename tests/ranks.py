"""What each process of tests/test_distributed.py runs: a module that processes can import."""

import datetime
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from targets import HAS_GPU
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import fastssl
from fastssl import functional
from fastssl.distributed import Ranks, world_size
from fastssl.integrations.open_clip import DistillClipLoss

SIZES = {2: [5, 9], 3: [4, 7, 3], 4: [5, 2, 4, 3]}  # rows of each rank, by the number of ranks
ROWS = 14
TIMEOUT = 60  # seconds
GROUP = [1, 3]  # of 4 ranks
BANK = (20, 24)
IDS = torch.arange(ROWS) * 3 % 8  # some on several ranks


class Views(nn.Module):
    """A loss of two views that knows no ids; or of what ``views`` makes of them."""

    def __init__(
        self,
        loss: Callable[..., nn.Module],
        views: Callable[[Tensor, Tensor], tuple[Any, ...]] = lambda *z: z,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss, self.views = loss(**options), views

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        return self.loss(*self.views(z_a, z_b))


class SwaV(nn.Module):
    """Of two global crops and a local one; with_queue, of which each rank has a part."""

    def __init__(
        self, gather_distributed: bool = False, with_queue: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.loss = fastssl.SwaVLoss(sinkhorn_gather_distributed=gather_distributed, **options)
        self.with_queue = with_queue

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        queue = [z_a - z_b, z_b - 2 * z_a] if self.with_queue else None
        return self.loss([z_a, z_b], [z_a + z_b], queue)[0]


class Codes(nn.Module):
    """A loss of codes with the gradient of their iterations."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.codes = partial(functional.sinkhorn_knopp, differentiable=True, **options)
        spread = options.get("gather_distributed", False)
        self.ranks = world_size(options.get("group")) if spread else 1

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        return self.ranks * (z_b * self.codes(z_a, 0.3)).sum()


class Tempered(nn.Module):
    """A loss whose temperature is learned; over duplicates, with_ids."""

    def __init__(
        self, loss: Callable[..., nn.Module], with_ids: bool = False, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(3)  # a bank begins with the same rows everywhere
        temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.loss, self.with_ids = loss(temperature, **options).double(), with_ids

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        return self.loss(z_a, z_b, ids=ids if self.with_ids else None)


class Queue(Tempered):
    """InfoNCE with the same negatives on every rank."""

    def __init__(self, **options: Any) -> None:
        super().__init__(fastssl.InfoNCELoss, **options)
        self.negatives, self.ids = torch.randn(20, 24).double(), torch.arange(20) % 8

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        if not self.with_ids:
            return self.loss(z_a, z_b, self.negatives)
        return self.loss(z_a, z_b, self.negatives, ids, self.ids)


class Classes(Tempered):
    """Supervised contrastive loss of two views, whose ids are their labels, with_ids."""

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        features = nn.functional.normalize(torch.stack([z_a, z_b], 1), dim=2)
        return self.loss(features, labels=ids if self.with_ids else None)


class Pairs(nn.Module):
    """A loss of open_clip's with the scale and the bias that a model would hold."""

    def __init__(
        self,
        loss: Callable[..., nn.Module],
        with_ids: bool = False,
        gather_distributed: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        ranks = world_size(options.get("group")) if gather_distributed else 1
        self.loss, self.with_ids = loss(world_size=ranks, **options), with_ids
        self.scale, self.bias = (
            nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (3.0, -2.0)
        )

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        image, text = (nn.functional.normalize(z, dim=1) for z in (z_a, z_b))
        return self.loss(image, text, self.scale, self.bias, ids=ids if self.with_ids else None)


class Distilled(nn.Module):
    """CLIP's loss with a teacher of another width, and a learned scale."""

    def __init__(self, gather_distributed: bool = False, **options: Any) -> None:
        super().__init__()
        ranks = world_size(options.get("group")) if gather_distributed else 1
        self.loss = DistillClipLoss(world_size=ranks, **options)
        self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        teacher = (z.detach()[:, :7].sin() for z in (z_b, z_a))
        contrastive, distillation = self.loss(z_a, z_b, self.scale, *teacher, 5.0)
        return contrastive + 2 * distillation


class Terms(nn.Module):
    """The sum of a loss's terms, and each of them weighted by hand."""

    def __init__(self, loss: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.loss = partial(loss, **options)
        spread = options.get("gather_distributed", False)
        self.ranks = world_size(options.get("group")) if spread else 1

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        terms = self.loss(z_a, z_b, reduction="none")
        weights = ids.repeat(len(terms) // len(ids)).double()
        return self.loss(z_a, z_b, reduction="sum") + self.ranks * (weights * terms).sum()


class Cast(nn.Module):
    """Another of these losses, in another type."""

    def __init__(self, make: Callable[..., nn.Module], dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        self.loss, self.dtype = make(**options), dtype

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        return self.loss(z_a.to(self.dtype), z_b.to(self.dtype), ids)


class LongRows(nn.Module):
    """CLIP with scores that are small in some pairs of blocks and very large in others."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = partial(functional.clip, logit_scale=0.5, **options)

    def forward(self, z_a: Tensor, z_b: Tensor, ids: Tensor) -> Tensor:
        length = torch.where((ids == 1) | (ids == 7), 30.0, 1.0)[:, None]
        return self.loss(z_a * length, z_b * length)


def weights_of_the_batch(u0: Tensor, u1: Tensor) -> Tensor:
    return torch.softmax((u0 @ u1.T).mean(1), 0) * 2


SIMILARITIES: dict[str, Callable[..., nn.Module]] = {
    "nt_xent": partial(Tempered, fastssl.NTXentLoss),
    "nt_xent with ids": partial(Tempered, fastssl.NTXentLoss, with_ids=True),
    "nt_xent in terms": partial(Terms, functional.nt_xent),
    "dcl": partial(Tempered, fastssl.DCLLoss),
    "dcl with ids": partial(Tempered, fastssl.DCLLoss, with_ids=True),
    "dcl in terms": partial(Terms, functional.dcl),
    "dclw": partial(Tempered, fastssl.DCLWLoss),
    "info_nce": partial(Tempered, fastssl.InfoNCELoss),
    "info_nce with ids": partial(Tempered, fastssl.InfoNCELoss, with_ids=True),
    "info_nce in terms": partial(Terms, functional.info_nce),
    "supcon": partial(Classes, fastssl.SupConLoss),
    "supcon with labels": partial(Classes, fastssl.SupConLoss, with_ids=True),
    "supcon of one view": partial(Classes, fastssl.SupConLoss, with_ids=True, contrast_mode="one"),
    "clip": partial(Pairs, fastssl.ClipLoss),
    "clip with ids": partial(Pairs, fastssl.ClipLoss, with_ids=True),
    "siglip": partial(Pairs, fastssl.SigLipLoss),
    "siglip with ids": partial(Pairs, fastssl.SigLipLoss, with_ids=True),
}
CAST_NAMES = ("nt_xent with ids", "info_nce", "supcon with labels", "clip", "siglip with ids")
HALF = {
    f"{name} in bfloat16": partial(Cast, SIMILARITIES[name], torch.bfloat16) for name in CAST_NAMES
}
BY_TRITON: dict[str, Callable[..., nn.Module]] = {
    f"{name} by Triton": partial(
        Cast, SIMILARITIES[name], torch.float32, exchange="ring", backend="triton"
    )
    for name in CAST_NAMES
    if not HAS_GPU  # kernels that are compiled take none of a CPU's tensors
}
STATISTICS: dict[str, Callable[..., nn.Module]] = {
    "barlow_twins": partial(Views, fastssl.BarlowTwinsLoss),
    "vicreg": partial(Views, fastssl.VICRegLoss),
    "vicreg at positions": partial(
        Views, fastssl.VICRegLoss, lambda *z: tuple(x.view(-1, 3, 8) for x in z)
    ),
}
EXCHANGED: dict[str, Callable[..., nn.Module]] = {
    f"{name}, {exchange}": partial(make, exchange=exchange)
    for name, make in (SIMILARITIES | HALF | {"clip of long rows": LongRows}).items()
    for exchange in ("gather", "ring")
}
MODULES: dict[str, Callable[..., nn.Module]] = {
    "swav": SwaV,
    "swav with a queue": partial(SwaV, with_queue=True),
    "sinkhorn_knopp": Codes,
    **{
        f"{name}, {exchange}": partial(make, exchange=exchange)
        for name, make in STATISTICS.items()
        for exchange in ("auto", "gather", "reduce")
    },
    "nt_xent with a memory bank": partial(Tempered, fastssl.NTXentLoss, memory_bank_size=BANK),
    "info_nce with a queue": Queue,
    "info_nce with a queue and ids": partial(Queue, with_ids=True),
    "distill_clip": Distilled,
    "dcl with weights of the batch": partial(
        Tempered, fastssl.DCLLoss, weight_fn=weights_of_the_batch
    ),
    **EXCHANGED,
}
GROUPED = [name for name in MODULES if "bfloat16" not in name]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 24)).double()


def images() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, ROWS, 6, dtype=torch.float64)


def start(job: Callable[..., None], ranks: int, *args: Any) -> None:
    """Run job(rank, ranks, *args) in processes that fork from one with all their imports."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "fastssl"])
    multiprocessing.start_processes(job, (ranks, *args), ranks, start_method="forkserver")


def join(rank: int, ranks: int, folder: Path) -> None:
    """Make this process one of the default process group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )


def rows_of(rank: int, ranks: int) -> range:
    """The places of a rank's rows in the batch."""
    begin = sum(SIZES[ranks][:rank])
    return range(begin, begin + SIZES[ranks][rank])


def trained(
    make: Callable[..., nn.Module], rows: range, **options: Any
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The loss on these rows, the averaged gradients and the buffers after a step."""
    group = options.get("group")
    x_a, x_b = images()[:, rows]
    model = nn.parallel.DistributedDataParallel(network(), process_group=group)
    z_a, z_b = model(torch.cat([x_a, x_b])).chunk(2)
    criterion = make(gather_distributed=True, **options)
    loss = criterion(z_a, z_b, IDS[rows])
    loss.backward()
    for p in criterion.parameters():  # which DistributedDataParallel would average
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)
    parameters = [*model.parameters(), *criterion.parameters()]
    buffers = {key: x.clone() for key, x in criterion.named_buffers()}
    return loss.detach(), [p.grad for p in parameters], buffers


def run(rank: int, ranks: int, folder: Path) -> None:
    """Write what each module gives on this rank's rows, and in a group of some ranks."""
    join(rank, ranks, folder)
    rows = rows_of(rank, ranks)
    modules = MODULES | BY_TRITON if ranks == 3 else MODULES
    results = {name: trained(make, rows) for name, make in modules.items()}
    if ranks == 4:
        group = dist.new_group(GROUP)
        if rank in GROUP:
            for name in GROUPED:
                results[f"{name}, group"] = trained(MODULES[name], rows, group=group)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


FEATURES = 9
COUNTED = {
    "nt_xent": functional.nt_xent,
    "info_nce": functional.info_nce,
    "clip": functional.clip,
    "siglip": functional.siglip,
    "supcon": lambda z_a, z_b, **options: functional.supcon(
        torch.stack([z_a, z_b], 1), labels=torch.arange(len(z_a)) // 2, **options
    ),
}


class MostRows(TorchDispatchMode):
    """The most rows of a matrix of embeddings that any operator returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] >= FEATURES:
                self.most = max(self.most, x.numel() // x.shape[-1])
        return result


class Sent:
    """Bytes that this rank sends.

    All that it gives to another rank counts, in an all_gather to each; an all_reduce takes
    2 (W - 1) / W times its tensor, as in a ring. Both are what the usual algorithms send.
    """

    def __init__(self) -> None:
        self.bytes = 0.0
        self.others = dist.get_world_size() - 1
        self.originals = dist.all_gather, dist.all_reduce, dist.batch_isend_irecv

    def __enter__(self) -> "Sent":
        gather, reduce, pass_on = self.originals

        def all_gather(pieces: list[Tensor], x: Tensor, **options: Any) -> None:
            self.bytes += self.others * x.nbytes
            gather(pieces, x, **options)

        def all_reduce(x: Tensor, **options: Any) -> dist.Work | None:
            self.bytes += 2 * self.others / (self.others + 1) * x.nbytes
            return reduce(x, **options)

        def batch_isend_irecv(operations: list[dist.P2POp]) -> list[dist.Work]:
            self.bytes += sum(each.tensor.nbytes for each in operations if each.op is dist.isend)
            return pass_on(operations)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce
        dist.batch_isend_irecv = batch_isend_irecv
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_gather, dist.all_reduce, dist.batch_isend_irecv = self.originals


def count(rank: int, ranks: int, folder: Path, rows: int) -> None:
    """Write what each exchange of bfloat16 rows sends, holds at most, and saves for backward."""
    join(rank, ranks, folder)
    results = {}
    for name, loss in COUNTED.items():
        for exchange in ("gather", "ring"):
            z = torch.randn(2, rows, FEATURES, dtype=torch.bfloat16).unbind()
            z_a, z_b = (x.requires_grad_() for x in z)
            saved: list[Tensor] = []
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: saved.append(x) or x, lambda x: x
            )
            with MostRows() as held, Sent() as sent:
                with hooks:
                    value = loss(z_a, z_b, gather_distributed=True, exchange=exchange)
                value.backward()
            kept = sum(x.nbytes for x in saved)
            results[name, exchange] = {"sent": sent.bytes, "rows": held.most, "saved": kept}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def refuse(rank: int, ranks: int, folder: Path) -> None:
    """Write how rows of one rank, 1, that do not go with the others' are refused on each."""
    join(rank, ranks, folder)
    wrong = {
        "empty": lambda z: z[:0],
        "narrow": lambda z: z[:, :3],
        "double": lambda z: z.double(),
    }
    messages = {}
    for name, change in wrong.items():
        z = torch.randn(2, 6, 4)
        z_a, z_b = (change(x) if rank == 1 else x for x in z.unbind())
        try:
            functional.nt_xent(z_a, z_b, gather_distributed=True)
        except (TypeError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    try:
        functional.supcon(torch.randn(2, 2, 4), mask=torch.eye(2), gather_distributed=True)
    except ValueError as error:
        messages["mask"] = str(error)
    z_a, z_b = torch.randn(2, 6, 4, requires_grad=True).unbind()
    value = functional.nt_xent(z_a, z_b, gather_distributed=True, exchange="ring")
    try:
        torch.autograd.grad(value, z_a, create_graph=True)
    except RuntimeError as error:
        messages["second derivative"] = str(error)
    group = dist.new_group([0, 2])
    try:
        messages["size of a group"] = world_size(group)
    except ValueError as error:
        messages["size of a group"] = str(error)
    torch.save(messages, folder / f"{rank}.pt")
    dist.destroy_process_group()


def die(rank: int, ranks: int, folder: Path, exchange: str, hops: int) -> None:
    """End rank 1 without a word before its loss, or in it; write what others raise, and when."""
    join(rank, ranks, folder)
    pass_on = Ranks.pass_on

    def last_words(self: Ranks, *args: Any) -> Any:
        nonlocal hops
        if hops == 0:
            os._exit(0)
        hops -= 1
        return pass_on(self, *args)

    dist.barrier()  # else one may die while others connect, which is another error
    if rank == 1:
        time.sleep(0.5)  # until all have left the barrier
        if exchange == "gather":
            os._exit(0)
        Ranks.pass_on = last_words
    z_a, z_b = torch.randn(2, 6, 4, requires_grad=True).unbind()
    begin = time.monotonic()
    try:
        functional.nt_xent(z_a, z_b, gather_distributed=True, exchange=exchange).backward()
        (folder / f"{rank}.txt").write_text("done")
    except RuntimeError:
        (folder / f"{rank}.txt").write_text(str(time.monotonic() - begin))
    os._exit(0)
