"""Losses in compiled graphs: one for any number of rows, and layouts as graphs expect them."""

import copy
from collections.abc import Callable

import pytest
import torch
from accuracy import value_and_gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch.nn.functional import normalize

import fastssl
from fastssl import functional


def teacher(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y.detach()[:, :5], x.detach()[:, :5]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt_xent": functional.nt_xent,
    "info_nce": functional.info_nce,
    "info_nce, shared negatives": lambda x, y: functional.info_nce(x, y, y.roll(1, 0) + x),
    "info_nce, a queue": lambda x, y: functional.info_nce(x, y, y.detach() + 1),
    "supcon": lambda x, y: functional.supcon(torch.stack([x, y], 1)),
    "distill_clip": lambda x, y: sum(functional.distill_clip(x, y, 10.0, *teacher(x, y), 5.0)),
    "siglip": lambda x, y: functional.siglip(x, y, 10.0, -10.0),
    "barlow_twins": functional.barlow_twins,
    "vicreg": functional.vicreg,
    "swav": lambda x, y: functional.swav([x, y], []),
}


@pytest.mark.slow
@config.patch(force_disable_caches=True)  # they would hide a wrong fake
def test_column_major_rows() -> None:
    """Where an operator's result lies otherwise than its fake says, the graph stops."""
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations

    def every(weights: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        rows = [((weight @ x).T, (weight @ y).T) for weight in weights]
        return [loss(*each) for loss, each in zip(LOSSES.values(), rows, strict=True)]

    weights = [torch.randn(12, 8) for _ in LOSSES]
    x, y = torch.randn(2, 8, 24)
    results = []
    for function in (every, torch.compile(every, fullgraph=True)):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        values = function(leaves, x, y)
        results.append([*values, *torch.autograd.grad(sum(values), leaves)])
    for name, *pair in zip([*LOSSES, *LOSSES], *results, strict=True):
        torch.testing.assert_close(*pair, msg=lambda text, name=name: f"{name}: {text}")


def unit(*views: Tensor) -> list[Tensor]:
    return [normalize(z, dim=1) for z in views]


def pairs(z0: Tensor, z1: Tensor) -> Tensor:
    return torch.stack(unit(z0, z1), 1)


def halves(z: Tensor) -> Tensor:
    """Ids by which two rows are of one sample."""
    return torch.arange(z.shape[0], device=z.device) // 2


QUEUE = torch.randn(50, 8)
TEMPERATURE = torch.tensor(0.4)
BATCHES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt_xent": functional.nt_xent,
    "nt_xent, ids": lambda x, y: functional.nt_xent(x, y, ids=halves(x)),
    "nt_xent, terms": lambda x, y: functional.nt_xent(x, y, TEMPERATURE, reduction="none").sum(),
    "nt_xent, a bank": fastssl.NTXentLoss(0.1, (320, 8)),
    "dcl": functional.dcl,
    "dcl, weighted": fastssl.DCLWLoss(),
    "info_nce": functional.info_nce,
    "info_nce, a queue": lambda x, y: functional.info_nce(x, y, QUEUE),
    "info_nce, shared negatives": lambda x, y: functional.info_nce(x, y, y.roll(1, 0) + x),
    "info_nce, own negatives": lambda x, y: functional.info_nce(x, y, torch.stack([x, y], 1)),
    "supcon": lambda x, y: functional.supcon(pairs(x, y)),
    "supcon, labels": lambda x, y: functional.supcon(pairs(x, y), halves(x), contrast_mode="one"),
    "supcon, a mask": lambda x, y: functional.supcon(pairs(x, y), mask=torch.eye(x.shape[0])),
    "clip": lambda x, y: functional.clip(*unit(x, y), 10.0),
    "distill_clip": lambda x, y: sum(
        functional.distill_clip(*unit(x, y), 10.0, *teacher(x, y), 5.0)
    ),
    "siglip": lambda x, y: functional.siglip(*unit(x, y), 10.0, -10.0),
    "barlow_twins": functional.barlow_twins,
    "vicreg": functional.vicreg,
    "swav": lambda x, y: functional.swav([x, y], [x * y]),
    "sinkhorn_knopp": lambda x, y: (functional.sinkhorn_knopp(x) * y).sum(),
    "sinkhorn_knopp, unrolled": lambda x, y: (
        functional.sinkhorn_knopp(x, differentiable=True) * y
    ).sum(),
    "negative_cosine": functional.negative_cosine_similarity,
}
SIZES = (9, 10, 11, 14, 16, 33, 64, 100, 255, 256, 257, 300)  # of the last ones not in one tile


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCHES)
def test_any_number_of_batch_sizes_takes_two_compilations(name: str) -> None:
    batches = [torch.randn(2, n, 8).unbind() for n in SIZES]
    plain = copy.deepcopy(BATCHES[name])  # a bank changes
    expected = [value_and_gradients(plain, views) for views in batches]
    for dynamic in (None, True):
        torch.compiler.reset()
        counter, loss = CompileCounterWithBackend("aot_eager"), copy.deepcopy(BATCHES[name])
        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
        for views, result in zip(batches, expected, strict=True):
            torch.testing.assert_close(value_and_gradients(compiled, views), result)
        assert counter.frame_count <= 2
