"""Scores of samples and prototypes, and the loss of crops that predict each other's codes."""

from collections.abc import Callable

import torch
from targets import Target

from fastssl import functional, reference

# Aligned; ragged; one sample; one prototype; many prototypes.
SHAPES = [(32, 64), (37, 19), (1, 8), (9, 1), (5, 300)]
GPU_SHAPES = [(256, 3000), (4096, 300), (1, 8), (513, 1), (64, 65536)]


def shapes(target: Target) -> list[tuple[int, int]]:
    return GPU_SHAPES if target.device == "cuda" else SHAPES


def dtypes(target: Target) -> list[torch.dtype]:
    low = [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float64, *low] if target.backend == "torch" else low


def similarities(target: Target, b: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (0.3 * torch.randn(b, k)).clamp(-1, 1).to(target.device, dtype)


def extreme(kind: str) -> torch.Tensor:
    scores = torch.randn(12, 20)
    if kind == "large":
        scores *= 1e4 / scores.abs().max()
    elif kind == "equal":
        scores[:] = 0.7
    elif kind == "a sample far above":
        scores[3] += 1e4
    elif kind == "a prototype nobody is near":
        scores[:, 5] -= 1e4
    elif kind == "a prototype everybody is near":
        scores[:, 5] += 1e4
    return scores


def swap(target: Target | None, **options: object) -> Callable[..., torch.Tensor]:
    """SwAV of two global crops and any number of local ones; the reference where target is None."""
    function = reference.swav if target is None else functional.swav
    if target is not None:
        options["backend"] = target.backend
    return lambda *crops: function(crops[:2], crops[2:], **options)
