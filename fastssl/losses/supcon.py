"""Supervised contrastive learning: rows of a class are each other's positives."""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.checks import (
    check_choice,
    check_embeddings,
    check_no_tangents,
    check_number,
    check_ranks,
    check_scalar,
)
from fastssl.distributed import EXCHANGES, Group, Ranks
from fastssl.losses.module import LossModule
from fastssl.losses.multiplier import scale_of
from fastssl.losses.terms import reduced
from fastssl.ops import backend as backends
from fastssl.ops.ring import class_sums, ring_class_sums, ring_lse
from fastssl.ops.similarity import class_lse, similarity_lse

CONTRAST_MODES = ("all", "one")


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
        labels: [B] or [B, 1] real numbers of any type, on features' device or a CPU; rows with the
            same label are positives of each other. NaN is no label's same, not even its own.
        mask: [B, B] weights in place of labels, finite and none negative, on features' device or a
            CPU: how much of a positive sample j is for sample i. They are constants, and must not
            require a gradient. Without labels and mask the positives are the other views, as in
            SimCLR.
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
    features = features.flatten(2)
    B, V = features.shape[:2]
    nameless = None
    if labels is not None:
        labels = labels.detach().reshape(-1).to(features.device)
        nameless = labels.isnan() if labels.is_floating_point() else None
        labels = _as_integers(labels)
    scale = scale_of(temperature, features)
    chosen = backends.resolve(backend, features)
    if ranks is not None:
        if mask is not None:
            raise ValueError(
                "mask must be None over several ranks: labels tell positives on other ranks too"
            )
        terms = _class_lse(features, labels, contrast_mode, scale, ranks, exchange, chosen)
    else:
        if mask is not None:
            if backend == "triton":
                raise RuntimeError(
                    "backend='triton' cannot run here: its kernels take labels, not a mask; use "
                    "labels, or backend='torch' or 'auto'"
                )
            mask, chosen = mask.to(features.device), "torch"
        # View by view: weights of either sign alternate, and their sums stay small on the way.
        rows = features.transpose(0, 1).flatten(0, 1)
        classes = torch.arange(B, device=rows.device) if labels is None else labels
        terms = class_lse(rows, scale, classes.repeat(V), mask, backend=chosen)
        terms = terms.view(V, B).T
        if contrast_mode == "one":
            terms = terms[:, :1]
    if nameless is not None:
        terms = terms.reshape(B, -1).masked_fill(nameless[:, None], 0)
    return reduced(terms, "mean", ranks) / (scale * base_temperature)


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
        sums = ring_class_sums(sums, labels, ranks)
    else:
        sums = class_sums(labels, sums, ranks.gather(labels))
    sums = sums.repeat_interleave(len(q) // B, 0)
    count = sums[:, -1] - 1
    mean = (sums[:, :-1] - q) / count.clamp_min(1)[:, None]  # of the row's positives

    plain: dict[str, Any] = {"normalize": False, "backend": backend}
    if in_ring:
        ids: dict[str, Any] = {"row_ids": row_ids, "col_ids": place, "everywhere": False}
        positive = scale * (q * mean).sum(1)
        lse, _ = ring_lse(q, rows, scale, positive, **ids, ranks=ranks.times(V), **plain)
    else:
        row_ids = row_ids + V * ranks.own.start
        col_ids = torch.arange(V * len(every), device=rows.device)
        keys = every.flatten(0, 1)
        lse = similarity_lse(q, keys, scale, row_ids, col_ids, pair=mean, **plain)
    return lse.masked_fill(count < 1, 0)


def _as_integers(labels: Tensor) -> Tensor:
    """Integers that are equal where labels are, but for those of NaN."""
    if labels.is_floating_point():
        labels = labels.to(torch.promote_types(labels.dtype, torch.float32))
        bits = torch.int64 if labels.dtype == torch.float64 else torch.int32
        return (labels + 0.0).view(bits)  # -0 is 0
    return labels.to(torch.uint8) if labels.dtype == torch.bool else labels


def _check_features(features: Tensor, labels: Tensor | None, mask: Tensor | None) -> None:
    """Accept features [B, V, ...] with labels, a mask or neither."""
    check_embeddings("features", features, positions=True)
    for name, x in (("labels", labels), ("mask", mask)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(x).__name__}")
        if x.is_complex():
            raise TypeError(f"{name} must be real, got {str(x.dtype).removeprefix('torch.')}")
        if x.device.type != "cpu" and x.device != features.device:
            raise ValueError(
                f"{name} must be on a CPU or the features' device {features.device}, got {x.device}"
            )
    if features.dim() < 3:
        raise ValueError(
            f"features must have shape (B, V, ...), V views of B samples, got "
            f"{tuple(features.shape)}"
        )
    if labels is not None and mask is not None:
        raise ValueError("labels and mask must not be given both")
    if labels is not None and labels.shape not in ((len(features),), (len(features), 1)):
        raise ValueError(
            f"labels must have shape {(len(features),)}, one for each sample, "
            f"got {tuple(labels.shape)}"
        )
    if mask is not None:
        if mask.shape != (len(features), len(features)):
            raise ValueError(
                f"mask must have shape {(len(features), len(features))}, one weight for each pair "
                f"of samples, got {tuple(mask.shape)}"
            )
        if mask.requires_grad:
            raise ValueError("mask must not require a gradient, since it gets none: detach it")
        # As for scalars, to read values elsewhere would stop the device.
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = mask[~((mask >= 0) & (mask < torch.inf))]
            if len(wrong):
                raise ValueError(
                    f"mask must hold finite weights, none negative, got {wrong[0].item()}"
                )
