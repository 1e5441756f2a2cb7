"""The sum of sigmoid terms, where a loss shows a part of it only."""

from functools import partial

import pytest
import torch
from accuracy import check_accuracy
from targets import Target
from torch import Tensor

from fastssl import reference
from fastssl.ops import sigmoid


def rows(target: Target, m: int, n: int, d: int, dtype: torch.dtype = torch.float32):
    return [torch.randn(size, d).to(target.device, dtype) for size in (m, n)]


# Rows, columns, the first row's pair and whether columns are asked for.
PAIRS = {
    "square": (33, 33, 0, False),
    "both sides": (33, 33, 0, True),
    "a rank's rows": (20, 47, 13, False),
    "the last rank's": (20, 47, 27, False),
    "one row": (1, 9, 4, False),
}
SEVERAL_TILES = {"tiles": (600, 600, 0, True), "tiles of a rank": (600, 1500, 700, False)}


def plain_sigmoid(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None = None, *, first: int = 0
) -> Tensor:
    y = scale * q @ k.T + bias
    at = torch.arange(len(k), device=q.device)
    own = at[:0] if first < 0 else at[first : first + len(q)]
    pair = own[:, None] == at if first >= 0 else torch.zeros_like(y, dtype=torch.bool)
    terms = -torch.nn.functional.logsigmoid(torch.where(pair, y, -y))
    if ids is not None:
        terms = terms.masked_fill((ids[own][:, None] == ids) & ~pair, 0)
    return terms.sum()


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("case", [*PAIRS, "no pairs", *SEVERAL_TILES])
def test_the_sum_of_sigmoid_terms(target: Target, case: str, with_ids: bool) -> None:
    if case in SEVERAL_TILES and target.interpreted:
        pytest.skip("too many for the interpreter")
    if case == "no pairs" and with_ids:
        pytest.skip("ids are those of pairs")
    m, n, first, _ = (PAIRS | SEVERAL_TILES | {"no pairs": (20, 30, -1, False)})[case]
    dtype = torch.float64 if target.backend == "torch" else torch.float32
    q, k = (reference.normalize(x) for x in rows(target, m, n, 10, dtype))
    ids = torch.arange(n, device=target.device) * 3 % 8 if with_ids else None
    large = with_ids or case in PAIRS
    # In the few numbers of one row the plain rounding of large scores is luck.
    for scale, bias in [(2.0, -1.0)] + [(60.0, -20.0)] * (large and m > 1):
        scalars = [torch.tensor(x, dtype=dtype, device=target.device) for x in (scale, bias)]
        check_accuracy(
            partial(sigmoid.sigmoid_sum, ids=ids, first=first, backend=target.backend),
            partial(plain_sigmoid, ids=ids, first=first),
            [q, k, *scalars],
            0.3,
        )
