"""The terms of pairs with a teacher, where a loss shows a part of them only."""

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from targets import Target
from torch import Tensor

from fastssl.ops.distill_clip import distill_clip_terms

# Rows, columns, the first row's pair and whether columns are asked for.
PAIRS = {
    "square": (33, 33, 0, False),
    "both sides": (33, 33, 0, True),
    "a rank's rows": (20, 47, 13, False),
    "the last rank's": (20, 47, 27, False),
    "one row": (1, 9, 4, False),
}
SEVERAL_TILES = {"tiles": (600, 600, 0, True), "tiles of a rank": (600, 1500, 700, False)}


def given(target: Target, m: int, n: int) -> list[Tensor]:
    """Rows and a scale of the student, and of a teacher of another width."""
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    inputs = []
    for width, scale in ((10, 2.0), (7, 0.7)):
        rows = [torch.randn(size, width, dtype=dtype) for size in (m, n)]
        inputs += [*rows, torch.tensor(scale, dtype=dtype)]
    return [x.to(target.device) for x in inputs]


def plain_terms(
    q: Tensor, k: Tensor, s: Tensor, a: Tensor, b: Tensor, t: Tensor, first: int, columns: bool
) -> Tensor:
    x, y = s * q @ k.T, t * a @ b.T
    pair = torch.zeros_like(x, dtype=torch.bool).diagonal_scatter(
        torch.ones(len(q), dtype=torch.bool, device=q.device), first
    )
    negatives, own = x.masked_fill(pair, -torch.inf), x[pair]
    terms = [(negatives - own[:, None]).logsumexp(1), -(y.softmax(1) * x.log_softmax(1)).sum(1)]
    if columns:
        terms += [(negatives - own).logsumexp(0), -(y.softmax(0) * x.log_softmax(0)).sum(0)]
    return torch.cat(terms)


@pytest.mark.parametrize("case", PAIRS | SEVERAL_TILES)
def test_rows_and_columns(target: Target, case: str) -> None:
    if case in SEVERAL_TILES and target.interpreted:
        pytest.skip("too many for the interpreter")
    m, n, first, columns = (PAIRS | SEVERAL_TILES)[case]

    def fused(*inputs: Tensor) -> Tensor:
        rows, cols = distill_clip_terms(
            *inputs, first=first, columns=columns, backend=target.backend
        )
        return torch.cat([rows.flatten(), cols.flatten()])

    def plain(*inputs: Tensor) -> Tensor:
        return plain_terms(*inputs, first, columns)

    inputs = given(target, m, n)
    upstream = torch.randn(2 * (m + n * columns), dtype=inputs[0].dtype, device=target.device)
    check_accuracy(fused, plain, inputs[:3], upstream, fixed=inputs[3:])


def test_a_pair_without_negatives_is_minus_infinity(target: Target) -> None:
    def fused(*inputs: Tensor) -> Tensor:
        return torch.stack(distill_clip_terms(*inputs, columns=True, backend=target.backend))

    inputs = given(target, 1, 1)
    terms, *grads = value_and_gradients(fused, inputs[:3], fixed=inputs[3:])
    assert (terms[:, 0] == -torch.inf).all()
    assert (terms[:, 1] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_columns_not_asked_for_are_empty(target: Target) -> None:
    _, cols = distill_clip_terms(*given(target, 4, 4), backend=target.backend)
    assert cols.shape == (2, 0)
