"""VICReg: views agree, while features keep their variance and share no covariance."""

import torch
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


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    *,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
    eps: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
    """Variance, invariance and covariance of VICReg, without the D x D covariance matrices.

    Equivalent, for z_a and z_b of shape [N, D], to::

        loss = lambda_param * mse_loss(z_a, z_b)
        for z in (z_a, z_b):
            std = (z.var(0) + eps).sqrt()
            loss += mu_param * relu(1 - std).mean() / 2
            loss += nu_param * cov(z.T)[~eye(D, dtype=bool)].square().sum() / D

    Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
    Learning", 2022, equations 1 to 6; the variance term is halved as in the authors' code.

    Args:
        z_a: [N, ..., D] projections of one view, float64, float32, bfloat16 or float16, N at least
            2. Of dimensions in the middle, each position has its own statistics over the batch, and
            the terms are means over positions.
        z_b: [N, ..., D] projections of the other view, on z_a's device; of two types both count as
            the wider.
        lambda_param: Weight of the invariance term.
        mu_param: Weight of the variance term.
        nu_param: Weight of the covariance term.
        gather_distributed: Whether statistics are those of the rows of all ranks. Without a process
            group it makes no difference.
        group: Process group, the default one for None.
        exchange: ``"gather"`` sends the rows to all ranks, ``"reduce"`` adds up panels of the D x D
            matrix over ranks; ``"auto"`` sends less.
        eps: Positive number added to each feature's variance, the unbiased one of the batch.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        0-dim loss; float64 for float64 projections, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit; statistics need two samples.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> vicreg(z_a, z_b).shape
        torch.Size([])
    """
    ranks = check_ranks("z_a", z_a, gather_distributed, group)
    check_views(z_a=z_a, z_b=z_b, rows=1 if ranks else 2, positions=True)
    for name, weight in (
        ("lambda_param", lambda_param),
        ("mu_param", mu_param),
        ("nu_param", nu_param),
    ):
        check_number(name, weight, z_a)
    check_number("eps", eps, z_a, positive=True)
    check_no_tangents(z_a, z_b)
    check_choice("exchange", exchange, STATISTICS_EXCHANGES)
    z_a, z_b = in_common_type(z_a, z_b)
    backend = backends.resolve(backend, z_a)
    all_a, all_b, N, energy_of = of_whole_batch(z_a, z_b, ranks, exchange, backend)
    D = z_a.shape[-1]

    stds, energies = [], []
    for z in (all_a, all_b):
        for position in [z] if z.dim() == 2 else z.reshape(len(z), -1, D).unbind(1):
            energy, diagonal, factor = energy_of(position, eps=eps, standardize=False)
            unbiased = N / (N - 1) / factor[0].square()  # the factor is a power of two
            stds.append((unbiased * diagonal + eps).sqrt())
            energies.append(unbiased.square() * energy)
    positions = len(energies) // 2
    variance = torch.relu(1 - torch.stack(stds)).mean()
    covariance = torch.stack(energies).sum() / (positions * D)
    loss = mu_param * variance + nu_param * covariance
    difference = z_a.to(loss.dtype) - z_b.to(loss.dtype)
    invariance = (difference * difference).mean()
    if ranks:
        loss = sum_gradients(loss, group)
        invariance = invariance * (len(z_a) / ranks.mean_size)
    return lambda_param * invariance + loss


class VICRegLoss(LossModule):
    """VICReg as a module, in the place of lightly's ``VICRegLoss``.

    Args:
        lambda_param: Weight of the invariance term.
        mu_param: Weight of the variance term.
        nu_param: Weight of the covariance term.
        gather_distributed: Whether the batch is that of all ranks. Without a process group it
            makes no difference.
        group: Process group, the default one for None.
        exchange: ``"gather"`` sends the rows to all ranks, ``"reduce"`` adds up panels of the D x D
            matrix over ranks; ``"auto"`` sends less.
        eps: Positive number added to each feature's variance.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: A weight or eps is not a number.
        ValueError: A weight, eps, exchange or backend is not accepted, or gather_distributed where
            torch.distributed is not available.

    Example:
        >>> criterion = VICRegLoss()
        >>> z_a, z_b = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z_a, z_b).backward()
    """

    lambda_param: float
    mu_param: float
    nu_param: float
    gather_distributed: bool
    group: Group
    exchange: str
    eps: float
    backend: str

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
        *,
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_number("lambda_param", lambda_param)
        check_number("mu_param", mu_param)
        check_number("nu_param", nu_param)
        check_number("eps", eps, positive=True)
        check_gather("gather_distributed", gather_distributed)
        check_choice("exchange", exchange, STATISTICS_EXCHANGES)
        super().__init__(
            lambda_param=lambda_param,
            mu_param=mu_param,
            nu_param=nu_param,
            gather_distributed=gather_distributed,
            group=group,
            exchange=exchange,
            eps=eps,
            backend=backend,
        )

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return ``functional.vicreg`` of two views' projections [N, ..., D]."""
        return vicreg(
            z_a,
            z_b,
            self.lambda_param,
            self.mu_param,
            self.nu_param,
            gather_distributed=self.gather_distributed,
            group=self.group,
            exchange=self.exchange,
            eps=self.eps,
            backend=self.backend,
        )
