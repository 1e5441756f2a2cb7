"""Statistics of the features in PyTorch, and the gradient that passes through them.

    factor = 1 / sqrt(var(u) + eps)                per feature, or 1
    du = factor (du^ - mean(du^) - u^ mean(du^ u^))

Since u^ is centred, to rounding, so are h and du^, and mean(du^) needs no pass.
"""

import torch
from torch import Tensor

from fastssl.streaming.energy_tiles import Batch, panels_of, shaped

LEAST_FACTOR = 1e-15  # squares of deviations above its inverse may overflow float32 sums


def statistics_fwd(
    u: Tensor, v: Tensor | None, eps: float, standardize: bool
) -> tuple[Batch, Batch]:
    """Return u and v as batches, which are the same where v is None."""
    a = _moments(u, eps, standardize)
    return a, a if v is None else _moments(v, eps, standardize)


def _moments(x: Tensor, eps: float, standardize: bool) -> Batch:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = torch.empty(x.shape[1], dtype=dtype, device=x.device)
    batch = Batch(x, mean, torch.ones_like(mean))
    memory = batch.memory()
    for rows, features in panels_of(x):
        panel = x[rows, features]
        centred = torch.sub(panel, panel[0].to(dtype), out=shaped(memory, panel))
        mean[features] = centred.mean(0)
        if standardize:
            centred -= mean[features]
            factor = centred.square_().mean(0).add_(eps).rsqrt_()
            if x.device.type != "cpu" or not factor.min() > LEAST_FACTOR:
                # Over a power of two, which rounds nothing, the largest deviation is at most 1.
                torch.sub(panel, panel[0].to(dtype), out=centred).sub_(mean[features])
                largest = torch.linalg.vector_norm(centred, torch.inf, dim=0).clamp_min_(1)
                power = (-1 - largest.log2().floor()).exp2()  # Macs have no frexp
                squares = centred.mul_(power).square_().mean(0)
                factor = squares.addcmul_(power, power, value=eps).rsqrt_().mul_(power)
            batch.factor[features] = factor
    return batch


def statistics_bwd(
    x: Tensor,
    y: Tensor,
    h: Tensor,
    *,
    mean: Tensor | None,
    diagonal: Tensor,
    factor: Tensor,
    scale: Tensor,
    along: Tensor,
    out: Tensor,
) -> None:
    """Write du of a panel, du^ being scale h + along v^.

    Args:
        x: [B, P] rows of u^, overwritten.
        y: [B, P] rows of v^, or x itself.
        h: [B, P].
        mean: [P] mean(h u^); None where the factor is no function of u.
        diagonal: [P] mean(v^ u^).
        factor: [P] of u.
        scale: [].
        along: [P].
        out: [B, P] in the dtype of the rows, to be written.
    """
    # du^ is centred, to rounding. What is left to be taken off is its part along u^.
    inside = torch.zeros_like(along) if mean is None else scale * mean + along * diagonal
    if y is x:
        x *= factor * (along - inside)
    else:
        x.mul_(-factor * inside).addcmul_(y, factor * along)
    torch.addcmul(x, h, scale * factor, out=out)
