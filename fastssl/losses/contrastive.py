"""Losses that contrast positives with negatives by a softmax or sigmoid over similarities."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.checks import (
    check_choice,
    check_count,
    check_embeddings,
    check_ids,
    check_like,
    check_no_tangents,
    check_number,
    check_ranks,
    check_scalar,
    check_views,
)
from fastssl.distributed import EXCHANGES, Group, Ranks, world_size
from fastssl.losses.module import LossModule
from fastssl.memory_bank import MemoryBankModule
from fastssl.ops import backend as backends
from fastssl.ops.pairs import pair_lse
from fastssl.ops.ring import class_sums, ring_class_sums, ring_lse, ring_sigmoid_sum
from fastssl.ops.sigmoid import sigmoid_sum
from fastssl.ops.similarity import class_lse, similarity_lse
from fastssl.ops.two_views import two_view_lse

REDUCTIONS = ("mean", "sum", "none")
CONTRAST_MODES = ("all", "one")
OPEN_CLIP_EXCHANGES = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    ids: Tensor | None = None,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Normalised temperature-scaled cross-entropy of SimCLR, without the 2N x 2N matrix.

    Equivalent to::

        z = normalize(cat([z0, z1]))                               # 2N views
        logits = (z @ z.T / temperature).fill_diagonal_(-inf)
        loss = cross_entropy(logits, arange(2 * N).roll(N))        # view i's positive is view i + N

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
    equation 1. The mean is over the 2N views; texts that sum over both views and divide by N report
    twice this value.

    Args:
        z0: [N, D] embeddings of one view, float64, float32, bfloat16 or float16; need not be
            normalised. A row of length at most 1e-12 counts as zero and gets no gradient.
        z1: [N, D] embeddings of the other view, of z0's dtype and device.
        temperature: Positive number, or a tensor of one element, which then gets its gradient. A
            tensor's value is not looked at outside a CPU, since that would stop the device.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the 2N terms, those of z0's rows first.
        ids: [N] integers naming the samples. Rows of samples with the same id are not each other's
            negatives; a row's positive stays.
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
        >>> nt_xent(z0, z1, temperature=0.1).shape
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
    backend = backends.resolve(backend, z0)
    lse = _negatives_lse(z0, z1, _scale(temperature, z0), ids, ranks, exchange, backend)
    return _reduced(_cross_entropy(lse), reduction, ranks)


class NTXentLoss(LossModule):
    """NT-Xent of SimCLR as a module, in the place of lightly's ``NTXentLoss``.

    With a memory bank it is MoCo's loss: out0's rows against their positives in out1 and the
    negatives in the bank, which takes out1's unit rows after each step (when out0 needs a
    gradient).

    Args:
        temperature: Positive number, or a tensor of one element; a Parameter is learned.
        memory_bank_size: (number of negatives, D); a number alone takes D from the first batch; 0
            for no memory bank.
        gather_distributed: Whether the batch is that of all ranks of a process group; without one
            it makes no difference.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: temperature is neither a number nor a tensor.
        ValueError: temperature, memory_bank_size, reduction or backend is not accepted.

    Example:
        >>> criterion = NTXentLoss(temperature=0.1)
        >>> z0, z1 = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(z0, z1).backward()
    """

    temperature: float | Tensor
    gather_distributed: bool
    reduction: str
    group: Group
    exchange: str
    backend: str

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_scalar("temperature", temperature)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("exchange", exchange, EXCHANGES)
        super().__init__(
            temperature=temperature,
            gather_distributed=gather_distributed,
            reduction=reduction,
            group=group,
            exchange=exchange,
            backend=backend,
        )
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed, group=group)

    def forward(self, out0: Tensor, out1: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the loss of two views' embeddings [N, D], with ids [N] as ``functional.nt_xent``.

        With a memory bank, whose rows have no ids, ids must be None.
        """
        if self.memory_bank.size[0]:
            if ids is not None:
                raise ValueError("ids must be None with a memory bank, whose rows have no ids")
            ranks = check_ranks("out0", out0, self.gather_distributed, self.group)
            check_views(out0=out0, out1=out1)
            bank = self.memory_bank.rows_for(out1)
            terms = info_nce(
                out0,
                out1,
                bank.to(out0.device, out0.dtype),
                self.temperature,
                reduction="none",
                backend=self.backend,
            )
            if out0.requires_grad:
                self.memory_bank.update(_unit(out1.detach()))
            return _reduced(terms, self.reduction, ranks)
        return nt_xent(
            out0,
            out1,
            self.temperature,
            reduction=self.reduction,
            ids=ids,
            gather_distributed=self.gather_distributed,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )


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
        positive: [N, D] the queries' positive keys, of query's dtype and device.
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
    backend = backends.resolve(backend, query)
    scale = _scale(temperature, query)
    if negatives is None:
        if negative_ids is not None:
            raise ValueError("negative_ids need negatives, got None")
        if ranks is None:
            lse, _ = pair_lse(query, positive, scale, ids, backend=backend)
        elif ranks.in_ring(exchange, positive):
            pairs = scale * _cosines(query, positive)
            lse, _ = ring_lse(
                query, positive, scale, pairs, **_samples(query, ids), ranks=ranks, backend=backend
            )
        else:
            keys, ids = ranks.gather(positive), None if ids is None else ranks.gather(ids)
            lse, _ = pair_lse(query, keys, scale, ids, first=ranks.own.start, backend=backend)
        return _reduced(_cross_entropy(lse), reduction, ranks)

    _check_negatives(negatives, query, ids, negative_ids)
    cosines = _cosines(query, positive)
    if negatives.dim() == 2:
        lse = similarity_lse(query, negatives, scale, ids, negative_ids, backend=backend)
        lse = lse - scale * cosines
    else:
        own = scale * (_cosines(query[:, None], negatives) - cosines[:, None])
        if ids is not None and negative_ids is not None:
            own = own.masked_fill(ids[:, None] == negative_ids, -torch.inf)
        # Relative to the largest, so that the weights, exp(own - lse), sum to 1 to the last digit.
        top = own.detach().amax(1, keepdim=True).clamp_min(torch.finfo(own.dtype).min)
        lse = (own - top).logsumexp(1) + top[:, 0]
    return _reduced(_cross_entropy(lse), reduction, ranks)


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
        z1: [N, D] embeddings of the other view, of z0's dtype and device.
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
    scale = _scale(temperature, z0)
    backend = backends.resolve(backend, z0)
    terms = _negatives_lse(z0, z1, scale, ids, ranks, exchange, backend)
    if weight_fn is not None:
        cosines = _cosines(z0, z1)
        u0, u1 = _unit(z0), _unit(z1)
        if ranks is not None:
            if of_cosines:  # rows of one feature have them too
                u0, u1 = cosines[:, None], torch.ones_like(cosines[:, None])
            u0, u1 = ranks.gather(u0), ranks.gather(u1)
        own = slice(None) if ranks is None else ranks.own
        weights = [_weights(weight_fn, a, b) for a, b in ((u0, u1), (u1, u0))]
        terms = terms + (1 - torch.cat([x[own] for x in weights])) * scale * cosines.repeat(2)
    return _reduced(terms, reduction, ranks)


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
        ValueError: temperature or backend is not accepted.

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
        ValueError: temperature, sigma or backend is not accepted.

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


def supcon(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
    *,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Supervised contrastive loss, without the VB x VB matrix.

    Equivalent to::

        z = cat(features.unbind(1))                                # V B rows, view by view
        logits = (z @ z.T / temperature).fill_diagonal_(-inf)
        log_prob = logits - logits.logsumexp(1, keepdim=True)
        positives = labels.repeat(V)[:, None] == labels.repeat(V)  # but not a row with itself
        terms = -(log_prob * positives).sum(1) / positives.sum(1)
        loss = temperature / base_temperature * terms.mean()

    Khosla et al., "Supervised Contrastive Learning", 2020, equation 2. Rows are multiplied as they
    are: normalise them first, as the paper does. A row without a positive contributes 0. Give
    duplicates one label: they are then positives.

    Args:
        features: [B, V, ...] embeddings of V views of B samples, float64, float32, bfloat16 or
            float16; dimensions after the second are flattened.
        labels: [B] or [B, 1] integers; rows with the same label are positives of each other.
        mask: [B, B] weights in place of labels, finite and none negative: how much of a positive
            sample j is for sample i. They are constants, and must not require a gradient.
            Without labels and mask the positives are the other views, as in SimCLR.
        temperature: Positive number, or a tensor of one element, which then gets its gradient.
        contrast_mode: ``"all"``: every row is an anchor; ``"one"``: those of the first view.
        base_temperature: Positive number that the loss is divided by, as temperature multiplies it.
        gather_distributed: Whether the batch is that of all ranks of a process group, of which
            these samples are a part; without one it makes no difference. Labels, not a mask, say
            there which samples are positives.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"`` for all at once, ``"ring"`` for
            one rank's after another's, or ``"auto"``, by their size.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; with a mask PyTorch does the work.

    Returns:
        0-dim loss, float64 for float64 embeddings, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit; labels and mask are both given.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> features = torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2)
        >>> supcon(features, labels=torch.arange(8) // 2).shape
        torch.Size([])
    """
    ranks = check_ranks("features", features, gather_distributed, group)
    _check_features(features, labels, mask)
    check_scalar("temperature", temperature, features)
    check_no_tangents(features, temperature)
    check_choice("contrast_mode", contrast_mode, CONTRAST_MODES)
    check_choice("exchange", exchange, EXCHANGES)
    check_number("base_temperature", base_temperature, features, positive=True)
    B, V = features.shape[:2]
    rows = features.reshape(B * V, -1)  # sample by sample
    scale = _scale(temperature, rows)
    chosen = backends.resolve(backend, rows)
    if ranks is not None:
        if mask is not None:
            raise ValueError(
                "mask must be None over several ranks: labels tell positives on other ranks too"
            )
        features = features.flatten(2)
        terms = _class_lse(features, labels, contrast_mode, scale, ranks, exchange, chosen)
        return _reduced(terms, "mean", ranks) / (scale * base_temperature)
    if labels is None:
        labels = torch.arange(B, device=rows.device)
    if mask is not None:
        if backend == "triton":
            raise RuntimeError(
                "backend='triton' cannot run here: its kernels take labels, not a mask; use "
                "labels, or backend='torch' or 'auto'"
            )
        chosen = "torch"
    classes = labels.reshape(-1).repeat_interleave(V)
    terms = class_lse(rows, scale, classes, mask, backend=chosen)
    if contrast_mode == "one":
        terms = terms[::V]
    return terms.mean() / (scale * base_temperature)


class SupConLoss(LossModule):
    """Supervised contrastive loss as a module, in the place of SupContrast's ``SupConLoss``.

    Args:
        temperature: Positive number, or a tensor of one element; a Parameter is learned.
        contrast_mode: ``"all"``: every row is an anchor; ``"one"``: those of the first view.
        base_temperature: Positive number that the loss is divided by, as temperature multiplies it.
        gather_distributed: Whether the batch is that of all ranks of a process group; without one
            it makes no difference.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: temperature or base_temperature is of another type.
        ValueError: An option's value is not accepted.

    Example:
        >>> criterion = SupConLoss()
        >>> features = torch.randn(8, 2, 16, requires_grad=True)
        >>> rows = torch.nn.functional.normalize(features, dim=2)
        >>> criterion(rows, labels=torch.arange(8) // 2).backward()
    """

    temperature: float | Tensor
    contrast_mode: str
    base_temperature: float
    gather_distributed: bool
    group: Group
    exchange: str
    backend: str

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        gather_distributed: bool = False,
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_scalar("temperature", temperature)
        check_choice("contrast_mode", contrast_mode, CONTRAST_MODES)
        check_choice("exchange", exchange, EXCHANGES)
        check_number("base_temperature", base_temperature, positive=True)
        super().__init__(
            temperature=temperature,
            contrast_mode=contrast_mode,
            base_temperature=base_temperature,
            gather_distributed=gather_distributed,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return ``functional.supcon`` of features [B, V, ...], and labels [B], mask or neither."""
        return supcon(
            features,
            labels,
            mask,
            self.temperature,
            self.contrast_mode,
            self.base_temperature,
            gather_distributed=self.gather_distributed,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1.0,
    logit_bias: float | Tensor | None = None,
    *,
    ids: Tensor | None = None,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Contrastive language-image loss, both directions from one pass, without the N x N matrix.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        loss = (cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
    figure 3. Rows are multiplied as they are: normalise them first, as the paper does.

    Args:
        image_features: [N, D], float64, float32, bfloat16 or float16.
        text_features: [N, D], of image_features' dtype and device.
        logit_scale: Positive number, or a tensor of one element, which then gets its gradient.
        logit_bias: Number or tensor of one element added to all logits. It changes neither the loss
            nor any gradient, and its own is 0.
        ids: [N] integers naming the pairs. Pairs with the same id are not each other's negatives.
        gather_distributed: Whether the batch is that of all ranks of a process group, of which
            these rows are a part; without one it makes no difference.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"`` for all at once, ``"ring"`` for
            one rank's after another's, or ``"auto"``, by their size.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        0-dim loss, float64 for float64 embeddings, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> clip(image, text, logit_scale=14.3).shape
        torch.Size([])
    """
    ranks = check_ranks("image_features", image_features, gather_distributed, group)
    _check_pairs(image_features, text_features, logit_scale, logit_bias, ids)
    check_choice("exchange", exchange, EXCHANGES)
    backend = backends.resolve(backend, image_features)
    image, text = image_features, text_features
    scale = _multiplier(logit_scale, image)
    plain: dict[str, Any] = {"normalize": False, "backend": backend}
    if ranks is None:
        rows, cols = pair_lse(image, text, scale, ids, columns=True, **plain)
    elif ranks.in_ring(exchange, text):
        pairs = scale * (image.to(scale.dtype) * text).sum(1)
        seen = _samples(image, ids)
        rows, cols = ring_lse(image, text, scale, pairs, **seen, ranks=ranks, columns=True, **plain)
    else:
        images, texts = ranks.gather(image), ranks.gather(text)
        ids = None if ids is None else ranks.gather(ids)
        rows, _ = pair_lse(image, texts, scale, ids, first=ranks.own.start, **plain)
        cols, _ = pair_lse(text, images, scale, ids, first=ranks.own.start, **plain)
    terms = torch.cat([_cross_entropy(rows), _cross_entropy(cols)])
    loss = _reduced(terms, "mean", ranks)
    return loss if logit_bias is None else loss + 0 * _multiplier(logit_bias, image_features)


class ClipLoss(LossModule):
    """Contrastive language-image loss as a module, in the place of open_clip's ``ClipLoss``.

    Args:
        local_loss: As gather_with_grad and cache_labels, accepted for open_clip's sake. Over
            several ranks each computes the terms of its own rows, gradients go to every rank that
            they belong to, and there are no labels to cache.
        gather_with_grad: See local_loss.
        cache_labels: See local_loss.
        rank: This process's rank; the process group knows it.
        world_size: Number of ranks; above 1 the batch is that of all ranks of the process group,
            which must have as many.
        use_horovod: Must be False.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: world_size is not a whole number.
        ValueError: use_horovod, world_size, exchange or backend is not accepted.

    Example:
        >>> criterion = ClipLoss()
        >>> image, text = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(image, text, logit_scale=1.0).backward()
    """

    local_loss: bool
    gather_with_grad: bool
    cache_labels: bool
    rank: int
    world_size: int
    group: Group
    exchange: str
    backend: str

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        if use_horovod:
            raise ValueError("use_horovod must be False: ranks are those of torch.distributed")
        check_choice("exchange", exchange, EXCHANGES)
        check_count("world_size", world_size, 1)
        super().__init__(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return ``functional.clip`` of features [N, D]; in a dict with output_dict."""
        loss = clip(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            ids=ids,
            gather_distributed=_spans_ranks(self.world_size, self.group),
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1.0,
    logit_bias: float | Tensor | None = None,
    *,
    ids: Tensor | None = None,
    gather_distributed: bool = False,
    group: Group = None,
    exchange: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Sigmoid loss for language-image pairs, without the N x N matrix.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        loss = -logsigmoid((2 * eye(N) - 1) * logits).sum() / N

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, equation 1. Rows are
    multiplied as they are: normalise them first, as the paper does. Gradients are computed with the
    loss, in three products of N x N x D, and kept, one matrix like each input that needs one.

    Args:
        image_features: [N, D], float64, float32, bfloat16 or float16.
        text_features: [N, D], of image_features' dtype and device.
        logit_scale: Positive number, or a tensor of one element, which then gets its gradient.
        logit_bias: Number, or a tensor of one element, which then gets its gradient; None for 0.
        ids: [N] integers naming the pairs. Pairs with the same id are not each other's negatives.
        gather_distributed: Whether the batch is that of all ranks of a process group, of which
            these rows are a part; without one it makes no difference.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"`` for all at once, ``"ring"`` for
            one rank's after another's, or ``"auto"``, by their size.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        0-dim loss, float64 for float64 embeddings, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> siglip(image, text, logit_scale=10.0, logit_bias=-10.0).shape
        torch.Size([])
    """
    ranks = check_ranks("image_features", image_features, gather_distributed, group)
    _check_pairs(image_features, text_features, logit_scale, logit_bias, ids)
    check_choice("exchange", exchange, EXCHANGES)
    image, text = image_features, text_features
    backend = backends.resolve(backend, image)
    scale = _multiplier(logit_scale, image)
    bias = _multiplier(0.0 if logit_bias is None else logit_bias, image)
    if ranks is None:
        return sigmoid_sum(image, text, scale, bias, ids, backend=backend) / len(image)
    if ranks.in_ring(exchange, text):
        total = ring_sigmoid_sum(image, text, scale, bias, ids, ranks, backend=backend)
    else:
        ids = None if ids is None else ranks.gather(ids)
        texts, first = ranks.gather(text), ranks.own.start
        total = sigmoid_sum(image, texts, scale, bias, ids, first=first, backend=backend)
    return total / ranks.mean_size


class SigLipLoss(LossModule):
    """Sigmoid language-image loss as a module, in the place of open_clip's ``SigLipLoss``.

    Args:
        cache_labels: Accepted for open_clip's sake: there are no labels to cache.
        rank: This process's rank; the process group knows it.
        world_size: Number of ranks; above 1 the batch is that of all ranks of the process group,
            which must have as many.
        dist_impl: open_clip's name for the exchange, in its place: ``"bidir"`` and ``"shift"`` for
            ``"ring"``, ``"reduce"`` and ``"gather"`` for ``"gather"``.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: world_size is not a whole number.
        ValueError: dist_impl, world_size, exchange or backend is not accepted.

    Example:
        >>> criterion = SigLipLoss()
        >>> image, text = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(image, text, logit_scale=1.0, logit_bias=0.0).backward()
    """

    cache_labels: bool
    rank: int
    world_size: int
    dist_impl: str | None
    group: Group
    exchange: str
    backend: str

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: Group = None,
        exchange: str = "auto",
        backend: str = "auto",
    ) -> None:
        if dist_impl is not None:
            check_choice("dist_impl", dist_impl, tuple(OPEN_CLIP_EXCHANGES))
            if exchange != "auto":
                raise ValueError(f"exchange must be 'auto' with dist_impl, got {exchange!r}")
        check_choice("exchange", exchange, EXCHANGES)
        check_count("world_size", world_size, 1)
        super().__init__(
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
            dist_impl=dist_impl,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return ``functional.siglip`` of features [N, D]; in a dict with output_dict."""
        loss = siglip(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            ids=ids,
            gather_distributed=_spans_ranks(self.world_size, self.group),
            group=self.group,
            exchange=OPEN_CLIP_EXCHANGES[self.dist_impl] if self.dist_impl else self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _scale(temperature: float | Tensor, z: Tensor) -> Tensor:
    """1 / temperature as a 0-dim tensor on z's device, in the type that losses of z have."""
    if isinstance(temperature, Tensor):
        return _multiplier(temperature, z).reciprocal()
    return _multiplier(1 / float(temperature), z)


def _multiplier(value: float | Tensor, z: Tensor) -> Tensor:
    """A value as a 0-dim tensor on z's device, in the type that losses of z have."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.reshape(()).to(z.device, dtype)
    return torch.full((), float(value), dtype=dtype, device=z.device)


def _samples(z: Tensor, ids: Tensor | None, views: int = 1) -> dict[str, Any]:
    """What ``ring_lse`` is told of rows: those of samples z [N, D], or with ids, are not seen."""
    samples = torch.arange(len(z), device=z.device) if ids is None else ids
    samples = samples.repeat(views)
    return {"row_ids": samples, "col_ids": samples, "everywhere": ids is not None}


def _negatives_lse(
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    ranks: Ranks | None,
    exchange: str,
    backend: str,
) -> Tensor:
    """``two_view_lse`` of this rank's rows, over the rows of all ranks."""
    if ranks is None:
        return two_view_lse(z0, z1, scale, ids, backend=backend)
    z, both = torch.cat([z0, z1]), ranks.times(2)
    pairs = (scale * _cosines(z0, z1)).repeat(2)
    if both.in_ring(exchange, z):
        seen = _samples(z0, ids, views=2)
        return ring_lse(z, z, scale, pairs, **seen, ranks=both, backend=backend)[0]
    keys = ranks.gather(torch.stack([z0, z1], 1)).flatten(0, 1)  # sample by sample
    samples = torch.arange(len(keys) // 2, device=z.device) if ids is None else ranks.gather(ids)
    row_ids, col_ids = samples[ranks.own].repeat(2), samples.repeat_interleave(2)
    return similarity_lse(z, keys, scale, row_ids, col_ids, backend=backend) - pairs


def _cross_entropy(lse: Tensor) -> Tensor:
    """log(1 + exp(lse)): the positive's own exponential is 1, relative to the positive."""
    return -nn.functional.logsigmoid(-lse)


def _class_lse(
    features: Tensor,
    labels: Tensor | None,
    contrast_mode: str,
    scale: Tensor,
    ranks: Ranks,
    exchange: str,
    backend: str,
) -> Tensor:
    """``class_lse`` of this rank's anchors, sample by sample, over the rows of all ranks."""
    B, V = features.shape[:2]
    rows = features.flatten(0, 1)
    place = torch.arange(len(rows), device=rows.device)
    anchors = slice(None, None, V if contrast_mode == "one" else 1)
    q, row_ids = rows[anchors], place[anchors]
    in_ring = ranks.times(V).in_ring(exchange, rows)
    every = features if in_ring else ranks.gather(features)

    # Positives have the same class: of their scores the sum is that with the sum of their rows.
    sums = nn.functional.pad(every.sum(1, dtype=scale.dtype), (0, 1), value=V)  # the last counts
    if labels is None:
        sums = sums if in_ring else sums[ranks.own]
    elif in_ring:
        sums = ring_class_sums(sums, labels.reshape(-1), ranks)
    else:
        classes = labels.reshape(-1)
        sums = class_sums(classes, sums, ranks.gather(classes))
    sums = sums.repeat_interleave(len(q) // B, 0)
    count = sums[:, -1] - 1
    positive = scale * (q * (sums[:, :-1] - q)).sum(1) / count.clamp_min(1)

    plain: dict[str, Any] = {"normalize": False, "backend": backend}
    if in_ring:
        ids: dict[str, Any] = {"row_ids": row_ids, "col_ids": place, "everywhere": False}
        lse, _ = ring_lse(q, rows, scale, positive, **ids, ranks=ranks.times(V), **plain)
    else:
        row_ids = row_ids + V * ranks.own.start
        col_ids = torch.arange(V * len(every), device=rows.device)
        lse = similarity_lse(q, every.flatten(0, 1), scale, row_ids, col_ids, **plain) - positive
    return lse.masked_fill(count < 1, 0)


def _reduced(terms: Tensor, reduction: str, ranks: Ranks | None) -> Tensor:
    """Mean, sum or all of the terms; with other ranks, of all of theirs, seen from this one."""
    if reduction == "none":
        return terms
    if ranks is None:
        return terms.mean() if reduction == "mean" else terms.sum()
    share = ranks.sizes[ranks.rank] / ranks.mean_size
    return share * terms.mean() if reduction == "mean" else len(ranks.sizes) * terms.sum()


def _unit(x: Tensor) -> Tensor:
    """Rows at unit length, in the type that losses have; one of length at most 1e-12 is zero."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # Over their largest entry first, so that no square over- or underflows.
        tiny = torch.finfo(x.dtype).tiny
        top = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1, keepdim=True).clamp_min(tiny)
        x = x / top
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        zero = norm * top <= 1e-12
        return (x / norm.masked_fill(zero, 1)).masked_fill(zero, 0)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine similarities of rows with rows, broadcast."""
    return (_unit(x) * _unit(y)).sum(-1)


def _spans_ranks(expected: int, group: Group) -> bool:
    """Whether a loss with this option is one over several ranks, which must be there."""
    if expected > 1 and world_size(group) != expected:
        raise ValueError(
            f"world_size must be that of the process group, {world_size(group)}, got {expected}"
        )
    return expected > 1


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
    check_like("negatives", negatives, "query", query)
    if (ids is None) != (negative_ids is None):
        given, missing = (
            ("ids", "negative_ids") if negative_ids is None else ("negative_ids", "ids")
        )
        raise ValueError(f"{given} with negatives need {missing} too, got None")
    if negative_ids is not None:
        check_ids("negative_ids", negative_ids, negatives, dims=negatives.dim() - 1)


def _check_features(features: Tensor, labels: Tensor | None, mask: Tensor | None) -> None:
    """Accept features [B, V, ...] with labels, a mask or neither."""
    check_embeddings("features", features, positions=True)
    if features.dim() < 3:
        raise ValueError(
            f"features must have shape (B, V, ...), V views of B samples, got "
            f"{tuple(features.shape)}"
        )
    if labels is not None and mask is not None:
        raise ValueError("labels and mask must not be given both")
    if labels is not None:
        if isinstance(labels, Tensor) and labels.shape[1:] == (1,):
            labels = labels[:, 0]
        check_ids("labels", labels, features)
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor or None, got {type(mask).__name__}")
        if mask.shape != (len(features), len(features)):
            raise ValueError(
                f"mask must have shape {(len(features), len(features))}, one weight for each pair "
                f"of samples, got {tuple(mask.shape)}"
            )
        if mask.device != features.device:
            raise ValueError(
                f"mask must be on the features' device {features.device}, got {mask.device}"
            )
        if mask.is_complex():
            raise TypeError(f"mask must be real, got {mask.dtype}")
        if mask.requires_grad:
            raise ValueError("mask must not require a gradient, since it gets none: detach it")
        # As for scalars, to read values elsewhere would stop the device.
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = mask[~((mask >= 0) & (mask < torch.inf))]
            if len(wrong):
                raise ValueError(
                    f"mask must hold finite weights, none negative, got {wrong[0].item()}"
                )


def _check_pairs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    ids: Tensor | None,
) -> None:
    check_views(image_features=image_features, text_features=text_features)
    check_scalar("logit_scale", logit_scale, image_features)
    if logit_bias is not None:
        check_scalar("logit_bias", logit_bias, image_features, positive=False)
    check_no_tangents(image_features, text_features, logit_scale, logit_bias)
    if ids is not None:
        check_ids("ids", ids, image_features)
