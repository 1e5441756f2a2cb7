"""Decoupled contrastive learning: NT-Xent without the positive in its own denominator."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastssl.checks import (
    check_choice,
    check_gather,
    check_ids,
    check_no_tangents,
    check_number,
    check_ranks,
    check_scalar,
    check_views,
)
from fastssl.distributed import EXCHANGES, Group
from fastssl.losses.common_type import in_common_type
from fastssl.losses.module import LossModule
from fastssl.losses.multiplier import scale_of
from fastssl.losses.negatives import negatives_lse
from fastssl.losses.terms import REDUCTIONS, reduced
from fastssl.losses.unit_rows import cosines_of, unit_rows
from fastssl.ops import backend as backends


def dcl(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    reduction: str = "mean",
    ids: Tensor | None = None,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Decoupled contrastive learning: NT-Xent whose positive is not in its own denominator.

    Equivalent to::

        z = normalize(cat([z0, z1]))                               # 2N views
        logits = z @ z.T / temperature
        positive = logits[arange(2 * N), arange(2 * N).roll(N)]
        hidden = sample[:, None] == sample                         # sample = arange(N).repeat(2)
        loss = (logits.masked_fill(hidden, -inf).logsumexp(1) - weight * positive).mean()

    Yeh et al., "Decoupled Contrastive Learning", 2022, equations 5 and 6. N must be at least 2:
    without negatives the loss is minus infinity.

    Args:
        z0: [N, D] embeddings of one view, float64, float32, bfloat16 or float16; need not be
            normalised. A row of length at most 1e-12 counts as zero and gets no gradient.
        z1: [N, D] embeddings of the other view, on z0's device; two types count as the wider one.
        temperature: Positive number, or a tensor of one element, which then gets its gradient.
        weight_fn: Called with the unit rows of both views [N, D], then with them exchanged; returns
            the weights [N], floating point, of the positives of its first argument's rows. None:
            weights of 1. Over several ranks the rows are those of all, and only
            ``mises_fisher_weights``, which look at no row but at the cosines of the positives, go
            with a ring.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the 2N terms, those of z0's rows first.
        ids: [N] integers naming the samples. Rows of samples with the same id are not each other's
            negatives. A row that is left without negatives has a term of minus infinity.
        gather_distributed: Whether the batch is that of all ranks of a process group, of which
            z0 and z1 are a part; without one it makes no difference.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"`` for all at once, ``"ring"`` for
            one rank's after another's, or ``"auto"``, by their size.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        0-dim loss, or [2N] terms; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> z0, z1 = torch.randn(2, 8, 16)
        >>> dcl(z0, z1, temperature=0.1).shape
        torch.Size([])
    """
    ranks = check_ranks("z0", z0, gather_distributed, group)
    check_views(z0=z0, z1=z1)
    check_scalar("temperature", temperature, z0)
    check_no_tangents(z0, z1, temperature)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("exchange", exchange, EXCHANGES)
    if ids is not None:
        check_ids("ids", ids, z0)
    _check_weight_fn(weight_fn)
    if len(z0) == 1 and ranks is None:
        raise ValueError("z0 and z1 must have at least 2 rows, or there are no negatives, got 1")
    of_cosines = getattr(weight_fn, "func", weight_fn) is mises_fisher_weights
    if weight_fn is not None and not of_cosines:
        if exchange == "ring":
            raise ValueError(
                "exchange must be 'auto' or 'gather' with a weight_fn of the rows of all ranks, "
                "got 'ring'"
            )
        exchange = "gather"
    z0, z1 = in_common_type(z0, z1)
    scale = scale_of(temperature, z0)
    backend = backends.resolve(backend, z0)
    terms = negatives_lse(z0, z1, scale, ids, ranks, exchange, backend)
    if weight_fn is not None:
        cosines = cosines_of(z0, z1)
        u0, u1 = unit_rows(z0), unit_rows(z1)
        if ranks is not None:
            if of_cosines:  # rows of one feature have them too
                u0, u1 = cosines[:, None], torch.ones_like(cosines[:, None])
            u0, u1 = ranks.gather(u0), ranks.gather(u1)
        own = slice(None) if ranks is None else ranks.own
        weights = [_weights(weight_fn, a, b) for a, b in ((u0, u1), (u1, u0))]
        terms = terms + (1 - torch.cat([x[own] for x in weights])) * scale * cosines.repeat(2)
    return reduced(terms, reduction, ranks)


class DCLLoss(LossModule):
    """Decoupled contrastive learning as a module, in the place of lightly's ``DCLLoss``.

    Args:
        temperature: Positive number, or a tensor of one element; a Parameter is learned.
        weight_fn: Called with the unit rows of both views [N, D], then with them exchanged; returns
            the weights [N] of the positives of its first argument's rows. None: weights of 1.
        gather_distributed: Whether the batch is that of all ranks of a process group; without one
            it makes no difference.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: temperature is neither a number nor a tensor, or weight_fn not callable.
        ValueError: temperature or backend is not accepted, or gather_distributed where
            torch.distributed is not available.

    Example:
        >>> criterion = DCLLoss()
        >>> z0, z1 = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z0, z1).backward()
    """

    temperature: float | Tensor
    weight_fn: Callable[[Tensor, Tensor], Tensor] | None
    gather_distributed: bool
    group: Group
    exchange: str
    backend: str

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
        *,
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_scalar("temperature", temperature)
        check_gather("gather_distributed", gather_distributed)
        check_choice("exchange", exchange, EXCHANGES)
        _check_weight_fn(weight_fn)
        super().__init__(
            temperature=temperature,
            weight_fn=weight_fn,
            gather_distributed=gather_distributed,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(self, out0: Tensor, out1: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return ``functional.dcl`` of two views' embeddings [N, D], with ids [N] or none."""
        return dcl(
            out0,
            out1,
            self.temperature,
            weight_fn=self.weight_fn,
            ids=ids,
            gather_distributed=self.gather_distributed,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )


def mises_fisher_weights(z0: Tensor, z1: Tensor, sigma: float = 0.5) -> Tensor:
    """Weights of weighted DCL: small for positives that are close already; mean 1, no gradient.

    Yeh et al. 2022, section 3.3: 2 - N softmax(<z0_i, z1_i> / sigma).

    Args:
        z0: [N, D] unit rows of one view.
        z1: [N, D] unit rows of the other.
        sigma: Positive number; large ones make all weights alike.

    Returns:
        [N], of z0's dtype.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit.
    """
    check_views(z0=z0, z1=z1)
    check_number("sigma", sigma, z0, positive=True)
    cosines = (z0.detach() * z1.detach()).sum(1)
    return 2 - len(z0) * torch.softmax(cosines / sigma, 0)


class DCLWLoss(DCLLoss):
    """DCL with the weights of ``mises_fisher_weights``, in the place of lightly's ``DCLWLoss``.

    Args:
        temperature: Positive number, or a tensor of one element; a Parameter is learned.
        sigma: Positive number; large ones make all weights alike.
        gather_distributed: Whether the batch is that of all ranks of a process group; without one
            it makes no difference.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: temperature is neither a number nor a tensor, or sigma is not a number.
        ValueError: temperature, sigma or backend is not accepted, or gather_distributed where
            torch.distributed is not available.

    Example:
        >>> criterion = DCLWLoss(sigma=0.5)
        >>> z0, z1 = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z0, z1).backward()
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_number("sigma", sigma, positive=True)
        weight_fn = partial(mises_fisher_weights, sigma=sigma)
        super().__init__(
            temperature,
            weight_fn,
            gather_distributed,
            group=group,
            exchange=exchange,
            backend=backend,
        )


def _check_weight_fn(weight_fn: object) -> None:
    if weight_fn is not None and not callable(weight_fn):
        raise TypeError(f"weight_fn must be callable or None, got {type(weight_fn).__name__}")


def _weights(weight_fn: Callable[[Tensor, Tensor], Tensor], u0: Tensor, u1: Tensor) -> Tensor:
    """What weight_fn returns for unit rows [N, D], in their type."""
    weights = weight_fn(u0, u1)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weight_fn must return a floating-point tensor, got {got}")
    if weights.shape != u0.shape[:1] or weights.device != u0.device:
        raise ValueError(
            f"weight_fn must return shape ({len(u0)},) on {u0.device}, one weight for each row, "
            f"got {tuple(weights.shape)} on {weights.device}"
        )
    return weights.to(u0.dtype)
