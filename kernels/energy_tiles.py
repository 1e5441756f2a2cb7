"""What the kernels of the cross product energy share: their rows, their launch parameters, the sum.

    û_ni = (u_ni - mean_i) factor_i      in float32 wherever rows are loaded, no copy of it is kept

A product takes them rounded to nearest, in the input's dtype. Either route leaves partial energies,
which one kernel adds up; of the dual route's it takes what the diagonal has in them:

    E = sum of partials, or (D/N)^2 sum of partials - sum_i c_ii^2

``launch_config`` has the sizes of all tiles.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu

# A new value must not compile a new kernel. Lengths and bounds of rows in memory are left out:
# whether they are multiples of 16 decides how wide loads are.
COUNTS = ["N", "splits", "count", "far_count", "sides", "first_partial", "begun"]


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


class Plan(NamedTuple):
    """What launch parameters follow from, the arguments of ``launch_config``."""

    N: int
    D: int
    inputs: int
    dtype: torch.dtype
    arch: str
    multiprocessors: int

    @classmethod
    def of(cls, u, v):
        """That of launches on u and v [N, D], or on u alone where v is None."""
        return cls(*u.shape, 1 if v is None else 2, u.dtype, *gpu.target(u.device))

    def config(self, kernel):
        """(options, parts) of a kernel, as ``launch_config`` names it."""
        return launch_config(kernel, *self)

    def precision(self):
        """How its products multiply."""
        return gpu.precision_of(self.dtype, self.arch)


class Batch(NamedTuple):
    """A batch and what standardises its features."""

    x: torch.Tensor  # [N, D], as given
    mean: torch.Tensor  # [D]
    factor: torch.Tensor  # [D]


def arguments_of(**batches):
    """Arguments of a kernel for the batches of these names."""
    arguments = gpu.strided(**{name: batch.x for name, batch in batches.items()})
    for name, batch in batches.items():
        arguments[f"{name}_mean_ptr"], arguments[f"{name}_factor_ptr"] = batch.mean, batch.factor
    return arguments


@triton.jit
def load_vector(ptr, feats, D):
    return tl.load(ptr + feats, mask=feats < D, other=0.0)


@triton.jit
def load_unit(z_ptr, rows, feats, N, D, stride_n, stride_d, mean, factor):
    """(z - mean) * factor in float32, 0 outside of [N, D]."""
    mask = (rows < N)[:, None] & (feats < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + feats.to(tl.int64)[None, :] * stride_d
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, (z - mean[None, :]) * factor[None, :], 0.0)  # [rows, feats]


@triton.jit
def operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Rounded to nearest, as a product takes it."""
    if PRECISION == "tf32":  # the tensor cores would cut the last 13 bits off
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN stays NaN
    else:
        return x.to(dtype)


@triton.jit
def mean_of(x, N):
    return tl.sum(x, 0) * (1.0 / N)  # in c_ii the rounding of 1 / N cancels with that in a variance


@triton.jit(do_not_specialize=[*COUNTS, "D"])
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
            diagonal = load_vector(diagonal_ptr, feats, D).to(tl.float64)
            if far_energy_ptr is not None:
                rest_factor = load_vector(rest_factor_ptr, feats, D)
                diagonal = tl.where(rest_factor == 0, 0.0, diagonal)
            total -= diagonal * diagonal
    if far_energy_ptr is not None:
        for start in range(0, far_count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(far_energy_ptr + at, mask=at < far_count, other=0.0).to(tl.float64)
    tl.store(energy_ptr, tl.sum(total, 0).to(tl.float32))


def sum_energy(partials, N, D, *, diagonal=None, rest_factor=None, raised=None, far_energy=None):
    """Launch it: E [], of the dual route where there is a diagonal."""
    energy = partials.new_empty(())
    gpu.launch(
        _energy_kernel,
        (1,),
        partials_ptr=partials,
        diagonal_ptr=diagonal,
        rest_factor_ptr=rest_factor,
        raised_ptr=raised,
        far_energy_ptr=far_energy,
        energy_ptr=energy,
        count=partials.numel(),
        far_count=None if far_energy is None else far_energy.numel(),
        N=N,
        D=D,
        BLOCK=1024,
        num_warps=4,
    )
    return energy
