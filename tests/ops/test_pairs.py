"""The log-sum-exps of pairs, where a loss shows a part of them only."""

from collections.abc import Callable

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from targets import Target
from torch import Tensor

from fastssl import reference
from fastssl.ops import pairs


def rows(target: Target, m: int, n: int, d: int, dtype: torch.dtype = torch.float32):
    return [torch.randn(size, d).to(target.device, dtype) for size in (m, n)]


def scores(q: Tensor, k: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    return scale * (reference.normalize(q) @ reference.normalize(k).T if normalize else q @ k.T)


def plain_pairs(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    *,
    first: int = 0,
    columns: bool = False,
    normalize: bool = True,
) -> Tensor:
    x = scores(q, k, scale, normalize)
    at = torch.arange(len(q), device=q.device) + first
    own = x[at - first, at]
    hidden = at[:, None] == torch.arange(len(k), device=q.device)
    if ids is not None:
        hidden = hidden | (ids[at][:, None] == ids)
    x = x.masked_fill(hidden, -torch.inf)
    found = (x - own[:, None]).logsumexp(1)
    return torch.cat([found, (x - own).logsumexp(0)]) if columns else found


def fused_pairs(target: Target, *args: object, **options: object) -> Callable[..., Tensor]:
    return lambda q, k, scale: torch.cat(
        pairs.pair_lse(q, k, scale, *args, **options, backend=target.backend)
    )


# Rows, columns, the first row's pair and whether columns are asked for.
PAIRS = {
    "square": (33, 33, 0, False),
    "both sides": (33, 33, 0, True),
    "a rank's rows": (20, 47, 13, False),
    "the last rank's": (20, 47, 27, False),
    "one row": (1, 9, 4, False),
}
SEVERAL_TILES = {"tiles": (600, 600, 0, True), "tiles of a rank": (600, 1500, 700, False)}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("case", PAIRS | SEVERAL_TILES)
def test_pairs_and_their_negatives(
    target: Target, case: str, with_ids: bool, normalize: bool
) -> None:
    if case in SEVERAL_TILES and target.interpreted:
        pytest.skip("too many for the interpreter")
    m, n, first, columns = (PAIRS | SEVERAL_TILES)[case]
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    q, k = rows(target, m, n, 10, dtype)
    ids = torch.arange(n, device=target.device) * 3 % 8 if with_ids else None
    options = {"first": first, "columns": columns, "normalize": normalize}
    for scale in (2.0, 60.0) if case in PAIRS else (60.0 if with_ids else 2.0,):
        s = torch.tensor(scale, dtype=dtype, device=target.device)
        upstream = torch.randn(m + n * columns, dtype=dtype, device=target.device)
        check_accuracy(
            fused_pairs(target, ids, **options),
            lambda q, k, s, ids=ids: plain_pairs(q, k, s, ids, **options),
            [q, k, s],
            upstream,
        )


@pytest.mark.parametrize("columns", [False, True])
def test_a_pair_without_negatives_is_minus_infinity(target: Target, columns: bool) -> None:
    q, k = rows(target, 4, 4, 6)
    s = torch.tensor(3.0, device=target.device)
    alike = torch.zeros(4, dtype=torch.int64, device=target.device)
    lse, *grads = value_and_gradients(fused_pairs(target, alike, columns=columns), [q, k, s])
    assert (lse == -torch.inf).all()
    assert all(grad.isfinite().all() for grad in grads)
    lone = fused_pairs(target, columns=columns)(q[:1], k[:1], s)
    assert (lone == -torch.inf).all()


def test_columns_not_asked_for_are_empty(target: Target) -> None:
    q, k = rows(target, 4, 4, 6)
    _, cols = pairs.pair_lse(q, k, torch.tensor(3.0, device=target.device), backend=target.backend)
    assert cols.shape == (0,)


def test_one_side_of_the_pairs_alone_gets_its_gradient(target: Target) -> None:
    q, k = rows(target, 21, 21, 6)
    s = torch.tensor(3.0, device=target.device)
    for side in (0, 1):

        def part(q, k, s, side=side):
            return pairs.pair_lse(q, k, s, columns=True, backend=target.backend)[side]

        def plain(q, k, s, side=side):
            return plain_pairs(q, k, s, columns=True).view(2, 21)[side]

        check_accuracy(part, plain, [q, k, s], torch.randn(21, device=target.device))
