"""Similarity log-sum-exp on the GPU: the matrix of similarities is never stored.

Rows x_i [M, D] and columns y_j [N, D], scale s = 1 / temperature, unit rows x^ = x / |x|:

    forward     L_i = log sum_j exp(s x^_i.y^_j)        over the j with row_ids[i] != col_ids[j]
    backward    W_ij = dL_i exp(s x^_i.y^_j - L_i)      recomputed tile by tile from the saved L
                dx^_i = s sum_j W_ij y^_j    dy^_j = s sum_i W_ij x^_i    ds = sum_ij W_ij x^_i.y^_j
                dx_i = (dx^_i - x^_i <x^_i, dx^_i>) / |x_i|

Both passes read the rows once per row block and keep O(N) numbers: 2 M N D operations forward, and
4 M N D for each side that has a gradient. Rows of classes (SupCon), compared as they are, are
walked by the programs that own them in both passes: 6 N^2 D operations. The forward kernel serves
pairs too (pairs.py), the backward kernel the rows of two views (two_views.py). README.md has the
derivations. Logarithms and exponentials are base 2 inside the kernels.
"""

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LOG2E
from fastssl.kernels.tiles import (
    COUNTS,
    FP16_WEIGHT,
    UNSHIFTED_SCALE,
    VECTORS,
    chunked_products,
    empty_rnorms,
    fill_rnorms,
    finish_lse,
    gain_of,
    launch_config,
    less_pair,
    load_rnorm,
    load_tile,
    logits_of,
    online,
    over,
    pair_scores,
    power_of_two,
    store_gradient,
    times,
    view_of,
    weight_of,
)


@triton.jit(do_not_specialize=COUNTS)
def _similarity_lse_fwd_kernel(
    x_ptr, y_ptr, x_rnorm_ptr, y_rnorm_ptr, x_ids_ptr, y_ids_ptr, scale_ptr, parts_ptr,
    M, N, first, width, per_group, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    PAIRED: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write parts and tops [splits, M]: each row's sum and maximum over a share of the columns.

    PAIRED: row i does not see column first + i. COLUMNS: parts and tops are [splits, M + N], and
    hold each column's sum and maximum over a group of per_group row blocks too. CLASSES: columns of
    a row's id are positives, whose scores and number follow the tops.
    """
    feats = tl.arange(0, BLOCK_D)
    root = tl.sqrt(tl.load(scale_ptr).to(tl.float32) * LOG2E)
    tops_ptr = parts_ptr + splits.to(tl.int64) * width
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    start = tl.program_id(1) * share
    first_block = tl.program_id(0) * per_group
    for block in range(first_block, tl.minimum(first_block + per_group, tl.cdiv(M, BLOCK_M))):
        row_start = block * BLOCK_M
        rows = row_start + tl.arange(0, BLOCK_M)
        x_rnorm = load_rnorm(x_rnorm_ptr, rows, rows < M)
        x_power = None if x_rnorm_ptr is None else power_of_two(x_rnorm)
        x_factor = over(x_rnorm * root, x_power)
        if x_ids_ptr is not None:
            x_ids = tl.load(x_ids_ptr + rows, mask=rows < M, other=0)
        if D <= BLOCK_D:
            x = times(load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D), x_power)

        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if CLASSES:
            positives = tl.zeros([BLOCK_M], tl.float32)
            count = tl.zeros([BLOCK_M], tl.float32)
        for col_start in range(start, tl.minimum(start + share, N), BLOCK_N):
            cols = col_start + tl.arange(0, BLOCK_N)
            y_rnorm = load_rnorm(y_rnorm_ptr, cols, cols < N)
            if D <= BLOCK_D:
                y = load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
                products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            else:
                products = chunked_products(
                    x_ptr, x_power, rows, M, x_stride_n, x_stride_d,
                    y_ptr, cols, N, y_stride_n, y_stride_d, D, BLOCK_D, PRECISION,
                )  # fmt: skip
            logits = logits_of(products, x_factor, y_rnorm * root)  # [i, j], base 2
            if x_ids_ptr is not None:
                y_ids = tl.load(y_ids_ptr + cols, mask=cols < N, other=0)
                if not CLASSES:
                    logits = tl.where(x_ids[:, None] != y_ids[None, :], logits, -float("inf"))
            edge = col_start + BLOCK_N > N
            if PAIRED:
                pair_start = first + row_start
                edge |= (pair_start < col_start + BLOCK_N) & (col_start < pair_start + BLOCK_M)
            if COLUMNS:
                edge |= row_start + BLOCK_M > M
            if edge:
                visible = (cols < N)[None, :]
                if PAIRED:
                    visible &= (first + rows)[:, None] != cols[None, :]
                if COLUMNS:
                    visible &= (rows < M)[:, None]
                logits = tl.where(visible, logits, -float("inf"))

            if CLASSES:
                positive = (x_ids[:, None] == y_ids[None, :]) & (logits != -float("inf"))
                positives += tl.sum(tl.where(positive, logits, 0.0), 1)
                count += tl.sum(tl.where(positive, 1.0, 0.0), 1)
            top, total = online(top, total, logits, 1)
            if COLUMNS:
                col_at = tl.program_id(0).to(tl.int64) * width + M + cols
                begun = tl.where(block == first_block, 0, N)  # the workspace is not cleared
                col_total = tl.load(parts_ptr + col_at, mask=cols < begun, other=0.0)
                col_top = tl.load(tops_ptr + col_at, mask=cols < begun, other=-float("inf"))
                col_top, col_total = online(col_top, col_total, logits, 0)
                tl.store(parts_ptr + col_at, col_total, mask=cols < N)
                tl.store(tops_ptr + col_at, col_top, mask=cols < N)

        part_at = tl.program_id(1).to(tl.int64) * width + rows
        tl.store(parts_ptr + part_at, total, mask=rows < M)
        tl.store(tops_ptr + part_at, top, mask=rows < M)
        if CLASSES:
            positives_ptr = tops_ptr + splits.to(tl.int64) * width
            tl.store(positives_ptr + part_at, positives, mask=rows < M)
            counts_ptr = positives_ptr + splits.to(tl.int64) * width
            tl.store(counts_ptr + part_at, count, mask=rows < M)
        if COLUMNS:
            tl.debug_barrier()  # the next rows read what other threads wrote of the columns


@triton.jit(do_not_specialize=[*COUNTS, *VECTORS])
def _similarity_lse_weight_kernel(
    total_ptr, counts_ptr, dlse_ptr, rnorm_ptr, peak_ptr, weight_ptr, M, dlse_stride,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Weight of each row for the programs that meet it as a column, times rnorm unless float16.

    With counts_ptr weight is [2, M] and holds what each positive takes off too.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.load(total_ptr + rows, mask=rows < M, other=0.0)
    dlse = tl.load(dlse_ptr + rows.to(tl.int64) * dlse_stride, mask=rows < M, other=0.0)
    if counts_ptr is not None:
        count = tl.load(counts_ptr + rows, mask=rows < M, other=0.0)
        dlse = tl.where(count == 0, 0.0, dlse)
        tl.store(weight_ptr + M + rows, weight_of(count, dlse, gain_of(peak_ptr)), mask=rows < M)
    weight = weight_of(total, dlse, gain_of(peak_ptr))
    if peak_ptr is None and rnorm_ptr is not None:
        weight *= tl.load(rnorm_ptr + rows, mask=rows < M, other=0.0)
    tl.store(weight_ptr + rows, weight, mask=rows < M)


@triton.jit(do_not_specialize=[*COUNTS, *VECTORS])
def _similarity_lse_bwd_kernel(
    x_ptr, y_ptr, x_rnorm_ptr, y_rnorm_ptr, x_ids_ptr, y_ids_ptr,
    top_ptr, total_ptr, dlse_ptr, weight_ptr, peak_ptr, scale_ptr,
    pair_ptr, pair_rnorm_ptr, positive_ptr, dx_ptr, dy_ptr, dscale_ptr, dunit_ptr, along_ptr,
    M, N, first_block, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    pair_stride_n, pair_stride_d, dlse_stride,
    D: tl.constexpr, PRECISION: tl.constexpr,
    ROW_WEIGHT: tl.constexpr, COL_WEIGHT: tl.constexpr, VIEWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One row block of sum_j W_ij y^_j over one share of the columns; if it is the only one, dx.

    W_ij is made of the lse of row i (ROW_WEIGHT), of column j (COL_WEIGHT) or of both. With both,
    rows and columns are the same: those of the two views x and y, or with VIEWS = 1 those of x,
    whose ids are classes. Where pair_ptr is given, row i's lse is less the score of its pair.
    """
    SELF: tl.constexpr = ROW_WEIGHT and COL_WEIGHT
    CLASSES: tl.constexpr = SELF and VIEWS == 1
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    NORMALIZE: tl.constexpr = x_rnorm_ptr is not None
    scale = tl.load(scale_ptr).to(tl.float32)
    root = tl.sqrt(scale * LOG2E)
    unshifted = scale <= UNSHIFTED_SCALE

    row_blocks = tl.cdiv(M, BLOCK_M)
    x_view = (first_block + tl.program_id(0) >= row_blocks).to(tl.int32)
    if VIEWS == 2:
        rows_ptr, row_stride_n, row_stride_d = view_of(
            x_view, x_ptr, y_ptr, x_stride_n, x_stride_d, y_stride_n, y_stride_d
        )
        out_ptr = tl.where(x_view == 0, dx_ptr, dy_ptr)
    else:
        rows_ptr, row_stride_n, row_stride_d, out_ptr = x_ptr, x_stride_n, x_stride_d, dx_ptr
    row_start = (first_block + tl.program_id(0) - x_view * row_blocks) * BLOCK_M
    rows = row_start + tl.arange(0, BLOCK_M)
    row_at = rows + x_view * M
    x_rnorm = load_rnorm(x_rnorm_ptr, row_at, rows < M)
    x_power = power_of_two(x_rnorm) if NORMALIZE else None
    x_factor = over(x_rnorm * root, x_power)
    if D <= BLOCK_D:
        feats = tl.arange(0, BLOCK_D)
        x = times(load_tile(rows_ptr, rows, M, row_stride_n, row_stride_d, feats, D), x_power)
    if x_ids_ptr is not None:
        x_ids = tl.load(x_ids_ptr + rows, mask=rows < M, other=0)

    gain = gain_of(peak_ptr)
    if CLASSES:
        x_top = tl.load(top_ptr + rows, mask=rows < M, other=0.0)
        x_weight = tl.load(weight_ptr + rows, mask=rows < M, other=0.0)
        x_mean = tl.load(weight_ptr + M + rows, mask=rows < M, other=0.0)
    elif ROW_WEIGHT:
        x_top = tl.load(top_ptr + row_at, mask=rows < M, other=0.0)
        x_total = tl.load(total_ptr + row_at, mask=rows < M, other=0.0)
        x_dlse = tl.load(dlse_ptr + row_at.to(tl.int64) * dlse_stride, mask=rows < M, other=0.0)
        if SELF:
            x_weight = weight_of(x_total, x_dlse, gain)
            partner_at = (rows + (1 - x_view) * M).to(tl.int64) * dlse_stride
            partner_dlse = tl.load(dlse_ptr + partner_at, mask=rows < M, other=0.0)
            dpositive = -(x_dlse + partner_dlse) / gain
        elif FP16:
            x_top -= 14  # exp2(14) = FP16_WEIGHT

    acc = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    out_feats = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    col_blocks = tl.cdiv(N, BLOCK_N)
    total_blocks = VIEWS * col_blocks
    share = tl.cdiv(total_blocks, splits)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, total_blocks)
    # Both views' weights in one walk, or in two where each needs an exponential of its own.
    walks = tl.where(unshifted, 1, 2) if VIEWS == 2 else 1
    for step in range(start, start + (stop - start) * walks):
        first_walk = step < stop
        block = tl.where(first_walk, step, step - (stop - start))
        y_view = (block >= col_blocks).to(tl.int32)
        if VIEWS == 2:
            cols_ptr, col_stride_n, col_stride_d = view_of(
                y_view, x_ptr, y_ptr, x_stride_n, x_stride_d, y_stride_n, y_stride_d
            )
        else:
            cols_ptr, col_stride_n, col_stride_d = y_ptr, y_stride_n, y_stride_d
        col_start = (block - y_view * col_blocks) * BLOCK_N
        cols = col_start + tl.arange(0, BLOCK_N)
        col_at = cols + y_view * N
        y_rnorm = load_rnorm(y_rnorm_ptr, col_at, cols < N)

        if D <= BLOCK_D:
            y = load_tile(cols_ptr, cols, N, col_stride_n, col_stride_d, feats, D)
            products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            products = chunked_products(
                rows_ptr, x_power, rows, M, row_stride_n, row_stride_d,
                cols_ptr, cols, N, col_stride_n, col_stride_d, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            y = load_tile(cols_ptr, cols, N, col_stride_n, col_stride_d, out_feats, D)
        logits = logits_of(products, x_factor, y_rnorm * root)  # [i, j], base 2
        if FP16 and NORMALIZE:  # weight / |y| may not be a float16 number: y becomes a unit tile
            y = times(y, y_rnorm)
            products *= y_rnorm[None, :]
            y_rnorm = tl.full([BLOCK_N], 1.0, tl.float32)

        if COL_WEIGHT:
            y_weight = tl.load(weight_ptr + col_at, mask=cols < N, other=0.0)
        if CLASSES:
            y_top = tl.load(top_ptr + cols, mask=cols < N, other=0.0)
            y_mean = tl.load(weight_ptr + M + cols, mask=cols < N, other=0.0)
            y_ids = tl.load(y_ids_ptr + cols, mask=cols < N, other=0)
            # Each difference by itself: where all is won it is 0 to the last digit.
            positive = x_ids[:, None] == y_ids[None, :]
            row_weights = tl.exp2(logits - x_top[:, None]) * x_weight[:, None]
            weights = tl.where(positive, row_weights - x_mean[:, None], row_weights)
            col_weights = tl.exp2(logits - y_top[None, :]) * y_weight[None, :]
            weights += tl.where(positive, col_weights - y_mean[None, :], col_weights)
        elif SELF:
            if unshifted:  # both tops are 0: one exponential
                row_weight = x_weight[:, None] * y_rnorm[None, :]
                weights = tl.exp2(logits) * (row_weight + y_weight[None, :])
            else:
                y_top = tl.load(top_ptr + col_at, mask=cols < N, other=0.0)
                row_top, col_top = (
                    tl.where(first_walk, x_top, 0.0),
                    tl.where(first_walk, 0.0, y_top),
                )
                row_weight = tl.where(first_walk, x_weight, 0.0)[:, None] * y_rnorm[None, :]
                col_weight = tl.where(first_walk, 0.0, y_weight)
                weights = tl.exp2(logits - (row_top[:, None] + col_top[None, :]))
                weights *= row_weight + col_weight[None, :]
        elif ROW_WEIGHT:
            weights = tl.exp2(logits - x_top[:, None]) * y_rnorm[None, :]
        else:
            y_top = tl.load(top_ptr + col_at, mask=cols < N, other=0.0)
            weights = tl.exp2(logits - y_top[None, :]) * y_weight[None, :]

        if x_ids_ptr is not None and not CLASSES:
            y_ids = tl.load(y_ids_ptr + cols, mask=cols < N, other=0)
            weights = tl.where(x_ids[:, None] != y_ids[None, :], weights, 0.0)
        edge = col_start + BLOCK_N > N
        if SELF:
            edge |= (col_start < row_start + BLOCK_M) & (row_start < col_start + BLOCK_N)
        if edge:
            weights = tl.where((cols < N)[None, :], weights, 0.0)
            if SELF:
                same = rows[:, None] == cols[None, :]
                if VIEWS == 2:
                    added = first_walk & (x_view != y_view)
                    positive = tl.where(added, dpositive[:, None] * y_rnorm[None, :], 0.0)
                    weights = tl.where(same, positive, weights)
                else:
                    weights = tl.where(same, 0.0, weights)

        weights = weights.to(y.dtype)
        acc = tl.dot(weights, y, acc, input_precision=PRECISION)
        if D > BLOCK_D:
            along += tl.sum(weights.to(tl.float32) * products, 1)

    if ROW_WEIGHT and not SELF:
        gain = weight_of(x_total, x_dlse, FP16_WEIGHT if FP16 else 1.0)
    gain += tl.zeros([BLOCK_M], tl.float32)
    acc *= gain[:, None]
    along *= gain * over(x_rnorm, x_power)
    if dunit_ptr is None:
        if pair_ptr is not None:
            acc, along = less_pair(
                acc, along, rows, out_feats, tl.where(x_total == 0, 0.0, x_dlse), scale,
                pair_ptr, pair_rnorm_ptr, positive_ptr, M, pair_stride_n, pair_stride_d, D,
            )  # fmt: skip
        store_gradient(
            acc, along, rows, row_at, out_feats, scale, rows_ptr, x_rnorm, out_ptr, dscale_ptr,
            M, row_stride_n, row_stride_d, D, NORMALIZE, SELF,
        )  # fmt: skip
    else:
        part_at = tl.program_id(1).to(tl.int64) * VIEWS * M + row_at
        mask = (rows < M)[:, None] & (out_feats < D)[None, :]
        tl.store(dunit_ptr + part_at[:, None] * D + out_feats[None, :], acc, mask=mask)
        tl.store(along_ptr + part_at, along, mask=rows < M)


@triton.jit(do_not_specialize=[*COUNTS, *VECTORS])
def _similarity_lse_bwd_finish_kernel(
    x_ptr, y_ptr, rnorm_ptr, scale_ptr, total_ptr, dlse_ptr, pair_ptr, pair_rnorm_ptr, positive_ptr,
    dx_ptr, dy_ptr, dscale_ptr, dunit_ptr, along_ptr,
    M, first_block, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    pair_stride_n, pair_stride_d, dlse_stride,
    D: tl.constexpr, SELF: tl.constexpr, VIEWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Add up the shares of dx that the splits of the backward kernel leave."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    x_view = (first_block + tl.program_id(0) >= row_blocks).to(tl.int32)
    if VIEWS == 2:
        x_ptr, x_stride_n, x_stride_d = view_of(
            x_view, x_ptr, y_ptr, x_stride_n, x_stride_d, y_stride_n, y_stride_d
        )
        dx_ptr = tl.where(x_view == 0, dx_ptr, dy_ptr)
    row_start = (first_block + tl.program_id(0) - x_view * row_blocks) * BLOCK_M
    rows = row_start + tl.arange(0, BLOCK_M)
    at = rows + x_view * M
    feats = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = (rows < M)[:, None] & (feats < D)[None, :]
    dunit = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        part_at = M.to(tl.int64) * VIEWS * split + at
        dunit += tl.load(dunit_ptr + part_at[:, None] * D + feats[None, :], mask=mask, other=0.0)
        along += tl.load(along_ptr + part_at, mask=rows < M, other=0.0)
    x_rnorm = load_rnorm(rnorm_ptr, at, rows < M)
    scale = tl.load(scale_ptr).to(tl.float32)
    if pair_ptr is not None:
        total = tl.load(total_ptr + rows, mask=rows < M, other=0.0)
        dlse = tl.load(dlse_ptr + rows.to(tl.int64) * dlse_stride, mask=rows < M, other=0.0)
        dunit, along = less_pair(
            dunit, along, rows, feats, tl.where(total == 0, 0.0, dlse), scale,
            pair_ptr, pair_rnorm_ptr, positive_ptr, M, pair_stride_n, pair_stride_d, D,
        )  # fmt: skip
    store_gradient(
        dunit, along, rows, at, feats, scale, x_ptr, x_rnorm, dx_ptr, dscale_ptr,
        M, x_stride_n, x_stride_d, D, rnorm_ptr is not None, SELF,
    )  # fmt: skip


def row_parts(
    q, k, scale, ids, q_rnorm, k_rnorm, *, first=None, columns=False, positives=False
):  # fmt: skip
    """Sums and maxima over shares of the columns [2, shares, M], without the pairs (i, first + i).

    With columns [2, shares, M + N]: those of the columns over as many shares of the rows too. With
    positives [4, shares, M]: equal ids are positives, whose scores are summed and counted.
    """
    (M, D), N = q.shape, len(k)
    ids = [None if each is None else each.contiguous() for each in ids]
    arch, multiprocessors = gpu.target(q.device)
    options, parts = launch_config(
        "pair" if columns else "fwd", M, N, D, q.dtype, ids[0] is not None, arch, multiprocessors
    )
    row_blocks = triton.cdiv(M, options["BLOCK_M"])
    per_group = parts if columns else 1
    splits = triton.cdiv(row_blocks, parts) if columns else parts
    width = M + N if columns else M
    workspace = torch.empty(
        4 if positives else 2, splits, width, dtype=torch.float32, device=q.device
    )
    gpu.launch(
        _similarity_lse_fwd_kernel,
        (triton.cdiv(row_blocks, per_group), splits),
        **gpu.strided(x=q, y=k),
        x_rnorm_ptr=q_rnorm,
        y_rnorm_ptr=k_rnorm,
        x_ids_ptr=ids[0],
        y_ids_ptr=ids[1],
        scale_ptr=scale,
        parts_ptr=workspace,
        M=M,
        N=N,
        first=first or 0,
        width=width,
        per_group=per_group,
        splits=splits,
        D=D,
        PRECISION=gpu.precision_of(q.dtype, arch),
        PAIRED=first is not None,
        COLUMNS=columns,
        CLASSES=positives,
        **options,
    )
    return workspace


def row_gradients(
    x, y, rnorms, ids, top, total, dlse, scale, *,
    row_weight, col_weight, dscale, views=(0,), of=1, counts=None, pair=None,
):  # fmt: skip
    """Gradients of views (0: x, 1: y) out of one or two and, with dscale, each row's of the scale.

    With both weights rows and columns are the same, those of all views. With counts of positives
    ids are classes. With pairs of x's rows, whose weight alone is asked for, their scores are off.
    """
    (M, D), N, device = x.shape, len(y), x.device
    ids = [None if each is None else each.contiguous() for each in ids]
    arch, multiprocessors = gpu.target(device)
    rows, columns = len(views) * M, of * N
    options, splits = launch_config(
        "bwd", rows, columns, D, x.dtype, ids[0] is not None, arch, multiprocessors
    )

    stacked = of * M
    gradients = {view: torch.empty(M, D, dtype=x.dtype, device=device) for view in views}
    dscale_rows = torch.empty(stacked, dtype=torch.float32, device=device) if dscale else None
    dunit = along = peak = weight = None
    if splits > 1:
        dunit = torch.empty(splits, stacked, D, dtype=torch.float32, device=device)
        along = torch.empty(splits, stacked, dtype=torch.float32, device=device)
    if x.dtype == torch.float16 and col_weight:
        peak = torch.linalg.vector_norm(dlse, ord=float("inf"))
    if col_weight:
        weight = total.new_empty(1 if counts is None else 2, len(total))
        gpu.launch(
            _similarity_lse_weight_kernel,
            (triton.cdiv(len(total), 256),),
            total_ptr=total,
            counts_ptr=counts,
            dlse_ptr=dlse,
            rnorm_ptr=rnorms[1],
            peak_ptr=peak,
            weight_ptr=weight,
            M=len(total),
            dlse_stride=dlse.stride(0),
            BLOCK_M=256,
            num_warps=4,
        )

    pair_rnorm, positive = pair_scores(x, pair, rnorms[0], scale)
    shared = {
        **gpu.strided(x=x, y=y),
        **gpu.strided(pair=x if pair is None else pair) | {"pair_ptr": pair},
        "pair_rnorm_ptr": pair_rnorm,
        "positive_ptr": positive,
        "total_ptr": total,
        "dlse_ptr": dlse,
        "dlse_stride": dlse.stride(0),
        "scale_ptr": scale,
        "dx_ptr": gradients[views[0]],
        "dy_ptr": gradients[views[-1]],
        "dscale_ptr": dscale_rows,
        "dunit_ptr": dunit,
        "along_ptr": along,
        "M": M,
        "splits": splits,
        "D": D,
        "VIEWS": of,
        "BLOCK_OUT": options["BLOCK_OUT"],
    }
    out_chunks = triton.cdiv(D, options["BLOCK_OUT"])
    row_blocks = triton.cdiv(M, options["BLOCK_M"])
    gpu.launch(
        _similarity_lse_bwd_kernel,
        (len(views) * row_blocks, splits, out_chunks),
        **shared | options,
        x_rnorm_ptr=rnorms[0],
        y_rnorm_ptr=rnorms[1],
        x_ids_ptr=ids[0],
        y_ids_ptr=ids[1],
        top_ptr=top,
        weight_ptr=weight,
        peak_ptr=peak,
        N=N,
        first_block=views[0] * row_blocks,
        PRECISION=gpu.precision_of(x.dtype, arch),
        ROW_WEIGHT=row_weight,
        COL_WEIGHT=col_weight,
    )
    if splits > 1:
        block_m = max(1, 4096 // options["BLOCK_OUT"])
        row_blocks = triton.cdiv(M, block_m)
        gpu.launch(
            _similarity_lse_bwd_finish_kernel,
            (len(views) * row_blocks, out_chunks),
            **shared,
            rnorm_ptr=rnorms[0],
            first_block=views[0] * row_blocks,
            SELF=row_weight and col_weight,
            BLOCK_M=block_m,
            num_warps=4,
        )
    return gradients, dscale_rows


def similarity_lse_fwd(q, k, scale, pair, row_ids, col_ids, normalize):
    """Log-sum-exp of each row of q over the rows of k, or over those with another id.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise.
        scale: [] float, 1 / temperature, on the device.
        pair: [M, D] rows, whose scores with those of q are taken off lse, or None.
        row_ids: [M] integers or None.
        col_ids: [N] integers or None.
        normalize: whether rows are compared at unit length.

    Returns:
        lse, the maximum and sum it is made of, q_rnorm = 1 / |q|, each [M] float32; k_rnorm [N].
        Without normalize the inverse norms are empty.
    """
    q_rnorm, k_rnorm = empty_rnorms(q, k, normalize)
    with torch.cuda.device_of(q):
        if normalize:
            fill_rnorms(q, k, q_rnorm, k_rnorm, None, scale)
        norms = (q_rnorm, k_rnorm) if normalize else (None, None)
        _, positive = pair_scores(q, pair, norms[0], scale)
        parts = row_parts(q, k, scale, (row_ids, col_ids), *norms)
        return *finish_lse(parts, scale, positive), q_rnorm, k_rnorm


def similarity_lse_bwd(
    dlse, q, k, scale, pair, row_ids, col_ids, top, total, q_rnorm, k_rnorm, normalize, needs
):
    """Gradients of ``similarity_lse_fwd``.

    Args:
        dlse: [M] float32, any stride.
        q: [M, D] as in the forward pass, like k, scale, pair and the ids.
        k: [N, D].
        scale: [].
        pair: [M, D] or None.
        row_ids: [M] or None.
        col_ids: [N] or None.
        top: [M] float32, from the forward pass, like total and the inverse norms.
        total: [M] float32.
        q_rnorm: [M] float32, or empty.
        k_rnorm: [N] float32, or empty.
        normalize: as in the forward pass.
        needs: which of dq, dk, dscale to compute.

    Returns:
        dq [M, D] and dk [N, D] in the input's dtype, dscale [] float32; None where not needed.
    """
    dq = dk = dscale = None
    if not normalize:
        q_rnorm = k_rnorm = None
    with torch.cuda.device_of(q):
        if needs[0] or needs[2]:
            gradients, dscale = row_gradients(
                q, k, (q_rnorm, k_rnorm), (row_ids, col_ids), top, total, dlse, scale,
                row_weight=True, col_weight=False, dscale=needs[2], pair=pair,
            )  # fmt: skip
            dq = gradients[0] if needs[0] else None
            dscale = dscale.sum() if needs[2] else None
        if needs[1]:
            gradients, _ = row_gradients(
                k, q, (k_rnorm, q_rnorm), (col_ids, row_ids), top, total, dlse, scale,
                row_weight=False, col_weight=True, dscale=False,
            )  # fmt: skip
            dk = gradients[0]
    return dq, dk, dscale


def class_lse_fwd(z, scale, classes, weights):
    """Log-sum-exp of each row over the other rows, less the mean score of its positives.

    Args:
        z: [N, D] float32, bfloat16 or float16, any strides; compared as they are.
        scale: [] float, 1 / temperature, on the device.
        classes: [N] integers; the other rows of a row's class are its positives.
        weights: None; the torch backend weighs positives.

    Returns:
        lse, 0 for a row without positives, the maximum and sum it is made of, and the number of
        positives, each [N] float32.
    """
    counts = torch.empty(len(z), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        parts = row_parts(z, z, scale, (classes, classes), None, None, first=0, positives=True)
        return *finish_lse(parts, scale, counts=counts), counts


def class_lse_bwd(dlse, z, scale, classes, weights, top, total, counts, needs):
    """Gradients of ``class_lse_fwd``.

    Args:
        dlse: [N] float32, any stride.
        z: [N, D] as in the forward pass, like scale and classes.
        scale: [].
        classes: [N].
        weights: None.
        top: [N] float32, from the forward pass, like total and counts.
        total: [N] float32.
        counts: [N] float32.
        needs: which of dz, dscale to compute.

    Returns:
        dz [N, D] in the input's dtype, dscale [] float32; None where not needed.
    """
    with torch.cuda.device_of(z):
        gradients, dscale = row_gradients(
            z, z, (None, None), (classes, classes), top, total, dlse, scale,
            row_weight=True, col_weight=True, dscale=needs[1], counts=counts,
        )  # fmt: skip
        dscale = dscale.sum() if needs[1] else None
    return gradients[0] if needs[0] else None, dscale
