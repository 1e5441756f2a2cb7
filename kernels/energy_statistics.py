"""Statistics of the features on the GPU, and the gradient that passes through them.

    forward     mean_i and var_i of feature i over the samples, the variance biased
                factor_i = 1 / sqrt(var_i + eps), or of all features the power of two that brings
                the largest deviation into [1/2, 1)
                c_ii = 1/N sum_n û_ni v̂_ni
    backward    dû = dE 2/N h_u + ddiag v̂ / N      (v = u: twice that)
                du = factor (dû - mean(dû) - û mean(dû û))      without the last term for one factor

A program owns some features and walks the samples: three times forward, twice backward. Forward
both batches are one launch, and one factor for all features is one more. README.md has the rest.
"""

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.energy_tiles import (
    COUNTS,
    Batch,
    arguments_of,
    load_unit,
    load_vector,
    mean_of,
    operand,
)

CONSTANT = tl.constexpr(2.0**100)  # local factor of a constant feature: above that of any other
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


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
        total += load_unit(z_ptr, rows, feats, N, D, stride_n, stride_d, first, one)
    mean = first + mean_of(total, N)
    squares = tl.zeros([BLOCK_N, feats.shape[0]], tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        z = load_unit(z_ptr, rows, feats, N, D, stride_n, stride_d, mean, one)
        squares += z * z
    return mean, mean_of(squares, N)


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
def lift_of(var):
    """The power of two that brings a deviation into [1/2, 1), 1 if there is none."""
    power = _factor(tl.maximum(var, 0.0), 0.0, False)
    return tl.where(power == CONSTANT, 1.0, power)


@triton.jit(do_not_specialize=COUNTS)
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
        u = load_unit(u_ptr, rows, feats, N, D, u_stride_n, u_stride_d, u_mean, u_factor)
        u = operand(u, dtype, PRECISION).to(tl.float32)
        v = u
        if v_ptr is not None:
            v = load_unit(v_ptr, rows, feats, N, D, v_stride_n, v_stride_d, v_mean, v_factor)
            v = operand(v, dtype, PRECISION).to(tl.float32)
        products += u * v
    tl.store(diagonal_ptr + feats, mean_of(products, N), mask=feats < D)


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
    diagonal = load_vector(diagonal_ptr, feats, D)
    tl.store(diagonal_ptr + feats, diagonal * u_change * v_change, mask=feats < D)


@triton.jit
def _load_dunit(
    h_ptr, other_ptr, rows, feats, N, D, stride_n, stride_d, mean, factor, gain, ddiagonal,
):  # fmt: skip
    mask = (rows < N)[:, None] & (feats < D)[None, :]
    h = tl.load(h_ptr + rows.to(tl.int64)[:, None] * D + feats[None, :], mask=mask, other=0.0)
    other = load_unit(other_ptr, rows, feats, N, D, stride_n, stride_d, mean, factor)
    return gain * h + ddiagonal[None, :] * other  # [rows, feats]


@triton.jit(do_not_specialize=[*COUNTS, "ddiagonal_stride"])
def _standardize_bwd_kernel(
    h_ptr, z_ptr, other_ptr, z_mean_ptr, z_factor_ptr, other_mean_ptr, other_factor_ptr,
    denergy_ptr, ddiagonal_ptr, dz_ptr,
    N, sides, D, z_stride_n, z_stride_d, other_stride_n, other_stride_d, ddiagonal_stride,
    STANDARDIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dẑ = sides (dE 2/N h + ddiag ô / N), ô the other view, and through the statistics dz."""
    feats = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mean = load_vector(z_mean_ptr, feats, D)
    factor = load_vector(z_factor_ptr, feats, D)
    other_mean = load_vector(other_mean_ptr, feats, D)
    other_factor = load_vector(other_factor_ptr, feats, D)
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
            z = load_unit(z_ptr, rows, feats, N, D, z_stride_n, z_stride_d, mean, factor)
            along += dunit * z
    total_mean = mean_of(total, N)
    along_mean = mean_of(along, N)

    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        dunit = _load_dunit(
            h_ptr, other_ptr, rows, feats, N, D, other_stride_n, other_stride_d,
            other_mean, other_factor, gain, ddiagonal,
        )  # fmt: skip
        dz = dunit - total_mean[None, :]
        if STANDARDIZE:
            z = load_unit(z_ptr, rows, feats, N, D, z_stride_n, z_stride_d, mean, factor)
            dz -= z * along_mean[None, :]
        out = rows.to(tl.int64)[:, None] * D + feats[None, :]
        mask = (rows < N)[:, None] & (feats < D)[None, :]
        dz *= factor[None, :]
        tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def statistics_fwd(u, v, eps, standardize, plan):
    """Find what standardises the features.

    Args:
        u: [N, D] float32, bfloat16 or float16, any strides.
        v: [N, D] likewise, or None for v = u.
        eps: float, added to a variance.
        standardize: divide each feature by its deviation; or all by one power of two.
        plan: their launch parameters.

    Returns:
        u and v as batches, which are the same where v is None, and c_ii [D] float32.
    """
    N, D = u.shape
    diagonal, u_mean, u_factor = (u.new_empty(D, dtype=torch.float32) for _ in range(3))
    a = b = Batch(u, u_mean, u_factor)
    if v is not None:
        b = Batch(v, torch.empty_like(u_mean), torch.empty_like(u_factor))
    options, _ = plan.config("columns")
    gpu.launch(
        _moments_kernel,
        (triton.cdiv(D, options["BLOCK_F"]),),
        **arguments_of(u=a, v=b) | {"v_ptr": v},
        diagonal_ptr=diagonal,
        eps=eps,
        N=N,
        D=D,
        STANDARDIZE=standardize,
        PRECISION=plan.precision(),
        **options,
    )
    if not standardize:
        u_local, v_local = a.factor, b.factor
        a = a._replace(factor=torch.empty_like(u_local))
        b = a if v is None else b._replace(factor=torch.empty_like(v_local))
        gpu.launch(
            _common_factor_kernel,
            (triton.cdiv(D, 1024),),
            u_local_ptr=u_local,
            v_local_ptr=None if v is None else v_local,
            u_factor_ptr=a.factor,
            v_factor_ptr=b.factor,
            diagonal_ptr=diagonal,
            D=D,
            BLOCK_F=1024,
            num_warps=4,
        )
    return a, b, diagonal


def statistics_bwd(h, z, other, denergy, ddiagonal, standardize, plan):
    """Gradient [N, D] of z, whose h [N, D] float32 is, by the energy and the diagonal."""
    N, D = z.x.shape
    dz = torch.empty(N, D, dtype=z.x.dtype, device=z.x.device)
    options, _ = plan.config("columns")
    gpu.launch(
        _standardize_bwd_kernel,
        (triton.cdiv(D, options["BLOCK_F"]),),
        h_ptr=h,
        **arguments_of(z=z, other=other),
        denergy_ptr=denergy,
        ddiagonal_ptr=ddiagonal,
        dz_ptr=dz,
        N=N,
        sides=2 if other is z else 1,
        D=D,
        ddiagonal_stride=ddiagonal.stride(0),
        STANDARDIZE=standardize,
        **options,
    )
    return dz
