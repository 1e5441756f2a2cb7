"""InfoNCE: each query finds its positive among keys, those of a batch, a queue or its own."""

import torch
from torch import Tensor

from fastssl.checks import (
    check_choice,
    check_device,
    check_embeddings,
    check_ids,
    check_no_tangents,
    check_ranks,
    check_scalar,
    check_views,
)
from fastssl.distributed import EXCHANGES, Group
from fastssl.losses.common_type import in_common_type
from fastssl.losses.module import LossModule
from fastssl.losses.multiplier import scale_of
from fastssl.losses.negatives import samples_seen
from fastssl.losses.terms import REDUCTIONS, cross_entropy, reduced
from fastssl.losses.unit_rows import cosines_of
from fastssl.ops import backend as backends
from fastssl.ops.pairs import pair_lse
from fastssl.ops.ring import ring_lse
from fastssl.ops.similarity import similarity_lse


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE of queries against keys, without the matrix of their similarities.

    Equivalent to::

        q, p, n = normalize(query), normalize(positive), normalize(negatives)
        logits = cat([(q * p).sum(1, keepdim=True), q @ n.T], 1) / temperature
        loss = cross_entropy(logits, zeros(N))                    # with negatives [K, D]
        loss = cross_entropy(q @ p.T / temperature, arange(N))    # without

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
    equation 4; with a queue of negatives, He et al., "Momentum Contrast for Unsupervised Visual
    Representation Learning", 2020, equation 1. Negatives that need no gradient are not kept for the
    backward pass: a queue may be changed before it.

    Args:
        query: [N, D] embeddings, float64, float32, bfloat16 or float16; need not be normalised. A
            row of length at most 1e-12 counts as zero and gets no gradient.
        positive: [N, D] the queries' positive keys, on query's device; of several types all count
            as the widest.
        negatives: [K, D] keys that are negatives of every query; [N, K, D], each query's own, which
            are held at unit length beside the input; or None, where a query's negatives are the
            other queries' positives.
        temperature: Positive number, or a tensor of one element, which then gets its gradient. A
            tensor's value is not looked at outside a CPU, since that would stop the device.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the N terms.
        ids: [N] integers naming the queries' samples. A key of the same sample is not a negative.
        negative_ids: [K] or [N, K] integers naming the negatives' samples: given with ids where
            there are negatives, and only there.
        gather_distributed: Whether the batch is that of all ranks of a process group, of which
            these queries are a part; without one it makes no difference. Without negatives the
            positives of all ranks are keys. Negatives [K, D] are to be the same on every rank, as
            a queue of all ranks' keys is: with negatives the reduction alone is over the ranks.
        group: The process group; None for the default one.
        exchange: How positives of other ranks come here: ``"gather"`` for all at once, ``"ring"``
            for one rank's after another's, or ``"auto"``, by their size.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``. A query's own negatives are multiplied by
            PyTorch on either.

    Returns:
        0-dim loss, or [N] terms; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> query, positive = torch.randn(2, 8, 16)
        >>> info_nce(query, positive, torch.randn(100, 16)).shape
        torch.Size([])
    """
    ranks = check_ranks("query", query, gather_distributed, group)
    check_views(query=query, positive=positive)
    check_scalar("temperature", temperature, query)
    check_no_tangents(query, positive, negatives, temperature)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("exchange", exchange, EXCHANGES)
    if ids is not None:
        check_ids("ids", ids, query)
    if negatives is None:
        if negative_ids is not None:
            raise ValueError("negative_ids need negatives, got None")
        query, positive = in_common_type(query, positive)
    else:
        _check_negatives(negatives, query, ids, negative_ids)
        query, positive, negatives = in_common_type(query, positive, negatives)
    backend = backends.resolve(backend, query)
    scale = scale_of(temperature, query)
    if negatives is None:
        if ranks is None:
            lse, _ = pair_lse(query, positive, scale, ids, backend=backend)
        elif ranks.in_ring(exchange, positive):
            pairs = scale * cosines_of(query, positive)
            lse, _ = ring_lse(
                query,
                positive,
                scale,
                pairs,
                **samples_seen(query, ids),
                ranks=ranks,
                backend=backend,
            )
        else:
            keys, ids = ranks.gather(positive), None if ids is None else ranks.gather(ids)
            lse, _ = pair_lse(query, keys, scale, ids, first=ranks.own.start, backend=backend)
        return reduced(cross_entropy(lse), reduction, ranks)

    if negatives.dim() == 2:
        lse = similarity_lse(
            query, negatives, scale, ids, negative_ids, pair=positive, backend=backend
        )
    else:
        cosines = cosines_of(query, positive)
        own = scale * (cosines_of(query[:, None], negatives) - cosines[:, None])
        alone = None
        if ids is not None and negative_ids is not None:
            hidden = ids[:, None] == negative_ids
            alone = hidden.all(1)  # of which the gradient of a log-sum-exp would be NaN
            own = own.masked_fill(hidden & ~alone[:, None], -torch.inf)
        # Relative to the largest, so that the weights, exp(own - lse), sum to 1 to the last digit.
        top = own.detach().amax(1, keepdim=True)
        lse = (own - top).logsumexp(1) + top[:, 0]
        lse = lse if alone is None else lse.masked_fill(alone, -torch.inf)
    return reduced(cross_entropy(lse), reduction, ranks)


class InfoNCELoss(LossModule):
    """InfoNCE as a module: queries against positives and, with MoCo, a queue of negatives.

    Args:
        temperature: Positive number, or a tensor of one element; a Parameter is learned.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        gather_distributed: Whether the batch is that of all ranks of a process group, as in
            ``functional.info_nce``; without one it makes no difference.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: temperature is neither a number nor a tensor.
        ValueError: temperature, reduction or backend is not accepted.

    Example:
        >>> criterion = InfoNCELoss()
        >>> query, positive = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(query, positive, torch.randn(100, 16)).backward()
    """

    temperature: float | Tensor
    reduction: str
    gather_distributed: bool
    group: Group
    exchange: str
    backend: str

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        *,
        gather_distributed: bool = False,
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_scalar("temperature", temperature)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("exchange", exchange, EXCHANGES)
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            gather_distributed=gather_distributed,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(
        self,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor | None = None,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> Tensor:
        """Return ``functional.info_nce`` of queries and positives [N, D] and negatives."""
        return info_nce(
            query,
            positive,
            negatives,
            self.temperature,
            reduction=self.reduction,
            ids=ids,
            negative_ids=negative_ids,
            gather_distributed=self.gather_distributed,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )


def _check_negatives(
    negatives: Tensor, query: Tensor, ids: Tensor | None, negative_ids: Tensor | None
) -> None:
    """Accept keys [K, D] or [N, K, D] for queries [N, D], with ids of both or of neither."""
    n, d = query.shape
    check_embeddings("negatives", negatives, positions=True)
    shared = negatives.dim() == 2
    if negatives.shape[-1] != d or not (shared or (negatives.dim() == 3 and len(negatives) == n)):
        raise ValueError(
            f"negatives must have shape (K, {d}) or ({n}, K, {d}) for queries of shape "
            f"{(n, d)}, got {tuple(negatives.shape)}"
        )
    check_device("negatives", negatives, "query", query)
    if (ids is None) != (negative_ids is None):
        given, missing = (
            ("ids", "negative_ids") if negative_ids is None else ("negative_ids", "ids")
        )
        raise ValueError(f"{given} with negatives need {missing} too, got None")
    if negative_ids is not None:
        check_ids("negative_ids", negative_ids, negatives, dims=negatives.dim() - 1)
