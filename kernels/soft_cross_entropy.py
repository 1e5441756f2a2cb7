"""Soft cross-entropy on the GPU: no matrix of probabilities is stored.

Logits s [B, K], x = s / temperature, targets t [B, K] of any sum, L_b = log sum_k exp(x_bk):

    forward     loss_b = sum_k t_bk (L_b - x_bk)
    backward    ds_bk = dloss_b (softmax(x_b)_k sum_k t_bk - t_bk) / temperature

Forward reads both matrices once and keeps a maximum and sums per row. Backward reads both once,
twice (from L2) where a row does not fit in registers, and writes one. A launch each. Exponentials
are base 2 inside the kernels.
"""

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LN2, LOG2E
from fastssl.kernels.sinkhorn import COUNTS, tile_at

WIDEST = 16384  # columns of a row that is kept in registers


@lru_cache(maxsize=1024)
def launch_config(kernel, B, K, arch, multiprocessors):
    """Tile sizes and launch options of a kernel.

    Args:
        kernel: "fwd" or "bwd".
        B: number of rows.
        K: number of columns.
        arch: "sm_90", "gfx942", ... as ``gpu.target`` names it.
        multiprocessors: how many of them the device has.
    """
    block_k = max(16, triton.next_power_of_2(K))
    if kernel == "fwd" or block_k > WIDEST:
        block_k = min(block_k, 4096)
    warps = max(4, min(16, block_k // 512))
    fill = triton.next_power_of_2(triton.cdiv(B, 4 * multiprocessors))
    return {
        "BLOCK_B": min(32, max(1, 2048 // block_k), fill),
        "BLOCK_K": block_k,
        "num_warps": warps // 2 if arch.startswith("gfx") else warps,
    }


@triton.jit
def _load(
    logits_ptr, targets_ptr, rows, cols, B, K,
    logits_stride_b, logits_stride_k, targets_stride_b, targets_stride_k,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Logits and targets in float32; logits are -inf beyond the last column."""
    at, mask = tile_at(rows, cols, B, K, logits_stride_b, logits_stride_k, ALIGNMENT)
    z = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at, _ = tile_at(rows, cols, B, K, targets_stride_b, targets_stride_k, ALIGNMENT)
    t = tl.load(targets_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where((cols < K)[None, :], z, -float("inf")), t


@triton.jit
def _online(top, totals, z, scale):
    """Running maximum of each row, and sums of exponentials of each row and lane."""
    new_top = tl.maximum(top, tl.max(z, 1))
    totals *= tl.exp2((top - new_top) * scale)[:, None]
    return new_top, totals + tl.exp2((z - new_top[:, None]) * scale)


@triton.jit(do_not_specialize=[*COUNTS, "logits_stride_b", "targets_stride_b"])
def _soft_cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, loss_ptr, top_ptr, total_ptr, temperature,
    B, K, logits_stride_b, logits_stride_k, targets_stride_b, targets_stride_k,
    ALIGNMENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale = LOG2E / temperature
    top = tl.full([BLOCK_B], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    masses = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    costs = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)  # sum of t (top - s): no term is negative
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        z, t = _load(
            logits_ptr, targets_ptr, rows, cols, B, K,
            logits_stride_b, logits_stride_k, targets_stride_b, targets_stride_k, ALIGNMENT,
        )  # fmt: skip
        new_top, totals = _online(top, totals, z, scale)
        rise = tl.where(top == -float("inf"), 0.0, new_top - top)
        costs += masses * rise[:, None]
        costs += t * tl.where((cols < K)[None, :], new_top[:, None] - z, 0.0)
        masses += t
        top = new_top
    total = tl.sum(totals, 1)
    loss = tl.sum(costs, 1) / temperature + tl.sum(masses, 1) * tl.log2(total) * LN2
    tl.store(loss_ptr + rows, loss, mask=rows < B)
    tl.store(top_ptr + rows, top, mask=rows < B)
    tl.store(total_ptr + rows, total, mask=rows < B)


@triton.jit(do_not_specialize=[*COUNTS, "logits_stride_b", "targets_stride_b", "dloss_stride"])
def _soft_cross_entropy_bwd_kernel(
    dloss_ptr, logits_ptr, targets_ptr, dlogits_ptr, temperature,
    B, K, dloss_stride, logits_stride_b, logits_stride_k, targets_stride_b, targets_stride_k,
    ALIGNMENT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale = LOG2E / temperature
    dloss_at = dloss_ptr + rows.to(tl.int64) * dloss_stride
    weight = tl.load(dloss_at, mask=rows < B, other=0.0) / temperature
    dtype = dlogits_ptr.dtype.element_ty
    if WHOLE:
        cols = tl.arange(0, BLOCK_K)
        z, t = _load(
            logits_ptr, targets_ptr, rows, cols, B, K,
            logits_stride_b, logits_stride_k, targets_stride_b, targets_stride_k, ALIGNMENT,
        )  # fmt: skip
        e = tl.exp2((z - tl.max(z, 1)[:, None]) * scale)
        e *= (tl.sum(t, 1) / tl.sum(e, 1))[:, None]
        at, mask = tile_at(rows, cols, B, K, K, 1, ALIGNMENT)
        tl.store(dlogits_ptr + at, (weight[:, None] * (e - t)).to(dtype), mask=mask)
    else:
        top = tl.full([BLOCK_B], -float("inf"), tl.float32)
        totals = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        masses = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            z, t = _load(
                logits_ptr, targets_ptr, rows, start + tl.arange(0, BLOCK_K), B, K,
                logits_stride_b, logits_stride_k, targets_stride_b, targets_stride_k, ALIGNMENT,
            )  # fmt: skip
            top, totals = _online(top, totals, z, scale)
            masses += t
        gain = tl.sum(masses, 1) / tl.sum(totals, 1)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            z, t = _load(
                logits_ptr, targets_ptr, rows, cols, B, K,
                logits_stride_b, logits_stride_k, targets_stride_b, targets_stride_k, ALIGNMENT,
            )  # fmt: skip
            e = tl.exp2((z - top[:, None]) * scale) * gain[:, None]
            at, mask = tile_at(rows, cols, B, K, K, 1, ALIGNMENT)
            tl.store(dlogits_ptr + at, (weight[:, None] * (e - t)).to(dtype), mask=mask)


def _arguments(kernel, logits, targets, temperature):
    """Grid and keyword arguments that both kernels take."""
    (B, K), (logits_stride_b, logits_stride_k) = logits.shape, logits.stride()
    targets_stride_b, targets_stride_k = targets.stride()
    options = launch_config(kernel, B, K, *gpu.target(logits.device))
    dense = logits_stride_k == targets_stride_k == 1
    return (triton.cdiv(B, options["BLOCK_B"]),), {
        "logits_ptr": logits,
        "targets_ptr": targets,
        "temperature": temperature,
        "B": B,
        "K": K,
        "logits_stride_b": logits_stride_b,
        "logits_stride_k": logits_stride_k,
        "targets_stride_b": targets_stride_b,
        "targets_stride_k": targets_stride_k,
        "ALIGNMENT": gcd(logits_stride_b, targets_stride_b, K, 16) if dense else 1,
        **options,
    }


def soft_cross_entropy_fwd(logits, targets, temperature):
    """Cross-entropy of each row of logits / temperature against its targets.

    Args:
        logits: [B, K] float32, bfloat16 or float16, any strides.
        targets: [B, K] likewise, not necessarily of the same type.
        temperature: float.

    Returns:
        loss; the largest logit; the sum of exp((logits - largest) / temperature); [B] float32 each.
    """
    loss, top, total = (
        torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    with torch.cuda.device_of(logits):
        grid, arguments = _arguments("fwd", logits, targets, temperature)
        gpu.launch(
            _soft_cross_entropy_fwd_kernel,
            grid,
            **arguments,
            loss_ptr=loss,
            top_ptr=top,
            total_ptr=total,
        )
    return loss, top, total


def soft_cross_entropy_bwd(dloss, logits, targets, top, total, temperature):
    """Gradient of ``soft_cross_entropy_fwd``.

    Args:
        dloss: [B] float32, any stride.
        logits: [B, K] as in the forward pass, like targets and temperature.
        targets: [B, K].
        top: [B], of the forward pass; not read, nor is total: the whole row is at hand.
        total: [B].
        temperature: float.

    Returns:
        dlogits [B, K] in the type of logits.
    """
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        grid, arguments = _arguments("bwd", logits, targets, temperature)
        gpu.launch(
            _soft_cross_entropy_bwd_kernel,
            grid,
            **arguments,
            dloss_ptr=dloss,
            dlogits_ptr=dlogits,
            dloss_stride=dloss.stride(0),
            WHOLE=arguments["K"] <= arguments["BLOCK_K"],
        )
    return dlogits
