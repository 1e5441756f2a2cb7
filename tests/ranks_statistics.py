"""What each process of tests/test_statistics_of_ranks.py runs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import ranks
import torch
from targets import HAS_GPU
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl import functional

SIZES = ranks.SIZES[4]
FEATURES = 40
LOSSES = {"barlow_twins": functional.barlow_twins, "vicreg": functional.vicreg}
# Options with which all ranks compute the same: VICReg's invariance is that of a rank's own rows.
SHARED: dict[str, dict[str, Any]] = {"barlow_twins": {}, "vicreg": {"lambda_param": 0.0}}
EXCHANGES = ["gather", "reduce"]
EVERYTHING = slice(0, ranks.ROWS)
EMPTY = 2  # the rank that once has no rows
GATHER = {"gather_distributed": True}


class Codes(NamedTuple):
    """A call of Sinkhorn-Knopp; on rows that are wide for the kernels."""

    backend: str
    spread: float
    iterations: int
    wide: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.backend == "torch" else torch.float32


CODES = [
    *(Codes("torch", spread, iterations) for spread in (0.3, 1e4) for iterations in (0, 1, 3)),
    *(Codes("triton", spread, 3, wide) for spread in (0.3, 1e4) for wide in (False, True)),
    Codes("triton", 0.3, 0),
]
if HAS_GPU:  # where kernels are not interpreted
    CODES = [case for case in CODES if case.backend == "torch"]


def place(rank: int) -> slice:
    return slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))


def views(
    here: slice = EVERYTHING, dtype: torch.dtype = torch.float64, mean: float = 0.0
) -> list[Tensor]:
    torch.manual_seed(4)
    return list(
        (torch.randn(2, ranks.ROWS, FEATURES, dtype=torch.float64) + mean).to(dtype)[:, here]
    )


def scores(spread: float, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(5)
    return (spread * torch.randn(ranks.ROWS, FEATURES, dtype=torch.float64)).to(dtype)


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


def value_and_gradients(loss: Callable[..., Tensor], z: list[Tensor]) -> list[Tensor]:
    own = [x.clone().requires_grad_() for x in z]
    value = loss(*own)
    value.backward()
    return [value.detach(), *(x.grad for x in own)]


def error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def run(rank: int, count: int, folder: Path) -> None:
    """Write what this rank gets, sees and sends."""
    ranks.join(rank, count, folder)
    here = place(rank)
    results: dict[str, Any] = {}
    for name in LOSSES:
        for exchange in EXCHANGES:
            found = results[name, exchange] = statistics(name, exchange, here)
            weighted = partial(of_ranks, name, exchange, weight=rank + 1, **SHARED[name])
            found["weighted"] = value_and_gradients(weighted, views(here))
        results[name, "auto"] = [
            {
                exchange: bytes_sent(partial(of_ranks, name, exchange), z)
                for exchange in (*EXCHANGES, "auto")
            }
            for z in (
                views(here),
                [x[:, :10] for x in views(here)],
                [x[:, :10] for x in views(here, torch.bfloat16)],
            )
        ]
    for case in CODES:
        results[case] = codes(case, here)
    results["hard"] = functional.sinkhorn_knopp(scores(0.3)[here], hard=True, **GATHER)

    z_a, z_b = views(slice(0, 0 if rank == EMPTY else 2))
    results["empty"] = {
        "barlow_twins": error(lambda: functional.barlow_twins(z_a, z_b, **GATHER)),
        "vicreg": error(lambda: functional.vicreg(z_a, z_b, **GATHER)),
        "sinkhorn_knopp": error(lambda: functional.sinkhorn_knopp(z_a, **GATHER)),
        "swav": error(lambda: functional.swav([z_a, z_b], **GATHER)),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def bytes_sent(loss: Callable[..., Tensor], z: list[Tensor]) -> float:
    with ranks.Sent() as sent:
        value_and_gradients(loss, z)
    return sent.bytes


def of_ranks(name: str, exchange: str, *z: Tensor, weight: int = 1, **options: Any) -> Tensor:
    return weight * LOSSES[name](*z, exchange=exchange, **GATHER, **options)


def statistics(name: str, exchange: str, here: slice) -> dict[str, Any]:
    loss = partial(of_ranks, name, exchange)
    own = views(here)
    saved: list[int] = []

    def save(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda x: x)
    with Shapes() as shapes, hooks:
        value_and_gradients(loss, own)
    sent = bytes_sent(loss, own)
    own[0].requires_grad_()
    (slope,) = torch.autograd.grad(loss(*own), own[0], create_graph=True)
    return {
        "shapes": shapes.seen,
        "sent": sent,
        "saved": max(saved),
        "bfloat16": value_and_gradients(loss, views(here, torch.bfloat16)),
        "far mean": value_and_gradients(loss, views(here, torch.float32, 1000.0)),
        "second derivative": error(slope.square().sum().backward),
    }


def codes(case: Codes, here: slice) -> dict[str, Any]:
    from fastssl.kernels import sinkhorn as kernels

    own = scores(case.spread, case.dtype)[here]
    widest = mock.patch.object(kernels, "WIDEST", 0 if case.wide else 8192)
    with widest, Shapes() as shapes, ranks.Sent() as sent:
        found = functional.sinkhorn_knopp(
            own, iterations=case.iterations, backend=case.backend, **GATHER
        )
    return {"codes": found, "shapes": shapes.seen, "sent": sent.bytes}
