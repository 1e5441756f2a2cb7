"""Every loss as its paper writes it, in plain PyTorch: the oracle.

Tests, benchmarks and ``fastssl verify`` compare with these functions. They build the matrices that
the fused losses avoid, run in the dtype of their inputs and have derivatives of every order.
"""

import torch
from torch import Tensor

NORM_EPS = 1e-12


def normalize(x: Tensor) -> Tensor:
    """Scale rows to unit length; one of length at most 1e-12 becomes zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rnorm = torch.where(norm > NORM_EPS, 1 / norm.clamp_min(NORM_EPS), torch.zeros_like(norm))
    return x * rnorm


def similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> Tensor:
    """L_i = log sum_j exp(scale cos(q_i, k_j)) over the j whose id is not row i's, or -inf."""
    logits = scale * normalize(q) @ normalize(k).T
    if row_ids is not None and col_ids is not None:
        logits = logits.masked_fill(row_ids[:, None] == col_ids[None, :], -torch.inf)
    return torch.logsumexp(logits, dim=1)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    ids: Tensor | None = None,
) -> Tensor:
    """NT-Xent of SimCLR (Chen et al. 2020, equation 1), averaged over the 2N views.

    See ``fastssl.functional.nt_xent`` for the arguments; this is the same function with the 2N x 2N
    matrix in memory.
    """
    n = len(z0)
    z = normalize(torch.cat([z0, z1]))
    views = torch.arange(2 * n, device=z.device)
    positive = (views + n) % (2 * n)

    hidden = views[:, None] == views[None, :]
    if ids is not None:
        ids = torch.cat([ids, ids])
        hidden = (ids[:, None] == ids[None, :]) & (views[None, :] != positive[:, None])
    logits = (z @ z.T / temperature).masked_fill(hidden, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, positive, reduction=reduction)


def standardize(z: Tensor, eps: float) -> Tensor:
    """Put each feature at mean 0 and, but for eps, biased variance 1 over the batch."""
    return (z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt()


def barlow_twins(
    z_a: Tensor, z_b: Tensor, lambda_param: float = 5e-3, *, eps: float = 1e-5
) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, equation 1), summed over features.

    See ``fastssl.functional.barlow_twins`` for the arguments; this is the same function with the
    D x D matrix in memory.
    """
    n, d = z_a.shape
    c = standardize(z_a, eps).T @ standardize(z_b, eps) / n
    invariance = (1 - c.diagonal()).square().sum()
    redundancy = (c * (1 - torch.eye(d, dtype=c.dtype, device=c.device))).square().sum()
    return invariance + lambda_param * redundancy


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    *,
    eps: float = 1e-4,
) -> Tensor:
    """VICReg (Bardes et al. 2022, equations 1 to 6), its variance term halved as in their code.

    See ``fastssl.functional.vicreg`` for the arguments; this is the same function with the D x D
    matrices in memory.
    """
    n, d = len(z_a), z_a.shape[-1]
    off_diagonal = 1 - torch.eye(d, dtype=z_a.dtype, device=z_a.device)
    variance = covariance = torch.zeros((), dtype=z_a.dtype, device=z_a.device)
    for z in (z_a, z_b):
        std = (z.var(0) + eps).sqrt()
        variance = variance + torch.relu(1 - std).mean() / 2
        centred = z - z.mean(0)
        matrices = torch.einsum("n...i,n...j->...ij", centred, centred) / (n - 1)
        covariance = covariance + (matrices * off_diagonal).square().sum((-2, -1)).mean() / d
    invariance = (z_a - z_b).square().mean()
    return lambda_param * invariance + mu_param * variance + nu_param * covariance
