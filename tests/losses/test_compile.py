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
@pytest.mark.parametrize("name", LOSSES)
@config.patch(force_disable_caches=True)  # they would hide a wrong fake
def test_column_major_rows(name: str) -> None:
    """Where an operator's result lies otherwise than its fake says, the graph stops."""
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations
    loss = LOSSES[name]

    def step(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss((weight @ x).T, (weight @ y).T)

    weight, x, y = torch.randn(12, 8), torch.randn(8, 24), torch.randn(8, 24)
    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = weight.clone().requires_grad_()
        value = function(leaf, x, y)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0])
