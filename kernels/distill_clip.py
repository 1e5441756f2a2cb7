"""CLIP's loss with a teacher on the GPU: neither matrix of scores is stored.

Rows q_i [M, D] and k_j [N, D], the teacher's a_i [M, E] and b_j [N, E], row i's pair p = first + i:

    x_ij = s q_i.k_j, with softmax p_ij over j        y_ij = t a_i.b_j, with softmax P_ij
    forward     R_i = log sum_{j != p} exp(x_ij - x_ip)            columns likewise
                H_i = log sum_j exp(x_ij) - sum_j P_ij x_ij
    backward    W_ij = dR_i n_ij + dH_i (p_ij - P_ij), n the softmax of the row's negatives
                W_ip = -dR_i + dH_i (p_ip - P_ip)                   and columns' shares on top
                dq = s W k        dk = s W^T q        ds = sum_ij W_ij q_i.k_j

Forward is one walk of both matrices: of each side a maximum and a sum of exponentials, and the sum
of x_ij by the teacher's exponentials, rescaled as the maxima grow. The backward pass keeps a panel
of W and multiplies it as pairs.py does: with the forward pass 8 M N D + 4 M N E operations, CLIP's
own loss included. README.md has the rest.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LN2, LOG2E
from fastssl.kernels.pairs import panel_gradients, panel_rows
from fastssl.kernels.tiles import (
    COUNTS,
    blocks_per_group,
    chunked_products,
    gain_of,
    register_bound,
    relative,
)

SUMS = 5  # of a row: top and total of the student's scores and the teacher's, and of x by both
LOWEST = tl.constexpr(-1e38)  # in the place of -inf, where it is multiplied by 0


@lru_cache(maxsize=1024)
def launch_config(kernel, rows, columns, wide, arch, multiprocessors):
    """Tile sizes and launch options of a kernel, and into how many parts its work is cut.

    Args:
        kernel: "pair" (forward with columns), "row" (forward without) or "weight".
        rows: number of rows.
        columns: number of columns.
        wide: whether rows of the student or the teacher are float32.
        arch: "sm_90", "gfx942", ... as ``gpu.target`` names it.
        multiprocessors: how many of them the device has.

    Returns:
        (options, parts): keyword arguments of the kernel; the blocks per group ("pair"), the number
        of column splits ("row") or 1.
    """
    hopper = arch in ("sm_90", "sm_100", "sm_103")
    roomy = hopper or arch in ("sm_80", "sm_87", "interpreter")  # 160 KiB of shared memory or more
    wide = wide and arch != "interpreter"
    weight = kernel == "weight"
    tiles = triton.cdiv(rows, 128) * triton.cdiv(columns, 128)
    options = {
        # Forward, two tiles of scores with what rows and columns have seen fill the registers.
        "BLOCK_M": 128 if weight and not wide and tiles >= multiprocessors else 64,
        "BLOCK_N": 32 if not weight and wide and arch.startswith("sm_") and not hopper else 64,
        # Chunks of one width give float32 scores the same bits forward and backward.
        "BLOCK_D": 16 if wide else 64 if weight else 32,
        "num_warps": 8,
        "num_stages": (3 if weight or wide else 4) if roomy else 2,
        "enable_fp_fusion": False,
    } | register_bound(arch)
    blocks = triton.cdiv(rows, options["BLOCK_M"])
    if kernel == "pair":
        return options, blocks_per_group(blocks, multiprocessors)
    if kernel == "row":
        columns = triton.cdiv(columns, options["BLOCK_N"])
        return options, gpu.splits_of(blocks, columns, multiprocessors)
    return options, 1


@triton.jit
def _scores(
    q_ptr, k_ptr, a_ptr, b_ptr, scale_ptr, teacher_scale_ptr, rows, cols, M, N,
    q_stride_n, q_stride_d, k_stride_n, k_stride_d,
    a_stride_n, a_stride_d, b_stride_n, b_stride_d,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The student's scores [rows, cols] and the teacher's, base 2."""
    x = chunked_products(
        q_ptr, None, rows, M, q_stride_n, q_stride_d, k_ptr, cols, N, k_stride_n, k_stride_d,
        D, BLOCK_D, PRECISION,
    )  # fmt: skip
    y = chunked_products(
        a_ptr, None, rows, M, a_stride_n, a_stride_d, b_ptr, cols, N, b_stride_n, b_stride_d,
        E, BLOCK_D, TEACHER_PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    return x * scale, y * (tl.load(teacher_scale_ptr).to(tl.float32) * LOG2E)


@triton.jit
def _fallen(top, new_top):
    """By how much scores relative to a top are lower relative to a new one; 0 of no scores."""
    return tl.where(top == -float("inf"), 0.0, top - new_top)


@triton.jit
def _seen(top, teacher_top, total, teacher_total, below, x, y, axis: tl.constexpr):
    """Running sums along an axis with a tile of scores, -inf where they do not count."""
    new_top, kept, exps = relative(top, x, axis)
    teacher_top, teacher_kept, weights = relative(teacher_top, y, axis)
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    below = (below + teacher_total * _fallen(top, shift)) * teacher_kept
    below += tl.sum(weights * tl.maximum(x - tl.expand_dims(shift, axis), LOWEST), axis)
    total = total * kept + tl.sum(exps, axis)
    teacher_total = teacher_total * teacher_kept + tl.sum(weights, axis)
    return new_top, teacher_top, total, teacher_total, below


@triton.jit
def _load_sums(parts_ptr, at, stride, mask):
    """Sums that were stored at a place of a workspace [SUMS, ...], those of nothing elsewhere."""
    stride = stride.to(tl.int64)
    return (
        tl.load(parts_ptr + at, mask=mask, other=-float("inf")),
        tl.load(parts_ptr + stride + at, mask=mask, other=-float("inf")),
        tl.load(parts_ptr + 2 * stride + at, mask=mask, other=0.0),
        tl.load(parts_ptr + 3 * stride + at, mask=mask, other=0.0),
        tl.load(parts_ptr + 4 * stride + at, mask=mask, other=0.0),
    )


@triton.jit
def _store_sums(parts_ptr, at, stride, mask, top, teacher_top, total, teacher_total, below):
    stride = stride.to(tl.int64)
    tl.store(parts_ptr + at, top, mask=mask)
    tl.store(parts_ptr + stride + at, teacher_top, mask=mask)
    tl.store(parts_ptr + 2 * stride + at, total, mask=mask)
    tl.store(parts_ptr + 3 * stride + at, teacher_total, mask=mask)
    tl.store(parts_ptr + 4 * stride + at, below, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _distill_clip_fwd_kernel(
    q_ptr, k_ptr, a_ptr, b_ptr, scale_ptr, teacher_scale_ptr, parts_ptr, pairs_ptr,
    M, N, first, width, per_group, splits,
    q_stride_n, q_stride_d, k_stride_n, k_stride_d,
    a_stride_n, a_stride_d, b_stride_n, b_stride_d,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write parts [SUMS, splits, width]: each row's sums over a share of the columns but its pair.

    COLUMNS: and after those of the rows each column's, over a group of per_group row blocks. The
    pairs' scores, the student's and the teacher's, are written to pairs [2, M].
    """
    stride = splits.to(tl.int64) * width
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    start = tl.program_id(1) * share
    first_block = tl.program_id(0) * per_group
    for block in range(first_block, tl.minimum(first_block + per_group, tl.cdiv(M, BLOCK_M))):
        row_start = block * BLOCK_M
        rows = row_start + tl.arange(0, BLOCK_M)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        teacher_top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        teacher_total = tl.zeros([BLOCK_M], tl.float32)
        below = tl.zeros([BLOCK_M], tl.float32)
        for col_start in range(start, tl.minimum(start + share, N), BLOCK_N):
            cols = col_start + tl.arange(0, BLOCK_N)
            x, y = _scores(
                q_ptr, k_ptr, a_ptr, b_ptr, scale_ptr, teacher_scale_ptr, rows, cols, M, N,
                q_stride_n, q_stride_d, k_stride_n, k_stride_d,
                a_stride_n, a_stride_d, b_stride_n, b_stride_d,
                D, E, PRECISION, TEACHER_PRECISION, BLOCK_D,
            )  # fmt: skip
            pair_start = first + row_start
            edge = (pair_start < col_start + BLOCK_N) & (col_start < pair_start + BLOCK_M)
            if edge:
                pair = (first + rows)[:, None] == cols[None, :]
                here = (first + rows >= col_start) & (first + rows < col_start + BLOCK_N)
                here &= rows < M
                tl.store(pairs_ptr + rows, tl.sum(tl.where(pair, x, 0.0), 1), mask=here)
                tl.store(pairs_ptr + M + rows, tl.sum(tl.where(pair, y, 0.0), 1), mask=here)
                x = tl.where(pair, -float("inf"), x)
                y = tl.where(pair, -float("inf"), y)
            if (col_start + BLOCK_N > N) | (row_start + BLOCK_M > M):
                counts = (rows < M)[:, None] & (cols < N)[None, :]
                x = tl.where(counts, x, -float("inf"))
                y = tl.where(counts, y, -float("inf"))

            if COLUMNS:
                col_at = tl.program_id(0).to(tl.int64) * width + M + cols
                begun = tl.where(block == first_block, 0, N)  # the workspace is not cleared
                c_top, c_teacher_top, c_total, c_teacher_total, c_below = _load_sums(
                    parts_ptr, col_at, stride, cols < begun
                )
                c_top, c_teacher_top, c_total, c_teacher_total, c_below = _seen(
                    c_top, c_teacher_top, c_total, c_teacher_total, c_below, x, y, 0
                )
                _store_sums(
                    parts_ptr, col_at, stride, cols < N,
                    c_top, c_teacher_top, c_total, c_teacher_total, c_below,
                )  # fmt: skip
            top, teacher_top, total, teacher_total, below = _seen(
                top, teacher_top, total, teacher_total, below, x, y, 1
            )

        at = tl.program_id(1).to(tl.int64) * width + rows
        _store_sums(parts_ptr, at, stride, rows < M, top, teacher_top, total, teacher_total, below)
        if COLUMNS:
            tl.debug_barrier()  # the next rows read what other threads wrote of the columns


@triton.jit
def _softmax(top, total, pair):
    """Highest score, sum of exponentials relative to it, and what makes exp2(score - top) p."""
    highest = tl.maximum(top, pair, propagate_nan=tl.PropagateNan.ALL)
    shrunk = tl.exp2(top - highest)
    whole = total * shrunk + tl.exp2(pair - highest)
    return highest, whole, shrunk / whole


@triton.jit(do_not_specialize=COUNTS)
def _distill_clip_finish_kernel(
    parts_ptr, pairs_ptr, terms_ptr, stats_ptr, col_terms_ptr, col_stats_ptr, M, width, parts,
    BLOCK_M: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Merge a forward kernel's parts [SUMS, parts, width] into R and H [2, M], and statistics.

    Those are top, total and the pair's score, the student's and the teacher's of each: [6, M]. From
    M on they are the columns'.
    """
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.arange(0, BLOCK_PARTS)
    mask = (part < parts)[:, None] & (places < width)[None, :]
    at = part.to(tl.int64)[:, None] * width + places[None, :]
    tops, teacher_tops, totals, teacher_totals, belows = _load_sums(
        parts_ptr, at, parts.to(tl.int64) * width, mask
    )
    top = tl.max(tops, 0)
    teacher_top = tl.max(teacher_tops, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    teacher_shift = tl.where(teacher_top == -float("inf"), 0.0, teacher_top)
    kept = tl.exp2(teacher_tops - teacher_shift[None, :])
    below = tl.sum((belows + teacher_totals * _fallen(tops, shift[None, :])) * kept, 0)
    total = tl.sum(totals * tl.exp2(tops - shift[None, :]), 0)
    teacher_total = tl.sum(teacher_totals * kept, 0)

    is_row = places < M
    rows = tl.where(is_row, places, places - M)
    pair = tl.load(pairs_ptr + rows, mask=places < width, other=0.0)
    teacher_pair = tl.load(pairs_ptr + M + rows, mask=places < width, other=0.0)
    # Taken first, the difference of large numbers is exact; the logarithm is small beside them.
    negatives = ((top - pair) + tl.log2(total)) * LN2
    highest, whole, _ = _softmax(top, total, pair)
    teacher_highest, teacher_whole, factor = _softmax(teacher_top, teacher_total, teacher_pair)
    # By how much the mean of the scores by the teacher is below the highest.
    below = factor * (below + teacher_total * _fallen(top, highest))
    below += tl.exp2(teacher_pair - teacher_highest) / teacher_whole * (pair - highest)
    cross = (tl.log2(whole) - below) * LN2

    tl.store(terms_ptr + rows, negatives, mask=is_row)
    tl.store(terms_ptr + M + rows, cross, mask=is_row)
    _store_sums(stats_ptr, rows, M, is_row, top, teacher_top, total, teacher_total, pair)
    tl.store(stats_ptr + 5 * M.to(tl.int64) + rows, teacher_pair, mask=is_row)
    if col_terms_ptr is not None:  # of as many columns
        is_col = (places >= M) & (places < width)
        tl.store(col_terms_ptr + rows, negatives, mask=is_col)
        tl.store(col_terms_ptr + M + rows, cross, mask=is_col)
        _store_sums(col_stats_ptr, rows, M, is_col, top, teacher_top, total, teacher_total, pair)
        tl.store(col_stats_ptr + 5 * M.to(tl.int64) + rows, teacher_pair, mask=is_col)


@triton.jit
def _share_of(stats_ptr, dterms_ptr, rows, M, mask, gain):
    """Of rows, over gain: tops, what multiplies exp2(score - top) in W, and W at the pair."""
    top, teacher_top, total, teacher_total, pair = _load_sums(stats_ptr, rows, M, mask)
    teacher_pair = tl.load(stats_ptr + 5 * M.to(tl.int64) + rows, mask=mask, other=0.0)
    g = tl.load(dterms_ptr + rows, mask=mask, other=0.0) / gain
    h = tl.load(dterms_ptr + M + rows, mask=mask, other=0.0) / gain
    _, _, factor = _softmax(top, total, pair)
    _, _, teacher_factor = _softmax(teacher_top, teacher_total, teacher_pair)
    weight = tl.where(total == 0, 0.0, g / total) + h * factor
    # Where the pair has nearly all probability, p - P is the others', to the last digit.
    at_pair = h * (teacher_total * teacher_factor - total * factor) - g
    # Relative to infinity, the exponentials of a row that sees nothing are 0.
    top = tl.where(top == -float("inf"), float("inf"), top)
    teacher_top = tl.where(teacher_top == -float("inf"), float("inf"), teacher_top)
    return top, teacher_top, weight, h * teacher_factor, at_pair


@triton.jit(do_not_specialize=COUNTS)
def _distill_clip_share_kernel(
    stats_ptr, dterms_ptr, col_stats_ptr, dcol_terms_ptr, peak_ptr, shares_ptr, M, width,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What rows, and from M on as many columns, put into the weights: shares [SUMS, width].

    Those are what ``_share_of`` returns; the last, W at the pair, is that of row and column.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < M
    gain = gain_of(peak_ptr)
    top, teacher_top, weight, teacher_weight, at_pair = _share_of(
        stats_ptr, dterms_ptr, rows, M, mask, gain
    )
    if col_stats_ptr is not None:
        c_top, c_teacher_top, c_weight, c_teacher_weight, of_column = _share_of(
            col_stats_ptr, dcol_terms_ptr, rows, M, mask, gain
        )
        at_pair += of_column
        _store_sums(
            shares_ptr, M + rows, width, mask,
            c_top, c_teacher_top, c_weight, c_teacher_weight, at_pair,
        )  # fmt: skip
    _store_sums(shares_ptr, rows, width, mask, top, teacher_top, weight, teacher_weight, at_pair)


@triton.jit(do_not_specialize=COUNTS)
def _distill_clip_weight_kernel(
    q_ptr, k_ptr, a_ptr, b_ptr, scale_ptr, teacher_scale_ptr, peak_ptr,
    shares_ptr, weights_ptr, dscale_ptr,
    M, N, first, start, width, weights_stride,
    q_stride_n, q_stride_d, k_stride_n, k_stride_d,
    a_stride_n, a_stride_d, b_stride_n, b_stride_d,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the weights W_ij of rows from start on, and its sum of W_ij x_ij.

    With COLUMNS those have their part. Beyond the last row and column weights are 0.
    """
    out_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = start + out_rows
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, y = _scores(
        q_ptr, k_ptr, a_ptr, b_ptr, scale_ptr, teacher_scale_ptr, rows, cols, M, N,
        q_stride_n, q_stride_d, k_stride_n, k_stride_d,
        a_stride_n, a_stride_d, b_stride_n, b_stride_d,
        D, E, PRECISION, TEACHER_PRECISION, BLOCK_D,
    )  # fmt: skip
    top, teacher_top, weight, teacher_weight, at_pair = _load_sums(
        shares_ptr, rows, width, rows < M
    )
    weights = tl.exp2(x - top[:, None]) * weight[:, None]
    weights -= tl.exp2(y - teacher_top[:, None]) * teacher_weight[:, None]
    if COLUMNS:
        top, teacher_top, weight, teacher_weight, _ = _load_sums(
            shares_ptr, M + cols, width, cols < N
        )
        weights += tl.exp2(x - top[None, :]) * weight[None, :]
        weights -= tl.exp2(y - teacher_top[None, :]) * teacher_weight[None, :]
    row_start = start + tl.program_id(0) * BLOCK_M
    col_start = tl.program_id(1) * BLOCK_N
    pairs = (first + row_start < col_start + BLOCK_N) & (col_start < first + row_start + BLOCK_M)
    if pairs | (row_start + BLOCK_M > M) | (col_start + BLOCK_N > N):
        pair = (first + rows)[:, None] == cols[None, :]
        weights = tl.where(pair, at_pair[:, None], weights)
        weights = tl.where((rows < M)[:, None] & (cols < N)[None, :], weights, 0.0)

    at = out_rows.to(tl.int64)[:, None] * weights_stride + cols[None, :]
    tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty))
    if dscale_ptr is not None:
        block = (start // BLOCK_M + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(dscale_ptr + block, tl.sum(tl.sum(weights * x, 1), 0) * gain_of(peak_ptr))


def _arguments(q, k, scale, teacher_q, teacher_k, teacher_scale):
    """Those that the kernels of scores share."""
    arch, _ = gpu.target(q.device)
    return {
        **gpu.strided(q=q, k=k, a=teacher_q, b=teacher_k),
        "scale_ptr": scale,
        "teacher_scale_ptr": teacher_scale,
        "M": len(q),
        "N": len(k),
        "D": q.shape[1],
        "E": teacher_q.shape[1],
        "PRECISION": gpu.precision_of(q.dtype, arch),
        "TEACHER_PRECISION": gpu.precision_of(teacher_q.dtype, arch),
    }


def _config(kernel, rows, q, k, teacher_q):
    wide = torch.float32 in (q.dtype, teacher_q.dtype)
    return launch_config(kernel, rows, len(k), wide, *gpu.target(q.device))


def distill_clip_fwd(q, k, scale, teacher_q, teacher_k, teacher_scale, first, columns):
    """CLIP's log-sum-exp of negatives less the pair's score, and cross-entropy with a teacher.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise; row i's pair is column first + i.
        scale: [] float, on the device.
        teacher_q: [M, E] float32, bfloat16 or float16, any strides.
        teacher_k: [N, E] likewise.
        teacher_scale: [] float, on the device.
        first: the pair of row 0.
        columns: whether to do the same for the columns, over the rows; then M = N and first = 0.

    Returns:
        Rows' R and H [2, M], columns' [2, N], and statistics that these are made of, [6, M] and
        [6, N]: float32, those of columns empty where not asked for.
    """
    M, N = len(q), len(k)
    options, parts = _config("pair" if columns else "row", M, q, k, teacher_q)
    row_blocks = triton.cdiv(M, options["BLOCK_M"])
    per_group = parts if columns else 1
    splits = triton.cdiv(row_blocks, parts) if columns else parts
    width = M + N if columns else M

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    workspace, pairs = empty(SUMS, splits, width), empty(2, M)
    terms, stats = empty(2, M), empty(6, M)
    col_terms, col_stats = empty(2, N if columns else 0), empty(6, N if columns else 0)
    block_parts = triton.next_power_of_2(splits)
    block_m = max(16, min(64, 2048 // block_parts))
    with torch.cuda.device_of(q):
        gpu.launch(
            _distill_clip_fwd_kernel,
            (triton.cdiv(row_blocks, per_group), splits),
            **_arguments(q, k, scale, teacher_q, teacher_k, teacher_scale),
            parts_ptr=workspace,
            pairs_ptr=pairs,
            first=first,
            width=width,
            per_group=per_group,
            splits=splits,
            COLUMNS=columns,
            **options,
        )
        gpu.launch(
            _distill_clip_finish_kernel,
            (triton.cdiv(width, block_m),),
            parts_ptr=workspace,
            pairs_ptr=pairs,
            terms_ptr=terms,
            stats_ptr=stats,
            col_terms_ptr=col_terms if columns else None,
            col_stats_ptr=col_stats if columns else None,
            M=M,
            width=width,
            parts=splits,
            BLOCK_M=block_m,
            BLOCK_PARTS=block_parts,
            num_warps=4,
        )
    return terms, col_terms, stats, col_stats


def distill_clip_bwd(
    dterms, dcol_terms, q, k, scale, teacher_q, teacher_k, teacher_scale, stats, col_stats,
    first, columns, needs,
):  # fmt: skip
    """Gradients of ``distill_clip_fwd``; the teacher's gets none.

    Args:
        dterms: [2, M] float32, any strides.
        dcol_terms: [2, N] float32, any strides; empty without columns.
        q: [M, D] as in the forward pass, like all that follow.
        k: [N, D].
        scale: [].
        teacher_q: [M, E].
        teacher_k: [N, E].
        teacher_scale: [].
        stats: [6, M] float32, from the forward pass.
        col_stats: [6, N] float32 or empty.
        first: int.
        columns: bool.
        needs: which of dq, dk, dscale to compute.

    Returns:
        dq [M, D] and dk [N, D] in the input's dtype, dscale [] float32; None where not needed.
    """
    M, N = len(q), len(k)
    width = M + N if columns else M
    dterms, dcol_terms = dterms.contiguous(), dcol_terms.contiguous()
    shares = torch.empty(SUMS, width, dtype=torch.float32, device=q.device)
    options, _ = _config("weight", panel_rows(M, N, q.element_size()), q, k, teacher_q)
    shared = _arguments(q, k, scale, teacher_q, teacher_k, teacher_scale)
    with torch.cuda.device_of(q):
        peak = None
        if q.dtype == torch.float16:  # no weight of one side is more than both of its gradients
            upstream = torch.cat([dterms, dcol_terms], 1) if columns else dterms
            peak = torch.linalg.vector_norm(upstream, ord=float("inf"), dim=1).sum()

        gpu.launch(
            _distill_clip_share_kernel,
            (triton.cdiv(M, 256),),
            stats_ptr=stats,
            dterms_ptr=dterms,
            col_stats_ptr=col_stats if columns else None,
            dcol_terms_ptr=dcol_terms if columns else None,
            peak_ptr=peak,
            shares_ptr=shares,
            M=M,
            width=width,
            BLOCK_M=256,
            num_warps=4,
        )

        def fill(start, count, weights, dscale):
            grid = triton.cdiv(count, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"])
            gpu.launch(
                _distill_clip_weight_kernel,
                grid,
                **shared,
                peak_ptr=peak,
                shares_ptr=shares,
                weights_ptr=weights,
                dscale_ptr=dscale,
                first=first,
                start=start,
                width=width,
                weights_stride=weights.stride(0),
                COLUMNS=columns,
                **options,
            )

        return panel_gradients(q, k, (None, None), scale, peak, needs, options, fill)
