"""Sinkhorn-Knopp, and SwaV with 2 + 6 crops, beside the plain, the compiled and lightly's."""

from collections.abc import Callable

import pytest
import torch
from accuracy import check_accuracy

from fastssl import functional, reference

PROVIDERS = ["fastssl", "plain", "compiled", "lightly"]


def compiled_if(provider: str, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(plain) if provider == "compiled" else plain


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("b", "k"), [(256, 3000), (4096, 3000), (1024, 65536)])
def test_sinkhorn(time_and_memory, b: int, k: int, provider: str) -> None:
    """Scores are small enough for the exponentials of lightly not to overflow."""
    if provider == "fastssl":
        function = functional.sinkhorn_knopp
    elif provider == "lightly":
        function = pytest.importorskip("lightly.loss.swav_loss").sinkhorn
    else:
        function = compiled_if(provider, torch.no_grad()(reference.sinkhorn_knopp))
    scores = (0.3 * torch.randn(b, k)).clamp(-1, 1)  # as cosines are
    few = scores[:64, :500]
    exact = reference.sinkhorn_knopp(few.double())
    torch.testing.assert_close(function(few).double(), exact, rtol=1e-4, atol=1e-7)
    time_and_memory(
        "Sinkhorn",
        provider,
        function,
        [scores],
        moved=5 * scores.nbytes,  # four reads and one write
        backward=False,
        rounds=max(3, 2**27 // scores.numel()),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_swav(time_and_memory, provider: str) -> None:
    b, k, crops = 512, 3000, 8
    if provider == "fastssl":
        function = functional.swav
    elif provider == "lightly":
        function = pytest.importorskip("lightly.loss").SwaVLoss()
    else:
        function = compiled_if(provider, reference.swav)

    def loss(*scores: torch.Tensor) -> torch.Tensor:
        return function(list(scores[:2]), list(scores[2:])).sum()

    def plain(*scores: torch.Tensor) -> torch.Tensor:
        return reference.swav(scores[:2], scores[2:])

    check_accuracy(loss, plain, list(0.3 * torch.randn(crops, 32, 500)))
    scores = list(0.3 * torch.randn(crops, b, k))
    # Each crop is read forward and backward and its gradient written; codes take five each.
    moved = (3 * crops + 2 * 5) * scores[0].nbytes
    time_and_memory("SwaV 2 + 6 crops", provider, loss, scores, moved=moved, rounds=10)
