"""Losses by which views agree while no feature repeats another, without the D x D matrix."""

import torch
from torch import Tensor

from fastssl.distributed import gather_rows
from fastssl.losses.checks import check_number, check_views
from fastssl.losses.module import LossModule
from fastssl.ops import backend as backends
from fastssl.ops.energy import cross_energy


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 5e-3,
    *,
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
        z_b: [N, D] projections of the other view, of z_a's dtype and device.
        lambda_param: Weight of the squares off the diagonal.
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
    check_views(z_a=z_a, z_b=z_b, rows=2)
    check_number("lambda_param", lambda_param)
    check_number("eps", eps, positive=True)
    backend = backends.resolve(backend, z_a)
    energy, diagonal, _ = cross_energy(z_a, z_b, eps=eps, standardize=True, backend=backend)
    return (1 - diagonal).square().sum() + lambda_param * energy


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    *,
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
        z_b: [N, ..., D] projections of the other view, of z_a's dtype and device.
        lambda_param: Weight of the invariance term.
        mu_param: Weight of the variance term.
        nu_param: Weight of the covariance term.
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
    check_views(z_a=z_a, z_b=z_b, rows=2, positions=True)
    for name, weight in (
        ("lambda_param", lambda_param),
        ("mu_param", mu_param),
        ("nu_param", nu_param),
    ):
        check_number(name, weight)
    check_number("eps", eps, positive=True)
    backend = backends.resolve(backend, z_a)
    N, D = len(z_a), z_a.shape[-1]

    stds, energies = [], []
    for z in (z_a, z_b):
        for position in [z] if z.dim() == 2 else z.reshape(N, -1, D).unbind(1):
            energy, diagonal, factor = cross_energy(
                position, eps=eps, standardize=False, backend=backend
            )
            unbiased = N / (N - 1) / factor[0].square()  # the factor is a power of two
            stds.append((unbiased * diagonal + eps).sqrt())
            energies.append(unbiased.square() * energy)
    positions = len(energies) // 2
    difference = z_a.to(stds[0].dtype) - z_b.to(stds[0].dtype)
    invariance = (difference * difference).mean()
    variance = torch.relu(1 - torch.stack(stds)).mean()
    covariance = torch.stack(energies).sum() / (positions * D)
    return lambda_param * invariance + mu_param * variance + nu_param * covariance


class BarlowTwinsLoss(LossModule):
    """Barlow Twins as a module, in the place of lightly's ``BarlowTwinsLoss``.

    Args:
        lambda_param: Weight of the squares off the diagonal.
        gather_distributed: Whether the batch is that of all ranks of the default process group;
            without one it makes no difference.
        eps: Positive number added to each feature's variance.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: lambda_param or eps is not a number.
        ValueError: lambda_param, eps or backend is not accepted.

    Example:
        >>> criterion = BarlowTwinsLoss()
        >>> z_a, z_b = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z_a, z_b).backward()
    """

    lambda_param: float
    gather_distributed: bool
    eps: float
    backend: str

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool = False,
        *,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        check_number("lambda_param", lambda_param)
        check_number("eps", eps, positive=True)
        super().__init__(
            lambda_param=lambda_param,
            gather_distributed=gather_distributed,
            eps=eps,
            backend=backend,
        )

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return ``functional.barlow_twins`` of two views' projections [N, D]."""
        if self.gather_distributed:
            (z_a, _), (z_b, _) = gather_rows(z_a), gather_rows(z_b)
        return barlow_twins(z_a, z_b, self.lambda_param, eps=self.eps, backend=self.backend)


class VICRegLoss(LossModule):
    """VICReg as a module, in the place of lightly's ``VICRegLoss``.

    Args:
        lambda_param: Weight of the invariance term.
        mu_param: Weight of the variance term.
        nu_param: Weight of the covariance term.
        gather_distributed: Whether the batch is that of all ranks of the default process group;
            without one it makes no difference.
        eps: Positive number added to each feature's variance.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: A weight or eps is not a number.
        ValueError: A weight, eps or backend is not accepted.

    Example:
        >>> criterion = VICRegLoss()
        >>> z_a, z_b = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z_a, z_b).backward()
    """

    lambda_param: float
    mu_param: float
    nu_param: float
    gather_distributed: bool
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
        backend: str = "auto",
    ) -> None:
        check_number("lambda_param", lambda_param)
        check_number("mu_param", mu_param)
        check_number("nu_param", nu_param)
        check_number("eps", eps, positive=True)
        super().__init__(
            lambda_param=lambda_param,
            mu_param=mu_param,
            nu_param=nu_param,
            gather_distributed=gather_distributed,
            eps=eps,
            backend=backend,
        )

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return ``functional.vicreg`` of two views' projections [N, ..., D]."""
        if self.gather_distributed:
            (z_a, _), (z_b, _) = gather_rows(z_a), gather_rows(z_b)
        weights = (self.lambda_param, self.mu_param, self.nu_param)
        return vicreg(z_a, z_b, *weights, eps=self.eps, backend=self.backend)
