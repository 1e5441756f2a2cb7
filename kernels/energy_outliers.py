"""Features that hold much of all variance, on the GPU, and their rows of c.

Where one factor serves all features, <K, K> / N^2 less sum_i c_ii^2 has no digit of the small ones
left beside a few large ones. On the dual route these, outliers o, are therefore no part of K:

    outliers    c_oo^2 > 1/64 sum_i c_ii^2, at most 16, the largest if there are more
    rows        c_oj = 1/N sum_n û_no û_nj, 0 where j = o; 32 N D operations
    energies    sum_oj c_oj^2, those of ordinary j twice: their columns hold them again

One program finds them from c_ii, in the forward pass and in the backward pass alike. README.md has
the rest.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.energy_statistics import lift_of
from fastssl.kernels.energy_tiles import COUNTS, arguments_of, load_unit, load_vector, operand

OUTLIERS = tl.constexpr(16)  # at most
SHARE = tl.constexpr(1 / 64)  # of all squared variances, from which on a feature is an outlier


class Outliers(NamedTuple):
    """Features that are no part of K; nothing where none were looked for."""

    features: torch.Tensor | None = None  # [OUTLIERS] int32, D in free places
    rest_factor: torch.Tensor | None = None  # [D], 0 for outliers
    raised: torch.Tensor | None = None  # [], how many times the factor of all the rest's is


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
        diagonal = load_vector(diagonal_ptr, start + tl.arange(0, BLOCK), D)
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

    raised = lift_of(top)
    tl.store(raised_ptr, raised)
    for start in range(0, D, BLOCK):
        feats = start + tl.arange(0, BLOCK)
        diagonal = load_vector(diagonal_ptr, feats, D)
        far = (diagonal > top) | ((diagonal == top) & (feats < top_at))
        rest_factor = tl.where(far, 0.0, load_vector(factor_ptr, feats, D) * raised)
        tl.store(rest_factor_ptr + feats, rest_factor, mask=feats < D)


@triton.jit(do_not_specialize=COUNTS)
def _outlier_rows_kernel(
    z_ptr, z_mean_ptr, z_factor_ptr, rest_factor_ptr, outliers_ptr, far_c_ptr, far_energy_ptr,
    N, D, z_stride_n, z_stride_d,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Rows of c of the outliers [OUTLIERS, D], 0 on its diagonal, or squares of rows and columns.

    Nothing is read where there are no outliers.
    """
    feats = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    places = tl.arange(0, OUTLIERS)
    outliers = tl.load(outliers_ptr + places)
    far_mean = load_vector(z_mean_ptr, outliers, D)
    far_factor = load_vector(z_factor_ptr, outliers, D)
    mean = load_vector(z_mean_ptr, feats, D)
    factor = load_vector(z_factor_ptr, feats, D)
    acc = tl.zeros([OUTLIERS, BLOCK_F], tl.float32)
    for start in range(0, tl.where(tl.load(outliers_ptr) < D, N, 0), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        far = load_unit(z_ptr, rows, outliers, N, D, z_stride_n, z_stride_d, far_mean, far_factor)
        z = load_unit(z_ptr, rows, feats, N, D, z_stride_n, z_stride_d, mean, factor)
        far, z = operand(far, tl.float32, PRECISION), operand(z, tl.float32, PRECISION)
        acc = tl.dot(tl.trans(far), z, acc, input_precision=PRECISION)

    c = tl.where(outliers[:, None] == feats[None, :], 0.0, acc / N)
    if far_c_ptr is not None:
        tl.store(far_c_ptr + places[:, None] * D + feats[None, :], c, mask=(feats < D)[None, :])
    if far_energy_ptr is not None:
        # The column of an outlier is another row of these, that of any other feature is not.
        sides = tl.where(load_vector(rest_factor_ptr, feats, D) == 0, 1.0, 2.0)
        tl.store(far_energy_ptr + tl.program_id(0), tl.sum(c * c * sides[None, :]))


def find_outliers(diagonal, factor):
    """Find them from c_ii [D] and the factor [D] of all features."""
    D = len(diagonal)
    features = torch.empty(OUTLIERS.value, dtype=torch.int32, device=diagonal.device)
    outliers = Outliers(features, torch.empty_like(diagonal), diagonal.new_empty(()))
    gpu.launch(
        _outliers_kernel,
        (1,),
        diagonal_ptr=diagonal,
        factor_ptr=factor,
        outliers_ptr=outliers.features,
        rest_factor_ptr=outliers.rest_factor,
        raised_ptr=outliers.raised,
        D=D,
        BLOCK=4096,
        num_warps=8,
    )
    return outliers


def outlier_rows(z, outliers, plan, *, keep):
    """Outliers' rows of c [OUTLIERS, D] to keep, or else their partial energies."""
    (N, D), block = z.x.shape, 32
    blocks = triton.cdiv(D, block)
    out = z.mean.new_empty((OUTLIERS.value, D) if keep else blocks)
    gpu.launch(
        _outlier_rows_kernel,
        (blocks,),
        **arguments_of(z=z),
        rest_factor_ptr=outliers.rest_factor,
        outliers_ptr=outliers.features,
        far_c_ptr=out if keep else None,
        far_energy_ptr=None if keep else out,
        N=N,
        D=D,
        PRECISION=gpu.precision_of(torch.float32, plan.arch),
        BLOCK_N=block,
        BLOCK_F=block,
        num_warps=4,
        num_stages=2,
    )
    return out
