"""Similarity log-sum-exp on the GPU: the matrix of similarities is never stored.

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
rows once per row block and keep O(N) numbers. Rows of classes (SupCon), compared as they are, are
walked by the programs that own them in both passes: 6 N^2 D operations. Where columns get no
gradient (a queue), that of the rows is made in the forward pass: 4 M N D operations.

For pairs (row i and column first + i: CLIP, InfoNCE) the backward pass keeps a panel of W, some
rows of it at a time, and multiplies it from both sides: 8 M N D operations with the forward pass.
README.md has the derivations. Logarithms and exponentials are base 2 inside the kernels.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastssl.kernels.launch import LN2, LOG2E, launch, precision_of, splits_of, target

NORM_EPS = tl.constexpr(1e-12)  # a row of this length or less counts as zero
UNSHIFTED_SCALE = tl.constexpr(48.0)  # exp(+-s), its sums and their inverses are float32 numbers
PANEL_BYTES = 2**25  # of the pairs' weights kept at a time, or those of PANEL_ROWS, if more
PANEL_ROWS = 2048
FP16_WEIGHT = tl.constexpr(16384.0)  # a float16 row's largest weight; the sum of two is in range


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
        arch: "sm_90", "gfx942", ... as ``target`` names it.
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
            return options, _blocks_per_group(blocks, multiprocessors)
        tiles = blocks * triton.cdiv(D, options["BLOCK_N"])
        steps = triton.cdiv(columns, options["BLOCK_D"])
        return options, splits_of(tiles, steps, multiprocessors)
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
        return options, _blocks_per_group(2 * triton.cdiv(N, options["BLOCK_N"]), 2 * slots)

    if kernel == "fwd" and half and hopper and rows >= 128 * multiprocessors:
        options |= {"BLOCK_M": 128, "num_warps": 8}
    programs = triton.cdiv(rows, options["BLOCK_M"])
    # To compare ids, or to put float16 columns at unit length, takes registers too.
    crowded = ids or (dtype == torch.float16 and kernel == "bwd")
    if kernel != "fwd" and block_d >= 64 and crowded:
        options["BLOCK_N"] = 32
    if kernel == "bwd":
        options["BLOCK_OUT"] = block_d if whole else min(block_d, 128)
        programs *= triton.cdiv(D, options["BLOCK_OUT"])
    return options, splits_of(programs, triton.cdiv(columns, options["BLOCK_N"]), slots)


def _pair_options(kernel, rows, columns, D, half, roomy, arch, multiprocessors):
    """Options of a kernel that gives each program a tile, large ones if there are enough."""
    row_blocks, col_blocks, feat_blocks = (triton.cdiv(x, 128) for x in (rows, columns, D))
    tiles = row_blocks * col_blocks
    product = kernel.endswith("product")
    if product:
        tiles = (row_blocks + (col_blocks if kernel == "product" else 0)) * feat_blocks
    large = half and tiles >= multiprocessors
    more_warps = arch.startswith("sm_") and arch != "sm_90" and (not half or product)
    short = kernel == "pair" and (large or not half)
    options = {
        "BLOCK_M": 128 if large else 64,
        # A tile of scores with both of its exponentials takes many registers.
        "BLOCK_N": 128 if large and product else 64,
        "BLOCK_D": (64 if half else 32) // (2 if short else 1),
        "num_warps": 8 if large or more_warps else 4,
        "num_stages": (5 if short else 3) if roomy else 2,
    }
    if not product:
        options["BLOCK_D"] = min(options["BLOCK_D"], max(16, triton.next_power_of_2(D)))
    return options


def _blocks_per_group(blocks, slots):
    """The group size with which groups x groups take least time, in tiles, on so many slots.

    At most 64 groups, so that the forward kernel's workspace has at most 64 numbers a row.
    """

    def tiles(size):
        groups = triton.cdiv(blocks, size)
        waves = triton.cdiv(groups * groups, slots)
        return waves * size * (size + 1)  # one more than size to fill the pipeline

    sizes = {triton.cdiv(blocks, groups) for groups in range(1, min(blocks, 64) + 1)}
    return min(sorted(sizes), key=tiles)


# Counts and vector strides: a new value must not compile a new kernel.
_COUNTS = ["M", "N", "groups", "per_group", "splits", "first_block", "parts", "width", "pairs"]
_COUNTS += ["first", "start", "count", "q_programs", "q_blocks", "k_blocks"]
_VECTORS = ["dlse_stride", "drows_stride", "dcols_stride"]


@triton.jit
def _load_tile(ptr, rows, n_rows, stride_n, stride_d, feats, D: tl.constexpr):
    offsets = rows.to(tl.int64)[:, None] * stride_n + feats.to(tl.int64)[None, :] * stride_d
    mask = (rows < n_rows)[:, None] & (feats < D)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)  # [rows, feats]


@triton.jit
def _load_rnorm(ptr, at, mask):
    """Inverse norms, or 1 where rows are compared as they are."""
    if ptr is None:
        return tl.full(at.shape, 1.0, tl.float32)
    else:
        return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def _times(x, factors):
    if factors is None:
        return x
    else:
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
    if power is None:
        return factor
    else:
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
def _relative(top, logits, axis: tl.constexpr):
    """Running maximum along an axis, by what earlier sums shrink, and the new exponentials."""
    new_top = tl.maximum(top, tl.max(logits, axis))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing visible yet
    return new_top, tl.exp2(top - shift), tl.exp2(logits - tl.expand_dims(shift, axis))


@triton.jit
def _online(top, total, logits, axis: tl.constexpr):
    """Running maximum and sum of exponentials along an axis."""
    new_top, kept, terms = _relative(top, logits, axis)
    return new_top, total * kept + tl.sum(terms, axis)


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
    M, N, first, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |x_i| and 1 / |y_j|, and the score of x_i and y_first+i in base 2.

    The score where positive_ptr is given; the plain product where x_rnorm_ptr is not.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    y_rows = tl.where(rows < N - first, rows + first, rows - (N - first))
    y_valid = tl.where(rows < N, N, 0)
    # Rows are divided by their largest entry first: no square over- or underflows.
    x_top = tl.full([BLOCK_M], 1e-30, tl.float32)
    y_top = tl.full([BLOCK_M], 1e-30, tl.float32)
    for d in range(0, D, BLOCK_D):
        feats = d + tl.arange(0, BLOCK_D)
        x = _load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
        y = _load_tile(y_ptr, y_rows, y_valid, y_stride_n, y_stride_d, feats, D).to(tl.float32)
        x_top = tl.maximum(x_top, tl.max(tl.abs(x), 1))
        y_top = tl.maximum(y_top, tl.max(tl.abs(y), 1))

    xx = tl.zeros([BLOCK_M], tl.float32)
    yy = tl.zeros([BLOCK_M], tl.float32)
    xy = tl.zeros([BLOCK_M], tl.float32)
    for d in range(0, D, BLOCK_D):
        feats = d + tl.arange(0, BLOCK_D)
        x = _load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
        y = _load_tile(y_ptr, y_rows, y_valid, y_stride_n, y_stride_d, feats, D).to(tl.float32)
        x /= x_top[:, None]
        y /= y_top[:, None]
        xx += tl.sum(x * x, 1)
        yy += tl.sum(y * y, 1)
        xy += tl.sum(x * y, 1)

    similarity = xy * x_top * y_top
    if x_rnorm_ptr is not None:
        x_norm = x_top * tl.sqrt(xx)
        y_norm = y_top * tl.sqrt(yy)
        x_rnorm = tl.where(x_norm <= NORM_EPS, 0.0, 1 / x_norm)  # NaN stays NaN
        y_rnorm = tl.where(y_norm <= NORM_EPS, 0.0, 1 / y_norm)
        tl.store(x_rnorm_ptr + rows, x_rnorm, mask=rows < M)
        tl.store(y_rnorm_ptr + y_rows, y_rnorm, mask=rows < N)
        cosine = xy / (tl.sqrt(xx) * tl.sqrt(yy))
        similarity = tl.where((x_rnorm == 0) | (y_rnorm == 0), 0.0, cosine)
    if positive_ptr is not None:
        scale2 = tl.load(scale_ptr).to(tl.float32) * LOG2E
        tl.store(positive_ptr + rows, similarity * scale2, mask=rows < M)


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
    last_tile = tl.minimum((a + 1) * per_group, 2 * blocks) * tiles
    for tile in range(a * per_group * tiles, last_tile):
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
            top, total = _online(top, total, tl.where(visible, logits, -float("inf")), 1)
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
        x_rnorm = _load_rnorm(x_rnorm_ptr, rows, rows < M)
        x_power = None if x_rnorm_ptr is None else _power(x_rnorm)
        x_factor = _over(x_rnorm * root, x_power)
        if x_ids_ptr is not None:
            x_ids = tl.load(x_ids_ptr + rows, mask=rows < M, other=0)
        if D <= BLOCK_D:
            x = _times(_load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D), x_power)

        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if CLASSES:
            positives = tl.zeros([BLOCK_M], tl.float32)
            count = tl.zeros([BLOCK_M], tl.float32)
        for col_start in range(start, tl.minimum(start + share, N), BLOCK_N):
            cols = col_start + tl.arange(0, BLOCK_N)
            y_rnorm = _load_rnorm(y_rnorm_ptr, cols, cols < N)
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
            top, total = _online(top, total, logits, 1)
            if COLUMNS:
                col_at = tl.program_id(0).to(tl.int64) * width + M + cols
                begun = tl.where(block == first_block, 0, N)  # the workspace is not cleared
                col_total = tl.load(parts_ptr + col_at, mask=cols < begun, other=0.0)
                col_top = tl.load(tops_ptr + col_at, mask=cols < begun, other=-float("inf"))
                col_top, col_total = _online(col_top, col_total, logits, 0)
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


@triton.jit
def _store_both(ptr, second_ptr, rows, values, M, pairs):
    """Store a block of M values, or where second_ptr is given those from pairs on there."""
    if second_ptr is None:
        tl.store(ptr + rows, values, mask=rows < M)
    else:
        tl.store(ptr + rows, values, mask=rows < pairs)
        tl.store(second_ptr + (rows - pairs), values, mask=(rows >= pairs) & (rows < M))


@triton.jit(do_not_specialize=_COUNTS)
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


@triton.jit
def _store_gradient(
    dunit, along, rows, at, feats, scale, x_ptr, x_rnorm, dx_ptr, dscale_ptr,
    M, x_stride_n, x_stride_d,
    D: tl.constexpr, NORMALIZE: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """dx_i = s (dunit_i - x^_i <x^_i, dunit_i>) / |x_i|, where dunit_i = sum_j W_ij y^_j.

    Of rows that are not normalised it is s dunit_i.
    """
    if NORMALIZE or dscale_ptr is not None:
        x = _load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
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
        tl.store(weight_ptr + M + rows, _weight(count, dlse, _gain(peak_ptr)), mask=rows < M)
    weight = _weight(total, dlse, _gain(peak_ptr))
    if peak_ptr is None and rnorm_ptr is not None:
        weight *= tl.load(rnorm_ptr + rows, mask=rows < M, other=0.0)
    tl.store(weight_ptr + rows, weight, mask=rows < M)


@triton.jit(do_not_specialize=[*_COUNTS, *_VECTORS])
def _similarity_lse_bwd_kernel(
    x_ptr, y_ptr, x_rnorm_ptr, y_rnorm_ptr, x_ids_ptr, y_ids_ptr,
    top_ptr, total_ptr, dlse_ptr, weight_ptr, peak_ptr, scale_ptr,
    dx_ptr, dy_ptr, dscale_ptr, dunit_ptr, along_ptr,
    M, N, first_block, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d, dlse_stride,
    D: tl.constexpr, PRECISION: tl.constexpr,
    ROW_WEIGHT: tl.constexpr, COL_WEIGHT: tl.constexpr, VIEWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One row block of sum_j W_ij y^_j over one share of the columns; if it is the only one, dx.

    W_ij is made of the lse of row i (ROW_WEIGHT), of column j (COL_WEIGHT) or of both. With both,
    rows and columns are the same: those of the two views x and y, or with VIEWS = 1 those of x,
    whose ids are classes.
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
        rows_ptr, row_stride_n, row_stride_d = _view(
            x_view, x_ptr, y_ptr, x_stride_n, x_stride_d, y_stride_n, y_stride_d
        )
        out_ptr = tl.where(x_view == 0, dx_ptr, dy_ptr)
    else:
        rows_ptr, row_stride_n, row_stride_d, out_ptr = x_ptr, x_stride_n, x_stride_d, dx_ptr
    row_start = (first_block + tl.program_id(0) - x_view * row_blocks) * BLOCK_M
    rows = row_start + tl.arange(0, BLOCK_M)
    row_at = rows + x_view * M
    x_rnorm = _load_rnorm(x_rnorm_ptr, row_at, rows < M)
    x_power = _power(x_rnorm) if NORMALIZE else None
    x_factor = _over(x_rnorm * root, x_power)
    if D <= BLOCK_D:
        feats = tl.arange(0, BLOCK_D)
        x = _times(_load_tile(rows_ptr, rows, M, row_stride_n, row_stride_d, feats, D), x_power)
    if x_ids_ptr is not None:
        x_ids = tl.load(x_ids_ptr + rows, mask=rows < M, other=0)

    gain = _gain(peak_ptr)
    if CLASSES:
        x_top = tl.load(top_ptr + rows, mask=rows < M, other=0.0)
        x_weight = tl.load(weight_ptr + rows, mask=rows < M, other=0.0)
        x_mean = tl.load(weight_ptr + M + rows, mask=rows < M, other=0.0)
    elif ROW_WEIGHT:
        x_top = tl.load(top_ptr + row_at, mask=rows < M, other=0.0)
        x_total = tl.load(total_ptr + row_at, mask=rows < M, other=0.0)
        x_dlse = tl.load(dlse_ptr + row_at.to(tl.int64) * dlse_stride, mask=rows < M, other=0.0)
        if SELF:
            x_weight = _weight(x_total, x_dlse, gain)
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
            cols_ptr, col_stride_n, col_stride_d = _view(
                y_view, x_ptr, y_ptr, x_stride_n, x_stride_d, y_stride_n, y_stride_d
            )
        else:
            cols_ptr, col_stride_n, col_stride_d = y_ptr, y_stride_n, y_stride_d
        col_start = (block - y_view * col_blocks) * BLOCK_N
        cols = col_start + tl.arange(0, BLOCK_N)
        col_at = cols + y_view * N
        y_rnorm = _load_rnorm(y_rnorm_ptr, col_at, cols < N)

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
        if FP16 and NORMALIZE:  # weight / |y| may not be a float16 number: y becomes a unit tile
            y = _times(y, y_rnorm)
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
        gain = _weight(x_total, x_dlse, FP16_WEIGHT if FP16 else 1.0)
    gain += tl.zeros([BLOCK_M], tl.float32)
    acc *= gain[:, None]
    along *= gain * _over(x_rnorm, x_power)
    if dunit_ptr is None:
        _store_gradient(
            acc, along, rows, row_at, out_feats, scale, rows_ptr, x_rnorm, out_ptr, dscale_ptr,
            M, row_stride_n, row_stride_d, D, NORMALIZE, SELF,
        )  # fmt: skip
    else:
        part_at = tl.program_id(1).to(tl.int64) * VIEWS * M + row_at
        mask = (rows < M)[:, None] & (out_feats < D)[None, :]
        tl.store(dunit_ptr + part_at[:, None] * D + out_feats[None, :], acc, mask=mask)
        tl.store(along_ptr + part_at, along, mask=rows < M)


@triton.jit(do_not_specialize=_COUNTS)
def _similarity_lse_bwd_finish_kernel(
    x_ptr, y_ptr, rnorm_ptr, scale_ptr, dx_ptr, dy_ptr, dscale_ptr, dunit_ptr, along_ptr,
    M, first_block, splits, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    D: tl.constexpr, SELF: tl.constexpr, VIEWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Add up the shares of dx that the splits of the backward kernel leave."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    x_view = (first_block + tl.program_id(0) >= row_blocks).to(tl.int32)
    if VIEWS == 2:
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
        part_at = M.to(tl.int64) * VIEWS * split + at
        dunit += tl.load(dunit_ptr + part_at[:, None] * D + feats[None, :], mask=mask, other=0.0)
        along += tl.load(along_ptr + part_at, mask=rows < M, other=0.0)
    x_rnorm = _load_rnorm(rnorm_ptr, at, rows < M)
    scale = tl.load(scale_ptr).to(tl.float32)
    _store_gradient(
        dunit, along, rows, at, feats, scale, x_ptr, x_rnorm, dx_ptr, dscale_ptr,
        M, x_stride_n, x_stride_d, D, rnorm_ptr is not None, SELF,
    )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
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
    x_power = _power(x_rnorm)
    x_factor = _over(x_rnorm * root, x_power)
    x = _times(_load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D), x_power)
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
        y = _load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
        products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        logits = _logits(products, x_factor, y_rnorm * root)  # [i, j], base 2
        if x_ids_ptr is not None:
            y_ids = tl.load(y_ids_ptr + cols, mask=cols < N, other=0)
            logits = tl.where(x_ids[:, None] != y_ids[None, :], logits, -float("inf"))
        if col_start + BLOCK_N > N:
            logits = tl.where((cols < N)[None, :], logits, -float("inf"))
        top, kept, weights = _relative(top, logits, 1)
        total = total * kept + tl.sum(weights, 1)
        if dunit_ptr is not None:
            if FP16:  # weight / |y| may not be a float16 number: y becomes a unit tile
                y = _times(y, y_rnorm)
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


@triton.jit(do_not_specialize=_COUNTS)
def _fixed_keys_lse_finish_kernel(
    x_ptr, rnorm_ptr, scale_ptr, parts_ptr, dunit_ptr, lse_ptr, dx_ptr, dscale_ptr,
    M, splits, x_stride_n, x_stride_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Merge parts and tops of the shares: lse [M]; and if dunit, its derivatives by x_i and s."""
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
    tl.store(lse_ptr + rows, (top + tl.log2(total)) * LN2, mask=rows < M)

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
        _store_gradient(
            dunit, total, rows, rows, feats, scale, x_ptr, rnorm, dx_ptr, dscale_ptr,
            M, x_stride_n, x_stride_d, D, True, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*_COUNTS, *_VECTORS])
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
    q_rnorm = _load_rnorm(q_rnorm_ptr, rows, rows < M)
    k_rnorm = _load_rnorm(k_rnorm_ptr, cols, cols < N)
    q_power = None if q_rnorm_ptr is None else _power(q_rnorm)
    products = _chunked_products(
        q_ptr, q_power, rows, M, q_stride_n, q_stride_d,
        k_ptr, cols, N, k_stride_n, k_stride_d, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    logits = _logits(products, _over(q_rnorm * root, q_power), k_rnorm * root)  # base 2

    gain = _gain(peak_ptr)
    top = tl.load(top_ptr + rows, mask=rows < M, other=0.0)
    total = tl.load(total_ptr + rows, mask=rows < M, other=0.0)
    drows = tl.load(drows_ptr + rows.to(tl.int64) * drows_stride, mask=rows < M, other=0.0)
    weights = tl.exp2(logits - top[:, None]) * _weight(total, drows, gain)[:, None]
    if col_top_ptr is not None:
        col_top = tl.load(col_top_ptr + cols, mask=cols < N, other=0.0)
        col_total = tl.load(col_total_ptr + cols, mask=cols < N, other=0.0)
        dcols = tl.load(dcols_ptr + cols.to(tl.int64) * dcols_stride, mask=cols < N, other=0.0)
        weights += tl.exp2(logits - col_top[None, :]) * _weight(col_total, dcols, gain)[None, :]
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
        tl.store(dscale_ptr + block, tl.sum(tl.sum(weights * logits, 1), 0) * gain)


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
        y = _load_tile(y_ptr, y_start + inner, N, y_stride_n, y_stride_d, feats, D)
        if TRANSPOSED:
            at = inner.to(tl.int64)[:, None] * weights_stride + rows[None, :]
            weights = tl.trans(tl.load(weights_ptr + at))
        else:
            at = rows.to(tl.int64)[:, None] * weights_stride + inner[None, :]
            weights = tl.load(weights_ptr + at)
        if y_rnorm_ptr is not None:
            rnorm = tl.load(y_rnorm_ptr + y_start + inner, mask=y_start + inner < N, other=0.0)
            if FP16:  # weight / |y| may not be a float16 number
                y = _times(y, rnorm)
            else:
                weights = (weights.to(tl.float32) * rnorm[None, :]).to(weights.dtype)
        acc = tl.dot(weights, y, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=_COUNTS)
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
    rnorm = _load_rnorm(rnorm_ptr, rows, out_rows < count)
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
            x = _load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D).to(tl.float32)
            x *= rnorm[:, None]
            if step < tl.cdiv(D, BLOCK_D):
                along += tl.sum(x * unit, 1)
            unit -= x * along[:, None]
        dx = unit * (factor * rnorm)[:, None]
        if step >= (PASSES - 1) * tl.cdiv(D, BLOCK_D):
            at = rows.to(tl.int64)[:, None] * D + feats[None, :]
            mask = (out_rows < count)[:, None] & (feats < D)[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
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
    factor = scale * _gain(peak_ptr)
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


def strided(**matrices):
    """Arguments of a kernel for the matrices of these names: their pointers and strides."""
    arguments = {}
    for name, x in matrices.items():
        arguments[f"{name}_ptr"] = x
        arguments[f"{name}_stride_n"], arguments[f"{name}_stride_d"] = x.stride()
    return arguments


def _rnorms(x, y, x_rnorm, y_rnorm, positive, scale, first=0):
    """Fill the inverse norms, unless they are None, and the scores of the pairs (i, first + i)."""
    D = x.shape[1]
    block_d = min(256, max(16, triton.next_power_of_2(D)))
    block_m = 4096 // block_d
    launch(
        _rnorm_kernel,
        (triton.cdiv(len(x) if x_rnorm is None else max(len(x), len(y)), block_m),),
        **strided(x=x, y=y),
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
        num_warps=8,
    )


def _finish_lse(parts, scale, positive=None, columns=False, shifted=True, counts=None):
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
    launch(
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
            **strided(z0=z0, z1=z1),
            rnorm_ptr=rnorm,
            ids_ptr=ids,
            scale_ptr=scale,
            parts_ptr=parts,
            N=N,
            groups=groups,
            per_group=per_group,
            D=D,
            PRECISION=precision_of(z0.dtype, arch),
            **options,
        )
        stats = _finish_lse(parts, scale, positive, shifted=False)
    return *stats, rnorm, rnorm.new_empty(0, 0)


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
        parts = _row_parts(z, z, scale, (classes, classes), None, None, first=0, positives=True)
        return *_finish_lse(parts, scale, counts=counts), counts


def similarity_lse_fwd(q, k, scale, row_ids, col_ids, normalize):
    """Log-sum-exp of each row of q over the rows of k, or over those with another id.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise.
        scale: [] float, 1 / temperature, on the device.
        row_ids: [M] integers or None.
        col_ids: [N] integers or None.
        normalize: whether rows are compared at unit length.

    Returns:
        lse, the maximum and sum it is made of, q_rnorm = 1 / |q|, each [M] float32; k_rnorm [N].
        Without normalize the inverse norms are empty.
    """
    q_rnorm, k_rnorm = _empty_rnorms(q, k, normalize)
    with torch.cuda.device_of(q):
        if normalize:
            _rnorms(q, k, q_rnorm, k_rnorm, None, scale)
        norms = (q_rnorm, k_rnorm) if normalize else (None, None)
        parts = _row_parts(q, k, scale, (row_ids, col_ids), *norms)
        return *_finish_lse(parts, scale), q_rnorm, k_rnorm


def _empty_rnorms(q, k, normalize):
    sizes = (len(q), len(k)) if normalize else (0, 0)
    return [torch.empty(size, dtype=torch.float32, device=q.device) for size in sizes]


def _row_parts(
    q, k, scale, ids, q_rnorm, k_rnorm, *, first=None, columns=False, positives=False
):  # fmt: skip
    """Sums and maxima over shares of the columns [2, shares, M], without the pairs (i, first + i).

    With columns [2, shares, M + N]: those of the columns over as many shares of the rows too. With
    positives [4, shares, M]: equal ids are positives, whose scores are summed and counted.
    """
    (M, D), N = q.shape, len(k)
    ids = [None if each is None else each.contiguous() for each in ids]
    arch, multiprocessors = target(q.device)
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
    launch(
        _similarity_lse_fwd_kernel,
        (triton.cdiv(row_blocks, per_group), splits),
        **strided(x=q, y=k),
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
        PRECISION=precision_of(q.dtype, arch),
        PAIRED=first is not None,
        COLUMNS=columns,
        CLASSES=positives,
        **options,
    )
    return workspace


def _gradient(
    x, y, rnorms, ids, top, total, dlse, scale, *,
    row_weight, col_weight, dscale, views=(0,), of=1, counts=None,
):  # fmt: skip
    """Gradients of views (0: x, 1: y) out of one or two and, with dscale, each row's of the scale.

    With both weights rows and columns are the same, those of all views. With counts of positives
    ids are classes.
    """
    (M, D), N, device = x.shape, len(y), x.device
    ids = [None if each is None else each.contiguous() for each in ids]
    arch, multiprocessors = target(device)
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
        launch(
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

    shared = {
        **strided(x=x, y=y),
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
            SELF=row_weight and col_weight,
            BLOCK_M=block_m,
            num_warps=4,
        )
    return gradients, dscale_rows


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
            row_weight=True, col_weight=True, dscale=needs[2], views=views, of=2,
        )  # fmt: skip
        dscale = dscale.sum() if needs[2] else None
    return gradients[0] if needs[0] else None, gradients[1] if needs[1] else None, dscale


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
        gradients, dscale = _gradient(
            z, z, (None, None), (classes, classes), top, total, dlse, scale,
            row_weight=True, col_weight=True, dscale=needs[1], counts=counts,
        )  # fmt: skip
        dscale = dscale.sum() if needs[1] else None
    return gradients[0] if needs[0] else None, dscale


def similarity_lse_bwd(
    dlse, q, k, scale, row_ids, col_ids, top, total, q_rnorm, k_rnorm, normalize, needs
):
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
            gradients, dscale = _gradient(
                q, k, (q_rnorm, k_rnorm), (row_ids, col_ids), top, total, dlse, scale,
                row_weight=True, col_weight=False, dscale=needs[2],
            )  # fmt: skip
            dq = gradients[0] if needs[0] else None
            dscale = dscale.sum() if needs[2] else None
        if needs[1]:
            gradients, _ = _gradient(
                k, q, (k_rnorm, q_rnorm), (col_ids, row_ids), top, total, dlse, scale,
                row_weight=False, col_weight=True, dscale=False,
            )  # fmt: skip
            dk = gradients[0]
    return dq, dk, dscale


def fixed_keys_lse_fwd(q, k, scale, row_ids, col_ids, gradients):
    """``similarity_lse_fwd`` of cosines with the gradients, of which no key is then needed again.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise.
        scale: [] float, 1 / temperature, on the device.
        row_ids: [M] integers or None.
        col_ids: [N] integers or None.
        gradients: whether to compute them.

    Returns:
        lse [M] float32, and its derivatives by each row [M, D] in the rows' dtype and by the scale
        [M] float32; empty without gradients.
    """
    (M, D), N, device = q.shape, len(k), q.device
    ids = [None if each is None else each.contiguous() for each in (row_ids, col_ids)]
    arch, multiprocessors = target(device)
    options, splits = launch_config(
        "fixed_keys", M, N, D, q.dtype, row_ids is not None, arch, multiprocessors
    )
    nothing = [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((0, 0), 0)]
    if options["BLOCK_D"] < D:  # rows too wide for one tile are walked twice
        lse, top, total, *norms = similarity_lse_fwd(q, k, scale, *ids, True)
        if not gradients:
            return lse, *nothing
        with torch.cuda.device_of(q):
            one = torch.ones(1, dtype=torch.float32, device=device).expand(M)
            dq, dscale = _gradient(
                q, k, norms, ids, top, total, one, scale,
                row_weight=True, col_weight=False, dscale=True,
            )  # fmt: skip
        return lse, dq[0], dscale

    q_rnorm, k_rnorm = _empty_rnorms(q, k, True)
    parts = torch.empty(2, splits, M, dtype=torch.float32, device=device)
    lse, dq, dscale, dunit = torch.empty_like(q_rnorm), None, None, None
    if gradients:
        dq, dscale = torch.empty(M, D, dtype=q.dtype, device=device), torch.empty_like(lse)
        dunit = torch.empty(splits, M, D, dtype=torch.float32, device=device)
    block_m = max(1, 1024 // options["BLOCK_D"])
    shared = {
        **strided(x=q),
        "scale_ptr": scale,
        "parts_ptr": parts,
        "dunit_ptr": dunit,
        "M": M,
        "splits": splits,
        "D": D,
    }
    with torch.cuda.device_of(q):
        _rnorms(q, k, q_rnorm, k_rnorm, None, scale)
        launch(
            _fixed_keys_lse_kernel,
            (triton.cdiv(M, options["BLOCK_M"]), splits),
            **shared,
            **strided(y=k),
            x_rnorm_ptr=q_rnorm,
            y_rnorm_ptr=k_rnorm,
            x_ids_ptr=ids[0],
            y_ids_ptr=ids[1],
            N=N,
            PRECISION=precision_of(q.dtype, arch),
            **options,
        )
        launch(
            _fixed_keys_lse_finish_kernel,
            (triton.cdiv(M, block_m),),
            **shared,
            rnorm_ptr=q_rnorm,
            lse_ptr=lse,
            dx_ptr=dq,
            dscale_ptr=dscale,
            BLOCK_M=block_m,
            BLOCK_D=options["BLOCK_D"],
            BLOCK_PARTS=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return lse, *((dq, dscale) if gradients else nothing)


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
    q_rnorm, k_rnorm = _empty_rnorms(q, k, normalize)
    positive = torch.empty(M, dtype=torch.float32, device=q.device)
    norms = (q_rnorm, k_rnorm) if normalize else (None, None)
    with torch.cuda.device_of(q):
        _rnorms(q, k, *norms, positive, scale, first)
        parts = _row_parts(q, k, scale, (row_ids, ids), *norms, first=first, columns=columns)
        stats = _finish_lse(parts, scale, positive, columns)
    if columns:
        (rows, cols), (top, col_top), (total, col_total) = stats
    else:
        rows, top, total = stats
        cols, col_top, col_total = (positive.new_empty(0) for _ in range(3))
    return rows, cols, top, total, col_top, col_total, q_rnorm, k_rnorm


def _panel_rows(M, N, itemsize):
    """How many rows of weights are kept at a time."""
    return min(M, max(PANEL_ROWS, PANEL_BYTES // (itemsize * N) // 128 * 128))


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
    (M, D), N, device = q.shape, len(k), q.device
    arch, multiprocessors = target(device)
    precision = precision_of(q.dtype, arch)
    config = (N, D, q.dtype, ids is not None, arch, multiprocessors)
    panel = _panel_rows(M, N, q.element_size())
    options, _ = launch_config("weight", panel, *config)
    product = "product" if needs[1] else "row_product"
    product_options, splits = launch_config(product, panel, *config)
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
        **strided(q=q, k=k),
        "q_rnorm_ptr": q_rnorm if normalize else None,
        "k_rnorm_ptr": k_rnorm if normalize else None,
        "M": M,
        "N": N,
        "D": D,
    }
    block_d = min(1024, max(16, triton.next_power_of_2(D)))
    block_m = max(1, (2048 if splits == 1 else 1024) // block_d)
    with torch.cuda.device_of(q):
        peak = None
        if q.dtype == torch.float16:
            peak = torch.linalg.vector_norm(drows, ord=float("inf"))
            if columns:
                peak = torch.maximum(peak, torch.linalg.vector_norm(dcols, ord=float("inf")))
        for start in range(0, M, panel):
            count = min(panel, M - start)
            launch(
                _pair_weight_kernel,
                (triton.cdiv(count, options["BLOCK_M"]), col_blocks),
                **shared,
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
                dscale_ptr=dscale_parts,
                first=first,
                start=start,
                weights_stride=weights.stride(0),
                drows_stride=drows.stride(0),
                dcols_stride=dcols.stride(0),
                PRECISION=precision,
                **options,
            )
            q_programs = k_programs = 0
            if needs[0]:
                q_programs = triton.cdiv(count, product_options["BLOCK_M"]) * feat_blocks * splits
            if needs[1]:
                k_programs = triton.cdiv(N, product_options["BLOCK_M"]) * feat_blocks
            if needs[0] or needs[1]:
                launch(
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
                launch(
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
