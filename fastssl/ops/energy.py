"""Cross product energy as a differentiable operator, for autograd, autocast and torch.compile.

A backend's launchers do the work (``kernels/energy.py``, ``streaming/energy.py``), on one of two
exact routes. A second derivative raises, because the backward operator has none.
"""

from typing import Any

import torch
from torch import Tensor

from fastssl.ops.backend import launchers
from fastssl.ops.registration import differentiate, fake_of, operator, operator_without_derivative

# The dual route takes N / D of the operations. `fastssl bench --losses routes` measures both: on a
# CPU it is the faster from D = 1.5 N on in every row, and the other up to D = N in most.
DUAL_COST = 1.25


def cross_energy(
    u: Tensor, v: Tensor | None = None, *, eps: float, standardize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squares off the diagonal of c = u^T v / N, and its diagonal, for centred features.

    With standardize, features are divided by sqrt(biased variance + eps), so that c holds
    correlations. Without, by a number that the call returns.

    Args:
        u: [N, D] rows, N at least 2.
        v: [N, D] rows; None stands for u.
        eps: positive, added to variances.
        standardize: whether features are divided by their standard deviations.
        backend: ``"triton"`` or ``"torch"``, resolved.

    Returns:
        energy [] and diagonal [D], differentiable, and the [D] factors that u's features were
        multiplied by, all float64 for float64 rows, else float32.
    """
    dual = takes_dual_route(*u.shape)
    rows = [x for x in (u, v) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in rows)
    energy, diagonal, _, factor, *_ = _cross_energy(u, v, eps, standardize, dual, save, backend)
    return energy, diagonal, factor


def takes_dual_route(rows: int, features: int) -> bool:
    """Whether N x N products are taken for [N, D] batches, not D x D ones."""
    return DUAL_COST * rows < features


@operator
def _cross_energy(
    u: Tensor,
    v: Tensor | None,
    eps: float,
    standardize: bool,
    dual: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        return launchers(backend, "energy").cross_energy_fwd(u, v, eps, standardize, dual, save)


@operator_without_derivative
def _cross_energy_bwd(
    denergy: Tensor,
    ddiagonal: Tensor,
    u: Tensor,
    v: Tensor | None,
    u_mean: Tensor,
    u_factor: Tensor,
    v_mean: Tensor,
    v_factor: Tensor,
    diagonal: Tensor,
    u_saved: Tensor,
    v_saved: Tensor,
    standardize: bool,
    dual: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        grads = launchers(backend, "energy").cross_energy_bwd(
            denergy, ddiagonal, u, v, u_mean, u_factor, v_mean, v_factor, diagonal,
            u_saved, v_saved, standardize, dual, needs,
        )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@fake_of(_cross_energy)
def _cross_energy_fake(
    u: Tensor,
    v: Tensor | None,
    eps: float,
    standardize: bool,
    dual: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    N, D = u.shape
    of_v = (0,) if v is None else (D,)
    saved_shapes = launchers(backend, "energy").saved_shapes
    saved = saved_shapes(N, D, dual=dual, save=save, two=v is not None)
    shapes = [(), (D,), (D,), (D,), of_v, of_v, *saved]
    dtype = torch.promote_types(u.dtype, torch.float32)
    return tuple(u.new_empty(shape, dtype=dtype) for shape in shapes)


@fake_of(_cross_energy_bwd)
def _cross_energy_bwd_fake(
    denergy: Tensor, ddiagonal: Tensor, u: Tensor, v: Tensor | None, *rest: Any
) -> list[Tensor]:
    *_, needs, _ = rest
    pairs = zip((u, v), needs, strict=True)
    return [x.new_empty(x.shape) for x, need in pairs if need and x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, v, _, ctx.standardize, ctx.dual, _, ctx.backend = inputs
    _, diagonal, *moments, u_saved, v_saved = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(u, v, *moments, diagonal, u_saved, v_saved)


def _gradient(
    ctx: Any, denergy: Tensor, ddiagonal: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    grads = iter(
        _cross_energy_bwd(
            denergy, ddiagonal, *ctx.saved_tensors, ctx.standardize, ctx.dual, needs, ctx.backend
        )
    )
    return (*(next(grads) if need else None for need in needs), None, None, None, None, None)


differentiate(_cross_energy, _gradient, _save)
