"""SigLIP's pairwise sigmoid loss on the GPU: the matrix of scores is never stored.

Rows q_i [M, D] and k_j [N, D], scale s, bias b (Zhai et al. 2023, algorithm 1; nothing is
normalised here). The pair of row i is column first + i:

    y_ij = s q_i.k_j + b              t_ij = -y_ij on pairs, y_ij elsewhere
    terms_i = sum_j softplus(t_ij)    W_ij = -sigmoid(t_ij) on pairs, sigmoid(t_ij) elsewhere
    dq_i = s sum_j W_ij k_j           dk_j = s sum_i W_ij q_i
    ds = sum_ij W_ij q_i.k_j          db = sum_ij W_ij

A weight depends on its own score alone, so the gradients of sum_i terms_i need no statistics of
whole rows: they are made while the scores are at hand, and there is no backward pass. Narrow rows
take two walks, of the rows of q and of the rows of k: 8 M N D operations. Wide rows, which with
their gradient do not fit on the chip, take panels of W, a few rows at a time, multiplied with k and
q: 6 M N D operations and a workspace of some rows. README.md has the rest.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LOG2E
from fastssl.kernels.tiles import load_tile

FP16_WEIGHT = tl.constexpr(16384.0)  # times it, weights down to 2^-28 have every float16 digit
PANEL_BYTES = 2**24  # a panel of weights may take this, the bytes of dk, or 256 rows


@lru_cache(maxsize=1024)
def launch_config(kernel, rows, columns, D, dtype, ids, arch, multiprocessors):
    """Tile sizes and launch options of a kernel, and into how many parts the columns are cut.

    Args:
        kernel: "rows" (scores and the gradient of the rows), "scores" or "product".
        rows: number of rows that own an output.
        columns: number of rows they are compared with.
        D: number of features.
        dtype: dtype of the rows.
        ids: whether ids are compared, which takes registers.
        arch: "sm_90", "gfx942", ... as ``gpu.target`` names it.
        multiprocessors: how many of them the device has.

    Returns:
        (options, splits): keyword arguments of the kernel and the number of column splits; None for
        "rows" where D is too wide for them.
    """
    # A large tile costs the interpreter no more than a small one.
    half = dtype.itemsize == 2 or arch == "interpreter"
    hopper = arch in ("sm_90", "sm_100", "sm_103")
    roomy = hopper or arch in ("sm_80", "sm_87")  # 160 KiB of shared memory or more
    amd = arch.startswith("gfx")
    block_d = max(16, triton.next_power_of_2(D))
    # Two programs share a multiprocessor: one multiplies while the other exponentiates.
    light = half and block_d <= 128
    if kernel == "rows":
        widest = (256 if roomy else 128) if half else 32
        if block_d > widest:
            return None
        options = {
            "BLOCK_M": 64 if half or hopper else 32,
            "BLOCK_N": 64 if half else 32,
            "BLOCK_D": block_d,
            "num_warps": 4 if amd or (light and arch == "sm_90") else 8,
            "num_stages": 3 if arch == "sm_100" or (light and roomy) else 2,
        }
        if ids and block_d == 128 and arch == "sm_90":
            options["num_warps"] = 8
        slots = (2 if light else 1) * multiprocessors
    else:
        # Smaller tiles where there is little to do, so that they fill the device.
        few = rows * (D if kernel == "product" else columns) <= 64 * 64 * 2 * multiprocessors
        product = kernel == "product"
        small = not half or (few and columns <= 4096) or not (product or hopper)
        options = {
            "BLOCK_M": 64 if small else 128,
            "BLOCK_N": 64 if half or (hopper and not product) else 32,
            "BLOCK_D": (64 if small else 128) if product else min(block_d, 64 if half else 32),
            "num_warps": 4 if small and (amd or hopper or product or not half) else 8,
            "num_stages": 3 if roomy else 2,
        }
        if not half and not product and arch == "sm_90":
            options["num_warps"] = 8  # four run out of registers where chunks are unrolled
        slots = (2 if small else 1) * multiprocessors
    programs = triton.cdiv(rows, options["BLOCK_M"])
    if kernel == "product":
        programs *= triton.cdiv(D, options["BLOCK_D"])
    return options, gpu.splits_of(programs, triton.cdiv(columns, options["BLOCK_N"]), slots)


@triton.jit
def _log1p(u):
    """log(1 + u) of 0 <= u <= 1, to 2e-7 of itself: minimax polynomial of log(1 + u) / u."""
    ratio = -0.0295052275 + u * 0.00523269145
    ratio = 0.0782259335 + u * ratio
    ratio = -0.136632442 + u * ratio
    ratio = 0.19106006 + u * ratio
    ratio = -0.24842982 + u * ratio
    ratio = 0.333190968 + u * ratio
    ratio = -0.499994931 + u * ratio
    return u * (0.99999997 + u * ratio)


@triton.jit(do_not_specialize=["M", "N", "first", "splits", "part_stride"])
def _sigmoid_fwd_kernel(
    x_ptr, y_ptr, x_ids_ptr, y_ids_ptr, scale_ptr, bias_ptr,
    terms_ptr, dscale_ptr, dbias_ptr, dx_ptr, weights_ptr,
    M, N, first, splits, part_stride,
    x_stride_n, x_stride_d, y_stride_n, y_stride_d, weights_stride,
    D: tl.constexpr, PRECISION: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row block of whichever outputs are given, over one share of the columns.

    Where PAIRED, column first + i is the pair of row i; first is negative where x are the keys.
    dx needs D <= BLOCK_D.
    """
    WEIGHTED: tl.constexpr = not (
        dx_ptr is None and weights_ptr is None and dscale_ptr is None and dbias_ptr is None
    )
    GAIN: tl.constexpr = FP16_WEIGHT if x_ptr.dtype.element_ty == tl.float16 else 1.0
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr)
    row_start = tl.program_id(0) * BLOCK_M
    rows = row_start + tl.arange(0, BLOCK_M)
    if D <= BLOCK_D:
        feats = tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D)
    if x_ids_ptr is not None:
        x_ids = tl.load(x_ids_ptr + rows, mask=rows < M, other=0)

    terms = tl.zeros([BLOCK_M], tl.float32)
    dscale = tl.zeros([BLOCK_M], tl.float32)
    dbias = tl.zeros([BLOCK_M], tl.float32)
    if dx_ptr is not None:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    start = tl.program_id(1) * share
    for col_start in range(start, tl.minimum(start + share, N), BLOCK_N):
        cols = col_start + tl.arange(0, BLOCK_N)
        if D <= BLOCK_D:
            y = load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
            products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, D, BLOCK_D):
                feats = d + tl.arange(0, BLOCK_D)
                x = load_tile(x_ptr, rows, M, x_stride_n, x_stride_d, feats, D)
                y = load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
                products = tl.dot(x, tl.trans(y), products, input_precision=PRECISION)

        scores = products * scale + bias
        t = scores
        if x_ids_ptr is not None:
            y_ids = tl.load(y_ids_ptr + cols, mask=cols < N, other=0)
            t = tl.where(x_ids[:, None] != y_ids[None, :], t, -float("inf"))
        edge = True  # a branch would keep a large tile's scores in registers
        if dx_ptr is not None:
            edge = col_start + BLOCK_N > N
            if PAIRED:
                pair_start = row_start + first
                edge |= (col_start < pair_start + BLOCK_M) & (pair_start < col_start + BLOCK_N)
        if edge:
            if PAIRED:
                t = tl.where((rows + first)[:, None] == cols[None, :], -scores, t)
            t = tl.where((cols < N)[None, :], t, -float("inf"))  # no term and no weight

        u = tl.exp2(tl.abs(t) * -LOG2E)
        if terms_ptr is not None:
            terms += tl.sum(tl.maximum(t, 0.0) + _log1p(u), 1)
        if WEIGHTED:
            weights = tl.where(t >= 0, 1.0, u) / (1.0 + u)  # sigmoid(t)
            if PAIRED:  # noqa: SIM102 - the compiler knows this, and edge only the program
                if edge:
                    pair = (rows + first)[:, None] == cols[None, :]
                    weights = tl.where(pair, -weights, weights)
            if dscale_ptr is not None:
                dscale += tl.sum(weights * products, 1)
            if dbias_ptr is not None:
                dbias += tl.sum(weights, 1)
            weights = (weights * GAIN).to(x_ptr.dtype.element_ty)
            if weights_ptr is not None:  # a panel is whole tiles
                tile_ptr = weights_ptr + row_start.to(tl.int64) * weights_stride + col_start
                tile = (rows - row_start)[:, None] * weights_stride + (cols - col_start)[None, :]
                tl.store(tile_ptr + tile, weights)
            if dx_ptr is not None:
                acc = tl.dot(weights, y, acc, input_precision=PRECISION)

    part_at = tl.program_id(1).to(tl.int64) * part_stride + rows
    if terms_ptr is not None:
        tl.store(terms_ptr + part_at, terms, mask=rows < M)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + part_at, dscale, mask=rows < M)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part_at, dbias, mask=rows < M)
    if dx_ptr is not None:
        acc *= scale / GAIN
        mask = (rows < M)[:, None] & (feats < D)[None, :]
        tl.store(dx_ptr + part_at[:, None] * D + feats[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["M", "N", "splits", "begun"])
def _sigmoid_product_kernel(
    weights_ptr, y_ptr, scale_ptr, dx_ptr,
    M, N, splits, begun, weights_stride_m, weights_stride_n, y_stride_n, y_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx_i = s sum_j W_ij y_j over one share of the columns, added to rows that have begun."""
    GAIN: tl.constexpr = FP16_WEIGHT if y_ptr.dtype.element_ty == tl.float16 else 1.0
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feats = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    start = tl.program_id(2) * share
    for col_start in range(start, tl.minimum(start + share, N), BLOCK_N):
        cols = col_start + tl.arange(0, BLOCK_N)
        # No mask: a panel is whole tiles, and a mask by N would forbid loads of 16 bytes.
        tile = (
            rows.to(tl.int64)[:, None] * weights_stride_m
            + cols.to(tl.int64)[None, :] * weights_stride_n
        )
        weights = tl.load(weights_ptr + tile)
        y = load_tile(y_ptr, cols, N, y_stride_n, y_stride_d, feats, D)
        acc = tl.dot(weights, y, acc, input_precision=PRECISION)

    acc *= tl.load(scale_ptr) / GAIN
    part_at = tl.program_id(2).to(tl.int64) * M + rows
    at = part_at[:, None] * D + feats[None, :]
    mask = (rows < M)[:, None] & (feats < D)[None, :]
    acc += tl.load(dx_ptr + at, mask=mask & (rows < begun)[:, None], other=0.0)
    tl.store(dx_ptr + at, acc, mask=mask)


def _panel_rows(M, N, D, itemsize):
    """How many rows a panel of weights has: a multiple of 128, and few panels."""
    most = max(256, max(PANEL_BYTES, 4 * N * D) // (N * itemsize) // 128 * 128)
    return 128 * triton.cdiv(triton.cdiv(M, triton.cdiv(M, most)), 128)


def _scores(x, y, scale, bias, ids, first, options, splits, *, sums, dx, weights, part_stride):
    """Make sums (terms, dscale, dbias), dx and weights, each where it is not None."""
    terms, dscale, dbias = sums
    row_ids, col_ids = ids
    gpu.launch(
        _sigmoid_fwd_kernel,
        (triton.cdiv(len(x), options["BLOCK_M"]), splits),
        **gpu.strided(x=x, y=y),
        x_ids_ptr=row_ids,
        y_ids_ptr=col_ids,
        scale_ptr=scale,
        bias_ptr=bias,
        terms_ptr=terms,
        dscale_ptr=dscale,
        dbias_ptr=dbias,
        dx_ptr=dx,
        weights_ptr=weights,
        M=len(x),
        N=len(y),
        first=0 if first is None else first,
        splits=splits,
        part_stride=part_stride,
        weights_stride=0 if weights is None else weights.stride(0),
        D=x.shape[1],
        PRECISION=gpu.precision_of(x.dtype, gpu.target(x.device)[0]),
        PAIRED=first is not None,
        **options,
    )


def _product(weights, y, scale, dx, begun):
    """Store s weights y in dx, or add it to dx where that has begun."""
    (M, D), N = dx.shape, len(y)
    arch, multiprocessors = gpu.target(y.device)
    options, splits = launch_config("product", M, N, D, y.dtype, False, arch, multiprocessors)
    whole = splits == 1
    parts = dx if whole else dx.new_empty(splits, M, D)
    gpu.launch(
        _sigmoid_product_kernel,
        (triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(D, options["BLOCK_D"]), splits),
        weights_ptr=weights,
        **gpu.strided(y=y),
        scale_ptr=scale,
        dx_ptr=parts,
        M=M,
        N=N,
        splits=splits,
        begun=M if begun and whole else 0,
        weights_stride_m=weights.stride(0),
        weights_stride_n=weights.stride(1),
        D=D,
        PRECISION=gpu.precision_of(y.dtype, arch),
        **options,
    )
    if not whole:
        if begun:
            dx += parts.sum(0)
        else:
            torch.sum(parts, 0, out=dx)


def sigmoid_fwd(q, k, scale, bias, ids, first, needs):
    """Sum of the pairwise sigmoid losses of each row of q, and the gradients of their total.

    Args:
        q: [M, D] float32, bfloat16 or float16, any strides.
        k: [N, D] likewise.
        scale: [] float32, on the device.
        bias: [] float32, on the device.
        ids: [N] integers or None: (i, j), but for pairs, is left out if ids[first + i] == ids[j].
        first: column of row 0's pair; where no row has one -1, without ids, or N, with [N + M].
        needs: which of dq, dk, dscale, dbias to compute.

    Returns:
        terms [M], dq [M, D], dk [N, D], dscale [] and dbias [], all float32; an empty [0] tensor
        for each gradient that is not needed.
    """
    (M, D), N = q.shape, len(k)
    config = D, q.dtype, ids is not None, *gpu.target(q.device)
    narrow = launch_config("rows", N, M, *config)  # of the walk for dk
    panels = narrow is None and (needs[0] or needs[1])
    step = _panel_rows(M, N, D, q.element_size()) if panels else M
    walk = "rows" if needs[0] and not panels else "scores"
    options, splits = launch_config(walk, step, N, *config)
    row_ids = col_ids = None
    if ids is not None:
        col_ids = ids.contiguous()
        row_ids = col_ids[first : first + M]

    def empty(wanted, *shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device) if wanted else None

    sums = [empty(wanted, splits, M) for wanted in (True, needs[2], needs[3])]
    dq = empty(needs[0], *((M, D) if panels else (splits, M, D)))
    dk = empty(needs[1] and panels, N, D)
    weights = None
    if panels:
        weights = q.new_empty(step, 128 * triton.cdiv(N, 128))
    with torch.cuda.device_of(q):
        for start in range(0, M, step):
            rows = slice(start, start + step)
            _scores(
                q[rows], k, scale, bias, (None if ids is None else row_ids[rows], col_ids),
                None if first < 0 else first + start, options, splits,
                sums=[None if each is None else each[:, rows] for each in sums],
                dx=None if panels else dq, weights=weights, part_stride=M,
            )  # fmt: skip
            if panels and needs[0]:
                _product(weights, k, scale, dq[rows], begun=False)
            if panels and needs[1]:
                _product(weights.T, q[rows], scale, dk, begun=start > 0)
        if needs[1] and not panels:
            options, splits = narrow
            dk = empty(True, splits, N, D)
            _scores(
                k, q, scale, bias, (col_ids, row_ids), None if first < 0 else -first,
                options, splits, sums=(None, None, None), dx=dk, weights=None, part_stride=N,
            )  # fmt: skip
        # torch adds up shares in an order of its own, the same each time.
        terms, dq, dk = (
            x if x is None or x.dim() == rank else x[0] if len(x) == 1 else x.sum(0)
            for x, rank in zip((sums[0], dq, dk), (1, 2, 2), strict=True)
        )
        dscale, dbias = (None if x is None else x.sum() for x in sums[1:])
    return terms, *(terms.new_empty(0) if d is None else d for d in (dq, dk, dscale, dbias))
