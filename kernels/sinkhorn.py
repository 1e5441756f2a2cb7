"""Sinkhorn-Knopp on the GPU: the codes are the only matrix that is written.

Scores s [B, K] of samples against prototypes, x = s / epsilon, potentials f [B] and g [K]:

    g_1 = -log K - log sum_b exp(x_bk)              f_t = -log B - log sum_k exp(x_bk + g_t,k)
    c_t = B exp(x_bk + f_t,b + g_t,k), rows sum to 1      g_t+1 = g_t - log(K / B sum_b c_t,bk)

Prototypes first, then samples, as SwAV's code does (Caron et al. 2020, section 3.1); the codes are
c_T, or B exp(x) / sum exp(x) with no iterations.

    K <= WIDEST    whole rows in registers: T + 1 reads, one write, 2 T + 1 launches
    K > WIDEST     rows and columns apart: 2 T + 1 reads, one write, 3 T launches

No atomics: columns are summed over shares of the rows, to a workspace of at most WORKSPACE numbers,
then over the shares in order. A prototype's g is kept in two numbers, -top / epsilon and rest, top
its largest score. Exponentials and rest are base 2.
"""

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LOG2E

WIDEST = 8192  # columns of a row that is kept in registers
WORKSPACE = 2**21  # numbers: 8 MiB
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@lru_cache(maxsize=1024)
def launch_config(kernel, B, K, dtype, arch, multiprocessors):
    """Tile sizes and launch options of a kernel, and how many rows a program takes.

    Args:
        kernel: "column", "merge", "row", "wide_row" or "codes".
        B: number of samples.
        K: number of prototypes.
        dtype: dtype of the scores.
        arch: "sm_90", "gfx942", ... as ``gpu.target`` names it.
        multiprocessors: how many of them the device has.

    Returns:
        (options, rows): keyword arguments of the kernel; how many rows a program takes, whole tiles
        of them.
    """
    gfx = arch.startswith("gfx")  # twice the lanes in a warp
    block_k = max(16, triton.next_power_of_2(K))
    if kernel == "merge":
        block_s = 64 if K <= WIDEST else 8  # where K is large, shares are few
        return {"BLOCK_S": block_s, "BLOCK_K": 2048 // block_s, "num_warps": 4}, B
    if kernel == "row":
        alone = block_k > 4096  # one program of 16 warps on a multiprocessor, or two of 8
        programs = multiprocessors * (1 if alone else 2)
        fill = triton.next_power_of_2(triton.cdiv(B, programs))
        options = {
            "BLOCK_B": min(64, 8192 // block_k, max(4, fill)),
            "BLOCK_K": block_k,
            "num_warps": (16 if alone else 8) // (2 if gfx else 1),
        }
        return options, _rows(B, max(options["BLOCK_B"], 4), programs, WORKSPACE // K)
    if kernel == "wide_row":
        return {"BLOCK_B": 1, "BLOCK_K": 4096, "num_warps": 4 if gfx else 8}, 1
    if kernel == "codes":
        return {"BLOCK_B": 8, "BLOCK_K": 512, "num_warps": 4}, 8
    # The lanes of a program lie side by side in a row, 16 bytes each: a column stays in one lane.
    block_k = min(block_k, (256 if gfx else 128) * 16 // dtype.itemsize)
    options = {"BLOCK_B": min(64, max(8, 4096 // block_k)), "BLOCK_K": block_k, "num_warps": 4}
    programs = triton.cdiv(4 * multiprocessors, triton.cdiv(K, block_k))
    return options, _rows(B, max(options["BLOCK_B"], 16), programs, WORKSPACE // 2 // K)


def _rows(B, step, programs, shares):
    """Rows of a share, a multiple of step: as many shares as programs, but so many at most."""
    return triton.cdiv(triton.cdiv(B, step), min(programs, shares)) * step


# A new value must not compile a new kernel. ALIGNMENT divides K and the distance of two rows: that
# they are multiples of it tells the compiler how wide loads may be.
COUNTS = ["B", "K", "stride_b", "rows_per_share", "shares"]


@triton.jit
def tile_at(rows, cols, B, K, stride_b, stride_k, ALIGNMENT: tl.constexpr):
    """Offsets and mask of [rows, cols]."""
    row_at = rows.to(tl.int64)[:, None] * (stride_b // ALIGNMENT * ALIGNMENT)
    mask = (rows < B)[:, None] & (cols < K // ALIGNMENT * ALIGNMENT)[None, :]
    return row_at + cols.to(tl.int64)[None, :] * stride_k, mask


@triton.jit(do_not_specialize=COUNTS)
def _sinkhorn_column_kernel(
    scores_ptr, top_ptr, rest_ptr, f_ptr, parts_ptr,
    epsilon, B, K, rows_per_share, stride_b, stride_k,
    ALIGNMENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each column's sum of exp(x) and maximum over a share of the rows; or, given f, of codes."""
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    share = tl.program_id(1)
    scale = LOG2E / epsilon
    top = tl.full([BLOCK_K], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    if f_ptr is not None:
        top = tl.load(top_ptr + cols, mask=cols < K, other=0.0)
        rest = tl.load(rest_ptr + cols, mask=cols < K, other=-float("inf"))
    first = share * rows_per_share
    for start in range(first, tl.minimum(first + rows_per_share, B), BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        at, mask = tile_at(rows, cols, B, K, stride_b, stride_k, ALIGNMENT)
        z = tl.load(scores_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if f_ptr is None:
            z = tl.where((rows < B)[:, None], z, -float("inf"))
            new_top = tl.maximum(top, tl.max(z, 0))
            total *= tl.exp2((top - new_top) * scale)
            total += tl.sum(tl.exp2((z - new_top[None, :]) * scale), 0)
            top = new_top
        else:
            f = tl.load(f_ptr + rows, mask=rows < B, other=-float("inf"))
            z = (z - top[None, :]) * scale + rest[None, :]
            total += tl.sum(tl.exp2(z + f[:, None]), 0)
    parts = parts_ptr + share.to(tl.int64) * K + cols
    tl.store(parts, total, mask=cols < K)
    if f_ptr is None:
        tl.store(parts + tl.num_programs(1).to(tl.int64) * K, top, mask=cols < K)


@triton.jit(do_not_specialize=COUNTS)
def _sinkhorn_merge_kernel(
    parts_ptr, top_ptr, previous_ptr, rest_ptr, epsilon, B, K, shares,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of sums and maxima [2, shares, K], top and rest; of sums of codes [shares, K], the next."""
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = LOG2E / epsilon
    top = tl.full([BLOCK_S, BLOCK_K], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in range(0, shares, BLOCK_S):
        share = start + tl.arange(0, BLOCK_S)
        at = parts_ptr + share.to(tl.int64)[:, None] * K + cols[None, :]
        mask = (share < shares)[:, None] & (cols < K)[None, :]
        part = tl.load(at, mask=mask, other=0.0)
        if previous_ptr is None:
            part_top = tl.load(at + shares.to(tl.int64) * K, mask=mask, other=-float("inf"))
            new_top = tl.maximum(top, part_top)
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing there yet
            total *= tl.exp2((top - shift) * scale)
            part *= tl.exp2((part_top - shift) * scale)
            top = new_top
        total += part
    if previous_ptr is None:
        col_top = tl.max(top, 0)
        total *= tl.exp2((top - tl.where(cols < K, col_top, 0.0)[None, :]) * scale)
        total *= K
        tl.store(top_ptr + cols, col_top, mask=cols < K)
        rest = tl.zeros([BLOCK_K], tl.float32)
    else:
        total *= K / B
        rest = tl.load(previous_ptr + cols, mask=cols < K, other=0.0)
    # Only of scores that float32 cannot tell apart may a column have no codes; NaN stays NaN.
    col_total = tl.sum(total, 0)
    col_total = tl.where(col_total < SMALLEST_NORMAL, SMALLEST_NORMAL, col_total)
    tl.store(rest_ptr + cols, rest - tl.log2(col_total), mask=cols < K)


@triton.jit(do_not_specialize=COUNTS)
def _sinkhorn_row_kernel(
    scores_ptr, top_ptr, rest_ptr, sums_ptr, codes_ptr,
    epsilon, B, K, rows_per_share, stride_b, stride_k,
    ALIGNMENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes of a share of the rows, or only their sums over it."""
    share = tl.program_id(0)
    cols = tl.arange(0, BLOCK_K)
    scale = LOG2E / epsilon
    col_top = tl.load(top_ptr + cols, mask=cols < K, other=0.0)
    rest = tl.load(rest_ptr + cols, mask=cols < K, other=-float("inf"))
    sums = tl.zeros([BLOCK_K], tl.float32)
    first = share * rows_per_share
    for start in range(first, tl.minimum(first + rows_per_share, B), BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        at, mask = tile_at(rows, cols, B, K, stride_b, stride_k, ALIGNMENT)
        z = tl.load(scores_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = (z - col_top[None, :]) * scale + rest[None, :]
        e = tl.exp2(z - tl.max(z, 1)[:, None])
        total = tl.sum(e, 1)
        codes = e * tl.where(rows < B, 1 / total, 0.0)[:, None]
        if codes_ptr is None:
            sums += tl.sum(codes, 0)
        else:
            at, _ = tile_at(rows, cols, B, K, K, 1, ALIGNMENT)
            tl.store(codes_ptr + at, codes.to(codes_ptr.dtype.element_ty), mask=mask)
    if codes_ptr is None:
        tl.store(sums_ptr + share.to(tl.int64) * K + cols, sums, mask=cols < K)


@triton.jit
def _load_shifted(
    scores_ptr, top_ptr, rest_ptr, rows, cols, scale, B, K, stride_b, stride_k,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Exponents x + g, -inf beyond the last column."""
    at, mask = tile_at(rows, cols, B, K, stride_b, stride_k, ALIGNMENT)
    top = tl.load(top_ptr + cols, mask=cols < K, other=0.0)
    rest = tl.load(rest_ptr + cols, mask=cols < K, other=-float("inf"))
    z = tl.load(scores_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return (z - top[None, :]) * scale + rest[None, :]


@triton.jit(do_not_specialize=COUNTS)
def _sinkhorn_wide_row_kernel(
    scores_ptr, top_ptr, rest_ptr, f_ptr, codes_ptr,
    epsilon, B, K, stride_b, stride_k,
    ALIGNMENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What makes codes of x + g, f + log B, of some rows; or in a second walk the codes."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale = LOG2E / epsilon
    top = tl.full([BLOCK_B], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        z = _load_shifted(
            scores_ptr, top_ptr, rest_ptr, rows, start + tl.arange(0, BLOCK_K),
            scale, B, K, stride_b, stride_k, ALIGNMENT,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(z, 1))
        totals *= tl.exp2(top - new_top)[:, None]
        totals += tl.exp2(z - new_top[:, None])
        top = new_top
    total = tl.sum(totals, 1)
    if codes_ptr is None:
        tl.store(f_ptr + rows, -top - tl.log2(total), mask=rows < B)
    else:
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            z = _load_shifted(
                scores_ptr, top_ptr, rest_ptr, rows, cols,
                scale, B, K, stride_b, stride_k, ALIGNMENT,
            )  # fmt: skip
            codes = tl.exp2(z - top[:, None]) * (1 / total)[:, None]
            at, mask = tile_at(rows, cols, B, K, K, 1, ALIGNMENT)
            tl.store(codes_ptr + at, codes.to(codes_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _sinkhorn_codes_kernel(
    scores_ptr, top_ptr, total_ptr, codes_ptr,
    epsilon, B, K, stride_b, stride_k,
    ALIGNMENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """B exp(x) / sum exp(x)."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    at, mask = tile_at(rows, cols, B, K, stride_b, stride_k, ALIGNMENT)
    z = tl.load(scores_ptr + at, mask=mask, other=0.0).to(tl.float32)
    codes = tl.exp2((z - tl.load(top_ptr)) * (LOG2E / epsilon)) * (B / tl.load(total_ptr))
    at, _ = tile_at(rows, cols, B, K, K, 1, ALIGNMENT)
    tl.store(codes_ptr + at, codes.to(codes_ptr.dtype.element_ty), mask=mask)


def sinkhorn_fwd(scores, epsilon, iterations, samples=0, reduce=None):
    """Codes of prototype scores.

    Args:
        scores: [B, K] float32, bfloat16 or float16, any strides.
        epsilon: float.
        iterations: int, T.
        samples: number of samples on all ranks, if there are several.
        reduce: puts the "sum" or "max" over ranks in place of a tensor, if there are several.

    Returns:
        codes [B, K] in the type of scores.
    """
    (B, K), device = scores.shape, scores.device
    samples = samples or B
    arch, multiprocessors = gpu.target(device)
    config = (B, K, scores.dtype, arch, multiprocessors)
    stride_b, stride_k = scores.stride()
    matrix = {
        "scores_ptr": scores,
        "epsilon": epsilon,
        "B": B,
        "K": K,
        "stride_b": stride_b,
        "stride_k": stride_k,
        "ALIGNMENT": gcd(stride_b, K, 16) if stride_k == 1 else 1,
    }
    codes = torch.empty(B, K, dtype=scores.dtype, device=device)
    top = torch.empty(K, dtype=torch.float32, device=device)
    rest = f = None

    def column_parts():
        options, rows = launch_config("column", *config)
        shares = triton.cdiv(B, rows)
        parts = torch.empty(2 if f is None else 1, shares, K, dtype=torch.float32, device=device)
        gpu.launch(
            _sinkhorn_column_kernel,
            (triton.cdiv(K, options["BLOCK_K"]), shares),
            **matrix,
            top_ptr=top,
            rest_ptr=rest,
            f_ptr=f,
            parts_ptr=parts,
            rows_per_share=rows,
            **options,
        )
        return of_all_ranks(parts)

    def of_all_ranks(parts):
        if reduce is None:
            return parts
        if rest is None:
            totals, tops = parts
            highest = tops.amax(0)
            reduce(highest, "max")
            total = (totals * torch.exp((tops - highest) / epsilon)).sum(0)
            reduce(total, "sum")
            return torch.stack([total, highest])[:, None]
        total = parts.view(-1, K).sum(0)
        reduce(total, "sum")
        return total[None]

    def merge(parts):
        options, _ = launch_config("merge", *config)
        following = torch.empty(K, dtype=torch.float32, device=device)
        gpu.launch(
            _sinkhorn_merge_kernel,
            (triton.cdiv(K, options["BLOCK_K"]),),
            parts_ptr=parts,
            top_ptr=top,
            previous_ptr=rest,
            rest_ptr=following,
            epsilon=epsilon,
            B=samples,
            K=K,
            shares=parts.shape[-2],
            **options,
        )
        return following

    with torch.cuda.device_of(scores):
        if iterations == 0:
            totals, tops = column_parts()
            largest = tops.amax()
            total = (totals * torch.exp((tops - largest) / epsilon)).sum()
            total *= B / samples  # the kernel multiplies by B
            options, rows = launch_config("codes", *config)
            gpu.launch(
                _sinkhorn_codes_kernel,
                (triton.cdiv(B, rows), triton.cdiv(K, options["BLOCK_K"])),
                **matrix,
                top_ptr=largest,
                total_ptr=total,
                codes_ptr=codes,
                **options,
            )
        elif K <= WIDEST:
            options, rows = launch_config("row", *config)
            shares = triton.cdiv(B, rows)
            parts = column_parts()
            for left in reversed(range(iterations)):
                rest = merge(parts)
                parts = torch.empty(shares, K, dtype=torch.float32, device=device) if left else None
                gpu.launch(
                    _sinkhorn_row_kernel,
                    (shares,),
                    **matrix,
                    top_ptr=top,
                    rest_ptr=rest,
                    sums_ptr=parts,
                    codes_ptr=None if left else codes,
                    rows_per_share=rows,
                    **options,
                )
                if left:
                    parts = of_all_ranks(parts)
        else:
            options, rows = launch_config("wide_row", *config)
            for left in reversed(range(iterations)):
                rest = merge(column_parts())
                f = torch.empty(B, dtype=torch.float32, device=device) if left else None
                gpu.launch(
                    _sinkhorn_wide_row_kernel,
                    (triton.cdiv(B, rows),),
                    **matrix,
                    top_ptr=top,
                    rest_ptr=rest,
                    f_ptr=f,
                    codes_ptr=None if left else codes,
                    **options,
                )
    return codes
