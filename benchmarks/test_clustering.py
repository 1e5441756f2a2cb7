"""Sinkhorn-Knopp, and SwaV with 2 + 6 crops, beside the plain, the compiled and lightly's."""

from collections.abc import Callable

import pytest
import torch

from fastssl import functional, reference

PROVIDERS = ["fastssl", "plain", "compiled", "lightly"]


def compiled_if(provider: str, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(plain) if provider == "compiled" else plain


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("b", "k"), [(256, 3000), (4096, 3000), (1024, 65536)])
def test_sinkhorn(compare, b: int, k: int, provider: str) -> None:
    """Scores are small enough for the exponentials of lightly not to overflow."""
    if provider == "fastssl":
        function = functional.sinkhorn_knopp
    elif provider == "lightly":
        function = pytest.importorskip("lightly.loss.swav_loss").sinkhorn
    else:
        function = compiled_if(provider, torch.no_grad()(reference.sinkhorn_knopp))
    scores = (0.3 * torch.randn(b, k)).clamp(-1, 1)  # as cosines are
    compare(
        "Sinkhorn",
        provider,
        function,
        reference.sinkhorn_knopp,
        [scores[:64, :500]],
        [scores],
        moved=5 * scores.nbytes,  # four reads and one write
        backward=False,
        rounds=max(3, 2**27 // scores.numel()),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_swav(compare, provider: str) -> None:
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

    few = list(0.3 * torch.randn(crops, 32, 500))
    scores = list(0.3 * torch.randn(crops, b, k))
    # Each crop is read forward and backward and its gradient written; codes take five each.
    moved = (3 * crops + 2 * 5) * scores[0].nbytes
    compare("SwaV 2 + 6 crops", provider, loss, plain, few, scores, moved=moved, rounds=10)
