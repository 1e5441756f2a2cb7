"""The log-sum-exps of rows and of classes, where a loss shows a part of them only."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from targets import Target
from torch import Tensor

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

    def plain(q, k, scale):
        return reference.similarity_lse(q, k, scale, *ids)

    s = torch.tensor(scale, device=target.device)
    check_accuracy(fused(target, *ids), plain, [q, k, s], torch.randn(45, device=target.device))


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_score_of_a_pair_is_taken_off(target: Target, fixed: bool, with_ids: bool) -> None:
    for m, n, d in shapes(target):
        if with_ids and n < 6:
            continue
        q, k = rows(target, m, n, d)
        s, pair = torch.tensor(20.0, device=target.device), q + torch.randn_like(q)
        ids = [torch.arange(size, device=target.device) % 5 for size in (m, n)]
        ids = ids if with_ids else [None, None]

        def loss(q, s, pair, k=k, ids=tuple(ids)):
            return similarity.similarity_lse(q, k, s, *ids, pair=pair, backend=target.backend)

        def plain(q, s, pair, k=k, ids=tuple(ids)):
            return reference.similarity_lse(q, k.to(q.dtype), s, *ids, pair=pair)

        inputs = [q, s, pair, *([] if fixed else [k])]
        check_accuracy(loss, plain, inputs, torch.randn_like(q[:, 0]))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_row_that_sees_nothing_is_minus_infinity_without_gradient(
    target: Target, fixed: bool
) -> None:
    q, k = rows(target, 3, 5, 8)
    row_ids = torch.tensor([1, 2, 1], device=target.device)
    col_ids = torch.full((5,), 2, device=target.device)
    loss = fused(target, row_ids, col_ids)
    s = torch.tensor(4.0, device=target.device)
    if fixed:
        lse, dq, *grads = value_and_gradients(lambda q, s: loss(q, k, s), [q, s])
    else:
        lse, dq, *grads = value_and_gradients(loss, [q, k, s])
    assert lse[1] == -torch.inf
    assert lse[[0, 2]].isfinite().all()
    assert (dq[1] == 0).all()
    assert all(grad.isfinite().all() for grad in (dq, *grads))


def test_each_gradient_is_the_same_alone(target: Target) -> None:
    inputs = [*rows(target, 40, 23, 8), torch.tensor(7.0, device=target.device)]
    _, *together = value_and_gradients(fused(target), inputs)
    for i, expected in enumerate(together):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        fused(target)(*leaves).sum().backward()
        torch.testing.assert_close(leaves[i].grad, expected, rtol=1e-5, atol=1e-6)


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


def plain_classes(
    z: Tensor, scale: Tensor, classes: Tensor, weights: Tensor | None = None
) -> Tensor:
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    x = (scale * z @ z.T).masked_fill(itself, -torch.inf)
    positive = classes[:, None] == classes
    if weights is not None:
        positive = weights[classes][:, classes]
    positive = positive.to(x.dtype).masked_fill(itself, 0)
    count = positive.sum(1)
    mean = (positive * x.masked_fill(itself, 0)).sum(1) / count.masked_fill(count <= 0, 1)
    return torch.where(count > 0, x.logsumexp(1) - mean, 0)


def fused_classes(target: Target, *args: object) -> Callable[..., Tensor]:
    return lambda z, scale: similarity.class_lse(z, scale, *args, backend=target.backend)


@pytest.mark.parametrize("scale", [2.0, 60.0])
@pytest.mark.parametrize("kind", ["pairs", "few", "many", "alone", "one", "weights"])
def test_a_row_and_its_class(target: Target, kind: str, scale: float) -> None:
    if kind == "weights" and target.backend == "triton":
        pytest.skip("its kernels take no weights")
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    several = [(600, 9)] if target == Target("torch", "cpu") and kind in ("many", "weights") else []
    for n, d in [(34, 10), (6, 150), (2, 3), *several]:
        (z,) = rows(target, n, 0, d, dtype)[:1]
        z = reference.normalize(z)
        at = torch.arange(n, device=target.device)
        classes = {
            "pairs": at // 2,
            "few": at * 5 % 3,
            "many": at * 7 % (n // 3 + 1) - 4,
            "alone": torch.where(at % 3 > 0, at, 0),
            "one": 0 * at + 9,
            "weights": at % 5,
        }[kind]
        given = (classes,)
        if kind == "weights":  # whose class 3 has no positive
            weights = torch.arange(25, dtype=dtype, device=target.device).view(5, 5) % 4
            weights[3] = 0
            given = (classes, weights)
        s = torch.tensor(scale, dtype=dtype, device=target.device)
        upstream = torch.randn(n, dtype=dtype, device=target.device)
        check_accuracy(
            fused_classes(target, *given),
            lambda z, s, given=given: plain_classes(z, s, *given),
            [z, s],
            upstream,
        )


def test_a_row_without_a_positive_is_zero_without_gradient(target: Target) -> None:
    s = torch.tensor(3.0, device=target.device)
    for n in (1, 5):
        (z,) = rows(target, n, 0, 6)[:1]
        classes = torch.arange(n, device=target.device)
        lse, dz, ds = value_and_gradients(fused_classes(target, classes), [z, s])
        assert (lse == 0).all()
        assert (dz == 0).all()
        assert ds == 0
