"""The log-sum-exp over keys without a gradient, where a loss shows a part of it only."""

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from targets import Target

from fastssl import reference
from fastssl.ops import similarity

# Rows, columns, features.
SHAPES = [(32, 64, 16), (33, 70, 21), (1, 9, 8), (40, 1, 8), (5, 6, 270)]
GPU_SHAPES = [(512, 1024, 128), (1000, 3000, 96), (100, 65536, 128), (1, 1, 1), (300, 200, 768)]


def rows(target: Target, m: int, n: int, d: int, dtype: torch.dtype = torch.float32):
    return [torch.randn(size, d).to(target.device, dtype) for size in (m, n)]


def shapes(target: Target) -> list[tuple[int, int, int]]:
    return GPU_SHAPES if target.device == "cuda" else SHAPES


def fused(target: Target, row_ids=None, col_ids=None):
    return lambda q, k, scale: similarity.similarity_lse(
        q, k, scale, row_ids, col_ids, backend=target.backend
    )


@pytest.mark.parametrize("scale", [2.0, 200.0])
@pytest.mark.parametrize("with_ids", [False, True])
def test_keys_without_gradient_are_as_exact(target: Target, scale: float, with_ids: bool) -> None:
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    several = [(600, 1100, 8)] if target == Target("torch", "cpu") else []  # tiles
    for m, n, d in shapes(target) + several:
        q, k = rows(target, m, n, d, dtype)
        s = torch.tensor(scale, dtype=dtype, device=target.device)
        ids = (None, None)
        if with_ids:
            row_ids = torch.arange(m, device=target.device) % 4
            col_ids = torch.arange(n, device=target.device) % 4
            col_ids[-1] = 9  # so that each row sees something
            ids = (row_ids, col_ids)
        upstream = torch.randn(m, dtype=dtype, device=target.device)
        check_accuracy(
            lambda q, s, k=k, ids=ids: fused(target, *ids)(q, k, s),
            lambda q, s, k=k, ids=ids: reference.similarity_lse(q, k.to(q), s, *ids),
            [q, s],
            upstream,
        )


def test_keys_without_gradient_give_the_same(target: Target) -> None:
    q, k = rows(target, 30, 40, 12)
    s = torch.tensor(5.0, device=target.device)
    trained = value_and_gradients(fused(target), [q, k, s])
    fixed = value_and_gradients(lambda q, s: fused(target)(q, k, s), [q, s])
    for a, b in zip(fixed, (trained[0], trained[1], trained[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(fused(target)(q, k, s), fixed[0])
