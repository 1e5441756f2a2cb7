"""NT-Xent, forward and backward, beside plain PyTorch, the compiled plain loss and lightly."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from fastssl import functional, reference

D = 128
TEMPERATURE = 0.1
SIZES = {"cpu": [256, 1024, 4096, 8192, 16384], "cuda": [256, 1024, 4096, 16384, 32768]}  # pairs
PEERS_UP_TO = {
    "cpu": {"plain": 8192, "compiled": 4096, "lightly": 8192},
    "cuda": {"plain": 16384, "compiled": 16384, "lightly": 16384},
}


def provide(provider: str) -> Callable[..., torch.Tensor]:
    if provider == "fastssl":
        return partial(functional.nt_xent, temperature=TEMPERATURE)
    if provider == "lightly":
        return pytest.importorskip("lightly.loss").NTXentLoss(TEMPERATURE)
    plain = partial(reference.nt_xent, temperature=TEMPERATURE)
    return torch.compile(plain) if provider == "compiled" else plain


@pytest.mark.parametrize("provider", ["fastssl", "plain", "compiled", "lightly"])
@pytest.mark.parametrize("size", range(5))
def test_nt_xent(compare, device: str, size: int, provider: str) -> None:
    n = SIZES[device][size]
    if n > PEERS_UP_TO[device].get(provider, n):
        pytest.skip("the matrix would take more memory than most machines have")
    compare(
        "NT-Xent",
        provider,
        provide(provider),
        partial(reference.nt_xent, temperature=TEMPERATURE),
        torch.randn(2, min(n, 512), D).unbind(),
        torch.randn(2, n, D).unbind(),
        operations=4 * (2 * n) ** 2 * D,
        rounds=max(2, min(200, 2**17 // n)),
        warmup=max(1, 4096 // n),
    )
