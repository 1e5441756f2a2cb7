"""Barlow Twins: views agree in each feature, and no feature repeats another."""

from torch import Tensor

from fastssl.checks import (
    check_choice,
    check_gather,
    check_no_tangents,
    check_number,
    check_ranks,
    check_views,
)
from fastssl.distributed import Group, sum_gradients
from fastssl.losses.common_type import in_common_type
from fastssl.losses.module import LossModule
from fastssl.losses.whole_batch import STATISTICS_EXCHANGES, of_whole_batch
from fastssl.ops import backend as backends


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 5e-3,
    *,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Redundancy reduction of Barlow Twins, without the D x D cross-correlation matrix.

    Equivalent to::

        a = batch_norm(z_a, None, None, training=True, eps=eps)
        b = batch_norm(z_b, None, None, training=True, eps=eps)
        c = a.T @ b / N                                                     # D x D
        on, off = c.diagonal(), c[~eye(D, dtype=bool)]
        loss = (1 - on).square().sum() + lambda_param * off.square().sum()

    Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", 2021,
    equations 1 and 2. Where the batch is small beside D, N x N products give the same sums.

    Args:
        z_a: [N, D] projections of one view, float64, float32, bfloat16 or float16, N at least 2.
        z_b: [N, D] projections of the other view, on z_a's device; of two types both count as
            the wider.
        lambda_param: Weight of the squares off the diagonal.
        gather_distributed: Whether statistics are those of the rows of all ranks. Without a process
            group it makes no difference.
        group: Process group, the default one for None.
        exchange: ``"gather"`` sends the rows to all ranks, ``"reduce"`` adds up panels of the D x D
            matrix over ranks; ``"auto"`` sends less.
        eps: Positive number added to each feature's variance, the biased one of the batch.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        0-dim loss, summed over features; float64 for float64 projections, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit; statistics need two samples.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> barlow_twins(z_a, z_b).shape
        torch.Size([])
    """
    ranks = check_ranks("z_a", z_a, gather_distributed, group)
    check_views(z_a=z_a, z_b=z_b, rows=1 if ranks else 2)
    check_number("lambda_param", lambda_param, z_a)
    check_number("eps", eps, z_a, positive=True)
    check_no_tangents(z_a, z_b)
    check_choice("exchange", exchange, STATISTICS_EXCHANGES)
    z_a, z_b = in_common_type(z_a, z_b)
    backend = backends.resolve(backend, z_a)
    z_a, z_b, _, energy_of = of_whole_batch(z_a, z_b, ranks, exchange, backend)
    energy, diagonal, _ = energy_of(z_a, z_b, eps=eps, standardize=True)
    loss = (1 - diagonal).square().sum() + lambda_param * energy
    return sum_gradients(loss, group) if ranks else loss


class BarlowTwinsLoss(LossModule):
    """Barlow Twins as a module, in the place of lightly's ``BarlowTwinsLoss``.

    Args:
        lambda_param: Weight of the squares off the diagonal.
        gather_distributed: Whether the batch is that of all ranks. Without a process group it
            makes no difference.
        group: Process group, the default one for None.
        exchange: ``"gather"`` sends the rows to all ranks, ``"reduce"`` adds up panels of the D x D
            matrix over ranks; ``"auto"`` sends less.
        eps: Positive number added to each feature's variance.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: lambda_param or eps is not a number.
        ValueError: lambda_param, eps, exchange or backend is not accepted, or gather_distributed
            where torch.distributed is not available.

    Example:
        >>> criterion = BarlowTwinsLoss()
        >>> z_a, z_b = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z_a, z_b).backward()
    """

    lambda_param: float
    gather_distributed: bool
    group: Group
    exchange: str
    eps: float
    backend: str

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool = False,
        *,
        group: Group = None,
        exchange: str = "auto",
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        check_number("lambda_param", lambda_param)
        check_number("eps", eps, positive=True)
        check_gather("gather_distributed", gather_distributed)
        check_choice("exchange", exchange, STATISTICS_EXCHANGES)
        super().__init__(
            lambda_param=lambda_param,
            gather_distributed=gather_distributed,
            group=group,
            exchange=exchange,
            eps=eps,
            backend=backend,
        )

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return ``functional.barlow_twins`` of two views' projections [N, D]."""
        return barlow_twins(
            z_a,
            z_b,
            self.lambda_param,
            gather_distributed=self.gather_distributed,
            group=self.group,
            exchange=self.exchange,
            eps=self.eps,
            backend=self.backend,
        )
