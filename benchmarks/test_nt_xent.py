"""NT-Xent, forward and backward, beside plain PyTorch, the compiled plain loss and lightly."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import check_accuracy
from measure import extra_bytes

from fastssl import functional, reference

D = 128
TEMPERATURE = 0.1
PEERS_UP_TO = {"plain": 8192, "compiled": 4096, "lightly": 8192}
SIZES = [256, 1024, 4096, 8192, 16384]  # pairs


def provide(provider: str) -> Callable[..., torch.Tensor]:
    if provider == "fastssl":
        return partial(functional.nt_xent, temperature=TEMPERATURE)
    if provider == "lightly":
        return pytest.importorskip("lightly.loss").NTXentLoss(TEMPERATURE)
    plain = partial(reference.nt_xent, temperature=TEMPERATURE)
    return torch.compile(plain) if provider == "compiled" else plain


@pytest.mark.parametrize("provider", ["fastssl", *PEERS_UP_TO])
@pytest.mark.parametrize("n", SIZES)
def test_nt_xent(benchmark, rows, rate: float, n: int, provider: str) -> None:
    if n > PEERS_UP_TO.get(provider, n):
        pytest.skip("the matrix would take more memory than most machines have")
    loss = provide(provider)
    plain = partial(reference.nt_xent, temperature=TEMPERATURE)
    check_accuracy(loss, plain, torch.randn(2, min(n, 512), D).unbind())

    z0, z1 = (z.requires_grad_() for z in torch.randn(2, n, D).unbind())

    def step() -> None:
        z0.grad = z1.grad = None
        loss(z0, z1).backward()

    step()
    z0.grad = z1.grad = None
    grown = extra_bytes(step) - z0.nbytes - z1.nbytes
    benchmark.group = f"{n} pairs"
    benchmark.pedantic(step, rounds=max(2, min(200, 2**17 // n)), warmup_rounds=max(1, 4096 // n))
    seconds = benchmark.stats.stats.median
    rows.append(
        {
            "case": f"{n} x {D}",
            "provider": provider,
            "seconds": seconds,
            "extra_bytes": max(grown, 0),
            "share_of_rate": 4 * (2 * n) ** 2 * D / seconds / rate,
        }
    )
