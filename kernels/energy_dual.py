"""Cross product energy on the GPU over N x N tiles: the cheaper route where N is below D.

    K = û û^T, L = v̂ v̂^T                   the upper half of their tiles; N^2 D operations each
    E = <K, L> / N^2 - sum_i c_ii^2        since |c|^2 = tr(û^T v̂ v̂^T û) / N^2
    h_u = L û / N - diag(c) v̂              2 N^2 D operations, and as many for
    h_v = K v̂ / N - diag(c) û

Kept for the backward pass are K / D and L / D [N, N]. Where v is u and one factor serves all
features, outliers o are no part of K, and E and h gain their rows c_oj (energy_outliers.py).
README.md has the derivations.
"""

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.energy_outliers import OUTLIERS, Outliers, find_outliers, outlier_rows
from fastssl.kernels.energy_statistics import lift_of
from fastssl.kernels.energy_tiles import (
    COUNTS,
    arguments_of,
    load_unit,
    load_vector,
    operand,
    sum_energy,
)


@triton.jit
def _pair(N, BLOCK: tl.constexpr):
    """Blocks a, b of this program: each unordered pair once, in circulant order."""
    blocks = tl.cdiv(N, BLOCK)
    a = tl.program_id(0) % blocks
    return a, (a + tl.program_id(0) // blocks) % blocks


@triton.jit(do_not_specialize=COUNTS)
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
        mean = load_vector(mean_ptr, feats, D)
        factor = load_vector(factor_ptr, feats, D)
        x = load_unit(z_ptr, rows, feats, N, D, stride_n, stride_d, mean, factor)
        y = load_unit(z_ptr, cols, feats, N, D, stride_n, stride_d, mean, factor)
        x, y = operand(x, dtype, PRECISION), operand(y, dtype, PRECISION)
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


@triton.jit(do_not_specialize=COUNTS)
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
    u_mean = load_vector(u_mean_ptr, feats, D)
    u_factor = load_vector(u_factor_ptr, feats, D)
    if outliers_ptr is not None:
        # A feature that is small beside others keeps its digits too.
        lift = lift_of(load_vector(diagonal_ptr, feats, D))
        u_factor *= lift
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, gram_stride, BLOCK_K):
        others = k + tl.arange(0, BLOCK_K)
        gram_at = rows.to(tl.int64)[:, None] * gram_stride + others[None, :]
        mask = (rows < N)[:, None] & (others < gram_stride)[None, :]
        gram = tl.load(gram_ptr + gram_at, mask=mask, other=0.0)
        gram = tl.where(rows[:, None] == others[None, :], 0.0, gram)
        u = load_unit(u_ptr, others, feats, N, D, u_stride_n, u_stride_d, u_mean, u_factor)
        gram, u = operand(gram, dtype, PRECISION), operand(u, dtype, PRECISION)
        acc = tl.dot(gram, u, acc, input_precision=PRECISION)

    # The diagonal of L is the largest part of h and along û, where no gradient passes: in float32.
    own = tl.load(gram_ptr + rows.to(tl.int64) * (gram_stride + 1), mask=rows < N, other=0.0)
    u = load_unit(u_ptr, rows, feats, N, D, u_stride_n, u_stride_d, u_mean, u_factor)
    v_mean = load_vector(v_mean_ptr, feats, D)
    v_factor = load_vector(v_factor_ptr, feats, D)
    v = load_unit(v_ptr, rows, feats, N, D, v_stride_n, v_stride_d, v_mean, v_factor)
    h = (acc + own[:, None] * u) * (D / N)
    diagonal = load_vector(diagonal_ptr, feats, D)
    if outliers_ptr is not None:
        lower = 1 / tl.load(raised_ptr)
        h *= (lower * lower / lift)[None, :]
        rest_factor = load_vector(rest_factor_ptr, feats, D)
        diagonal = tl.where(rest_factor == 0, 0.0, diagonal)
    h -= diagonal[None, :] * v
    if outliers_ptr is not None:
        found = tl.sum((tl.load(outliers_ptr + tl.arange(0, OUTLIERS)) < D).to(tl.int32), 0)
        for place in range(0, found):
            outlier = tl.load(outliers_ptr + place)
            far_at = rows.to(tl.int64) * v_stride_n + outlier.to(tl.int64) * v_stride_d
            far = tl.load(v_ptr + far_at, mask=rows < N, other=0.0).to(tl.float32)
            far = (far - tl.load(v_mean_ptr + outlier)) * tl.load(v_factor_ptr + outlier)
            h += far[:, None] * load_vector(far_c_ptr + place * D, feats, D)[None, :]
    out = rows.to(tl.int64)[:, None] * D + feats[None, :]
    tl.store(h_ptr + out, h, mask=(rows < N)[:, None] & (feats < D)[None, :])


def dual_fwd(u, v, diagonal, u_gram, v_gram, standardize, plan):
    """Write K / D and, unless v is u, L / D; return E.

    Args:
        u: batch of [N, D].
        v: batch of [N, D].
        diagonal: [D] float32, c_ii.
        u_gram: [N, N] float32, to be written.
        v_gram: [N, N] likewise.
        standardize: whether each feature has its own factor.
        plan: their launch parameters.

    Returns:
        energy [] float32.
    """
    (N, D), symmetric = u.x.shape, v is u
    outliers, far_energy = Outliers(), None
    if symmetric and not standardize:
        outliers = find_outliers(diagonal, u.factor)
        far_energy = outlier_rows(u, outliers, plan, keep=False)
        u = v = u._replace(factor=outliers.rest_factor)
    options, splits = plan.config("gram")
    block, inputs = options["BLOCK_M"], 1 if symmetric else 2
    blocks = triton.cdiv(N, block)
    pairs = blocks * (blocks + 1) // 2
    sub = min(block, 64)
    shares = u_gram.new_empty(splits, inputs, pairs, block, block)
    partials = u_gram.new_empty((block // sub) ** 2, pairs)
    gpu.launch(
        _gram_kernel,
        (pairs, splits, inputs),
        **arguments_of(u=u, v=v),
        shares_ptr=shares,
        N=N,
        splits=splits,
        D=D,
        PRECISION=plan.precision(),
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
    return sum_energy(
        partials, N, D, diagonal=diagonal,
        rest_factor=outliers.rest_factor, raised=outliers.raised, far_energy=far_energy,
    )  # fmt: skip


def dual_bwd(gram, z, other, diagonal, standardize, plan):
    """Return h [N, D] float32 of z; gram [N, N] is the other batch's."""
    N, D = z.x.shape
    outliers, far_c = Outliers(), None
    if other is z and not standardize:
        outliers = find_outliers(diagonal, z.factor)
        far_c = outlier_rows(z, outliers, plan, keep=True)
    h = torch.empty(N, D, dtype=torch.float32, device=gram.device)
    options, _ = plan.config("gram_bwd")
    gpu.launch(
        _gram_bwd_kernel,
        (triton.cdiv(N, options["BLOCK_M"]), triton.cdiv(D, options["BLOCK_N"])),
        gram_ptr=gram,
        **arguments_of(u=z, v=other),
        diagonal_ptr=diagonal,
        h_ptr=h,
        outliers_ptr=outliers.features,
        rest_factor_ptr=outliers.rest_factor,
        raised_ptr=outliers.raised,
        far_c_ptr=far_c,
        N=N,
        D=D,
        gram_stride=N,
        PRECISION=plan.precision(),
        **options,
    )
    return h
