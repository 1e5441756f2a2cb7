"""Every loss as its paper writes it, in plain PyTorch: the oracle.

Tests, benchmarks and ``fastssl verify`` compare with these functions. They build the matrices that
the fused losses avoid, run in the dtype of their inputs and have derivatives of every order.
"""

import math
from collections.abc import Sequence

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


def sinkhorn_knopp(
    scores: Tensor, epsilon: float = 0.05, iterations: int = 3, *, hard: bool = False
) -> Tensor:
    """Codes of SwAV (Caron et al. 2020, equation 5): rows sum to 1, prototypes are used alike.

    See ``fastssl.functional.sinkhorn_knopp`` for the arguments. The steps are those of the authors'
    code, on logarithms, so that no score is too large.
    """
    b, k = scores.shape
    log_q = scores / epsilon
    log_q = log_q - torch.logsumexp(log_q, (0, 1))
    for _ in range(iterations):
        log_q = log_q - torch.logsumexp(log_q, 0) - math.log(k)
        log_q = log_q - torch.logsumexp(log_q, 1, keepdim=True) - math.log(b)
    codes = torch.exp(log_q + math.log(b))
    return torch.nn.functional.one_hot(codes.argmax(1), k).to(codes.dtype) if hard else codes


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    """-sum_k t_bk log softmax(logits_b / temperature)_k of each row, [B]."""
    return -(targets * torch.log_softmax(logits / temperature, 1)).sum(1)


def swav(
    high_resolution_outputs: Sequence[Tensor],
    low_resolution_outputs: Sequence[Tensor] = (),
    queue_outputs: Sequence[Tensor] | None = None,
    *,
    temperature: float = 0.1,
    iterations: int = 3,
    epsilon: float = 0.05,
) -> Tensor:
    """Swapped prediction of SwAV (Caron et al. 2020, equations 1 and 2), over all pairs of crops.

    See ``fastssl.functional.swav`` for the arguments.
    """
    crops = [*high_resolution_outputs, *low_resolution_outputs]
    terms = []
    for i, scores in enumerate(high_resolution_outputs):
        with torch.no_grad():
            rows = scores if queue_outputs is None else torch.cat([scores, queue_outputs[i]])
            codes = sinkhorn_knopp(rows, epsilon, iterations)[: len(scores)]
        others = [crop for j, crop in enumerate(crops) if j != i]
        terms += [soft_cross_entropy(crop, codes, temperature).mean() for crop in others]
    return torch.stack(terms).mean()
