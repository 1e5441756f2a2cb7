"""Cross product energy on the GPU: the D x D cross-correlation of two views is never stored.

Rows u_n, v_n of N samples with D features each, standardised per feature over the samples:

    û_ni = (u_ni - mean_i) factor_i      c_ij = 1/N sum_n û_ni v̂_nj      E = sum_{i != j} c_ij^2

Barlow Twins (Zbontar et al. 2021, equation 1) takes factor = 1 / std of both views, the covariance
term of VICReg (Bardes et al. 2022, equation 3) one factor for all features, and v = u. Two routes:

    features    panels of rows of c, its diagonal left out; 2 N D^2 operations, 1 where v is u
                h_u = v̂ c^T, h_v = û c                    6 N D^2 with both, 3 where v is u
    dual        K = û û^T, L = v̂ v̂^T, the upper half of their tiles;    N^2 D operations each
                E = <K, L> / N^2 - sum_i c_ii^2
                h_u = L û / N - diag(c) v̂, h_v = K v̂ / N - diag(c) û    2 N^2 D operations each
                with one factor, outliers o are no part of K, and E and h gain their rows c_oj
    backward    dû = dE 2/N h_u + ddiag v̂ / N      (v = u: twice that)
                du = factor (dû - mean(dû) - û mean(dû û))      without the last term for one factor

The features route keeps h [N, D] for the backward pass and a panel of c meanwhile, the dual route
K and L [N, N]. Inputs are read as they are and standardised on load. README.md has the derivations.
"""

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu

CONSTANT = tl.constexpr(2.0**100)  # local factor of a constant feature: above that of any other
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
OUTLIERS = tl.constexpr(16)  # at most
SHARE = tl.constexpr(1 / 64)  # of all squared variances, from which on a feature is an outlier


@lru_cache(maxsize=1024)
def launch_config(kernel, N, D, inputs, dtype, arch, multiprocessors):
    """Tile sizes and launch options of a kernel, and into how many parts its work is cut.

    Args:
        kernel: "columns" (statistics and their backward), "gram", "gram_bwd", "panel" or
            "panel_product".
        N: number of samples.
        D: number of features.
        inputs: 2 views, or 1 where v is u.
        dtype: dtype of the rows.
        arch: "sm_90", "gfx942", ... as ``gpu.target`` names it.
        multiprocessors: how many of them the device has.

    Returns:
        (options, parts): keyword arguments of the kernel; the shares of D ("gram"), the rows of c
        in a panel ("panel") or 1.
    """
    if kernel == "columns":
        # Narrow, so that a few programs share a multiprocessor and hide each other's loads.
        block_f = 32 if multiprocessors <= D // 128 else 16
        return {"BLOCK_N": 4096 // block_f, "BLOCK_F": block_f, "num_warps": 8}, 1

    half = dtype.itemsize == 2 or arch == "interpreter"
    hopper = arch in ("sm_90", "sm_100", "sm_103")
    roomy = hopper or arch in ("sm_80", "sm_87", "interpreter")  # 160 KiB of shared memory or more
    widest = min(triton.cdiv(D, 2), 2048)  # a panel is half of c at most, even where that is small
    rows, cols = {
        "gram": (N, N),
        "gram_bwd": (N, D),
        "panel": (widest, D),
        "panel_product": (N, widest),
    }[kernel]
    block = 128 if half or hopper else 64
    idle = triton.cdiv(rows, block) * triton.cdiv(cols, block) < multiprocessors
    if min(rows, cols) <= 64 or (idle and kernel != "gram"):  # which splits D instead
        block = 64
    options = {
        "BLOCK_M": block,
        "BLOCK_N": 64 if kernel == "gram_bwd" else block,  # its last lines hold three tiles
        "BLOCK_K": 64 if half and roomy else 32,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": 3 if roomy else 2,
    }
    if kernel == "gram":
        blocks = triton.cdiv(N, block)
        steps = triton.cdiv(D, options["BLOCK_K"])
        return options, gpu.splits_of(inputs * blocks * (blocks + 1) // 2, steps, multiprocessors)
    if kernel == "panel":
        # As many rows as give each multiprocessor a few tiles in every product that they are in.
        fill = triton.cdiv(4 * multiprocessors * block * block, min(N, D))
        return options, triton.cdiv(min(fill, widest), block) * block
    return options, 1


# A new value must not compile a new kernel. Lengths and bounds of rows in memory are left out:
# whether they are multiples of 16 decides how wide loads are.
_COUNTS = ["N", "splits", "count", "far_count", "sides", "first_partial", "begun"]
_VECTORS = ["ddiagonal_stride"]


@triton.jit
def _load_vector(ptr, feats, D):
    return tl.load(ptr + feats, mask=feats < D, other=0.0)


@triton.jit
def _load_unit(z_ptr, rows, feats, N, D, stride_n, stride_d, mean, factor):
    """(z - mean) * factor in float32, 0 outside of [N, D]."""
    mask = (rows < N)[:, None] & (feats < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + feats.to(tl.int64)[None, :] * stride_d
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, (z - mean[None, :]) * factor[None, :], 0.0)  # [rows, feats]


@triton.jit
def _operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Rounded to nearest, as a product takes it."""
    if PRECISION == "tf32":  # the tensor cores would cut the last 13 bits off
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN stays NaN
    else:
        return x.to(dtype)


@triton.jit
def _mean(x, N):
    return tl.sum(x, 0) * (1.0 / N)  # in c_ii the rounding of 1 / N cancels with that in a variance


@triton.jit
def _moments(z_ptr, feats, N, D, stride_n, stride_d, BLOCK_N: tl.constexpr):
    """Mean and biased variance of each feature over the samples."""
    one = tl.full([feats.shape[0]], 1.0, tl.float32)
    # Summed as differences from the first sample: small numbers, and 0 for a constant feature.
    first_at = z_ptr + feats.to(tl.int64) * stride_d
    first = tl.load(first_at, mask=feats < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N, feats.shape[0]], tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        total += _load_unit(z_ptr, rows, feats, N, D, stride_n, stride_d, first, one)
    mean = first + _mean(total, N)
    squares = tl.zeros([BLOCK_N, feats.shape[0]], tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        z = _load_unit(z_ptr, rows, feats, N, D, stride_n, stride_d, mean, one)
        squares += z * z
    return mean, _mean(squares, N)


@triton.jit
def _factor(var, eps, STANDARDIZE: tl.constexpr):
    """1 / std, or the power of two that brings std into [1/2, 1)."""
    if STANDARDIZE:
        var += eps
        # With a step of Newton's in float64: 1 - c_ii may be a few units in the last place.
        rstd = (1 / tl.sqrt(var)).to(tl.float64)
        rstd += 0.5 * rstd * (1 - var.to(tl.float64) * rstd * rstd)
        rstd = rstd.to(tl.float32)
        return tl.where((var < SMALLEST_NORMAL) | (var == float("inf")), 0.0, rstd)
    else:
        exponent = (tl.sqrt(var).to(tl.int32, bitcast=True) >> 23) & 255
        power = (tl.maximum(253 - exponent, 1) << 23).to(tl.float32, bitcast=True)
        return tl.where(var < SMALLEST_NORMAL, CONSTANT, power)


@triton.jit
def _lift(var):
    """The power of two that brings a deviation into [1/2, 1), 1 if there is none."""
    power = _factor(tl.maximum(var, 0.0), 0.0, False)
    return tl.where(power == CONSTANT, 1.0, power)


@triton.jit(do_not_specialize=_COUNTS)
def _moments_kernel(
    u_ptr, v_ptr, u_mean_ptr, u_factor_ptr, v_mean_ptr, v_factor_ptr, diagonal_ptr, eps,
    N, D, u_stride_n, u_stride_d, v_stride_n, v_stride_d,
    STANDARDIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Mean and factor of each feature, and c_ii; without STANDARDIZE a power of two for each."""
    feats = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    u_mean, u_var = _moments(u_ptr, feats, N, D, u_stride_n, u_stride_d, BLOCK_N)
    u_factor = _factor(u_var, eps, STANDARDIZE)
    tl.store(u_mean_ptr + feats, u_mean, mask=feats < D)
    tl.store(u_factor_ptr + feats, u_factor, mask=feats < D)
    if v_ptr is not None:
        v_mean, v_var = _moments(v_ptr, feats, N, D, v_stride_n, v_stride_d, BLOCK_N)
        v_factor = _factor(v_var, eps, STANDARDIZE)
        tl.store(v_mean_ptr + feats, v_mean, mask=feats < D)
        tl.store(v_factor_ptr + feats, v_factor, mask=feats < D)

    # Of rounded numbers, as the products are: what is taken off <K, L> is what is in it.
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    products = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        u = _load_unit(u_ptr, rows, feats, N, D, u_stride_n, u_stride_d, u_mean, u_factor)
        u = _operand(u, dtype, PRECISION).to(tl.float32)
        v = u
        if v_ptr is not None:
            v = _load_unit(v_ptr, rows, feats, N, D, v_stride_n, v_stride_d, v_mean, v_factor)
            v = _operand(v, dtype, PRECISION).to(tl.float32)
        products += u * v
    tl.store(diagonal_ptr + feats, _mean(products, N), mask=feats < D)


@triton.jit
def _common(local_ptr, D, BLOCK_F: tl.constexpr):
    """The smallest factor, which the largest deviation has; 1 if all features are constant."""
    smallest = tl.full([BLOCK_F], CONSTANT, tl.float32)
    for start in range(0, D, BLOCK_F):
        feats = start + tl.arange(0, BLOCK_F)
        local = tl.load(local_ptr + feats, mask=feats < D, other=CONSTANT)
        smallest = tl.minimum(smallest, local)
    common = tl.min(smallest, 0)
    return tl.where(common == CONSTANT, 1.0, common)


@triton.jit
def _common_factor_kernel(
    u_local_ptr, v_local_ptr, u_factor_ptr, v_factor_ptr, diagonal_ptr, D, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Put one factor in place of each feature's own, in c_ii too."""
    feats = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    u_common = _common(u_local_ptr, D, BLOCK_F)
    u_change = u_common / tl.load(u_local_ptr + feats, mask=feats < D, other=1.0)
    tl.store(u_factor_ptr + feats, tl.zeros([BLOCK_F], tl.float32) + u_common, mask=feats < D)
    v_change = u_change
    if v_local_ptr is not None:
        v_common = _common(v_local_ptr, D, BLOCK_F)
        v_change = v_common / tl.load(v_local_ptr + feats, mask=feats < D, other=1.0)
        tl.store(v_factor_ptr + feats, tl.zeros([BLOCK_F], tl.float32) + v_common, mask=feats < D)
    diagonal = _load_vector(diagonal_ptr, feats, D)
    tl.store(diagonal_ptr + feats, diagonal * u_change * v_change, mask=feats < D)


@triton.jit
def _next_largest(x_ptr, last, last_at, D, BLOCK: tl.constexpr):
    """The largest number after ``last`` and its place, ties in order; -1 and D if there is none."""
    largest = tl.full([BLOCK], -1.0, tl.float32)
    at = tl.zeros([BLOCK], tl.int32) + D
    for start in range(0, D, BLOCK):
        feats = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + feats, mask=feats < D, other=-1.0)
        later = ((x < last) | ((x == last) & (feats > last_at))) & (x > largest)
        largest = tl.where(later, x, largest)
        at = tl.where(later, feats, at)
    top = tl.max(largest, 0)
    return top, tl.min(tl.where(largest == top, at, D), 0)


@triton.jit(do_not_specialize=["D"])
def _outliers_kernel(
    diagonal_ptr, factor_ptr, outliers_ptr, rest_factor_ptr, raised_ptr, D, BLOCK: tl.constexpr,
):  # fmt: skip
    """Features with much of all squared variances, D in free places; the rest's factor, 0 for them.

    The rest has a factor of its own, ``raised`` times as large, so that its deviations are near 1.
    """
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        diagonal = _load_vector(diagonal_ptr, start + tl.arange(0, BLOCK), D)
        squares += diagonal * diagonal
    least = tl.sum(squares, 0) * SHARE

    places = tl.arange(0, OUTLIERS)
    outliers = tl.zeros([OUTLIERS], tl.int32) + D
    found = 0
    top, top_at = _next_largest(diagonal_ptr, float("inf"), -1, D, BLOCK)
    while (found < OUTLIERS) & (top * top > least):
        outliers = tl.where(places == found, top_at, outliers)
        found += 1
        top, top_at = _next_largest(diagonal_ptr, top, top_at, D, BLOCK)
    tl.store(outliers_ptr + places, outliers)

    raised = _lift(top)
    tl.store(raised_ptr, raised)
    for start in range(0, D, BLOCK):
        feats = start + tl.arange(0, BLOCK)
        diagonal = _load_vector(diagonal_ptr, feats, D)
        far = (diagonal > top) | ((diagonal == top) & (feats < top_at))
        rest_factor = tl.where(far, 0.0, _load_vector(factor_ptr, feats, D) * raised)
        tl.store(rest_factor_ptr + feats, rest_factor, mask=feats < D)


@triton.jit(do_not_specialize=_COUNTS)
def _outlier_rows_kernel(
    z_ptr, mean_ptr, factor_ptr, rest_factor_ptr, outliers_ptr, far_c_ptr, far_energy_ptr,
    N, D, z_stride_n, z_stride_d,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Rows of c of the outliers [OUTLIERS, D], 0 on its diagonal, or squares of rows and columns.

    Nothing is read where there are no outliers.
    """
    feats = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    places = tl.arange(0, OUTLIERS)
    outliers = tl.load(outliers_ptr + places)
    far_mean = _load_vector(mean_ptr, outliers, D)
    far_factor = _load_vector(factor_ptr, outliers, D)
    mean = _load_vector(mean_ptr, feats, D)
    factor = _load_vector(factor_ptr, feats, D)
    acc = tl.zeros([OUTLIERS, BLOCK_F], tl.float32)
    for start in range(0, tl.where(tl.load(outliers_ptr) < D, N, 0), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        far = _load_unit(z_ptr, rows, outliers, N, D, z_stride_n, z_stride_d, far_mean, far_factor)
        z = _load_unit(z_ptr, rows, feats, N, D, z_stride_n, z_stride_d, mean, factor)
        far, z = _operand(far, tl.float32, PRECISION), _operand(z, tl.float32, PRECISION)
        acc = tl.dot(tl.trans(far), z, acc, input_precision=PRECISION)

    c = tl.where(outliers[:, None] == feats[None, :], 0.0, acc / N)
    if far_c_ptr is not None:
        tl.store(far_c_ptr + places[:, None] * D + feats[None, :], c, mask=(feats < D)[None, :])
    if far_energy_ptr is not None:
        # The column of an outlier is another row of these, that of any other feature is not.
        sides = tl.where(_load_vector(rest_factor_ptr, feats, D) == 0, 1.0, 2.0)
        tl.store(far_energy_ptr + tl.program_id(0), tl.sum(c * c * sides[None, :]))


@triton.jit
def _pair(N, BLOCK: tl.constexpr):
    """Blocks a, b of this program: each unordered pair once, in circulant order."""
    blocks = tl.cdiv(N, BLOCK)
    a = tl.program_id(0) % blocks
    return a, (a + tl.program_id(0) // blocks) % blocks


@triton.jit(do_not_specialize=_COUNTS)
def _gram_kernel(
    u_ptr, v_ptr, u_mean_ptr, u_factor_ptr, v_mean_ptr, v_factor_ptr, shares_ptr,
    N, splits, D, u_stride_n, u_stride_d, v_stride_n, v_stride_d,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of K, and of L, over a share of D: shares [splits, inputs, pairs, BLOCK_M, BLOCK_N]."""
    first = tl.program_id(2) == 0
    z_ptr = tl.where(first, u_ptr, v_ptr)
    mean_ptr = tl.where(first, u_mean_ptr, v_mean_ptr)
    factor_ptr = tl.where(first, u_factor_ptr, v_factor_ptr)
    stride_n = tl.where(first, u_stride_n, v_stride_n)
    stride_d = tl.where(first, u_stride_d, v_stride_d)
    a, b = _pair(N, BLOCK_M)
    rows = a * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = b * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    share = tl.cdiv(tl.cdiv(D, BLOCK_K), splits) * BLOCK_K
    start = tl.program_id(1) * share
    for k in range(start, tl.minimum(start + share, D), BLOCK_K):
        feats = k + tl.arange(0, BLOCK_K)
        mean = _load_vector(mean_ptr, feats, D)
        factor = _load_vector(factor_ptr, feats, D)
        x = _load_unit(z_ptr, rows, feats, N, D, stride_n, stride_d, mean, factor)
        y = _load_unit(z_ptr, cols, feats, N, D, stride_n, stride_d, mean, factor)
        x, y = _operand(x, dtype, PRECISION), _operand(y, dtype, PRECISION)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)

    tile = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    tile = tile.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(shares_ptr + tile * BLOCK_M * BLOCK_N + at, acc)


@triton.jit
def _merge_tile(shares_ptr, gram_ptr, tile, stride, splits, rows, cols, N, D, mirrored, at):
    """Sum a tile's shares and write it over D, its rows before ``mirrored`` transposed too."""
    total = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for split in range(splits):
        total += tl.load(shares_ptr + (tile + stride * split) + at)
    total /= D
    mask = (rows < N)[:, None] & (cols < N)[None, :]
    rows, cols = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    tl.store(gram_ptr + rows * N + cols, total, mask=mask)
    tl.store(gram_ptr + cols * N + rows, total, mask=mask & (rows < mirrored))
    return total


@triton.jit(do_not_specialize=["splits"])
def _gram_merge_kernel(
    shares_ptr, u_gram_ptr, v_gram_ptr, energy_ptr, splits, N, D,
    BLOCK_M: tl.constexpr, BLOCK_SUB: tl.constexpr,
):  # fmt: skip
    """Add up the shares of a tile of K / D, and of L / D, and sum their product."""
    a, b = _pair(N, BLOCK_M)
    sub_row = tl.program_id(1) * BLOCK_SUB + tl.arange(0, BLOCK_SUB)
    sub_col = tl.program_id(2) * BLOCK_SUB + tl.arange(0, BLOCK_SUB)
    at = sub_row[:, None] * BLOCK_M + sub_col[None, :]
    rows, cols = a * BLOCK_M + sub_row, b * BLOCK_M + sub_col
    pairs = tl.num_programs(0)
    area: tl.constexpr = BLOCK_M * BLOCK_M
    tile = tl.program_id(0).to(tl.int64) * area
    one = pairs.to(tl.int64) * area
    stride = one if v_gram_ptr is None else 2 * one
    mirrored = tl.where(a == b, 0, N)
    k_tile = _merge_tile(
        shares_ptr, u_gram_ptr, tile, stride, splits, rows, cols, N, D, mirrored, at
    )
    l_tile = k_tile
    if v_gram_ptr is not None:
        l_tile = _merge_tile(
            shares_ptr, v_gram_ptr, tile + one, stride, splits, rows, cols, N, D, mirrored, at
        )
    energy = tl.sum(k_tile * l_tile) * tl.where(a == b, 1.0, 2.0)
    part = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    tl.store(energy_ptr + part.to(tl.int64) * pairs + tl.program_id(0), energy)


@triton.jit(do_not_specialize=_COUNTS)
def _gram_bwd_kernel(
    gram_ptr, u_ptr, v_ptr, u_mean_ptr, u_factor_ptr, v_mean_ptr, v_factor_ptr, diagonal_ptr, h_ptr,
    outliers_ptr, rest_factor_ptr, raised_ptr, far_c_ptr,
    N, D, gram_stride, u_stride_n, u_stride_d, v_stride_n, v_stride_d,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h_u = D/N (L/D) û - c_ii v̂, and with u and v, K and L swapped, h_v; gram_stride is N.

    With outliers, which are no part of L, theirs is D/N (L/D) û, and all gain sum_o c_oi û_no.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feats = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    u_mean = _load_vector(u_mean_ptr, feats, D)
    u_factor = _load_vector(u_factor_ptr, feats, D)
    if outliers_ptr is not None:
        # A feature that is small beside others keeps its digits too.
        lift = _lift(_load_vector(diagonal_ptr, feats, D))
        u_factor *= lift
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, gram_stride, BLOCK_K):
        others = k + tl.arange(0, BLOCK_K)
        gram_at = rows.to(tl.int64)[:, None] * gram_stride + others[None, :]
        mask = (rows < N)[:, None] & (others < gram_stride)[None, :]
        gram = tl.load(gram_ptr + gram_at, mask=mask, other=0.0)
        gram = tl.where(rows[:, None] == others[None, :], 0.0, gram)
        u = _load_unit(u_ptr, others, feats, N, D, u_stride_n, u_stride_d, u_mean, u_factor)
        gram, u = _operand(gram, dtype, PRECISION), _operand(u, dtype, PRECISION)
        acc = tl.dot(gram, u, acc, input_precision=PRECISION)

    # The diagonal of L is the largest part of h and along û, where no gradient passes: in float32.
    own = tl.load(gram_ptr + rows.to(tl.int64) * (gram_stride + 1), mask=rows < N, other=0.0)
    u = _load_unit(u_ptr, rows, feats, N, D, u_stride_n, u_stride_d, u_mean, u_factor)
    v_mean = _load_vector(v_mean_ptr, feats, D)
    v_factor = _load_vector(v_factor_ptr, feats, D)
    v = _load_unit(v_ptr, rows, feats, N, D, v_stride_n, v_stride_d, v_mean, v_factor)
    h = (acc + own[:, None] * u) * (D / N)
    diagonal = _load_vector(diagonal_ptr, feats, D)
    if outliers_ptr is not None:
        lower = 1 / tl.load(raised_ptr)
        h *= (lower * lower / lift)[None, :]
        rest_factor = _load_vector(rest_factor_ptr, feats, D)
        diagonal = tl.where(rest_factor == 0, 0.0, diagonal)
    h -= diagonal[None, :] * v
    if outliers_ptr is not None:
        found = tl.sum((tl.load(outliers_ptr + tl.arange(0, OUTLIERS)) < D).to(tl.int32), 0)
        for place in range(0, found):
            outlier = tl.load(outliers_ptr + place)
            far_at = rows.to(tl.int64) * v_stride_n + outlier.to(tl.int64) * v_stride_d
            far = tl.load(v_ptr + far_at, mask=rows < N, other=0.0).to(tl.float32)
            far = (far - tl.load(v_mean_ptr + outlier)) * tl.load(v_factor_ptr + outlier)
            h += far[:, None] * _load_vector(far_c_ptr + place * D, feats, D)[None, :]
    out = rows.to(tl.int64)[:, None] * D + feats[None, :]
    tl.store(h_ptr + out, h, mask=(rows < N)[:, None] & (feats < D)[None, :])


@triton.jit(do_not_specialize=_COUNTS)
def _panel_kernel(
    u_ptr, v_ptr, u_mean_ptr, u_factor_ptr, v_mean_ptr, v_factor_ptr, panel_ptr, energy_ptr,
    N, first_partial, first_row, first_col, last_row, D, panel_stride,
    u_stride_n, u_stride_d, v_stride_n, v_stride_d,
    SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of c without its diagonal: features of u from first_row to last_row with those of v.

    With SYMMETRIC, columns past the last row stand for their mirror image too; where the panel is
    not kept, so do those past the tile's own rows, and those before them are left out.
    """
    row_start = first_row + tl.program_id(0) * BLOCK_M
    col_start = first_col + tl.program_id(1) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_M)
    cols = col_start + tl.arange(0, BLOCK_N)
    steps = N
    weight = 1.0
    if SYMMETRIC:
        if panel_ptr is None:
            steps = tl.where(col_start < row_start, 0, N)
            weight = tl.where(col_start > row_start, 2.0, 1.0)
        else:
            weight = tl.where(col_start >= last_row, 2.0, 1.0)
    u_mean = _load_vector(u_mean_ptr, rows, last_row)
    u_factor = _load_vector(u_factor_ptr, rows, last_row)
    v_mean = _load_vector(v_mean_ptr, cols, D)
    v_factor = _load_vector(v_factor_ptr, cols, D)
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, steps, BLOCK_K):
        samples = k + tl.arange(0, BLOCK_K)
        u = _load_unit(u_ptr, samples, rows, N, last_row, u_stride_n, u_stride_d, u_mean, u_factor)
        v = _load_unit(v_ptr, samples, cols, N, D, v_stride_n, v_stride_d, v_mean, v_factor)
        u, v = _operand(u, dtype, PRECISION), _operand(v, dtype, PRECISION)
        acc = tl.dot(tl.trans(u), v, acc, input_precision=PRECISION)

    c = tl.where(rows[:, None] == cols[None, :], 0.0, acc / N)
    part = first_partial + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(energy_ptr + part, tl.sum(c * c) * weight)
    if panel_ptr is not None:
        at = (rows - first_row).to(tl.int64)[:, None] * panel_stride + (cols - first_col)[None, :]
        mask = (rows < last_row)[:, None] & (cols < D)[None, :]
        tl.store(panel_ptr + at, _operand(c, dtype, PRECISION), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _panel_product_kernel(
    z_ptr, mean_ptr, factor_ptr, panel_ptr, h_ptr,
    N, begun, first_in, last_in, first_out, last_out, out_origin, D, z_stride_n, z_stride_d,
    panel_stride_in, panel_stride_out, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[n, i] += sum_j ẑ_nj c_ij, first_in <= j < last_in, i likewise out; from 0 where n >= begun.

    The panel begins with the features first_in and out_origin.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = first_out + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first_in, last_in, BLOCK_K):
        ins = k + tl.arange(0, BLOCK_K)
        mean = _load_vector(mean_ptr, ins, last_in)
        factor = _load_vector(factor_ptr, ins, last_in)
        z = _load_unit(z_ptr, rows, ins, N, last_in, z_stride_n, z_stride_d, mean, factor)
        panel_at = (ins - first_in).to(tl.int64)[:, None] * panel_stride_in
        panel_at += (outs - out_origin).to(tl.int64)[None, :] * panel_stride_out
        mask = (ins < last_in)[:, None] & (outs < last_out)[None, :]
        panel = tl.load(panel_ptr + panel_at, mask=mask, other=0.0)
        acc = tl.dot(_operand(z, dtype, PRECISION), panel, acc, input_precision=PRECISION)

    out = h_ptr + rows.to(tl.int64)[:, None] * D + outs[None, :]
    mask = (rows < N)[:, None] & (outs < last_out)[None, :]
    acc += tl.load(out, mask=mask & (rows < begun)[:, None], other=0.0)
    tl.store(out, acc, mask=mask)


@triton.jit(do_not_specialize=[*_COUNTS, "D"])
def _energy_kernel(
    partials_ptr, diagonal_ptr, rest_factor_ptr, raised_ptr, far_energy_ptr, energy_ptr,
    count, far_count, N, D, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the partial energies; on the dual route (D/N)^2 <K/D, L/D> less that of the diagonal.

    With outliers that is of the rest, and those of their rows and columns are added.
    """
    # The difference of two large numbers: in float64.
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + at, mask=at < count, other=0.0).to(tl.float64)
    if diagonal_ptr is not None:
        ratio = D.to(tl.float64) / N.to(tl.float64)
        if far_energy_ptr is not None:
            raised = tl.load(raised_ptr).to(tl.float64)
            ratio /= raised * raised
        total *= ratio * ratio
        for start in range(0, D, BLOCK):
            feats = start + tl.arange(0, BLOCK)
            diagonal = _load_vector(diagonal_ptr, feats, D).to(tl.float64)
            if far_energy_ptr is not None:
                rest_factor = _load_vector(rest_factor_ptr, feats, D)
                diagonal = tl.where(rest_factor == 0, 0.0, diagonal)
            total -= diagonal * diagonal
    if far_energy_ptr is not None:
        for start in range(0, far_count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(far_energy_ptr + at, mask=at < far_count, other=0.0).to(tl.float64)
    tl.store(energy_ptr, tl.sum(total, 0).to(tl.float32))


@triton.jit
def _load_dunit(
    h_ptr, other_ptr, rows, feats, N, D, stride_n, stride_d, mean, factor, gain, ddiagonal,
):  # fmt: skip
    mask = (rows < N)[:, None] & (feats < D)[None, :]
    h = tl.load(h_ptr + rows.to(tl.int64)[:, None] * D + feats[None, :], mask=mask, other=0.0)
    other = _load_unit(other_ptr, rows, feats, N, D, stride_n, stride_d, mean, factor)
    return gain * h + ddiagonal[None, :] * other  # [rows, feats]


@triton.jit(do_not_specialize=[*_COUNTS, *_VECTORS])
def _standardize_bwd_kernel(
    h_ptr, z_ptr, other_ptr, mean_ptr, factor_ptr, other_mean_ptr, other_factor_ptr,
    denergy_ptr, ddiagonal_ptr, dz_ptr,
    N, sides, D, z_stride_n, z_stride_d, other_stride_n, other_stride_d, ddiagonal_stride,
    STANDARDIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dẑ = sides (dE 2/N h + ddiag ô / N), ô the other view, and through the statistics dz."""
    feats = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mean = _load_vector(mean_ptr, feats, D)
    factor = _load_vector(factor_ptr, feats, D)
    other_mean = _load_vector(other_mean_ptr, feats, D)
    other_factor = _load_vector(other_factor_ptr, feats, D)
    gain = tl.load(denergy_ptr) * 2 * sides / N
    ddiagonal_at = ddiagonal_ptr + feats.to(tl.int64) * ddiagonal_stride
    ddiagonal = tl.load(ddiagonal_at, mask=feats < D, other=0.0) * sides / N

    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    along = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        dunit = _load_dunit(
            h_ptr, other_ptr, rows, feats, N, D, other_stride_n, other_stride_d,
            other_mean, other_factor, gain, ddiagonal,
        )  # fmt: skip
        total += dunit
        if STANDARDIZE:
            z = _load_unit(z_ptr, rows, feats, N, D, z_stride_n, z_stride_d, mean, factor)
            along += dunit * z
    total_mean = _mean(total, N)
    along_mean = _mean(along, N)

    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        dunit = _load_dunit(
            h_ptr, other_ptr, rows, feats, N, D, other_stride_n, other_stride_d,
            other_mean, other_factor, gain, ddiagonal,
        )  # fmt: skip
        dz = dunit - total_mean[None, :]
        if STANDARDIZE:
            z = _load_unit(z_ptr, rows, feats, N, D, z_stride_n, z_stride_d, mean, factor)
            dz -= z * along_mean[None, :]
        out = rows.to(tl.int64)[:, None] * D + feats[None, :]
        mask = (rows < N)[:, None] & (feats < D)[None, :]
        dz *= factor[None, :]
        tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _strides(**matrices):
    """Strides of each matrix under the names that kernels give them."""
    return {
        f"{name}_stride_{axis}": stride
        for name, matrix in matrices.items()
        for axis, stride in zip("nd", matrix.stride(), strict=True)
    }


def _statistics(u, v, eps, standardize, precision, options):
    """Return mean and factor of u and of v, each [D], and c_ii [D]."""
    D = u.shape[1]
    symmetric = v is None
    diagonal, u_mean, u_factor = (u.new_empty(D, dtype=torch.float32) for _ in range(3))
    v_mean, v_factor = (u.new_empty(0 if symmetric else D, dtype=torch.float32) for _ in range(2))
    gpu.launch(
        _moments_kernel,
        (triton.cdiv(D, options["BLOCK_F"]),),
        u_ptr=u,
        v_ptr=v,
        u_mean_ptr=u_mean,
        u_factor_ptr=u_factor,
        v_mean_ptr=v_mean,
        v_factor_ptr=v_factor,
        diagonal_ptr=diagonal,
        eps=eps,
        N=len(u),
        D=D,
        **_strides(u=u, v=u if symmetric else v),
        STANDARDIZE=standardize,
        PRECISION=precision,
        **options,
    )
    if not standardize:
        u_local, v_local = u_factor, v_factor
        u_factor, v_factor = torch.empty_like(u_local), torch.empty_like(v_local)
        gpu.launch(
            _common_factor_kernel,
            (triton.cdiv(D, 1024),),
            u_local_ptr=u_local,
            v_local_ptr=None if symmetric else v_local,
            u_factor_ptr=u_factor,
            v_factor_ptr=v_factor,
            diagonal_ptr=diagonal,
            D=D,
            BLOCK_F=1024,
            num_warps=4,
        )
    return u_mean, u_factor, v_mean, v_factor, diagonal


def _outliers(diagonal, factor):
    """Find the features that stay out of K: pointers to them, to the rest's factor, and raised."""
    D = len(diagonal)
    outliers = torch.empty(OUTLIERS.value, dtype=torch.int32, device=diagonal.device)
    rest_factor, raised = torch.empty_like(diagonal), diagonal.new_empty(())
    pointers = {"outliers_ptr": outliers, "rest_factor_ptr": rest_factor, "raised_ptr": raised}
    gpu.launch(
        _outliers_kernel,
        (1,),
        diagonal_ptr=diagonal,
        factor_ptr=factor,
        **pointers,
        D=D,
        BLOCK=4096,
        num_warps=8,
    )
    return pointers


def _outlier_rows(z, mean, factor, outliers, arch, *, keep):
    """Return outliers' rows of c to keep, or else their partial energies."""
    (N, D), block = z.shape, 32
    blocks = triton.cdiv(D, block)
    out = mean.new_empty((OUTLIERS.value, D) if keep else blocks)
    gpu.launch(
        _outlier_rows_kernel,
        (blocks,),
        z_ptr=z,
        mean_ptr=mean,
        factor_ptr=factor,
        rest_factor_ptr=outliers["rest_factor_ptr"],
        outliers_ptr=outliers["outliers_ptr"],
        far_c_ptr=out if keep else None,
        far_energy_ptr=None if keep else out,
        N=N,
        D=D,
        **_strides(z=z),
        PRECISION=gpu.precision_of(torch.float32, arch),
        BLOCK_N=block,
        BLOCK_F=block,
        num_warps=4,
        num_stages=2,
    )
    return out


def _gram_fwd(operands, u_gram, v_gram, symmetric, precision, config):
    """Write K / D and, unless v is u, L / D; return the partial energies."""
    N, D = config[:2]
    options, splits = launch_config("gram", *config)
    block, inputs = options["BLOCK_M"], 1 if symmetric else 2
    blocks = triton.cdiv(N, block)
    pairs = blocks * (blocks + 1) // 2
    sub = min(block, 64)
    shares = u_gram.new_empty(splits, inputs, pairs, block, block)
    partials = u_gram.new_empty((block // sub) ** 2, pairs)
    gpu.launch(
        _gram_kernel,
        (pairs, splits, inputs),
        **operands,
        shares_ptr=shares,
        splits=splits,
        PRECISION=precision,
        **options,
    )
    gpu.launch(
        _gram_merge_kernel,
        (pairs, block // sub, block // sub),
        shares_ptr=shares,
        u_gram_ptr=u_gram,
        v_gram_ptr=None if symmetric else v_gram,
        energy_ptr=partials,
        splits=splits,
        N=N,
        D=D,
        BLOCK_M=block,
        BLOCK_SUB=sub,
        num_warps=4,
    )
    return partials


def _panels_fwd(operands, h_u, h_v, symmetric, save, precision, config):
    """Write, with save, h_u and, unless v is u, h_v; return the partial energies."""
    N, D = config[:2]
    options, panel_rows = launch_config("panel", *config)
    product_options, _ = launch_config("panel_product", *config)
    panel_rows = panel_rows if save else D
    panels = [(start, min(start + panel_rows, D)) for start in range(0, D, panel_rows)]
    # Where v is u, what is left of a panel's diagonal block is another panel's mirror image.
    first_cols = [start if symmetric else 0 for start, _ in panels]
    grids = [
        (triton.cdiv(stop - start, options["BLOCK_M"]), triton.cdiv(D - col, options["BLOCK_N"]))
        for (start, stop), col in zip(panels, first_cols, strict=True)
    ]
    partials = h_u.new_empty(sum(rows * cols for rows, cols in grids))
    width = triton.cdiv(D, 16) * 16  # rows are aligned, whatever D is
    panel = operands["u_ptr"].new_empty(panels[0][1], width) if save else None

    def add_product(h, name, accumulate, ins, outs, out_origin, strides):
        product_grid = (
            triton.cdiv(N, product_options["BLOCK_M"]),
            triton.cdiv(outs[1] - outs[0], product_options["BLOCK_N"]),
        )
        z = operands[f"{name}_ptr"]
        gpu.launch(
            _panel_product_kernel,
            product_grid,
            z_ptr=z,
            mean_ptr=operands[f"{name}_mean_ptr"],
            factor_ptr=operands[f"{name}_factor_ptr"],
            panel_ptr=panel,
            h_ptr=h,
            N=N,
            begun=N if accumulate else 0,
            first_in=ins[0],
            last_in=ins[1],
            first_out=outs[0],
            last_out=outs[1],
            out_origin=out_origin,
            D=D,
            **_strides(z=z),
            panel_stride_in=strides[0],
            panel_stride_out=strides[1],
            PRECISION=precision,
            **product_options,
        )

    first_partial = 0
    for (start, stop), first_col, grid in zip(panels, first_cols, grids, strict=True):
        gpu.launch(
            _panel_kernel,
            grid,
            **operands,
            panel_ptr=panel,
            energy_ptr=partials,
            first_partial=first_partial,
            first_row=start,
            first_col=first_col,
            last_row=stop,
            panel_stride=width,
            SYMMETRIC=symmetric,
            PRECISION=precision,
            **options,
        )
        first_partial += grid[0] * grid[1]
        if save:
            later = start > 0
            rows, cols = (start, stop), (first_col, D)
            add_product(h_u, "v", symmetric and later, cols, rows, start, (1, width))
            mirrored = (stop, D) if symmetric else cols
            if mirrored[0] < D:
                h = h_u if symmetric else h_v
                add_product(h, "u", later, rows, mirrored, first_col, (width, 1))
    return partials


def saved_shapes(N, D, *, dual, save, two):
    """Shapes of what ``cross_energy_fwd`` keeps of u and, if there are two inputs, of v."""
    kept = (N, N) if dual else (N, D) if save else (0,)
    return kept, kept if two else (0,)


def cross_energy_fwd(u, v, eps, standardize, dual, save):
    """Sum of the squares of the cross-correlation matrix off its diagonal, and that diagonal.

    Args:
        u: [N, D] float32, bfloat16 or float16, any strides.
        v: [N, D] likewise, or None for v = u.
        eps: float, added to a variance.
        standardize: divide each feature by its deviation; or all by one power of two.
        dual: take the route over [N, N] rather than over panels of [D, D].
        save: keep on the features route what the backward pass needs.

    Returns:
        energy [], diagonal, u_mean, u_factor, v_mean and v_factor [D]; u_saved and v_saved, which
        are K / D and L / D [N, N] on the dual route and else h_u and h_v [N, D]. All are float32,
        and empty where there is nothing to keep.
    """
    (N, D), symmetric = u.shape, v is None
    arch, multiprocessors = gpu.target(u.device)
    config = (N, D, 1 if symmetric else 2, u.dtype, arch, multiprocessors)
    precision = gpu.precision_of(u.dtype, arch)
    with torch.cuda.device_of(u):
        options, _ = launch_config("columns", *config)
        u_mean, u_factor, v_mean, v_factor, diagonal = _statistics(
            u, v, eps, standardize, precision, options
        )
        operands = {
            "u_ptr": u,
            "v_ptr": u if symmetric else v,
            "u_mean_ptr": u_mean,
            "u_factor_ptr": u_factor,
            "v_mean_ptr": u_mean if symmetric else v_mean,
            "v_factor_ptr": u_factor if symmetric else v_factor,
            "N": N,
            "D": D,
            **_strides(u=u, v=u if symmetric else v),
        }
        u_saved, v_saved = (
            torch.empty(shape, dtype=torch.float32, device=u.device)
            for shape in saved_shapes(N, D, dual=dual, save=save, two=not symmetric)
        )
        saved = (u_saved, v_saved, symmetric)
        outliers, far_energy = dict.fromkeys(["rest_factor_ptr", "raised_ptr"]), None
        if dual and symmetric and not standardize:
            outliers = _outliers(diagonal, u_factor)
            far_energy = _outlier_rows(u, u_mean, u_factor, outliers, arch, keep=False)
            operands["u_factor_ptr"] = operands["v_factor_ptr"] = outliers["rest_factor_ptr"]
        if dual:
            partials = _gram_fwd(operands, *saved, precision, config)
        else:
            partials = _panels_fwd(operands, *saved, save, precision, config)
        energy = partials.new_empty(())
        gpu.launch(
            _energy_kernel,
            (1,),
            partials_ptr=partials,
            diagonal_ptr=diagonal if dual else None,
            rest_factor_ptr=outliers["rest_factor_ptr"],
            raised_ptr=outliers["raised_ptr"],
            far_energy_ptr=far_energy,
            energy_ptr=energy,
            count=partials.numel(),
            far_count=None if far_energy is None else far_energy.numel(),
            N=N,
            D=D,
            BLOCK=1024,
            num_warps=4,
        )
    return energy, diagonal, u_mean, u_factor, v_mean, v_factor, u_saved, v_saved


def _gradient(
    z, other, stats, other_stats, saved, *,
    denergy, ddiagonal, diagonal, symmetric, standardize, dual,
):  # fmt: skip
    """Gradient of one input; saved is its h, or on the dual route the other's Gram matrix."""
    (N, D), device = z.shape, z.device
    arch, multiprocessors = gpu.target(device)
    config = (N, D, 1 if symmetric else 2, z.dtype, arch, multiprocessors)
    h = saved
    if dual:
        options, _ = launch_config("gram_bwd", *config)
        outliers = dict.fromkeys(["outliers_ptr", "rest_factor_ptr", "raised_ptr", "far_c_ptr"])
        if symmetric and not standardize:
            outliers = _outliers(diagonal, stats[1])
            outliers["far_c_ptr"] = _outlier_rows(z, *stats, outliers, arch, keep=True)
        h = torch.empty(N, D, dtype=torch.float32, device=device)
        gpu.launch(
            _gram_bwd_kernel,
            (triton.cdiv(N, options["BLOCK_M"]), triton.cdiv(D, options["BLOCK_N"])),
            gram_ptr=saved,
            u_ptr=z,
            v_ptr=other,
            u_mean_ptr=stats[0],
            u_factor_ptr=stats[1],
            v_mean_ptr=other_stats[0],
            v_factor_ptr=other_stats[1],
            diagonal_ptr=diagonal,
            h_ptr=h,
            **outliers,
            N=N,
            D=D,
            gram_stride=N,
            **_strides(u=z, v=other),
            PRECISION=gpu.precision_of(z.dtype, arch),
            **options,
        )
    dz = torch.empty(N, D, dtype=z.dtype, device=device)
    options, _ = launch_config("columns", *config)
    gpu.launch(
        _standardize_bwd_kernel,
        (triton.cdiv(D, options["BLOCK_F"]),),
        h_ptr=h,
        z_ptr=z,
        other_ptr=other,
        mean_ptr=stats[0],
        factor_ptr=stats[1],
        other_mean_ptr=other_stats[0],
        other_factor_ptr=other_stats[1],
        denergy_ptr=denergy,
        ddiagonal_ptr=ddiagonal,
        dz_ptr=dz,
        N=N,
        sides=2 if symmetric else 1,
        D=D,
        **_strides(z=z, other=other),
        ddiagonal_stride=ddiagonal.stride(0),
        STANDARDIZE=standardize,
        **options,
    )
    return dz


def cross_energy_bwd(
    denergy, ddiagonal, u, v, u_mean, u_factor, v_mean, v_factor, diagonal, u_saved, v_saved,
    standardize, dual, needs,
):  # fmt: skip
    """Gradients of ``cross_energy_fwd``.

    Args:
        denergy: [] float32.
        ddiagonal: [D] float32, any stride.
        u: [N, D] as in the forward pass, like v, standardize and dual.
        v: [N, D] or None.
        u_mean: [D] float32, from the forward pass, like all up to v_saved.
        u_factor: [D].
        v_mean: [D].
        v_factor: [D].
        diagonal: [D].
        u_saved: [N, N] or [N, D].
        v_saved: [N, N] or [N, D].
        standardize: bool.
        dual: bool.
        needs: which of du, dv to compute.

    Returns:
        du and dv [N, D] in the input's dtype; None where not needed.
    """
    u_stats, v_stats = (u_mean, u_factor), (v_mean, v_factor)
    gradient = partial(
        _gradient, denergy=denergy, ddiagonal=ddiagonal, diagonal=diagonal,
        symmetric=v is None, standardize=standardize, dual=dual,
    )  # fmt: skip
    du = dv = None
    with torch.cuda.device_of(u):
        if v is None:
            du = gradient(u, u, u_stats, u_stats, u_saved) if needs[0] else None
        else:
            if needs[0]:
                du = gradient(u, v, u_stats, v_stats, v_saved if dual else u_saved)
            if needs[1]:
                dv = gradient(v, u, v_stats, u_stats, u_saved if dual else v_saved)
    return du, dv
