"""The similarity log-sum-exp of two different sets of rows, and both operators' registration."""

from functools import partial

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


@pytest.mark.parametrize("scale", [2.0, 30.0, 200.0])
def test_value_and_gradients_are_as_exact_as_promised(target: Target, scale: float) -> None:
    dtypes = [torch.float32] + ([torch.float64] if target.backend == "torch" else [])
    for m, n, d in shapes(target):
        for dtype in dtypes:
            q, k = rows(target, m, n, d, dtype)
            s = torch.tensor(scale, dtype=dtype, device=target.device)
            upstream = torch.randn(m, dtype=dtype, device=target.device)
            check_accuracy(fused(target), reference.similarity_lse, [q, k, s], upstream)


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_pairs_with_equal_ids_are_left_out(target: Target, scale: float) -> None:
    q, k = rows(target, 45, 70, 12)
    ids = [torch.randint(-3, 9, (size,), device=target.device) for size in (45, 70)]
    plain = lambda q, k, scale: reference.similarity_lse(q, k, scale, *ids)  # noqa: E731
    s = torch.tensor(scale, device=target.device)
    check_accuracy(fused(target, *ids), plain, [q, k, s], torch.randn(45, device=target.device))


def test_a_row_that_sees_nothing_is_minus_infinity_without_gradient(target: Target) -> None:
    q, k = rows(target, 3, 5, 8)
    row_ids = torch.tensor([1, 2, 1], device=target.device)
    col_ids = torch.full((5,), 2, device=target.device)
    lse, dq, dk, dscale = value_and_gradients(
        fused(target, row_ids, col_ids), [q, k, torch.tensor(4.0, device=target.device)]
    )
    assert lse[1] == -torch.inf
    assert lse[[0, 2]].isfinite().all()
    assert (dq[1] == 0).all()
    assert all(grad.isfinite().all() for grad in (dq, dk, dscale))


def test_each_gradient_is_the_same_alone(target: Target) -> None:
    inputs = [*rows(target, 40, 23, 8), torch.tensor(7.0, device=target.device)]
    _, *together = value_and_gradients(fused(target), inputs)
    for i, expected in enumerate(together):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        fused(target)(*leaves).sum().backward()
        torch.testing.assert_close(leaves[i].grad, expected, rtol=1e-6, atol=1e-8)


def test_strides_do_not_matter(target: Target) -> None:
    q, k = rows(target, 30, 50, 20)
    s = torch.tensor(3.0, device=target.device)
    expected = fused(target)(q, k, s)
    spread = torch.zeros(60, 41, device=target.device)
    spread[::2, 1::2] = q
    torch.testing.assert_close(fused(target)(spread[::2, 1::2], k.T.contiguous().T, s), expected)


def test_gradcheck_in_float64() -> None:
    q, k = (torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (4, 6))
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for function in (partial(similarity.similarity_lse, backend="torch"), reference.similarity_lse):
        assert torch.autograd.gradcheck(function, (q, k, s))


def test_many_tiles_agree_with_one_matrix() -> None:
    q, k = rows(Target("torch", "cpu"), 1100, 1300, 8, torch.float64)
    for scale in (10.0, 90.0):
        s = torch.tensor(scale, dtype=torch.float64)
        check_accuracy(fused(Target("torch", "cpu")), reference.similarity_lse, [q, k, s])


@pytest.mark.parametrize("with_ids", [False, True])
def test_operators_are_registered_as_torch_wants(target: Target, with_ids: bool) -> None:
    q, k = (x.requires_grad_() for x in rows(target, 6, 6, 4))
    s = torch.tensor(3.0, device=target.device, requires_grad=True)
    ids = torch.arange(6, device=target.device) // 2 if with_ids else None
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(
        similarity._similarity_lse, (q, k, s, ids, ids, target.backend), test_utils=checks
    )
    torch.library.opcheck(
        similarity._two_view_lse, (q, k, s, ids, target.backend), test_utils=checks
    )
