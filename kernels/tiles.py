"""What the kernels of similarities share: their tiles, their log-sum-exps, their launch parameters.

Of rows x_i and y_j with s = 1 / temperature and unit rows x^ = x / |x|:

    a tile          x_i.y_j, and of it the logits s x^_i.y^_j, by the inverse norms
    its sums        max_j and sum_j exp of logits, a tile at a time
    a gradient      dx_i = s (u_i - x^_i <x^_i, u_i>) / |x_i| of u_i = sum_j W_ij y^_j

Two kernels are shared whole: that of the inverse norms and the scores of pairs, and that which
merges the sums and maxima that programs have left. ``launch_config`` has the sizes of all tiles.
Logarithms and exponentials are base 2 inside the kernels.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LN2, LOG2E

NORM_EPS = tl.constexpr(1e-12)  # a row of this length or less counts as zero
UNSHIFTED_SCALE = tl.constexpr(48.0)  # exp(+-s), its sums and their inverses are float32 numbers
FP16_WEIGHT = tl.constexpr(16384.0)  # a float16 row's largest weight; the sum of two is in range

# Counts and vector strides: a new value must not compile a new kernel.
COUNTS = ["M", "N", "groups", "per_group", "splits", "first_block", "parts", "width", "pairs"]
COUNTS += ["first", "start", "count", "q_programs", "q_blocks", "k_blocks"]
VECTORS = ["dlse_stride", "drows_stride", "dcols_stride"]


@lru_cache(maxsize=1024)
def launch_config(kernel, rows, columns, D, dtype, ids, arch, multiprocessors):
    """Tile sizes and launch options of a kernel, and into how many parts its work is cut.

    Args:
        kernel: "two_view" (forward on the symmetric half), "fwd", "bwd", "fixed_keys" (both), or of
            the pairs "pair" (forward with columns), "weight", "product" or "row_product" (dq
            alone).
        rows: number of rows that own an output.
        columns: number of rows they are compared with.
        D: number of features.
        dtype: dtype of the rows.
        ids: whether ids are compared, which takes registers.
        arch: "sm_90", "gfx942", ... as ``gpu.target`` names it.
        multiprocessors: how many of them the device has.

    Returns:
        (options, parts): keyword arguments of the kernel; the blocks per group ("two_view", "pair")
        or the number of column splits (the others).
    """
    # The interpreter has room for any tile, and a large one costs it no more than a small one.
    half = dtype.itemsize == 2 or arch == "interpreter"
    # Four warps issue a product of 64 rows together, with an operand in shared memory.
    hopper = arch in ("sm_90", "sm_100", "sm_103")
    # 160 KiB of shared memory or more.
    roomy = hopper or arch in ("sm_80", "sm_87", "interpreter")
    block_d = max(16, triton.next_power_of_2(D))
    if kernel in ("pair", "weight", "product", "row_product"):
        options = _pair_options(kernel, rows, columns, D, half, roomy, arch, multiprocessors)
        if kernel == "weight":
            return options, 1
        blocks = triton.cdiv(rows, options["BLOCK_M"])
        if kernel == "pair":
            return options, blocks_per_group(blocks, multiprocessors)
        tiles = blocks * triton.cdiv(D, options["BLOCK_N"])
        steps = triton.cdiv(columns, options["BLOCK_D"])
        return options, gpu.splits_of(tiles, steps, multiprocessors)
    whole = block_d <= ((256 if roomy else 128) if half else 32)  # else D is walked in chunks
    # Two programs share a multiprocessor: one multiplies while the other exponentiates.
    light = half and block_d <= 128
    slots = (2 if light else 1) * multiprocessors
    # A stage less frees registers of four warps; so does a smaller tile where ids are compared.
    stages = 2 if arch == "sm_90" and block_d == 128 and kernel == "bwd" else 3
    large = half and not (ids and arch == "sm_100")
    options = {
        "BLOCK_M": 64 if half or hopper else 32,
        "BLOCK_N": 64 if half or kernel in ("two_view", "fwd") else 32,
        "BLOCK_D": block_d if whole else 32,
        "num_warps": 4 if arch.startswith("gfx") or (light and arch == "sm_90") else 8,
        "num_stages": stages if light and roomy else 2,
        # Without, a score has the same bits forward and backward; "fixed_keys" has no backward.
        "enable_fp_fusion": kernel == "fixed_keys",
    }
    if kernel != "fixed_keys":
        options |= register_bound(arch)
    if kernel == "two_view":
        N = rows // 2
        if large and roomy and (block_d != 256 or arch == "sm_90") and N >= 2048:
            options["BLOCK_N"] = 128
        return options, blocks_per_group(2 * triton.cdiv(N, options["BLOCK_N"]), 2 * slots)

    if kernel == "fwd" and large and hopper and rows >= 128 * multiprocessors:
        options |= {"BLOCK_M": 128, "num_warps": 8}
    programs = triton.cdiv(rows, options["BLOCK_M"])
    # To compare ids, or to put float16 columns at unit length, takes registers too.
    crowded = ids or (dtype == torch.float16 and kernel == "bwd")
    if kernel != "fwd" and block_d >= 64 and crowded:
        options["BLOCK_N"] = 32
        if kernel == "bwd" and not half and block_d <= 128 and arch == "sm_90":
            options["num_warps"] = 4
    if kernel == "bwd":
        options["BLOCK_OUT"] = block_d if whole else min(block_d, 128)
        programs *= triton.cdiv(D, options["BLOCK_OUT"])
    return options, gpu.splits_of(programs, triton.cdiv(columns, options["BLOCK_N"]), slots)


def register_bound(arch):
    """Unbounded, ptxas spills a few to have one more program on a multiprocessor; not on Hopper."""
    return {"maxnreg": 255} if arch.startswith("sm_") and arch != "sm_90" else {}


def _pair_options(kernel, rows, columns, D, half, roomy, arch, multiprocessors):
    """Options of a kernel that gives each program a tile, large ones if there are enough."""
    row_blocks, col_blocks, feat_blocks = (triton.cdiv(x, 128) for x in (rows, columns, D))
    tiles = row_blocks * col_blocks
    product = kernel.endswith("product")
    if product:
        tiles = (row_blocks + (col_blocks if kernel == "product" else 0)) * feat_blocks
    large = half and tiles >= multiprocessors
    bound = register_bound(arch)
    # Chunks of one width give float32 scores the same bits forward and backward.
    short = not product if not half else kernel == "pair" and (large or bound)
    options = {
        "BLOCK_M": 128 if large else 64,
        # A tile of scores with both of its exponentials takes many registers.
        "BLOCK_N": 128 if large and product else 64,
        "BLOCK_D": (64 if half else 32) // (2 if short else 1),
        "num_warps": 8 if large or (bound and (not half or kernel != "weight")) else 4,
        "num_stages": (5 if short else 3) if roomy else 2,
        "enable_fp_fusion": product,  # forward and backward a score then has the same bits
    }
    if not large or kernel == "weight":
        options |= bound
    if not product:
        options["BLOCK_D"] = min(options["BLOCK_D"], max(16, triton.next_power_of_2(D)))
    return options


def blocks_per_group(blocks, slots):
    """The group size with which groups x groups take least time, in tiles, on so many slots.

    At most 64 groups, so that the forward kernel's workspace has at most 64 numbers a row.
    """

    def tiles(size):
        groups = triton.cdiv(blocks, size)
        waves = triton.cdiv(groups * groups, slots)
        return waves * size * (size + 1)  # one more than size to fill the pipeline

    sizes = {triton.cdiv(blocks, groups) for groups in range(1, min(blocks, 64) + 1)}
    return min(sorted(sizes), key=tiles)


@triton.jit
def load_tile(ptr, rows, n_rows, stride_n, stride_d, feats, D: tl.constexpr):
    """[rows, feats] of a matrix, 0 beyond its last row and feature."""
    offsets = rows.to(tl.int64)[:, None] * stride_n + feats.to(tl.int64)[None, :] * stride_d
    mask = (rows < n_rows)[:, None] & (feats < D)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_rnorm(ptr, at, mask):
    """Inverse norms, or 1 where rows are compared as they are."""
    if ptr is None:
        return tl.full(at.shape, 1.0, tl.float32)
    else:
        return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def times(x, factors):
    """Rows times their factors, in the rows' type; as they are without."""
    if factors is None:
        return x
    else:
        return (x.to(tl.float32) * factors[:, None]).to(x.dtype)


@triton.jit
def power_of_two(rnorm):
    """The power of two at or below each inverse norm, or 0: a row times it has every digit."""
    return (rnorm.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(power):
    """1 / power of a power of two, exactly; of 0 and of what no row is as long as, something."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def logits_of(products, row_factor, col_factor):
    """Products times both sqrt(s) / norm: the same bits whichever of the two is the row."""
    return products * (row_factor[:, None] * col_factor[None, :])


@triton.jit
def over(factor, power):
    """What is left of factors after a power of two has been multiplied in; 0 where that is 0."""
    if power is None:
        return factor
    else:
        return tl.where(power == 0, 0.0, factor * inverse_of(power))


@triton.jit
def chunked_products(
    x_ptr, x_power, rows, M, x_stride_n, x_stride_d,
    y_ptr, cols, N, y_stride_n, y_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_power_i x_i.y_j [rows, cols], by chunks of the features."""
    products = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for d in range(0, D, BLOCK_D):
        feats = d + tl.arange(0, BLOCK_D)
        x = times(load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D), x_power)
        y = load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
        products = tl.dot(x, tl.trans(y), products, input_precision=PRECISION)
    return products


@triton.jit
def relative(top, logits, axis: tl.constexpr):
    """Running maximum along an axis, by what earlier sums shrink, and the new exponentials."""
    new_top = tl.maximum(top, tl.max(logits, axis))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing visible yet
    return new_top, tl.exp2(top - shift), tl.exp2(logits - tl.expand_dims(shift, axis))


@triton.jit
def online(top, total, logits, axis: tl.constexpr):
    """Running maximum and sum of exponentials along an axis."""
    new_top, kept, terms = relative(top, logits, axis)
    return new_top, total * kept + tl.sum(terms, axis)


@triton.jit
def view_of(view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d):
    """Pointer and strides of view 0 or 1."""
    first = view == 0
    return (
        tl.where(first, z0_ptr, z1_ptr),
        tl.where(first, z0_stride_n, z1_stride_n),
        tl.where(first, z0_stride_d, z1_stride_d),
    )


@triton.jit
def weight_of(total, dlse, gain):
    """What multiplies a row's exponentials in W, over gain; 0 of a row that sees nothing."""
    return tl.where(total == 0, 0.0, dlse / gain / total)


@triton.jit
def gain_of(peak_ptr):
    """What weights are divided by, so that those of float16 rows stay in float16's range."""
    if peak_ptr is None:
        return 1.0
    else:
        peak = tl.maximum(tl.load(peak_ptr), 1e-30, propagate_nan=tl.PropagateNan.ALL)
        return peak / FP16_WEIGHT


@triton.jit
def less_pair(
    dunit, along, rows, feats, dlse, scale, pair_ptr, pair_rnorm_ptr, positive_ptr,
    M, pair_stride_n, pair_stride_d, D: tl.constexpr,
):  # fmt: skip
    """dunit_i - dL_i p^_i of rows whose L_i is less the score of a pair, and <x^_i, that>."""
    pair = load_tile(pair_ptr, rows, M, pair_stride_n, pair_stride_d, feats, D).to(tl.float32)
    pair_rnorm = load_rnorm(pair_rnorm_ptr, rows, rows < M)
    positive = tl.load(positive_ptr + rows, mask=rows < M, other=0.0) / (scale * LOG2E)
    return dunit - pair * (dlse * pair_rnorm)[:, None], along - dlse * positive


@triton.jit
def store_gradient(
    dunit, along, rows, at, feats, scale, x_ptr, x_rnorm, dx_ptr, dscale_ptr,
    M, x_stride_n, x_stride_d,
    D: tl.constexpr, NORMALIZE: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """dx_i = s (dunit_i - x^_i <x^_i, dunit_i>) / |x_i|, where dunit_i = sum_j W_ij y^_j.

    Of rows that are not normalised it is s dunit_i.
    """
    if NORMALIZE or dscale_ptr is not None:
        x = load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
        x *= x_rnorm[:, None]
        if feats.shape[0] >= D:
            along = tl.sum(x * dunit, 1)
    if NORMALIZE:
        dx = (dunit - x * along[:, None]) * (scale * x_rnorm)[:, None]
    else:
        dx = dunit * scale
    out = rows.to(tl.int64)[:, None] * D + feats[None, :]
    mask = (rows < M)[:, None] & (feats < D)[None, :]
    tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dscale_ptr is not None:
        if SELF:
            along *= 0.5  # both rows of a pair see it
        tl.store(dscale_ptr + at, along, mask=rows < M)


@triton.jit(do_not_specialize=COUNTS)
def _rnorm_kernel(
    x_ptr, y_ptr, x_rnorm_ptr, y_rnorm_ptr, positive_ptr, scale_ptr,
    M, N, first, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |x_i| and 1 / |y_j|, and the score of x_i and y_first+i in base 2.

    The score where positive_ptr is given; the plain product where x_rnorm_ptr is not.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    y_rows = tl.where(rows < N - first, rows + first, rows - (N - first))
    y_valid = tl.where(rows < N, N, 0)
    # Rows are divided first, by the power of two at their largest entry: no digit is lost, and no
    # square over- or underflows.
    x_top = tl.full([BLOCK_M], 1e-30, tl.float32)
    y_top = tl.full([BLOCK_M], 1e-30, tl.float32)
    for d in range(0, D, BLOCK_D):
        feats = d + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
        y = load_tile(y_ptr, y_rows, y_valid, y_stride_n, y_stride_d, feats, D).to(tl.float32)
        x_top = tl.maximum(x_top, tl.max(tl.abs(x), 1))
        y_top = tl.maximum(y_top, tl.max(tl.abs(y), 1))

    x_top = power_of_two(x_top)
    y_top = power_of_two(y_top)
    xx = tl.zeros([BLOCK_M], tl.float32)
    yy = tl.zeros([BLOCK_M], tl.float32)
    xy = tl.zeros([BLOCK_M], tl.float32)
    for d in range(0, D, BLOCK_D):
        feats = d + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
        y = load_tile(y_ptr, y_rows, y_valid, y_stride_n, y_stride_d, feats, D).to(tl.float32)
        x *= inverse_of(x_top)[:, None]
        y *= inverse_of(y_top)[:, None]
        xx += tl.sum(x * x, 1)
        yy += tl.sum(y * y, 1)
        xy += tl.sum(x * y, 1)

    if x_rnorm_ptr is not None:
        x_norm = x_top * tl.sqrt_rn(xx)
        y_norm = y_top * tl.sqrt_rn(yy)
        x_rnorm = tl.where(x_norm <= NORM_EPS, 0.0, tl.div_rn(1.0, x_norm))  # NaN stays NaN
        y_rnorm = tl.where(y_norm <= NORM_EPS, 0.0, tl.div_rn(1.0, y_norm))
        tl.store(x_rnorm_ptr + rows, x_rnorm, mask=rows < M)
        tl.store(y_rnorm_ptr + y_rows, y_rnorm, mask=rows < N)
    if positive_ptr is not None:
        # Rounded as a tile's scores are, which it is compared with.
        root = tl.sqrt(tl.load(scale_ptr).to(tl.float32) * LOG2E)
        if x_rnorm_ptr is not None:
            factor = (x_top * x_rnorm * root) * (y_top * y_rnorm * root)
        else:
            xy = xy * x_top * y_top  # in this order: both may be past float32 where xy is 0
            factor = root * root
        tl.store(positive_ptr + rows, xy * factor, mask=rows < M)


@triton.jit
def _store_both(ptr, second_ptr, rows, values, M, pairs):
    """Store a block of M values, or where second_ptr is given those from pairs on there."""
    if second_ptr is None:
        tl.store(ptr + rows, values, mask=rows < M)
    else:
        tl.store(ptr + rows, values, mask=rows < pairs)
        tl.store(second_ptr + (rows - pairs), values, mask=(rows >= pairs) & (rows < M))


@triton.jit(do_not_specialize=COUNTS)
def _lse_finish_kernel(
    parts_ptr, positive_ptr, scale_ptr, lse_ptr, top_ptr, total_ptr,
    col_lse_ptr, col_top_ptr, col_total_ptr, counts_ptr, M, pairs, parts,
    SHIFTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Merge a forward kernel's parts and tops [parts, M].

    Rows i and pairs + i belong to pair i, whose score is taken off where positive_ptr is given.
    Where counts_ptr is, the mean score of the row's positives is. Not SHIFTED: there are tops only
    for a large scale.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.arange(0, BLOCK_PARTS)
    mask = (part < parts)[:, None] & (rows < M)[None, :]
    at = part.to(tl.int64)[:, None] * M + rows[None, :]
    totals = tl.load(parts_ptr + at, mask=mask, other=0.0)
    top = tl.zeros([BLOCK_M], tl.float32)
    origin = tl.zeros([BLOCK_M], tl.float32)
    if positive_ptr is not None:
        samples = tl.where(rows < pairs, rows, rows - pairs)
        origin = tl.load(positive_ptr + samples, mask=rows < M, other=0.0)
    if counts_ptr is not None:
        positives_ptr = parts_ptr + 2 * parts.to(tl.int64) * M
        positives = tl.sum(tl.load(positives_ptr + at, mask=mask, other=0.0), 0)
        count_ptr = positives_ptr + parts.to(tl.int64) * M
        count = tl.sum(tl.load(count_ptr + at, mask=mask, other=0.0), 0)
        origin = positives / tl.maximum(count, 1.0)
        tl.store(counts_ptr + rows, count, mask=rows < M)
    shifted = True
    if not SHIFTED:
        shifted = tl.load(scale_ptr).to(tl.float32) > UNSHIFTED_SCALE
    if shifted:
        tops = tl.load(parts_ptr + parts.to(tl.int64) * M + at, mask=mask, other=-float("inf"))
        top = tl.max(tops, 0)
        shift = tl.where(top == -float("inf"), 0.0, top)
        totals *= tl.exp2(tops - shift[None, :])
    total = tl.sum(totals, 0)
    # Taken first, the difference of large numbers is exact; the logarithm is small beside them.
    lse = ((top - origin) + tl.log2(total)) * LN2
    if counts_ptr is not None:
        lse = tl.where(count == 0, 0.0, lse)
    _store_both(lse_ptr, col_lse_ptr, rows, lse, M, pairs)
    # To the backward pass, infinity gives a row that sees nothing the weight exp2(x - top) = 0.
    top = tl.where(top == -float("inf"), float("inf"), top)
    _store_both(top_ptr, col_top_ptr, rows, top, M, pairs)
    _store_both(total_ptr, col_total_ptr, rows, total, M, pairs)


def empty_rnorms(q, k, normalize):
    """Room for the inverse norms of q [M] and k [N]; none without normalize."""
    sizes = (len(q), len(k)) if normalize else (0, 0)
    return [torch.empty(size, dtype=torch.float32, device=q.device) for size in sizes]


def fill_rnorms(x, y, x_rnorm, y_rnorm, positive, scale, first=0):
    """Fill the inverse norms, unless they are None, and the scores of the pairs (i, first + i)."""
    D = x.shape[1]
    block_d = min(256, max(16, triton.next_power_of_2(D)))
    block_m = 2048 // block_d
    gpu.launch(
        _rnorm_kernel,
        (triton.cdiv(len(x) if x_rnorm is None else max(len(x), len(y)), block_m),),
        **gpu.strided(x=x, y=y),
        x_rnorm_ptr=x_rnorm,
        y_rnorm_ptr=y_rnorm,
        positive_ptr=positive,
        scale_ptr=scale,
        M=len(x),
        N=len(y),
        first=first,
        D=D,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )


def pair_scores(q, pair, q_rnorm, scale):
    """Inverse norms of the pairs of q's rows, if those have some, and their scores, each [M]."""
    if pair is None:
        return None, None
    pair_rnorm, positive = torch.empty(2, len(q), dtype=torch.float32, device=q.device)
    pair_rnorm = None if q_rnorm is None else pair_rnorm
    fill_rnorms(q, pair, q_rnorm, pair_rnorm, positive, scale)
    return pair_rnorm, positive


def finish_lse(parts, scale, positive=None, columns=False, shifted=True, counts=None):
    """Return lse, top and total of the sums and maxima in parts [2, parts, M]: each [M].

    With columns each is a pair, of the first half of them and of the second. With counts [M] parts
    [4, parts, M] have those of positives, which are written there.
    """
    _, count, M = parts.shape
    pairs = M if positive is None else len(positive)
    row_stats = [parts.new_empty(pairs if columns else M) for _ in range(3)]
    col_stats = [parts.new_empty(M - pairs) if columns else None for _ in range(3)]
    block_parts = triton.next_power_of_2(count)
    block_m = max(16, min(64, 4096 // block_parts))
    gpu.launch(
        _lse_finish_kernel,
        (triton.cdiv(M, block_m),),
        parts_ptr=parts,
        positive_ptr=positive,
        scale_ptr=scale,
        lse_ptr=row_stats[0],
        top_ptr=row_stats[1],
        total_ptr=row_stats[2],
        col_lse_ptr=col_stats[0],
        col_top_ptr=col_stats[1],
        col_total_ptr=col_stats[2],
        counts_ptr=counts,
        M=M,
        pairs=pairs,
        parts=count,
        SHIFTED=shifted,
        BLOCK_M=block_m,
        BLOCK_PARTS=block_parts,
        num_warps=4,
    )
    return list(zip(row_stats, col_stats, strict=True)) if columns else row_stats
