"""Similarity log-sum-exp on the GPU of columns that get no gradient: a queue of negatives.

The gradient of L_i by its own row and by the scale needs nothing but the mean of the columns,
weighted as the softmax weights them, and that is gathered in the forward pass:

    L_i = log sum_j exp(s x^_i.y^_j)        dL_i / dx^_i = s sum_j exp(s x^_i.y^_j - L_i) y^_j

4 M N D operations, and the columns may change before the backward pass, which multiplies by dL_i.
Rows too wide for one tile take the two walks of similarity.py. README.md has the rest.
"""

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LN2, LOG2E
from fastssl.kernels.similarity import row_gradients, similarity_lse_fwd
from fastssl.kernels.tiles import (
    COUNTS,
    FP16_WEIGHT,
    empty_rnorms,
    fill_rnorms,
    launch_config,
    less_pair,
    load_tile,
    logits_of,
    over,
    pair_scores,
    power_of_two,
    relative,
    store_gradient,
    times,
)


@triton.jit(do_not_specialize=COUNTS)
def _fixed_keys_lse_kernel(
    x_ptr, y_ptr, x_rnorm_ptr, y_rnorm_ptr, x_ids_ptr, y_ids_ptr, scale_ptr, parts_ptr, dunit_ptr,
    M, N, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write parts and tops [splits, M] as the forward kernel does, and sums of unit columns.

    These, dunit [splits, M, D], are sum_j exp(x_ij - top_i) y^_j over a share of the columns, where
    dunit_ptr is given.
    """
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    feats = tl.arange(0, BLOCK_D)
    root = tl.sqrt(tl.load(scale_ptr).to(tl.float32) * LOG2E)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rnorm = tl.load(x_rnorm_ptr + rows, mask=rows < M, other=0.0)
    x_power = power_of_two(x_rnorm)
    x_factor = over(x_rnorm * root, x_power)
    x = times(load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D), x_power)
    if x_ids_ptr is not None:
        x_ids = tl.load(x_ids_ptr + rows, mask=rows < M, other=0)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    start = tl.program_id(1) * share
    for col_start in range(start, tl.minimum(start + share, N), BLOCK_N):
        cols = col_start + tl.arange(0, BLOCK_N)
        y_rnorm = tl.load(y_rnorm_ptr + cols, mask=cols < N, other=0.0)
        y = load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
        products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        logits = logits_of(products, x_factor, y_rnorm * root)  # [i, j], base 2
        if x_ids_ptr is not None:
            y_ids = tl.load(y_ids_ptr + cols, mask=cols < N, other=0)
            logits = tl.where(x_ids[:, None] != y_ids[None, :], logits, -float("inf"))
        if col_start + BLOCK_N > N:
            logits = tl.where((cols < N)[None, :], logits, -float("inf"))
        top, kept, weights = relative(top, logits, 1)
        total = total * kept + tl.sum(weights, 1)
        if dunit_ptr is not None:
            if FP16:  # weight / |y| may not be a float16 number: y becomes a unit tile
                y = times(y, y_rnorm)
                weights *= FP16_WEIGHT
            else:
                weights *= y_rnorm[None, :]
            acc = tl.dot(weights.to(y.dtype), y, acc * kept[:, None], input_precision=PRECISION)

    part_at = tl.program_id(1).to(tl.int64) * M + rows
    tl.store(parts_ptr + part_at, total, mask=rows < M)
    tl.store(parts_ptr + splits.to(tl.int64) * M + part_at, top, mask=rows < M)
    if dunit_ptr is not None:
        if FP16:
            acc *= 1 / FP16_WEIGHT
        mask = (rows < M)[:, None] & (feats < D)[None, :]
        tl.store(dunit_ptr + part_at[:, None] * D + feats[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _fixed_keys_lse_finish_kernel(
    x_ptr, rnorm_ptr, scale_ptr, pair_ptr, pair_rnorm_ptr, positive_ptr,
    parts_ptr, dunit_ptr, lse_ptr, dx_ptr, dscale_ptr,
    M, splits, x_stride_n, x_stride_d, pair_stride_n, pair_stride_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Merge parts and tops of the shares: lse [M]; and if dunit, its derivatives by x_i and s.

    Where pair_ptr is given, all are of lse less the score of the row's pair.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.arange(0, BLOCK_PARTS)
    part_at = part.to(tl.int64)[:, None] * M + rows[None, :]
    visited = (part < splits)[:, None] & (rows < M)[None, :]
    tops_ptr = parts_ptr + splits.to(tl.int64) * M
    tops = tl.load(tops_ptr + part_at, mask=visited, other=-float("inf"))
    top = tl.max(tops, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    totals = tl.load(parts_ptr + part_at, mask=visited, other=0.0) * tl.exp2(tops - shift[None, :])
    total = tl.sum(totals, 0)
    origin = tl.zeros([BLOCK_M], tl.float32)
    if positive_ptr is not None:
        origin = tl.load(positive_ptr + rows, mask=rows < M, other=0.0)
    tl.store(lse_ptr + rows, ((top - origin) + tl.log2(total)) * LN2, mask=rows < M)

    if dunit_ptr is not None:
        feats = tl.arange(0, BLOCK_D)
        dunit = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for some in range(0, splits, 4):
            for split in tl.static_range(4):  # loads that do not wait for one another
                left = tl.where(some + split < splits, M, 0)
                row_at = M.to(tl.int64) * (some + split) + rows
                kept = tl.exp2(tl.load(tops_ptr + row_at, rows < left, -float("inf")) - shift)
                at = row_at[:, None] * D + feats[None, :]
                mask = (rows < left)[:, None] & (feats < D)[None, :]
                dunit += tl.load(dunit_ptr + at, mask=mask, other=0.0) * kept[:, None]
        dunit *= tl.where(total == 0, 0.0, 1 / total)[:, None]
        rnorm = tl.load(rnorm_ptr + rows, mask=rows < M, other=0.0)
        scale = tl.load(scale_ptr).to(tl.float32)
        if pair_ptr is not None:
            dunit, _ = less_pair(
                dunit, total, rows, feats, tl.where(total == 0, 0.0, 1.0), scale,
                pair_ptr, pair_rnorm_ptr, positive_ptr, M, pair_stride_n, pair_stride_d, D,
            )  # fmt: skip
        store_gradient(
            dunit, total, rows, rows, feats, scale, x_ptr, rnorm, dx_ptr, dscale_ptr,
            M, x_stride_n, x_stride_d, D, True, False,
        )  # fmt: skip


def fixed_keys_lse_fwd(q, k, scale, pair, row_ids, col_ids, gradients):
    """``similarity_lse_fwd`` of cosines with the gradients, of which no key is then needed again.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise.
        scale: [] float, 1 / temperature, on the device.
        pair: [M, D] rows, whose scores with those of q are taken off, or None.
        row_ids: [M] integers or None.
        col_ids: [N] integers or None.
        gradients: whether to compute them.

    Returns:
        lse [M] float32, and its derivatives by each row [M, D] in the rows' dtype and by the scale
        [M] float32; empty without gradients.
    """
    (M, D), N, device = q.shape, len(k), q.device
    ids = [None if each is None else each.contiguous() for each in (row_ids, col_ids)]
    arch, multiprocessors = gpu.target(device)
    options, splits = launch_config(
        "fixed_keys", M, N, D, q.dtype, row_ids is not None, arch, multiprocessors
    )
    nothing = [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((0, 0), 0)]
    if options["BLOCK_D"] < D:  # rows too wide for one tile are walked twice
        lse, top, total, *norms = similarity_lse_fwd(q, k, scale, pair, *ids, True)
        if not gradients:
            return lse, *nothing
        with torch.cuda.device_of(q):
            one = torch.ones(1, dtype=torch.float32, device=device).expand(M)
            dq, dscale = row_gradients(
                q, k, norms, ids, top, total, one, scale,
                row_weight=True, col_weight=False, dscale=True, pair=pair,
            )  # fmt: skip
        return lse, dq[0], dscale

    q_rnorm, k_rnorm = empty_rnorms(q, k, True)
    parts = torch.empty(2, splits, M, dtype=torch.float32, device=device)
    lse, dq, dscale, dunit = torch.empty_like(q_rnorm), None, None, None
    if gradients:
        dq, dscale = torch.empty(M, D, dtype=q.dtype, device=device), torch.empty_like(lse)
        dunit = torch.empty(splits, M, D, dtype=torch.float32, device=device)
    block_m = max(1, 1024 // options["BLOCK_D"])
    shared = {
        **gpu.strided(x=q),
        "scale_ptr": scale,
        "parts_ptr": parts,
        "dunit_ptr": dunit,
        "M": M,
        "splits": splits,
        "D": D,
    }
    with torch.cuda.device_of(q):
        fill_rnorms(q, k, q_rnorm, k_rnorm, None, scale)
        pair_rnorm, positive = pair_scores(q, pair, q_rnorm, scale)
        gpu.launch(
            _fixed_keys_lse_kernel,
            (triton.cdiv(M, options["BLOCK_M"]), splits),
            **shared,
            **gpu.strided(y=k),
            x_rnorm_ptr=q_rnorm,
            y_rnorm_ptr=k_rnorm,
            x_ids_ptr=ids[0],
            y_ids_ptr=ids[1],
            N=N,
            PRECISION=gpu.precision_of(q.dtype, arch),
            **options,
        )
        gpu.launch(
            _fixed_keys_lse_finish_kernel,
            (triton.cdiv(M, block_m),),
            **shared,
            **gpu.strided(pair=q if pair is None else pair) | {"pair_ptr": pair},
            rnorm_ptr=q_rnorm,
            pair_rnorm_ptr=pair_rnorm,
            positive_ptr=positive,
            lse_ptr=lse,
            dx_ptr=dq,
            dscale_ptr=dscale,
            BLOCK_M=block_m,
            BLOCK_D=options["BLOCK_D"],
            BLOCK_PARTS=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return lse, *((dq, dscale) if gradients else nothing)
