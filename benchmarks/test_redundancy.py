"""Barlow Twins and VICReg, forward and backward, beside the plain, the compiled and lightly's."""

from collections.abc import Callable

import pytest
import torch

from fastssl import functional, reference
from fastssl.ops import energy

# A small batch of ever wider projections, on the dual route from D = 1024 on; a large narrow one.
SIZES = [(512, 512), (512, 1024), (512, 2048), (512, 4096), (512, 8192), (256, 16384), (4096, 1024)]
PEERS_UP_TO = {"plain": 8192, "compiled": 8192, "lightly": 16384}  # features
NAMES = {"barlow_twins": "Barlow Twins", "vicreg": "VICReg"}


def provide(loss: str, provider: str) -> Callable[..., torch.Tensor]:
    if provider == "fastssl":
        return getattr(functional, loss)
    if provider == "lightly":
        lightly = pytest.importorskip("lightly.loss")
        return {"barlow_twins": lightly.BarlowTwinsLoss, "vicreg": lightly.VICRegLoss}[loss]()
    plain = getattr(reference, loss)
    return torch.compile(plain) if provider == "compiled" else plain


@pytest.mark.parametrize("provider", ["fastssl", *PEERS_UP_TO])
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("loss", NAMES)
def test_redundancy(compare, loss: str, n: int, d: int, provider: str) -> None:
    if d > PEERS_UP_TO.get(provider, d) or (
        loss == "vicreg" and d > 8192 and provider != "fastssl"
    ):
        pytest.skip("this one holds several D x D matrices: too many bytes for most machines")
    compare(
        NAMES[loss],
        provider,
        provide(loss, provider),
        getattr(reference, loss),
        torch.randn(2, n // 8, d // 8).unbind(),
        torch.randn(2, n, d).unbind(),
        operations=6 * n * d * min(n, d),  # by the shorter route, with its symmetric halves
        rounds=max(2, min(50, 2**25 // (n * d))) if d < 4096 or provider == "fastssl" else 2,
    )


@pytest.mark.parametrize("route", ["features", "dual"])
@pytest.mark.parametrize("d", [256, 512, 768, 1024, 1536, 2048])
@pytest.mark.parametrize("n", [256, 512, 1024])
@pytest.mark.parametrize("loss", NAMES)
def test_routes(compare, monkeypatch, loss: str, n: int, d: int, route: str) -> None:
    """Where the shorter route changes, for energy.DUAL_COST."""
    monkeypatch.setattr(energy, "takes_dual_route", lambda n, d: route == "dual")
    compare(
        f"{NAMES[loss]} routes",
        route,
        getattr(functional, loss),
        getattr(reference, loss),
        torch.randn(2, n // 8, d // 8).unbind(),
        torch.randn(2, n, d).unbind(),
        operations=6 * n * d * (n if route == "dual" else d),
        rounds=20,
        warmup=3,
    )
