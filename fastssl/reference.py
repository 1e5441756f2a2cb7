"""Every loss as its paper writes it, in plain PyTorch: the oracle.

Tests, benchmarks and ``fastssl verify`` compare with these functions. They build the matrices that
the fused losses avoid, run in the dtype of their inputs and have derivatives of every order.
"""

import math
from collections.abc import Callable, Sequence

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
    pair: Tensor | None = None,
) -> Tensor:
    """L_i = log sum_j exp(scale cos(q_i, k_j)) over the j whose id is not row i's, or -inf.

    With a pair [M, D], less the score scale cos(q_i, pair_i).
    """
    logits = scale * normalize(q) @ normalize(k).T
    if pair is not None:
        logits = logits - scale * (normalize(q) * normalize(pair)).sum(1, keepdim=True)
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


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, equation 4): which of the keys is the positive?

    See ``fastssl.functional.info_nce`` for the arguments.
    """
    n = len(query)
    query, positive = normalize(query), normalize(positive)
    if negatives is None:
        hidden = _equal(ids, ids) & ~torch.eye(n, dtype=torch.bool, device=query.device)
        logits = (query @ positive.T / temperature).masked_fill(hidden, -torch.inf)
        target = torch.arange(n, device=query.device)
    else:
        pattern = "nd,kd->nk" if negatives.dim() == 2 else "nd,nkd->nk"
        others = torch.einsum(pattern, query, normalize(negatives)) / temperature
        others = others.masked_fill(_equal(ids, negative_ids), -torch.inf)
        pairs = (query * positive).sum(1, keepdim=True) / temperature
        logits = torch.cat([pairs, others], 1)
        target = torch.zeros(n, dtype=torch.int64, device=query.device)
    return torch.nn.functional.cross_entropy(logits, target, reduction=reduction)


def _equal(row_ids: Tensor | None, col_ids: Tensor | None) -> Tensor:
    """Which ids are the same: [rows, columns], or for ids [N, K] of each row's own columns that."""
    if row_ids is None or col_ids is None:
        return torch.zeros((), dtype=torch.bool)
    return row_ids[:, None] == (col_ids if col_ids.dim() == 2 else col_ids[None, :])


def dcl(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    reduction: str = "mean",
    ids: Tensor | None = None,
) -> Tensor:
    """Decoupled contrastive learning (Yeh et al. 2022, equations 5 and 6) over the 2N views.

    See ``fastssl.functional.dcl`` for the arguments.
    """
    n = len(z0)
    z0, z1 = normalize(z0), normalize(z1)
    z = torch.cat([z0, z1])
    ids = (torch.arange(n, device=z.device) if ids is None else ids).repeat(2)
    logits = z @ z.T / temperature
    positive = logits.diagonal(n).repeat(2)
    if weight_fn is not None:
        positive = positive * torch.cat([weight_fn(z0, z1), weight_fn(z1, z0)])
    terms = logits.masked_fill(ids[:, None] == ids, -torch.inf).logsumexp(1) - positive
    return {"mean": terms.mean(), "sum": terms.sum(), "none": terms}[reduction]


def mises_fisher_weights(z0: Tensor, z1: Tensor, sigma: float = 0.5) -> Tensor:
    """Weights of the weighted loss (Yeh et al. 2022, section 3.3), less for close pairs."""
    return 2 - len(z0) * torch.softmax((z0 * z1).sum(1).detach() / sigma, 0)


def supcon(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, equation 2), averaged over anchors.

    See ``fastssl.functional.supcon`` for the arguments.
    """
    b, v = features.shape[:2]
    rows = features.reshape(b, v, -1).transpose(0, 1).flatten(0, 1)  # [V B, D], view by view
    if labels is not None:
        mask = labels.reshape(-1, 1) == labels.reshape(1, -1)
    elif mask is None:
        mask = torch.eye(b, device=rows.device)
    anchors = b if contrast_mode == "one" else b * v
    itself = torch.eye(b * v, dtype=torch.bool, device=rows.device)[:anchors]
    weights = mask.to(rows.dtype).repeat(v, v)[:anchors].masked_fill(itself, 0)

    logits = (rows[:anchors] @ rows.T / temperature).masked_fill(itself, -torch.inf)
    log_prob = logits - logits.logsumexp(1, keepdim=True)
    seen = (weights * log_prob.masked_fill(itself, 0)).sum(1)
    count = weights.sum(1)
    terms = torch.where(count > 0, -seen / count.masked_fill(count == 0, 1), 0)
    return (temperature / base_temperature) * terms.mean()


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1.0,
    logit_bias: float | Tensor | None = None,
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """Contrastive language-image loss (Radford et al. 2021, figure 3): mean of both directions.

    See ``fastssl.functional.clip`` for the arguments.
    """
    logits = logit_scale * image_features @ text_features.T
    logits = logits if logit_bias is None else logits + logit_bias
    pairs = torch.arange(len(logits), device=logits.device)
    hidden = _equal(ids, ids) & (pairs[:, None] != pairs)
    logits = logits.masked_fill(hidden, -torch.inf)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


def distill_clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    dist_image_features: Tensor,
    dist_text_features: Tensor,
    dist_logit_scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """CLIP's loss, and the cross-entropy of its softmaxes against a teacher's, in both directions.

    See ``fastssl.functional.distill_clip`` for the arguments.
    """
    logits = logit_scale * image_features @ text_features.T
    with torch.no_grad():
        teacher = dist_logit_scale * dist_image_features @ dist_text_features.T
    images = soft_cross_entropy(logits, teacher.softmax(1), 1.0)
    texts = soft_cross_entropy(logits.T, teacher.T.softmax(1), 1.0)
    contrastive = clip(image_features, text_features, logit_scale)
    return contrastive, (images.mean() + texts.mean()) / 2


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1.0,
    logit_bias: float | Tensor | None = None,
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """Sigmoid loss (Zhai et al. 2023, equation 1), summed over texts and averaged over images.

    See ``fastssl.functional.siglip`` for the arguments.
    """
    n = len(image_features)
    logits = logit_scale * image_features @ text_features.T
    logits = logits if logit_bias is None else logits + logit_bias
    pairs = torch.eye(n, dtype=torch.bool, device=logits.device)
    terms = -torch.nn.functional.logsigmoid(torch.where(pairs, logits, -logits))
    return terms.masked_fill(_equal(ids, ids) & ~pairs, 0).sum() / n


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


def negative_cosine_similarity(x0: Tensor, x1: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Negative cosine similarity of SimSiam (Chen & He 2021, equation 1), averaged over pairs.

    See ``fastssl.functional.negative_cosine_similarity`` for the arguments.
    """
    units = []
    for x in (x0, x1):
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        seen = norm > 0  # a row of zeros gets no gradient, and none of 1 / 0 either
        rnorm = 1 / torch.where(seen, norm.clamp_min(eps), 1)
        units.append(x * torch.where(seen, rnorm, 0))
    return -(units[0] * units[1]).sum(dim).mean()


def sinkhorn_knopp(
    scores: Tensor, epsilon: float = 0.05, iterations: int = 3, *, hard: bool = False
) -> Tensor:
    """Codes of SwAV (Caron et al. 2020, equation 5): rows sum to 1, prototypes are used alike.

    See ``fastssl.functional.sinkhorn_knopp`` for the arguments. The steps are those of the authors'
    code, on logarithms, so that no score is too large, and of differences from the largest score,
    so that what all have in common costs no digits.
    """
    b, k = scores.shape
    log_q = (scores - scores.detach().max()) / epsilon
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
