"""Log-sum-exp of pairs on the GPU: row i belongs to column p = first + i (CLIP, InfoNCE).

    forward     R_i = log sum_{j != p} exp(s (x^_i.y^_j - x^_i.y^_p))       columns likewise: C_j
    backward    W_ij = dR_i p_ij + dC_j p'_ij, p the softmax of rows and p' that of columns
                W_ip = -(dR_i + dC_p)
                dx^ = s W y^        dy^ = s W^T x^        ds = sum_ij W_ij x^_i.y^_j

The forward pass is that of similarity.py, with columns' sums in the same walk. The backward pass
keeps a panel of W, some rows of it at a time, and multiplies it from both sides: 8 M N D operations
with the forward pass. README.md has the rest.
"""

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LOG2E
from fastssl.kernels.similarity import row_parts
from fastssl.kernels.tiles import (
    COUNTS,
    VECTORS,
    chunked_products,
    empty_rnorms,
    fill_rnorms,
    finish_lse,
    gain_of,
    launch_config,
    load_rnorm,
    load_tile,
    logits_of,
    over,
    power_of_two,
    times,
    weight_of,
)

PANEL_BYTES = 2**25  # of the pairs' weights kept at a time, or those of PANEL_ROWS, if more
PANEL_ROWS = 2048


@triton.jit(do_not_specialize=[*COUNTS, *VECTORS])
def _pair_weight_kernel(
    q_ptr, k_ptr, q_rnorm_ptr, k_rnorm_ptr, ids_ptr, scale_ptr, peak_ptr,
    top_ptr, total_ptr, drows_ptr, col_top_ptr, col_total_ptr, dcols_ptr,
    weights_ptr, dscale_ptr,
    M, N, first, start, weights_stride, drows_stride, dcols_stride,
    q_stride_n, q_stride_d, k_stride_n, k_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the weights W_ij of rows from start on, and its sum of W_ij x_ij.

    W_ij = drows_i p_ij + dcols_j p'_ij off the pairs, and -(drows_i + dcols_j) on them. Columns
    have their part where col_top_ptr is given. Beyond the last row and column weights are 0.
    """
    out_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = start + out_rows
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    root = tl.sqrt(tl.load(scale_ptr).to(tl.float32) * LOG2E)
    q_rnorm = load_rnorm(q_rnorm_ptr, rows, rows < M)
    k_rnorm = load_rnorm(k_rnorm_ptr, cols, cols < N)
    q_power = None if q_rnorm_ptr is None else power_of_two(q_rnorm)
    products = chunked_products(
        q_ptr, q_power, rows, M, q_stride_n, q_stride_d,
        k_ptr, cols, N, k_stride_n, k_stride_d, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    logits = logits_of(products, over(q_rnorm * root, q_power), k_rnorm * root)  # base 2

    gain = gain_of(peak_ptr)
    top = tl.load(top_ptr + rows, mask=rows < M, other=0.0)
    total = tl.load(total_ptr + rows, mask=rows < M, other=0.0)
    drows = tl.load(drows_ptr + rows.to(tl.int64) * drows_stride, mask=rows < M, other=0.0)
    weights = tl.exp2(logits - top[:, None]) * weight_of(total, drows, gain)[:, None]
    if col_top_ptr is not None:
        col_top = tl.load(col_top_ptr + cols, mask=cols < N, other=0.0)
        col_total = tl.load(col_total_ptr + cols, mask=cols < N, other=0.0)
        dcols = tl.load(dcols_ptr + cols.to(tl.int64) * dcols_stride, mask=cols < N, other=0.0)
        weights += tl.exp2(logits - col_top[None, :]) * weight_of(col_total, dcols, gain)[None, :]
    if ids_ptr is not None:
        row_ids = tl.load(ids_ptr + first + rows, mask=rows < M, other=0)
        col_ids = tl.load(ids_ptr + cols, mask=cols < N, other=0)
        weights = tl.where(row_ids[:, None] != col_ids[None, :], weights, 0.0)
    row_start = start + tl.program_id(0) * BLOCK_M
    col_start = tl.program_id(1) * BLOCK_N
    pairs = (first + row_start < col_start + BLOCK_N) & (col_start < first + row_start + BLOCK_M)
    if pairs | (row_start + BLOCK_M > M) | (col_start + BLOCK_N > N):
        dpairs = drows
        if col_top_ptr is not None:
            at = (first + rows).to(tl.int64) * dcols_stride
            dpairs += tl.load(dcols_ptr + at, mask=rows < M, other=0.0)
        pair = (first + rows)[:, None] == cols[None, :]
        weights = tl.where(pair, (-dpairs / gain)[:, None], weights)
        weights = tl.where((rows < M)[:, None] & (cols < N)[None, :], weights, 0.0)

    at = out_rows.to(tl.int64)[:, None] * weights_stride + cols[None, :]
    tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty))
    if dscale_ptr is not None:
        block = (start // BLOCK_M + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(dscale_ptr + block, tl.sum(weights * logits) * gain)


@triton.jit
def _weights_times(
    acc, weights_ptr, weights_stride, rows, y_ptr, y_rnorm_ptr, y_start, N, y_stride_n, y_stride_d,
    feats, begin, end,
    D: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add sum_j W_ij y^_j over the j from begin to end; y_j is row y_start + j."""
    FP16: tl.constexpr = weights_ptr.dtype.element_ty == tl.float16
    for j in range(begin, end, BLOCK_D):
        inner = j + tl.arange(0, BLOCK_D)
        y = load_tile(y_ptr, y_start + inner, N, y_stride_n, y_stride_d, feats, D)
        if TRANSPOSED:
            at = inner.to(tl.int64)[:, None] * weights_stride + rows[None, :]
            weights = tl.trans(tl.load(weights_ptr + at))
        else:
            at = rows.to(tl.int64)[:, None] * weights_stride + inner[None, :]
            weights = tl.load(weights_ptr + at)
        if y_rnorm_ptr is not None:
            rnorm = tl.load(y_rnorm_ptr + y_start + inner, mask=y_start + inner < N, other=0.0)
            if FP16:  # weight / |y| may not be a float16 number
                y = times(y, rnorm)
            else:
                weights = (weights.to(tl.float32) * rnorm[None, :]).to(weights.dtype)
        acc = tl.dot(weights, y, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _pair_product_kernel(
    weights_ptr, q_ptr, k_ptr, q_rnorm_ptr, k_rnorm_ptr, q_unit_ptr, k_unit_ptr,
    M, N, start, count, splits, q_programs, weights_stride,
    q_stride_n, q_stride_d, k_stride_n, k_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of count rows of weights: a tile of a share of W k^, [splits, count, D], or of W^T q^.

    The latter is added up over calls, from start = 0 on.
    """
    pid = tl.program_id(0)
    feat_blocks = tl.cdiv(D, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if pid < q_programs:
        feats = pid % feat_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        row_blocks = tl.cdiv(count, BLOCK_M)
        split = pid // feat_blocks // row_blocks
        rows = pid // feat_blocks % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        if q_unit_ptr is not None:
            share = tl.cdiv(tl.cdiv(N, BLOCK_D), splits) * BLOCK_D
            acc = _weights_times(
                acc, weights_ptr, weights_stride, rows,
                k_ptr, k_rnorm_ptr, 0, N, k_stride_n, k_stride_d,
                feats, split * share, tl.minimum(split * share + share, N),
                D, PRECISION, False, BLOCK_D,
            )  # fmt: skip
            out = (split.to(tl.int64) * count + rows)[:, None] * D + feats[None, :]
            tl.store(q_unit_ptr + out, acc, mask=(rows < count)[:, None] & (feats < D)[None, :])
    else:
        pid -= q_programs
        feats = pid % feat_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = pid // feat_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        if k_unit_ptr is not None:
            out = rows.to(tl.int64)[:, None] * D + feats[None, :]
            mask = (rows < N)[:, None] & (feats < D)[None, :]
            begun = (rows < tl.where(start > 0, N, 0))[:, None] & (feats < D)[None, :]
            acc = tl.load(k_unit_ptr + out, mask=begun, other=0.0)
            acc = _weights_times(
                acc, weights_ptr, weights_stride, rows,
                q_ptr, q_rnorm_ptr, start, M, q_stride_n, q_stride_d,
                feats, 0, count, D, PRECISION, True, BLOCK_D,
            )  # fmt: skip
            tl.store(k_unit_ptr + out, acc, mask=mask)


@triton.jit
def _pair_gradient(
    unit_ptr, splits, count, start, out_rows, x_ptr, rnorm_ptr, dx_ptr, factor,
    M, x_stride_n, x_stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store dx of rows start + out_rows; unit_ptr: shares of sum_j W_ij y^_j [splits, count, D]."""
    rows = start + out_rows
    rnorm = load_rnorm(rnorm_ptr, rows, out_rows < count)
    along = tl.zeros([out_rows.shape[0]], tl.float32)
    PASSES: tl.constexpr = 1 if rnorm_ptr is None else 2
    for step in range(0, PASSES * tl.cdiv(D, BLOCK_D)):
        d = step % tl.cdiv(D, BLOCK_D) * BLOCK_D
        feats = d + tl.arange(0, BLOCK_D)
        unit = tl.zeros([out_rows.shape[0], BLOCK_D], tl.float32)
        for some in range(0, splits, 4):
            for split in tl.static_range(4):  # loads that do not wait for one another
                at = (count.to(tl.int64) * (some + split) + out_rows)[:, None] * D + feats[None, :]
                left = tl.where(some + split < splits, count, 0)
                mask = (out_rows < left)[:, None] & (feats < D)[None, :]
                unit += tl.load(unit_ptr + at, mask=mask, other=0.0)
        if rnorm_ptr is not None:
            x = load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
            x *= rnorm[:, None]
            if step < tl.cdiv(D, BLOCK_D):
                along += tl.sum(x * unit, 1)
            unit -= x * along[:, None]
        dx = unit * (factor * rnorm)[:, None]
        if step >= (PASSES - 1) * tl.cdiv(D, BLOCK_D):
            at = rows.to(tl.int64)[:, None] * D + feats[None, :]
            mask = (out_rows < count)[:, None] & (feats < D)[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _pair_finish_kernel(
    q_ptr, k_ptr, q_rnorm_ptr, k_rnorm_ptr, scale_ptr, peak_ptr,
    q_unit_ptr, k_unit_ptr, dq_ptr, dk_ptr, dscale_parts_ptr, dscale_ptr,
    M, N, start, count, splits, parts, q_blocks, k_blocks,
    q_stride_n, q_stride_d, k_stride_n, k_stride_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Make dq of count rows from start on, then dk, then in one more program dscale."""
    pid = tl.program_id(0)
    scale = tl.load(scale_ptr).to(tl.float32)
    factor = scale * gain_of(peak_ptr)
    if pid < q_blocks:
        if dq_ptr is not None:
            _pair_gradient(
                q_unit_ptr, splits, count, start, pid * BLOCK_M + tl.arange(0, BLOCK_M),
                q_ptr, q_rnorm_ptr, dq_ptr, factor, M, q_stride_n, q_stride_d, D, BLOCK_D,
            )  # fmt: skip
    elif pid < q_blocks + k_blocks:
        if dk_ptr is not None:
            _pair_gradient(
                k_unit_ptr, 1, N, 0, (pid - q_blocks) * BLOCK_M + tl.arange(0, BLOCK_M),
                k_ptr, k_rnorm_ptr, dk_ptr, factor, N, k_stride_n, k_stride_d, D, BLOCK_D,
            )  # fmt: skip
    else:
        if dscale_ptr is not None:
            sums = tl.zeros([BLOCK_PARTS], tl.float32)
            for part in range(0, parts, BLOCK_PARTS):
                at = part + tl.arange(0, BLOCK_PARTS)
                sums += tl.load(dscale_parts_ptr + at, mask=at < parts, other=0.0)
            tl.store(dscale_ptr, tl.sum(sums, 0) / (scale * LOG2E))


def pair_lse_fwd(q, k, scale, ids, first, columns, normalize):
    """Log-sum-exp of each row of q over the rows of k but its own pair, less the pair's score.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise; row i's pair is column first + i.
        scale: [] float, 1 / temperature, on the device.
        ids: [N] integers or None: columns of the id of a row's pair are left out.
        first: the pair of row 0.
        columns: whether to do the same for the columns, over the rows; then M = N and first = 0.
        normalize: whether rows are compared at unit length.

    Returns:
        Rows' lse [M], columns' lse [N], the maximum and sum that the rows' is made of, those of the
        columns, 1 / |q| [M] and 1 / |k| [N]: float32, empty where not asked for.
    """
    M = len(q)
    row_ids = None if ids is None else ids[first : first + M]
    q_rnorm, k_rnorm = empty_rnorms(q, k, normalize)
    positive = torch.empty(M, dtype=torch.float32, device=q.device)
    norms = (q_rnorm, k_rnorm) if normalize else (None, None)
    with torch.cuda.device_of(q):
        fill_rnorms(q, k, *norms, positive, scale, first)
        parts = row_parts(q, k, scale, (row_ids, ids), *norms, first=first, columns=columns)
        stats = finish_lse(parts, scale, positive, columns)
    if columns:
        (rows, cols), (top, col_top), (total, col_total) = stats
    else:
        rows, top, total = stats
        cols, col_top, col_total = (positive.new_empty(0) for _ in range(3))
    return rows, cols, top, total, col_top, col_total, q_rnorm, k_rnorm


def panel_rows(M, N, itemsize):
    """How many rows of weights are kept at a time."""
    return min(M, max(PANEL_ROWS, PANEL_BYTES // (itemsize * N) // 128 * 128))


def panel_gradients(q, k, rnorms, scale, peak, needs, options, fill):
    """Gradients of rows from weights W, of which a panel is kept at a time.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise.
        rnorms: 1 / |q| [M] and 1 / |k| [N], or None twice where rows count as they are.
        scale: [] float, on the device.
        peak: [] float32 for float16 rows: weights are at most twice this. Else None.
        needs: which of dq, dk, dscale to compute.
        options: of the kernel that fills a panel, with its BLOCK_M and BLOCK_N.
        fill: fill(start, count, weights, dscale) stores W of count rows from start on in weights, 0
            in the rest of their tiles, over ``gain_of(peak)``; and where dscale is not None, there
            a sum of W times base 2 scores for each tile of the whole matrix.

    Returns:
        dq [M, D] and dk [N, D] in the input's dtype, dscale [] float32; None where not needed.
    """
    (M, D), N, device = q.shape, len(k), q.device
    arch, multiprocessors = gpu.target(device)
    precision = gpu.precision_of(q.dtype, arch)
    panel = panel_rows(M, N, q.element_size())
    product = "product" if needs[1] else "row_product"
    config = (panel, N, D, q.dtype, False, arch, multiprocessors)
    product_options, splits = launch_config(product, *config)
    row_blocks, col_blocks = triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"])
    feat_blocks = triton.cdiv(D, product_options["BLOCK_N"])

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    # Whole tiles, so that a product of weights needs no mask.
    weights = empty(triton.cdiv(panel, 128) * 128, triton.cdiv(N, 128) * 128, dtype=q.dtype)
    dq, q_unit = (empty(M, D, dtype=q.dtype), empty(splits, panel, D)) if needs[0] else (None, None)
    dk, k_unit = (empty(N, D, dtype=k.dtype), empty(N, D)) if needs[1] else (None, None)
    dscale, dscale_parts = (empty(), empty(row_blocks * col_blocks)) if needs[2] else (None, None)
    shared = {
        **gpu.strided(q=q, k=k),
        "q_rnorm_ptr": rnorms[0],
        "k_rnorm_ptr": rnorms[1],
        "M": M,
        "N": N,
        "D": D,
    }
    block_d = min(1024, max(16, triton.next_power_of_2(D)))
    # Two rows of float32 spill where D is no power of two.
    block_m = max(1, (2048 if splits == 1 and q.dtype.itemsize == 2 else 1024) // block_d)
    for start in range(0, M, panel):
        count = min(panel, M - start)
        fill(start, count, weights, dscale_parts)
        q_programs = k_programs = 0
        if needs[0]:
            q_programs = triton.cdiv(count, product_options["BLOCK_M"]) * feat_blocks * splits
        if needs[1]:
            k_programs = triton.cdiv(N, product_options["BLOCK_M"]) * feat_blocks
        if needs[0] or needs[1]:
            gpu.launch(
                _pair_product_kernel,
                (q_programs + k_programs,),
                **shared,
                weights_ptr=weights,
                q_unit_ptr=q_unit,
                k_unit_ptr=k_unit,
                start=start,
                count=count,
                splits=splits,
                q_programs=q_programs,
                weights_stride=weights.stride(0),
                PRECISION=precision,
                **product_options,
            )
        # dq is complete with its panel, the others with the last.
        last = start + count == M
        q_blocks = triton.cdiv(count, block_m) if needs[0] else 0
        k_blocks = triton.cdiv(N, block_m) if needs[1] and last else 0
        dscale_blocks = int(needs[2] and last)
        if q_blocks + k_blocks + dscale_blocks:
            gpu.launch(
                _pair_finish_kernel,
                (q_blocks + k_blocks + dscale_blocks,),
                **shared,
                scale_ptr=scale,
                peak_ptr=peak,
                q_unit_ptr=q_unit,
                k_unit_ptr=k_unit,
                dq_ptr=dq,
                dk_ptr=dk,
                dscale_parts_ptr=dscale_parts,
                dscale_ptr=dscale,
                start=start,
                count=count,
                splits=splits,
                parts=row_blocks * col_blocks,
                q_blocks=q_blocks,
                k_blocks=k_blocks,
                BLOCK_M=block_m,
                BLOCK_D=block_d,
                BLOCK_PARTS=1024,
                num_warps=8,
            )
    return dq, dk, dscale


def pair_lse_bwd(
    drows, dcols, q, k, scale, ids, first, columns,
    top, total, col_top, col_total, q_rnorm, k_rnorm, normalize, needs,
):  # fmt: skip
    """Gradients of ``pair_lse_fwd``.

    Args:
        drows: [M] float32, any stride.
        dcols: [N] float32, any stride; empty without columns.
        q: [M, D] as in the forward pass, like k, scale, ids, first, columns and normalize.
        k: [N, D].
        scale: [].
        ids: [N] or None.
        first: int.
        columns: bool.
        top: [M] float32, from the forward pass, like all that follow.
        total: [M] float32.
        col_top: [N] float32 or empty.
        col_total: [N] float32 or empty.
        q_rnorm: [M] float32 or empty.
        k_rnorm: [N] float32 or empty.
        normalize: bool.
        needs: which of dq, dk, dscale to compute.

    Returns:
        dq [M, D] and dk [N, D] in the input's dtype, dscale [] float32; None where not needed.
    """
    arch, multiprocessors = gpu.target(q.device)
    M, N = len(q), len(k)
    options, _ = launch_config(
        "weight", panel_rows(M, N, q.element_size()), N, q.shape[1], q.dtype, ids is not None,
        arch, multiprocessors,
    )  # fmt: skip
    rnorms = (q_rnorm, k_rnorm) if normalize else (None, None)
    with torch.cuda.device_of(q):
        peak = None
        if q.dtype == torch.float16:
            peak = torch.linalg.vector_norm(drows, ord=float("inf"))
            if columns:
                peak = torch.maximum(peak, torch.linalg.vector_norm(dcols, ord=float("inf")))

        def fill(start, count, weights, dscale):
            gpu.launch(
                _pair_weight_kernel,
                (triton.cdiv(count, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"])),
                **gpu.strided(q=q, k=k),
                q_rnorm_ptr=rnorms[0],
                k_rnorm_ptr=rnorms[1],
                ids_ptr=None if ids is None else ids.contiguous(),
                scale_ptr=scale,
                peak_ptr=peak,
                top_ptr=top,
                total_ptr=total,
                drows_ptr=drows,
                col_top_ptr=col_top if columns else None,
                col_total_ptr=col_total if columns else None,
                dcols_ptr=dcols if columns else None,
                weights_ptr=weights,
                dscale_ptr=dscale,
                M=M,
                N=N,
                D=q.shape[1],
                first=first,
                start=start,
                weights_stride=weights.stride(0),
                drows_stride=drows.stride(0),
                dcols_stride=dcols.stride(0),
                PRECISION=gpu.precision_of(q.dtype, arch),
                **options,
            )

        return panel_gradients(q, k, rnorms, scale, peak, needs, options, fill)
