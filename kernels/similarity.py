"""Similarity log-sum-exp on the GPU: the matrix of cosine similarities is never stored.

Rows x_i [M, D] and columns y_j [N, D], scale s = 1 / temperature, unit rows x^ = x / |x|:

    forward     L_i = log sum_j exp(s x^_i.y^_j)        over the j with row_ids[i] != col_ids[j]
    backward    W_ij = dL_i exp(s x^_i.y^_j - L_i)      recomputed tile by tile from the saved L
                dx^_i = s sum_j W_ij y^_j    dy^_j = s sum_i W_ij x^_i    ds = sum_ij W_ij x^_i.y^_j
                dx_i = (dx^_i - x^_i <x^_i, dx^_i>) / |x_i|

For the rows z = [z0; z1] of two views (NT-Xent, Chen et al. 2020, equation 1) the matrix is
symmetric, L_i is taken less the row's positive, and a sample's own two rows are left out. The
forward pass then computes half of the tiles: (2N)^2 D operations and (2N)^2 / 2 exponentials, each
tile giving row sums and column sums. The backward pass gives each program one row block of the
gradient and walks all columns with the weight W_ij + W_ji: 4 (2N)^2 D operations. Both read the
rows once per row block and keep O(N) numbers. README.md has the derivations. Logarithms and
exponentials are base 2 inside the kernels.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastssl.kernels.launch import LN2, LOG2E, launch, precision_of, splits_of, target

NORM_EPS = tl.constexpr(1e-12)  # a row of this length or less counts as zero
UNSHIFTED_SCALE = tl.constexpr(48.0)  # exp(+-s), its sums and their inverses are float32 numbers
FP16_WEIGHT = tl.constexpr(16384.0)  # a float16 row's largest weight; the sum of two is in range


@lru_cache(maxsize=1024)
def launch_config(kernel, rows, columns, D, dtype, ids, arch, multiprocessors):
    """Tile sizes and launch options of a kernel, and into how many parts its work is cut.

    Args:
        kernel: "two_view" (forward on the symmetric half), "fwd" or "bwd".
        rows: number of rows that own an output.
        columns: number of rows they are compared with.
        D: number of features.
        dtype: dtype of the rows.
        ids: whether ids are compared, which takes registers.
        arch: "sm_90", "gfx942", ... as ``target`` names it.
        multiprocessors: how many of them the device has.

    Returns:
        (options, parts): keyword arguments of the kernel; the blocks per group ("two_view") or the
        number of column splits ("fwd", "bwd").
    """
    # The interpreter has room for any tile, and a large one costs it no more than a small one.
    half = dtype.itemsize == 2 or arch == "interpreter"
    # Four warps issue a product of 64 rows together, with an operand in shared memory.
    hopper = arch in ("sm_90", "sm_100", "sm_103")
    # 160 KiB of shared memory or more.
    roomy = hopper or arch in ("sm_80", "sm_87", "interpreter")
    block_d = max(16, triton.next_power_of_2(D))
    whole = block_d <= ((256 if roomy else 128) if half else 32)  # else D is walked in chunks
    # Two programs share a multiprocessor: one multiplies while the other exponentiates.
    light = half and block_d <= 128
    slots = (2 if light else 1) * multiprocessors
    options = {
        "BLOCK_M": 64 if half or hopper else 32,
        "BLOCK_N": 64 if half or kernel == "two_view" else 32,
        "BLOCK_D": block_d if whole else 32,
        "num_warps": 4 if arch.startswith("gfx") or (light and arch == "sm_90") else 8,
        "num_stages": 3 if light and roomy else 2,
    }
    if kernel == "two_view":
        N = rows // 2
        if half and roomy and (block_d != 256 or arch == "sm_90") and N >= 2048:
            options["BLOCK_N"] = 128
        if ids and block_d == 128 and arch == "sm_90":
            options["num_warps"] = 8
        return options, _blocks_per_group(2 * triton.cdiv(N, options["BLOCK_N"]), slots)

    if kernel == "fwd" and half and hopper and rows >= 128 * multiprocessors:
        options |= {"BLOCK_M": 128, "num_warps": 8}
    programs = triton.cdiv(rows, options["BLOCK_M"])
    if kernel == "bwd":
        # To compare ids, or to put float16 columns at unit length, takes registers too.
        if block_d >= 64 and (ids or dtype == torch.float16):
            options["BLOCK_N"] = 32
        options["BLOCK_OUT"] = block_d if whole else min(block_d, 128)
        programs *= triton.cdiv(D, options["BLOCK_OUT"])
    return options, splits_of(programs, triton.cdiv(columns, options["BLOCK_N"]), slots)


def _blocks_per_group(blocks, slots):
    """The group size with which all pairs of groups take least time, in tiles, on so many slots.

    At most 64 groups, so that the forward kernel's workspace has at most 64 numbers a row.
    """

    def tiles(size):
        groups = triton.cdiv(blocks, size)
        waves = triton.cdiv(groups * groups, 2 * slots)
        return waves * size * (size + 1)  # one more than size to fill the pipeline

    sizes = {triton.cdiv(blocks, groups) for groups in range(1, min(blocks, 64) + 1)}
    return min(sorted(sizes), key=tiles)


# Counts and vector strides: a new value must not compile a new kernel.
_COUNTS = ["M", "N", "groups", "per_group", "splits", "first_block", "parts"]
_VECTORS = ["dlse_stride"]


@triton.jit
def _load_tile(ptr, rows, n_rows, stride_n, stride_d, feats, D: tl.constexpr):
    offsets = rows.to(tl.int64)[:, None] * stride_n + feats.to(tl.int64)[None, :] * stride_d
    mask = (rows < n_rows)[:, None] & (feats < D)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)  # [rows, feats]


@triton.jit
def _times(x, factors):
    return (x.to(tl.float32) * factors[:, None]).to(x.dtype)


@triton.jit
def _power(rnorm):
    """The power of two at or below each inverse norm, or 0: a row times it has every digit."""
    return (rnorm.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _logits(products, row_factor, col_factor):
    """Products times both sqrt(s) / norm: the same bits whichever of the two is the row."""
    return products * (row_factor[:, None] * col_factor[None, :])


@triton.jit
def _over(factor, power):
    return tl.where(power == 0, 0.0, factor / power)


@triton.jit
def _chunked_products(
    x_ptr, x_power, rows, M, x_stride_n, x_stride_d,
    y_ptr, cols, N, y_stride_n, y_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    products = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for d in range(0, D, BLOCK_D):
        feats = d + tl.arange(0, BLOCK_D)
        x = _times(_load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D), x_power)
        y = _load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
        products = tl.dot(x, tl.trans(y), products, input_precision=PRECISION)
    return products  # x_power_i x_i.y_j, [rows, cols]


@triton.jit
def _log2_sum_exp2(x, axis: tl.constexpr):
    top = tl.max(x, axis)
    top = tl.where(top == -float("inf"), 0.0, top)  # nothing visible: log2(0) = -inf, not NaN
    return tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(top, axis)), axis)) + top


@triton.jit
def _online(top, total, logits):
    """Running maximum and sum of exponentials of each row."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing visible yet
    return new_top, total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)


@triton.jit
def _view(view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d):
    first = view == 0
    return (
        tl.where(first, z0_ptr, z1_ptr),
        tl.where(first, z0_stride_n, z1_stride_n),
        tl.where(first, z0_stride_d, z1_stride_d),
    )


@triton.jit(do_not_specialize=_COUNTS)
def _rnorm_kernel(
    x_ptr, y_ptr, x_rnorm_ptr, y_rnorm_ptr, positive_ptr, scale_ptr,
    M, N, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |x_i| and 1 / |y_i|, and s x^_i.y^_i in base 2 where positive_ptr is given."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows are divided by their largest entry first: no square over- or underflows.
    x_top = tl.full([BLOCK_M], 1e-30, tl.float32)
    y_top = tl.full([BLOCK_M], 1e-30, tl.float32)
    for d in range(0, D, BLOCK_D):
        feats = d + tl.arange(0, BLOCK_D)
        x = _load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
        y = _load_tile(y_ptr, rows, N, y_stride_n, y_stride_d, feats, D).to(tl.float32)
        x_top = tl.maximum(x_top, tl.max(tl.abs(x), 1))
        y_top = tl.maximum(y_top, tl.max(tl.abs(y), 1))

    xx = tl.zeros([BLOCK_M], tl.float32)
    yy = tl.zeros([BLOCK_M], tl.float32)
    xy = tl.zeros([BLOCK_M], tl.float32)
    for d in range(0, D, BLOCK_D):
        feats = d + tl.arange(0, BLOCK_D)
        x = _load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
        y = _load_tile(y_ptr, rows, N, y_stride_n, y_stride_d, feats, D).to(tl.float32)
        x /= x_top[:, None]
        y /= y_top[:, None]
        xx += tl.sum(x * x, 1)
        yy += tl.sum(y * y, 1)
        xy += tl.sum(x * y, 1)

    x_norm = x_top * tl.sqrt(xx)
    y_norm = y_top * tl.sqrt(yy)
    x_rnorm = tl.where(x_norm <= NORM_EPS, 0.0, 1 / x_norm)  # NaN stays NaN
    y_rnorm = tl.where(y_norm <= NORM_EPS, 0.0, 1 / y_norm)
    tl.store(x_rnorm_ptr + rows, x_rnorm, mask=rows < M)
    tl.store(y_rnorm_ptr + rows, y_rnorm, mask=rows < N)
    if positive_ptr is not None:
        cosine = tl.where((x_rnorm == 0) | (y_rnorm == 0), 0.0, xy / (tl.sqrt(xx) * tl.sqrt(yy)))
        scale2 = tl.load(scale_ptr).to(tl.float32) * LOG2E
        tl.store(positive_ptr + rows, cosine * scale2, mask=rows < M)


@triton.jit
def _group_pair_sums(
    a, b, root, z0_ptr, z1_ptr, rnorm_ptr, ids_ptr, parts_ptr,
    N, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each tile of groups a x b once: row sums go to part b of the rows, column sums to part a."""
    blocks = tl.cdiv(N, BLOCK_N)  # in one view
    tiles: tl.constexpr = BLOCK_N // BLOCK_M  # in one block of rows
    feats = tl.arange(0, BLOCK_D)
    for j in range(b * per_group, tl.minimum((b + 1) * per_group, 2 * blocks)):
        j_view = (j >= blocks).to(tl.int32)
        zj_ptr, zj_stride_n, zj_stride_d = _view(
            j_view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d
        )
        col_start = (j - j_view * blocks) * BLOCK_N
        cols = col_start + tl.arange(0, BLOCK_N)
        col_at = cols + j_view * N
        n_begun = tl.where(j == b * per_group, 0, N)  # the first j finds nothing in the workspace
        col_rnorm = tl.load(rnorm_ptr + col_at, mask=cols < N, other=0.0)
        col_power = _power(col_rnorm)
        col_factor = _over(col_rnorm * root, col_power)
        if D <= BLOCK_D:
            zj = _times(_load_tile(zj_ptr, cols, N, zj_stride_n, zj_stride_d, feats, D), col_power)
            zj = tl.trans(zj)  # here, so that it stays in shared memory for the whole inner loop
        # Rows that are 8 apart are added first: in a tensor-core layout one thread holds both.
        col_sums = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)

        first = tl.where(a == b, j, a * per_group)
        for tile in range(first * tiles, tl.minimum((a + 1) * per_group, 2 * blocks) * tiles):
            i = tile // tiles
            i_view = (i >= blocks).to(tl.int32)
            zi_ptr, zi_stride_n, zi_stride_d = _view(
                i_view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d
            )
            row_start = (tile - i_view * blocks * tiles) * BLOCK_M
            rows = row_start + tl.arange(0, BLOCK_M)
            row_at = rows + i_view * N
            row_rnorm = tl.load(rnorm_ptr + row_at, mask=rows < N, other=0.0)
            row_parts = parts_ptr + b.to(tl.int64) * 2 * N + row_at
            row_sums = tl.load(row_parts, mask=rows < n_begun, other=0.0)
            if D <= BLOCK_D:
                zi = _load_tile(zi_ptr, rows, N, zi_stride_n, zi_stride_d, feats, D)
                products = tl.dot(zi, zj, input_precision=PRECISION)
                logits = _logits(products, row_rnorm * root, col_factor)  # [i, j], base 2
            else:
                row_power = _power(row_rnorm)
                products = _chunked_products(
                    zi_ptr, row_power, rows, N, zi_stride_n, zi_stride_d,
                    zj_ptr, cols, N, zj_stride_n, zj_stride_d, D, BLOCK_D, PRECISION,
                )  # fmt: skip
                logits = _logits(products, _over(row_rnorm * root, row_power), col_rnorm * root)

            e = tl.exp2(logits)
            if ids_ptr is not None:
                row_ids = tl.load(ids_ptr + rows, mask=rows < N, other=0)
                col_ids = tl.load(ids_ptr + cols, mask=cols < N, other=0)
                e = tl.where(row_ids[:, None] != col_ids[None, :], e, 0.0)
            same_samples = (i == j) | (i == j + blocks) | (j == i + blocks)
            if same_samples | (row_start + BLOCK_M > N) | (col_start + BLOCK_N > N):
                visible = (rows[:, None] != cols[None, :]) & (rows < N)[:, None] & (cols < N)
                e = tl.where(visible, e, 0.0)
            col_sums += tl.sum(tl.reshape(e, [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)
            row_sums += tl.sum(e, 1)
            # A diagonal block is computed whole, so its column sums are enough.
            tl.store(row_parts, row_sums, mask=rows < tl.where(i == j, 0, N))

        col_parts = parts_ptr + a.to(tl.int64) * 2 * N + col_at
        earlier = tl.load(col_parts, mask=cols < tl.where(a == b, n_begun, 0), other=0.0)
        col_sums = tl.sum(tl.reshape(col_sums, [BLOCK_M // 2, BLOCK_N]), 0)
        tl.store(col_parts, earlier + col_sums, mask=cols < N)
        tl.debug_barrier()  # the next j reads what other threads of this program wrote


@triton.jit
def _group_pair_lse(
    a, b, root, z0_ptr, z1_ptr, rnorm_ptr, ids_ptr, parts_ptr, tops_ptr,
    N, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part b of group a's rows: largest score and sum of exponentials over group b."""
    blocks = tl.cdiv(N, BLOCK_N)
    tiles: tl.constexpr = BLOCK_N // BLOCK_M
    feats = tl.arange(0, BLOCK_D)
    for tile in range(a * per_group * tiles, tl.minimum((a + 1) * per_group, 2 * blocks) * tiles):
        i_view = (tile >= blocks * tiles).to(tl.int32)
        zi_ptr, zi_stride_n, zi_stride_d = _view(
            i_view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d
        )
        rows = (tile - i_view * blocks * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_at = rows + i_view * N
        row_rnorm = tl.load(rnorm_ptr + row_at, mask=rows < N, other=0.0)
        row_power = _power(row_rnorm)
        row_factor = _over(row_rnorm * root, row_power)
        if ids_ptr is not None:
            row_ids = tl.load(ids_ptr + rows, mask=rows < N, other=0)
        if D <= BLOCK_D:
            zi = _times(_load_tile(zi_ptr, rows, N, zi_stride_n, zi_stride_d, feats, D), row_power)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for j in range(b * per_group, tl.minimum((b + 1) * per_group, 2 * blocks)):
            j_view = (j >= blocks).to(tl.int32)
            zj_ptr, zj_stride_n, zj_stride_d = _view(
                j_view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d
            )
            cols = (j - j_view * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
            col_at = cols + j_view * N
            col_rnorm = tl.load(rnorm_ptr + col_at, mask=cols < N, other=0.0)
            if D <= BLOCK_D:
                zj = _load_tile(zj_ptr, cols, N, zj_stride_n, zj_stride_d, feats, D)
                products = tl.dot(zi, tl.trans(zj), input_precision=PRECISION)
            else:
                products = _chunked_products(
                    zi_ptr, row_power, rows, N, zi_stride_n, zi_stride_d,
                    zj_ptr, cols, N, zj_stride_n, zj_stride_d, D, BLOCK_D, PRECISION,
                )  # fmt: skip
            logits = _logits(products, row_factor, col_rnorm * root)
            if ids_ptr is not None:
                col_ids = tl.load(ids_ptr + cols, mask=cols < N, other=0)
                logits = tl.where(row_ids[:, None] != col_ids[None, :], logits, -float("inf"))
            visible = (rows[:, None] != cols[None, :]) & (cols < N)
            top, total = _online(top, total, tl.where(visible, logits, -float("inf")))
        part_at = b.to(tl.int64) * 2 * N + row_at
        tl.store(parts_ptr + part_at, total, mask=rows < N)
        tl.store(tops_ptr + part_at, top, mask=rows < N)


@triton.jit(do_not_specialize=_COUNTS)
def _two_view_lse_fwd_kernel(
    z0_ptr, z1_ptr, rnorm_ptr, ids_ptr, scale_ptr, parts_ptr,
    N, groups, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write what each group of columns adds to each row: parts [groups, 2N], sums of exponentials.

    For a large scale they are relative to the tops [groups, 2N] that follow them in memory.
    """
    pair = tl.num_programs(0) - 1 - tl.program_id(0)  # half-size pairs (a, a) start last
    a = pair % groups
    b = (a + pair // groups) % groups  # each unordered pair {a, b} once
    scale = tl.load(scale_ptr).to(tl.float32)
    root = tl.sqrt(scale * LOG2E)
    if scale <= UNSHIFTED_SCALE:
        _group_pair_sums(
            a, b, root, z0_ptr, z1_ptr, rnorm_ptr, ids_ptr, parts_ptr,
            N, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
            D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:  # both sides, each with its running maximum: all tiles, but any scale
        for swapped in range(tl.where(a == b, 1, 2)):
            _group_pair_lse(
                tl.where(swapped == 0, a, b), tl.where(swapped == 0, b, a), root,
                z0_ptr, z1_ptr, rnorm_ptr, ids_ptr,
                parts_ptr, parts_ptr + groups.to(tl.int64) * 2 * N,
                N, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
                D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def _similarity_lse_fwd_kernel(
    x_ptr, y_ptr, x_rnorm_ptr, y_rnorm_ptr, x_ids_ptr, y_ids_ptr, scale_ptr, parts_ptr,
    M, N, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write parts and tops [splits, M]: each row's sum and maximum over a share of the columns."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feats = tl.arange(0, BLOCK_D)
    root = tl.sqrt(tl.load(scale_ptr).to(tl.float32) * LOG2E)
    x_rnorm = tl.load(x_rnorm_ptr + rows, mask=rows < M, other=0.0)
    x_power = _power(x_rnorm)
    x_factor = _over(x_rnorm * root, x_power)
    if x_ids_ptr is not None:
        x_ids = tl.load(x_ids_ptr + rows, mask=rows < M, other=0)
    if D <= BLOCK_D:
        x = _times(_load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D), x_power)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    start = tl.program_id(1) * share
    for first in range(start, tl.minimum(start + share, N), BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        y_rnorm = tl.load(y_rnorm_ptr + cols, mask=cols < N, other=0.0)
        if D <= BLOCK_D:
            y = _load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
            products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            products = _chunked_products(
                x_ptr, x_power, rows, M, x_stride_n, x_stride_d,
                y_ptr, cols, N, y_stride_n, y_stride_d, D, BLOCK_D, PRECISION,
            )  # fmt: skip
        logits = _logits(products, x_factor, y_rnorm * root)  # [i, j], base 2
        if x_ids_ptr is not None:
            y_ids = tl.load(y_ids_ptr + cols, mask=cols < N, other=0)
            logits = tl.where(x_ids[:, None] != y_ids[None, :], logits, -float("inf"))
        if first + BLOCK_N > N:
            logits = tl.where((cols < N)[None, :], logits, -float("inf"))

        top, total = _online(top, total, logits)

    part_at = tl.program_id(1).to(tl.int64) * M + rows
    tl.store(parts_ptr + part_at, total, mask=rows < M)
    tl.store(parts_ptr + splits.to(tl.int64) * M + part_at, top, mask=rows < M)


@triton.jit(do_not_specialize=_COUNTS)
def _lse_finish_kernel(
    parts_ptr, positive_ptr, scale_ptr, lse_ptr, top_ptr, total_ptr, M, parts,
    BLOCK_M: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Merge a forward kernel's parts and tops [parts, M]; lse of two views is less the positive."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.arange(0, BLOCK_PARTS)
    mask = (part < parts)[:, None] & (rows < M)[None, :]
    at = part.to(tl.int64)[:, None] * M + rows[None, :]
    totals = tl.load(parts_ptr + at, mask=mask, other=0.0)
    top = tl.zeros([BLOCK_M], tl.float32)
    origin = tl.zeros([BLOCK_M], tl.float32)
    shifted = True
    if positive_ptr is not None:
        samples = tl.where(rows < M // 2, rows, rows - M // 2)
        origin = tl.load(positive_ptr + samples, mask=rows < M, other=0.0)
        shifted = tl.load(scale_ptr).to(tl.float32) > UNSHIFTED_SCALE
    if shifted:
        tops = tl.load(parts_ptr + parts.to(tl.int64) * M + at, mask=mask, other=-float("inf"))
        top = tl.max(tops, 0)
        shift = tl.where(top == -float("inf"), 0.0, top)
        totals *= tl.exp2(tops - shift[None, :])
    total = tl.sum(totals, 0)
    # Taken first, the difference of large numbers is exact; the logarithm is small beside them.
    tl.store(lse_ptr + rows, ((top - origin) + tl.log2(total)) * LN2, mask=rows < M)
    # To the backward pass, infinity gives a row that sees nothing the weight exp2(x - top) = 0.
    top = tl.where(top == -float("inf"), float("inf"), top)
    tl.store(top_ptr + rows, top, mask=rows < M)
    tl.store(total_ptr + rows, total, mask=rows < M)


@triton.jit
def _store_gradient(
    dunit, along, rows, at, feats, scale, x_ptr, x_rnorm, dx_ptr, dscale_ptr,
    M, x_stride_n, x_stride_d, D: tl.constexpr, TWO_VIEW: tl.constexpr,
):  # fmt: skip
    """dx_i = s (dunit_i - x^_i <x^_i, dunit_i>) / |x_i|, where dunit_i = sum_j W_ij y^_j."""
    x = _load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
    x *= x_rnorm[:, None]
    if feats.shape[0] >= D:
        along = tl.sum(x * dunit, 1)
    dx = (dunit - x * along[:, None]) * (scale * x_rnorm)[:, None]
    out = rows.to(tl.int64)[:, None] * D + feats[None, :]
    mask = (rows < M)[:, None] & (feats < D)[None, :]
    tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dscale_ptr is not None:
        if TWO_VIEW:
            along *= 0.5  # the rows of both views see each pair
        tl.store(dscale_ptr + at, along, mask=rows < M)


@triton.jit
def _weight(total, dlse, gain):
    return tl.where(total == 0, 0.0, dlse / gain / total)  # of a row that sees nothing: 0


@triton.jit
def _gain(peak_ptr):
    """What weights are divided by, so that those of float16 rows stay in float16's range."""
    if peak_ptr is None:
        return 1.0
    else:
        return tl.maximum(tl.load(peak_ptr), 1e-30) / FP16_WEIGHT


@triton.jit(do_not_specialize=[*_COUNTS, *_VECTORS])
def _similarity_lse_weight_kernel(
    total_ptr, dlse_ptr, rnorm_ptr, peak_ptr, weight_ptr, M, dlse_stride, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Weight of each row for the programs that meet it as a column, times rnorm unless float16."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.load(total_ptr + rows, mask=rows < M, other=0.0)
    dlse = tl.load(dlse_ptr + rows.to(tl.int64) * dlse_stride, mask=rows < M, other=0.0)
    weight = _weight(total, dlse, _gain(peak_ptr))
    if peak_ptr is None:
        weight *= tl.load(rnorm_ptr + rows, mask=rows < M, other=0.0)
    tl.store(weight_ptr + rows, weight, mask=rows < M)


@triton.jit(do_not_specialize=[*_COUNTS, *_VECTORS])
def _similarity_lse_bwd_kernel(
    x_ptr, y_ptr, x_rnorm_ptr, y_rnorm_ptr, x_ids_ptr, y_ids_ptr,
    top_ptr, total_ptr, dlse_ptr, weight_ptr, peak_ptr, scale_ptr,
    dx_ptr, dy_ptr, dscale_ptr, dunit_ptr, along_ptr,
    M, N, first_block, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d, dlse_stride,
    D: tl.constexpr, PRECISION: tl.constexpr,
    ROW_WEIGHT: tl.constexpr, COL_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One row block of sum_j W_ij y^_j over one share of the columns; if it is the only one, dx.

    W_ij is made of the lse of row i (ROW_WEIGHT), of column j (COL_WEIGHT) or of both; with both, x
    and y are the two views, and rows and columns run over the two of them.
    """
    TWO_VIEW: tl.constexpr = ROW_WEIGHT and COL_WEIGHT
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    scale = tl.load(scale_ptr).to(tl.float32)
    root = tl.sqrt(scale * LOG2E)
    unshifted = scale <= UNSHIFTED_SCALE

    row_blocks = tl.cdiv(M, BLOCK_M)
    x_view = (first_block + tl.program_id(0) >= row_blocks).to(tl.int32)
    if TWO_VIEW:
        rows_ptr, row_stride_n, row_stride_d = _view(
            x_view, x_ptr, y_ptr, x_stride_n, x_stride_d, y_stride_n, y_stride_d
        )
        out_ptr = tl.where(x_view == 0, dx_ptr, dy_ptr)
    else:
        rows_ptr, row_stride_n, row_stride_d, out_ptr = x_ptr, x_stride_n, x_stride_d, dx_ptr
    row_start = (first_block + tl.program_id(0) - x_view * row_blocks) * BLOCK_M
    rows = row_start + tl.arange(0, BLOCK_M)
    row_at = rows + x_view * M
    x_rnorm = tl.load(x_rnorm_ptr + row_at, mask=rows < M, other=0.0)
    x_power = _power(x_rnorm)
    x_factor = _over(x_rnorm * root, x_power)
    if D <= BLOCK_D:
        feats = tl.arange(0, BLOCK_D)
        x = _times(_load_tile(rows_ptr, rows, M, row_stride_n, row_stride_d, feats, D), x_power)
    if x_ids_ptr is not None:
        x_ids = tl.load(x_ids_ptr + rows, mask=rows < M, other=0)

    gain = _gain(peak_ptr)
    if ROW_WEIGHT:
        x_top = tl.load(top_ptr + row_at, mask=rows < M, other=0.0)
        x_total = tl.load(total_ptr + row_at, mask=rows < M, other=0.0)
        x_dlse = tl.load(dlse_ptr + row_at.to(tl.int64) * dlse_stride, mask=rows < M, other=0.0)
        if TWO_VIEW:
            x_weight = _weight(x_total, x_dlse, gain)
            partner_at = (rows + (1 - x_view) * M).to(tl.int64)
            partner_dlse = tl.load(dlse_ptr + partner_at * dlse_stride, mask=rows < M, other=0.0)
            dpositive = -(x_dlse + partner_dlse) / gain
        elif FP16:
            x_top -= 14  # exp2(14) = FP16_WEIGHT

    acc = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    out_feats = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    col_blocks = tl.cdiv(N, BLOCK_N)
    total_blocks = 2 * col_blocks if TWO_VIEW else col_blocks
    share = tl.cdiv(total_blocks, splits)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, total_blocks)
    # Both weights in one walk, or in two where each needs an exponential of its own.
    walks = tl.where(unshifted, 1, 2) if TWO_VIEW else 1
    for step in range(start, start + (stop - start) * walks):
        first_walk = step < stop
        block = tl.where(first_walk, step, step - (stop - start))
        y_view = (block >= col_blocks).to(tl.int32)
        if TWO_VIEW:
            cols_ptr, col_stride_n, col_stride_d = _view(
                y_view, x_ptr, y_ptr, x_stride_n, x_stride_d, y_stride_n, y_stride_d
            )
        else:
            cols_ptr, col_stride_n, col_stride_d = y_ptr, y_stride_n, y_stride_d
        col_start = (block - y_view * col_blocks) * BLOCK_N
        cols = col_start + tl.arange(0, BLOCK_N)
        col_at = cols + y_view * N
        y_rnorm = tl.load(y_rnorm_ptr + col_at, mask=cols < N, other=0.0)

        if D <= BLOCK_D:
            y = _load_tile(cols_ptr, cols, N, col_stride_n, col_stride_d, feats, D)
            products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            products = _chunked_products(
                rows_ptr, x_power, rows, M, row_stride_n, row_stride_d,
                cols_ptr, cols, N, col_stride_n, col_stride_d, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            y = _load_tile(cols_ptr, cols, N, col_stride_n, col_stride_d, out_feats, D)
        logits = _logits(products, x_factor, y_rnorm * root)  # [i, j], base 2
        if FP16:  # weight / |y| may not be a float16 number: y becomes a unit tile
            y = _times(y, y_rnorm)
            products *= y_rnorm[None, :]
            y_rnorm = tl.full([BLOCK_N], 1.0, tl.float32)

        if COL_WEIGHT:
            y_weight = tl.load(weight_ptr + col_at, mask=cols < N, other=0.0)
        if TWO_VIEW:
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

        if x_ids_ptr is not None:
            y_ids = tl.load(y_ids_ptr + cols, mask=cols < N, other=0)
            weights = tl.where(x_ids[:, None] != y_ids[None, :], weights, 0.0)
        edge = col_start + BLOCK_N > N
        if TWO_VIEW:
            edge |= (col_start < row_start + BLOCK_M) & (row_start < col_start + BLOCK_N)
        if edge:
            weights = tl.where((cols < N)[None, :], weights, 0.0)
            if TWO_VIEW:
                same = rows[:, None] == cols[None, :]
                added = first_walk & (x_view != y_view)
                positive = tl.where(added, dpositive[:, None] * y_rnorm[None, :], 0.0)
                weights = tl.where(same, positive, weights)

        weights = weights.to(y.dtype)
        acc = tl.dot(weights, y, acc, input_precision=PRECISION)
        if D > BLOCK_D:
            along += tl.sum(weights.to(tl.float32) * products, 1)

    if ROW_WEIGHT and not TWO_VIEW:
        gain = _weight(x_total, x_dlse, FP16_WEIGHT if FP16 else 1.0)
    gain += tl.zeros([BLOCK_M], tl.float32)
    acc *= gain[:, None]
    along *= gain * _over(x_rnorm, x_power)
    if dunit_ptr is None:
        _store_gradient(
            acc, along, rows, row_at, out_feats, scale, rows_ptr, x_rnorm, out_ptr, dscale_ptr,
            M, row_stride_n, row_stride_d, D, TWO_VIEW,
        )  # fmt: skip
    else:
        part_at = tl.program_id(1).to(tl.int64) * (2 * M if TWO_VIEW else M) + row_at
        mask = (rows < M)[:, None] & (out_feats < D)[None, :]
        tl.store(dunit_ptr + part_at[:, None] * D + out_feats[None, :], acc, mask=mask)
        tl.store(along_ptr + part_at, along, mask=rows < M)


@triton.jit(do_not_specialize=_COUNTS)
def _similarity_lse_bwd_finish_kernel(
    x_ptr, y_ptr, rnorm_ptr, scale_ptr, dx_ptr, dy_ptr, dscale_ptr, dunit_ptr, along_ptr,
    M, first_block, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    D: tl.constexpr, TWO_VIEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Add up the shares of dx that the splits of the backward kernel leave."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    x_view = (first_block + tl.program_id(0) >= row_blocks).to(tl.int32)
    if TWO_VIEW:
        x_ptr, x_stride_n, x_stride_d = _view(
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
        part_at = (2 * M if TWO_VIEW else M).to(tl.int64) * split + at
        dunit += tl.load(dunit_ptr + part_at[:, None] * D + feats[None, :], mask=mask, other=0.0)
        along += tl.load(along_ptr + part_at, mask=rows < M, other=0.0)
    x_rnorm = tl.load(rnorm_ptr + at, mask=rows < M, other=0.0)
    scale = tl.load(scale_ptr).to(tl.float32)
    _store_gradient(
        dunit, along, rows, at, feats, scale, x_ptr, x_rnorm, dx_ptr, dscale_ptr,
        M, x_stride_n, x_stride_d, D, TWO_VIEW,
    )  # fmt: skip


def _rnorms(x, y, x_rnorm, y_rnorm, positive, scale):
    D = x.shape[1]
    block_d = min(256, max(16, triton.next_power_of_2(D)))
    block_m = 4096 // block_d
    launch(
        _rnorm_kernel,
        (triton.cdiv(max(len(x), len(y)), block_m),),
        x_ptr=x,
        y_ptr=y,
        x_rnorm_ptr=x_rnorm,
        y_rnorm_ptr=y_rnorm,
        positive_ptr=positive,
        scale_ptr=scale,
        M=len(x),
        N=len(y),
        x_stride_n=x.stride(0),
        x_stride_d=x.stride(1),
        y_stride_n=y.stride(0),
        y_stride_d=y.stride(1),
        D=D,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )


def _finish_lse(parts, scale, positive):
    """Return lse, top and total [M] of the sums and maxima in parts [2, parts, M]."""
    _, count, M = parts.shape
    lse, top, total = (parts.new_empty(M) for _ in range(3))
    launch(
        _lse_finish_kernel,
        (triton.cdiv(M, 64),),
        parts_ptr=parts,
        positive_ptr=positive,
        scale_ptr=scale,
        lse_ptr=lse,
        top_ptr=top,
        total_ptr=total,
        M=M,
        parts=count,
        BLOCK_M=64,
        BLOCK_PARTS=triton.next_power_of_2(count),
        num_warps=4,
    )
    return lse, top, total


def two_view_lse_fwd(z0, z1, scale, ids):
    """Log-sum-exp of each of the 2N rows [z0; z1] over other samples' rows, less its positive.

    Args:
        z0: [N, D] float32, bfloat16 or float16, any strides.
        z1: [N, D] likewise.
        scale: [] float, 1 / temperature, on the device.
        ids: [N] integers or None: which samples are the same.

    Returns:
        lse, the maximum and sum it is made of, and rnorm = 1 / |z|, each [2N] float32; and an empty
        tensor, where the torch backend may keep a tile.
    """
    (N, D), device = z0.shape, z0.device
    ids = None if ids is None else ids.contiguous()
    arch, multiprocessors = target(device)
    options, per_group = launch_config(
        "two_view", 2 * N, 2 * N, D, z0.dtype, ids is not None, arch, multiprocessors
    )
    groups = triton.cdiv(2 * triton.cdiv(N, options["BLOCK_N"]), per_group)
    rnorm = torch.empty(2 * N, dtype=torch.float32, device=device)
    positive = torch.empty(N, dtype=torch.float32, device=device)
    parts = torch.empty(2, groups, 2 * N, dtype=torch.float32, device=device)
    with torch.cuda.device_of(z0):
        _rnorms(z0, z1, rnorm, rnorm[N:], positive, scale)
        launch(
            _two_view_lse_fwd_kernel,
            (groups * (groups + 1) // 2,),
            z0_ptr=z0,
            z1_ptr=z1,
            rnorm_ptr=rnorm,
            ids_ptr=ids,
            scale_ptr=scale,
            parts_ptr=parts,
            N=N,
            groups=groups,
            per_group=per_group,
            z0_stride_n=z0.stride(0),
            z0_stride_d=z0.stride(1),
            z1_stride_n=z1.stride(0),
            z1_stride_d=z1.stride(1),
            D=D,
            PRECISION=precision_of(z0.dtype, arch),
            **options,
        )
        return *_finish_lse(parts, scale, positive), rnorm, rnorm.new_empty(0, 0)


def similarity_lse_fwd(q, k, scale, row_ids, col_ids):
    """Log-sum-exp of each row of q over the rows of k, or over those with another id.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise.
        scale: [] float, 1 / temperature, on the device.
        row_ids: [M] int64 or None.
        col_ids: [N] int64 or None.

    Returns:
        lse, the maximum and sum it is made of, q_rnorm = 1 / |q|, each [M] float32; k_rnorm [N].
    """
    (M, D), N, device = q.shape, len(k), q.device
    row_ids, col_ids = (None if ids is None else ids.contiguous() for ids in (row_ids, col_ids))
    arch, multiprocessors = target(device)
    options, splits = launch_config(
        "fwd", M, N, D, q.dtype, row_ids is not None, arch, multiprocessors
    )
    q_rnorm = torch.empty(M, dtype=torch.float32, device=device)
    k_rnorm = torch.empty(N, dtype=torch.float32, device=device)
    parts = torch.empty(2, splits, M, dtype=torch.float32, device=device)
    with torch.cuda.device_of(q):
        _rnorms(q, k, q_rnorm, k_rnorm, None, scale)
        launch(
            _similarity_lse_fwd_kernel,
            (triton.cdiv(M, options["BLOCK_M"]), splits),
            x_ptr=q,
            y_ptr=k,
            x_rnorm_ptr=q_rnorm,
            y_rnorm_ptr=k_rnorm,
            x_ids_ptr=row_ids,
            y_ids_ptr=col_ids,
            scale_ptr=scale,
            parts_ptr=parts,
            M=M,
            N=N,
            splits=splits,
            x_stride_n=q.stride(0),
            x_stride_d=q.stride(1),
            y_stride_n=k.stride(0),
            y_stride_d=k.stride(1),
            D=D,
            PRECISION=precision_of(q.dtype, arch),
            **options,
        )
        return *_finish_lse(parts, scale, None), q_rnorm, k_rnorm


def _gradient(
    x, y, rnorms, ids, top, total, dlse, scale, *, row_weight, col_weight, views, dscale
):  # fmt: skip
    """Gradients of the views (0: x, 1: y) and, with dscale, the scale's."""
    (M, D), N, device = x.shape, len(y), x.device
    ids = [None if each is None else each.contiguous() for each in ids]
    two_view = row_weight and col_weight
    arch, multiprocessors = target(device)
    rows, columns = len(views) * M, 2 * N if two_view else N
    options, splits = launch_config(
        "bwd", rows, columns, D, x.dtype, ids[0] is not None, arch, multiprocessors
    )

    stacked = 2 * M if two_view else M
    gradients = {view: torch.empty(M, D, dtype=x.dtype, device=device) for view in views}
    dscale_rows = torch.empty(stacked, dtype=torch.float32, device=device) if dscale else None
    dunit = along = peak = weight = None
    if splits > 1:
        dunit = torch.empty(splits, stacked, D, dtype=torch.float32, device=device)
        along = torch.empty(splits, stacked, dtype=torch.float32, device=device)
    if x.dtype == torch.float16 and col_weight:
        peak = torch.linalg.vector_norm(dlse, ord=float("inf"))
    if col_weight:
        weight = torch.empty_like(total)
        launch(
            _similarity_lse_weight_kernel,
            (triton.cdiv(len(total), 256),),
            total_ptr=total,
            dlse_ptr=dlse,
            rnorm_ptr=rnorms[1],
            peak_ptr=peak,
            weight_ptr=weight,
            M=len(total),
            dlse_stride=dlse.stride(0),
            BLOCK_M=256,
            num_warps=4,
        )

    shared = {
        "x_ptr": x,
        "y_ptr": y,
        "scale_ptr": scale,
        "dx_ptr": gradients[views[0]],
        "dy_ptr": gradients[views[-1]],
        "dscale_ptr": dscale_rows,
        "dunit_ptr": dunit,
        "along_ptr": along,
        "M": M,
        "splits": splits,
        "x_stride_n": x.stride(0),
        "x_stride_d": x.stride(1),
        "y_stride_n": y.stride(0),
        "y_stride_d": y.stride(1),
        "D": D,
        "BLOCK_OUT": options["BLOCK_OUT"],
    }
    out_chunks = triton.cdiv(D, options["BLOCK_OUT"])
    row_blocks = triton.cdiv(M, options["BLOCK_M"])
    launch(
        _similarity_lse_bwd_kernel,
        (len(views) * row_blocks, splits, out_chunks),
        **shared | options,
        x_rnorm_ptr=rnorms[0],
        y_rnorm_ptr=rnorms[1],
        x_ids_ptr=ids[0],
        y_ids_ptr=ids[1],
        top_ptr=top,
        total_ptr=total,
        dlse_ptr=dlse,
        weight_ptr=weight,
        peak_ptr=peak,
        N=N,
        first_block=views[0] * row_blocks,
        dlse_stride=dlse.stride(0),
        PRECISION=precision_of(x.dtype, arch),
        ROW_WEIGHT=row_weight,
        COL_WEIGHT=col_weight,
    )
    if splits > 1:
        block_m = max(1, 4096 // options["BLOCK_OUT"])
        row_blocks = triton.cdiv(M, block_m)
        launch(
            _similarity_lse_bwd_finish_kernel,
            (len(views) * row_blocks, out_chunks),
            **shared,
            rnorm_ptr=rnorms[0],
            first_block=views[0] * row_blocks,
            TWO_VIEW=two_view,
            BLOCK_M=block_m,
            num_warps=4,
        )
    return gradients, dscale_rows.sum() if dscale else None


def two_view_lse_bwd(dlse, z0, z1, scale, ids, top, total, rnorm, tile, needs):
    """Gradients of ``two_view_lse_fwd``.

    Args:
        dlse: [2N] float32, any stride.
        z0: [N, D] as in the forward pass, like z1, scale and ids.
        z1: [N, D].
        scale: [].
        ids: [N] or None.
        top: [2N] float32, from the forward pass, like total and rnorm.
        total: [2N] float32.
        rnorm: [2N] float32.
        tile: empty; nothing is kept here.
        needs: which of dz0, dz1, dscale to compute.

    Returns:
        dz0 [N, D] and dz1 [N, D] in the input's dtype, dscale [] float32; None where not needed.
    """
    views = [view for view in (0, 1) if needs[view] or needs[2]]
    with torch.cuda.device_of(z0):
        gradients, dscale = _gradient(
            z0, z1, (rnorm, rnorm), (ids, ids), top, total, dlse, scale,
            row_weight=True, col_weight=True, views=views, dscale=needs[2],
        )  # fmt: skip
    return gradients[0] if needs[0] else None, gradients[1] if needs[1] else None, dscale


def similarity_lse_bwd(dlse, q, k, scale, row_ids, col_ids, top, total, q_rnorm, k_rnorm, needs):
    """Gradients of ``similarity_lse_fwd``.

    Args:
        dlse: [M] float32, any stride.
        q: [M, D] as in the forward pass, like k, scale and the ids.
        k: [N, D].
        scale: [].
        row_ids: [M] or None.
        col_ids: [N] or None.
        top: [M] float32, from the forward pass, like total and the inverse norms.
        total: [M] float32.
        q_rnorm: [M] float32.
        k_rnorm: [N] float32.
        needs: which of dq, dk, dscale to compute.

    Returns:
        dq [M, D] and dk [N, D] in the input's dtype, dscale [] float32; None where not needed.
    """
    dq = dk = dscale = None
    with torch.cuda.device_of(q):
        if needs[0] or needs[2]:
            gradients, dscale = _gradient(
                q, k, (q_rnorm, k_rnorm), (row_ids, col_ids), top, total, dlse, scale,
                row_weight=True, col_weight=False, views=[0], dscale=needs[2],
            )  # fmt: skip
            dq = gradients[0] if needs[0] else None
        if needs[1]:
            gradients, _ = _gradient(
                k, q, (k_rnorm, q_rnorm), (col_ids, row_ids), top, total, dlse, scale,
                row_weight=False, col_weight=True, views=[0], dscale=False,
            )  # fmt: skip
            dk = gradients[0]
    return dq, dk, dscale
