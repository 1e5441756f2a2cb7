"""Losses in graphs that the default compiler has made, which trusts the layouts it is told of."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from fastssl import functional

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt_xent": functional.nt_xent,
    "info_nce": functional.info_nce,
    "info_nce, shared negatives": lambda x, y: functional.info_nce(x, y, y.roll(1, 0) + x),
    "info_nce, a queue": lambda x, y: functional.info_nce(x, y, y.detach() + 1),
    "supcon": lambda x, y: functional.supcon(torch.stack([x, y], 1)),
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
