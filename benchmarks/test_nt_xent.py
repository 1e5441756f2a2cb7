"""NT-Xent, forward and backward, beside plain PyTorch, the compiled plain loss and lightly."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import check_accuracy

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
def test_nt_xent(time_and_memory, n: int, provider: str) -> None:
    if n > PEERS_UP_TO.get(provider, n):
        pytest.skip("the matrix would take more memory than most machines have")
    loss = provide(provider)
    plain = partial(reference.nt_xent, temperature=TEMPERATURE)
    check_accuracy(loss, plain, torch.randn(2, min(n, 512), D).unbind())
    time_and_memory(
        "NT-Xent",
        provider,
        loss,
        torch.randn(2, n, D).unbind(),
        operations=4 * (2 * n) ** 2 * D,
        rounds=max(2, min(200, 2**17 // n)),
        warmup=max(1, 4096 // n),
    )
