"""Cross product energy of a batch whose rows stay on their ranks, as a differentiable function.

The formulas are those of ``streaming/energy.py``, with sums over the rows of all ranks. A rank
multiplies its own rows. Panels of rows of c are added up over ranks, used for E and at once for
h, and dropped, so that no rank has rows of others or the whole of c. For v = u only the upper half
of c is sent. The backward pass needs nothing from other ranks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastssl.distributed import Group
from fastssl.ops.registration import operator_without_derivative

PANEL = 2**22  # numbers of a panel of c


def reduced_cross_energy(
    u: Tensor,
    v: Tensor | None = None,
    *,
    samples: int,
    eps: float,
    standardize: bool,
    backend: str,
    group: Group = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.energy.cross_energy`` of the rows of all ranks, the same on each.

    Where ranks differ in the gradient of what they get, it must be summed over them first
    (``distributed.sum_gradients``).

    Args:
        u: [N, D] rows of this rank.
        v: [N, D] rows; None stands for u.
        samples: the sum of N over ranks, at least 2.
        eps: positive, added to variances.
        standardize: whether features are divided by their standard deviations.
        backend: ``"triton"`` multiplies bfloat16 and float16 rows as they are on a CUDA device,
            like its kernels. All other products are of the accumulation type.
        group: process group, the default one for None.

    Returns:
        energy [] and diagonal [D], differentiable, and the [D] factors that u's features were
        multiplied by, all float64 for float64 rows, else float32.
    """
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (u, v) if x is not None]
    half = backend == "triton" and u.is_cuda and u.dtype in (torch.bfloat16, torch.float16)
    # Sums over ranks end a graph anyway: without this, panels of many shapes would be compiled.
    apply = torch.compiler.disable(_ReducedEnergy.apply)  # type: ignore[no-untyped-call]
    energy, diagonal, factor = apply(u, v, samples, eps, standardize, needs, half, group)
    return energy, diagonal, factor


class _ReducedEnergy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor | None,
        samples: int,
        eps: float,
        standardize: bool,
        needs: list[bool],
        half: bool,
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor]:
        xs = [x for x in (u, v) if x is not None]
        with torch.autocast(u.device.type, enabled=False):
            moments = _moments(xs, samples, eps, standardize, group)
            rows = [_standardise(x, moment) for x, moment in zip(xs, moments, strict=True)]
            if half:
                rows = [x.to(u.dtype) for x in rows]
            diagonal, squares, sums = _walk(rows, samples, moments.dtype, needs, group)
        ctx.samples, ctx.standardize = samples, standardize
        ctx.save_for_backward(u, v, moments, diagonal, squares, *sums)
        factor = moments[0, 2].clone()
        ctx.mark_non_differentiable(factor)
        return squares[0].sum(), diagonal, factor

    @staticmethod
    def backward(
        ctx: Any, denergy: Tensor, ddiagonal: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        u, v, moments, diagonal, squares, *sums = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None]
        for i, (x, other) in enumerate(((u, v), (v, u))):
            if ctx.needs_input_grad[i]:
                grads[i] = _reduced_energy_bwd(
                    denergy, ddiagonal, x, other, moments if i == 0 else moments.flip(0), diagonal,
                    squares[i], sums[i], ctx.samples, ctx.standardize,
                )  # fmt: skip
        return *grads, None, None, None, None, None, None


@operator_without_derivative
def _reduced_energy_bwd(
    denergy: Tensor,
    ddiagonal: Tensor,
    x: Tensor,
    other: Tensor | None,
    moments: Tensor,
    diagonal: Tensor,
    squares: Tensor,
    h: Tensor,
    samples: int,
    standardize: bool,
) -> Tensor:
    """Return the gradient of x. It is an operator so that a second derivative raises."""
    sides = 2 if other is None else 1
    scale = 2 * sides / samples * denergy  # of h
    along = sides / samples * ddiagonal  # of the other batch's rows
    unit = _standardise(x, moments[0])
    dunit = along * (unit if other is None else _standardise(other, moments[1]))
    dunit.addcmul_(h, scale)
    if standardize:  # dunit is centred over all ranks, to rounding
        dunit.addcmul_(unit, scale * squares + along * diagonal, value=-1)
    return dunit.mul_(moments[0, 2]).to(x.dtype)


def _moments(
    xs: list[Tensor],
    samples: int,
    eps: float,
    standardize: bool,
    group: Group,
) -> Tensor:
    """Return mean, what rounding left out of it, and factor, [len(xs), 3, D].

    The second pass takes differences from the mean, so that one far from zero costs no digits.
    """
    dtype = torch.promote_types(xs[0].dtype, torch.float32)
    mean = torch.stack([x.mean(0, dtype=dtype) for x in xs]).mul_(len(xs[0]) / samples)
    dist.all_reduce(mean, group=group)
    centred = [x - mean[i] for i, x in enumerate(xs)]
    sums = torch.stack([torch.stack([x.mean(0), x.square().mean(0)]) for x in centred], 1)
    sums.mul_(len(xs[0]) / samples)
    dist.all_reduce(sums, group=group)
    rest, squares = sums
    variance = (squares - rest.square()).clamp_(min=0)
    if standardize:
        factor = (variance + eps).rsqrt_()
    else:  # a power of two for all features, with which their products fit in float16
        exponent = variance.max().clamp(min=eps).log2().div(2).round()
        factor = torch.exp2(-exponent).expand_as(variance)
    return torch.stack([mean, rest, factor], 1)


def _standardise(x: Tensor, moments: Tensor) -> Tensor:
    mean, rest, factor = moments
    return (x - mean).sub_(rest).mul_(factor)


def _walk(
    rows: list[Tensor],
    samples: int,
    dtype: torch.dtype,
    needs: list[bool],
    group: Group,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the diagonal [D], sums of squares of c's rows and columns, and h where it is needed.

    For one batch, rows and columns are the same.
    """
    (N, D), symmetric = rows[0].shape, len(rows) == 1
    u, v = rows[0], rows[-1]
    diagonal = torch.empty(D, dtype=dtype, device=u.device)
    squares = diagonal.new_zeros(len(rows), D)
    sums = [diagonal.new_zeros(N if need else 0, D) for need in needs]
    for here, c, under_way in _panels(u, v, samples, dtype, group):
        under_way.wait()
        right = slice(here.start if symmetric else 0, D)  # the columns of c
        inside = c.diagonal(here.start - right.start)
        diagonal[here] = inside
        inside.zero_()
        # Columns beyond the diagonal block stand for rows that will not come.
        below = slice(here.stop if symmetric else 0, D)
        columns = c[:, below.start - right.start :]
        squares[0, here] += c.square().sum(1)
        squares[-1, below] += columns.square().sum(0)
        if needs[0]:
            sums[0][:, here] += _product(v[:, right], c.T.to(v.dtype), dtype)
        if needs[-1]:
            sums[-1][:, below] += _product(u[:, here], columns.to(u.dtype), dtype)
    return diagonal, squares, sums


def _panels(
    u: Tensor, v: Tensor, samples: int, dtype: torch.dtype, group: Group
) -> Iterator[tuple[slice, Tensor, dist.Work]]:
    """Yield panels of c and what waits for their sum over ranks, with the next one on its way."""
    D = u.shape[1]
    height = max(1, min(-(-D // 4), PANEL // D))
    sent: list[tuple[slice, Tensor, dist.Work]] = []
    for start in range(0, D, height):
        here = slice(start, min(start + height, D))
        c = _product(u[:, here].T, v[:, start:] if u is v else v, dtype).div_(samples)
        sent.append((here, c, dist.all_reduce(c, group=group, async_op=True)))
        if len(sent) == 2:
            yield sent.pop(0)
    yield sent.pop()


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return x @ y if x.dtype == dtype else torch.mm(x, y, out_dtype=dtype)
