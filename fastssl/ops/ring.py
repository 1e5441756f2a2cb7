"""Similarities with the rows of all ranks, which go from rank to rank in a ring.

No rank ever holds all keys. A block of them meets the queries of every rank; while a rank works
with one, the next is on its way. What a block gives to a query is added up at home; what queries
give to a block's rows, log-sum-exps of columns or gradients, follows the block and comes home with
it. The work is that of the operators in ``ops/similarity.py`` and ``ops/sigmoid.py``. Kept for the
backward pass, in which the keys go round again, is what belongs to this rank's rows. All ranks must
take part in both passes and agree in which inputs need gradients.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import Carried, Ranks
from fastssl.ops.sigmoid import _sigmoid_sum, _sigmoid_sum_bwd
from fastssl.ops.similarity import _similarity_lse, _similarity_lse_bwd


def ring_lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    pairs: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    ranks: Ranks,
    *,
    everywhere: bool,
    columns: bool = False,
    normalize: bool = True,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each query over the visible keys of all ranks, less the score of its pair.

    R_i = log sum_j exp(scale sim(q_i, k_j)) - pairs_i, and for the keys of this rank over the
    queries of all C_j = log sum_i exp(scale sim(q_i, k_j)) - pairs_j.

    Args:
        q: [M, D] rows.
        k: [N, D] rows.
        scale: 0-dim, positive, of the accumulation type (float64 for float64 rows, else float32).
        pairs: [M], of scale's type.
        row_ids: [M] integers; a query does not see the keys with its id.
        col_ids: [N] integers.
        ranks: Who holds the keys, and how many.
        everywhere: Whether ids tell keys of other ranks too; else queries see all of those.
        columns: Whether to return C, which needs M = N.
        normalize: Whether sim is the cosine; else the plain product.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        R [M] and C [N], of scale's type, -inf where nothing is seen; C is empty if not asked for.
    """
    rows, cols = _RingLse.apply(
        q, k, scale, pairs, row_ids, col_ids, ranks, everywhere, columns, normalize, backend
    )
    return rows, cols


def ring_sigmoid_sum(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    ranks: Ranks,
    *,
    backend: str,
) -> Tensor:
    """``sigmoid_sum`` of this rank's queries, row i's pair being key i, over the keys of all ranks.

    Gradients are computed with it; those of the keys come home in the same trip.

    Args:
        q: [N, D] rows.
        k: [N, D] rows.
        scale: 0-dim, of the accumulation type (float64 for float64 rows, else float32).
        bias: 0-dim, likewise.
        ids: [N] integers; of keys with equal ids, none but the pair itself counts for a row.
        ranks: Who holds the keys, and how many.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        0-dim, of scale's type.
    """
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (q, k, scale, bias)]
    total: Tensor = _RingSigmoid.apply(q, k, scale, bias, ids, ranks, needs, backend)
    return total


def ring_class_sums(x: Tensor, classes: Tensor, ranks: Ranks) -> Tensor:
    """Sum over the ranks of the rows x_j [N, F] with row i's class [N]: [N, F], differentiable."""
    sums: Tensor = _RingClassSums.apply(x, classes, ranks)
    return sums


def class_sums(classes: Tensor, x: Tensor, x_classes: Tensor) -> Tensor:
    """Sum of the rows x_j [N, F] of each of the classes [M]: [M, F], differentiable."""
    known = classes.sort().values
    place = torch.searchsorted(known, x_classes).clamp_max(len(known) - 1)
    x = x.where((known[place] == x_classes)[:, None], 0)
    # index_add would add in another order each time on a GPU.
    sums = x.new_zeros(len(known), x.shape[1]).index_put((place,), x, accumulate=True)
    return sums[torch.searchsorted(known, classes)]


class _RingLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        pairs: Tensor,
        row_ids: Tensor,
        col_ids: Tensor,
        ranks: Ranks,
        everywhere: bool,
        columns: bool,
        normalize: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        merge = partial(_merged, backend=backend)
        row_sums: list[Tensor] = []
        col_sums = Carried(ranks, merge)
        for owner, ids, (keys,) in _blocks(ranks, row_ids, col_ids, everywhere, k):
            part = _similarity_lse(q, keys, scale, None, *ids, normalize, backend)
            row_sums = merge(row_sums, part[1:3]) if row_sums else list(part[1:3])
            if owner == ranks.rank:
                rnorms = part[3:]
            if columns:
                part = _similarity_lse(keys, q, scale, None, *ids[::-1], normalize, backend)
                col_sums.put(owner, list(part[1:3]))
        ctx.options = ranks, everywhere, columns, normalize, backend
        saved = row_sums, col_sums.home()
        ctx.save_for_backward(q, k, scale, row_ids, col_ids, *rnorms, *saved[0], *saved[1])
        unit = math.log(2) if backend == "triton" else 1.0  # Triton's maxima are of base 2
        rows, *cols = (
            ((top * unit - pairs) + total.log()).masked_fill(total == 0, -torch.inf)
            for top, total in filter(None, saved)
        )
        return rows, cols[0] if columns else rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dcols: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        ranks, everywhere, columns, normalize, backend = ctx.options
        q, k, scale, row_ids, col_ids, q_rnorm, k_rnorm, top, total, *col_sums = ctx.saved_tensors
        need_q, need_k, need_scale, *_ = ctx.needs_input_grad
        needs, swapped = [need_q, need_k, need_scale], [need_k, need_q, need_scale]
        dq, dscale = (torch.zeros_like(x, dtype=scale.dtype) for x in (q, scale))
        carried = Carried(ranks)
        with_k = [*([k_rnorm] if normalize else []), *([*col_sums, dcols] if columns else [])]
        for owner, ids, (keys, *more) in _blocks(ranks, row_ids, col_ids, everywhere, k, *with_k):
            rnorm = more.pop(0) if normalize else k_rnorm
            dkeys = torch.zeros_like(keys, dtype=scale.dtype)
            kept = top, total, q_rnorm, rnorm
            found = _similarity_lse_bwd(
                drows, q, keys, scale, None, *ids, *kept, normalize, [*needs, False], backend
            )
            _add((dq, dkeys, dscale), needs, found)
            if columns:
                col_top, col_total, dlse = more
                kept = col_top, col_total, rnorm, q_rnorm
                found = _similarity_lse_bwd(
                    dlse,
                    keys,
                    q,
                    scale,
                    None,
                    *ids[::-1],
                    *kept,
                    normalize,
                    [*swapped, False],
                    backend,
                )
                _add((dkeys, dq, dscale), swapped, found)
            if need_k:
                carried.put(owner, [dkeys])
        return (
            dq.to(q.dtype) if need_q else None,
            carried.home()[0].to(k.dtype) if need_k else None,
            dscale if need_scale else None,
            -(drows + dcols if columns else drows),
            *(None for _ in ctx.needs_input_grad[4:]),
        )


class _RingSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        bias: Tensor,
        ids: Tensor | None,
        ranks: Ranks,
        needs: list[bool],
        backend: str,
    ) -> Tensor:
        total = torch.zeros_like(scale)
        home = [torch.zeros_like(x, dtype=scale.dtype) for x in (q, scale, bias)]
        carried = Carried(ranks)
        for owner, (keys, *others) in ranks.ring(k, *([] if ids is None else [ids])):
            first, block_ids = 0, ids
            if owner != ranks.rank:  # no row has its pair here; ids are those of keys, then of rows
                first = -1 if ids is None else len(keys)
                block_ids = None if ids is None else torch.cat([*others, ids])
            part, *grads = _sigmoid_sum(q, keys, scale, bias, block_ids, first, needs, backend)
            total += part
            dkeys = grads.pop(1)
            _add(home, [needs[0], *needs[2:]], [grad for grad in grads if grad.numel()])
            if needs[1]:
                carried.put(owner, [dkeys])
        ctx.backend = backend
        dk = carried.home()[0] if needs[1] else scale.new_empty(0)
        ctx.save_for_backward(q, k, scale, bias, home[0], dk, *home[1:])
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        needs = list(ctx.needs_input_grad[:4])
        saved = list(ctx.saved_tensors)  # once: a checkpoint gives them out a single time
        found = iter(_sigmoid_sum_bwd(dtotal, saved[:4], saved[4:], needs, ctx.backend))
        return (*(next(found) if need else None for need in needs), None, None, None, None)


class _RingClassSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, classes: Tensor, ranks: Ranks) -> Tensor:
        ctx.save_for_backward(classes)
        ctx.ranks = ranks
        sums = torch.zeros_like(x)
        for _, (rows, theirs) in ranks.ring(x, classes):
            sums += class_sums(classes, rows, theirs)
        return sums

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor, None, None]:
        # Which rows are summed is symmetric.
        return ring_class_sums(dsums, ctx.saved_tensors[0], ctx.ranks), None, None


def _blocks(
    ranks: Ranks, row_ids: Tensor, col_ids: Tensor, everywhere: bool, *rows: Tensor
) -> Iterator[tuple[int, tuple[Tensor | None, Tensor | None], list[Tensor]]]:
    """Go round with rows: whose they are, the ids of queries and keys to compare, and they."""
    if everywhere:
        for owner, (theirs, *here) in ranks.ring(col_ids, *rows):
            yield owner, (row_ids, theirs), here
    else:
        for owner, here in ranks.ring(*rows):
            yield owner, (row_ids, col_ids) if owner == ranks.rank else (None, None), here


def _merged(a: list[Tensor], b: list[Tensor], *, backend: str) -> list[Tensor]:
    """Maxima and sums of exponentials over the keys that either is of, as the backend has them."""
    # A maximum that belongs to nothing may be any number.
    tops = [top.masked_fill(total == 0, -torch.inf) for top, total in (a, b)]
    top = torch.maximum(*tops)
    nothing = top == -torch.inf
    shift = top.masked_fill(nothing, 0)
    exp = torch.exp2 if backend == "triton" else torch.exp
    total = a[1] * exp(tops[0] - shift) + b[1] * exp(tops[1] - shift)
    return [top.masked_fill(nothing, torch.inf if backend == "triton" else -torch.inf), total]


def _add(sums: Sequence[Tensor], needs: Sequence[bool], found: Sequence[Tensor]) -> None:
    """Add the gradients that were found to those of the sums that are needed."""
    needed = [each for each, need in zip(sums, needs, strict=True) if need]
    for each, part in zip(needed, found, strict=True):
        each += part


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("a loss with exchange='ring' has no second derivative")
