"""CLIP's loss: images find their texts, and texts their images."""

from typing import Any

import torch
from torch import Tensor

from fastssl.checks import check_choice, check_count, check_ranks
from fastssl.distributed import EXCHANGES, Group
from fastssl.losses.common_type import in_common_type
from fastssl.losses.image_text import check_pairs, spans_ranks
from fastssl.losses.module import LossModule
from fastssl.losses.multiplier import multiplier
from fastssl.losses.negatives import samples_seen
from fastssl.losses.terms import cross_entropy, reduced
from fastssl.ops import backend as backends
from fastssl.ops.pairs import pair_lse
from fastssl.ops.ring import ring_lse


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
        text_features: [N, D], on image_features' device; two types count as the wider one.
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
    check_pairs(image_features, text_features, logit_scale, logit_bias, ids)
    check_choice("exchange", exchange, EXCHANGES)
    image, text = in_common_type(image_features, text_features)
    backend = backends.resolve(backend, image)
    scale = multiplier(logit_scale, image)
    plain: dict[str, Any] = {"normalize": False, "backend": backend}
    if ranks is None:
        rows, cols = pair_lse(image, text, scale, ids, columns=True, **plain)
    elif ranks.in_ring(exchange, text):
        pairs = scale * (image.to(scale.dtype) * text).sum(1)
        seen = samples_seen(image, ids)
        rows, cols = ring_lse(image, text, scale, pairs, **seen, ranks=ranks, columns=True, **plain)
    else:
        images, texts = ranks.gather(image), ranks.gather(text)
        ids = None if ids is None else ranks.gather(ids)
        rows, _ = pair_lse(image, texts, scale, ids, first=ranks.own.start, **plain)
        cols, _ = pair_lse(text, images, scale, ids, first=ranks.own.start, **plain)
    terms = torch.cat([cross_entropy(rows), cross_entropy(cols)])
    loss = reduced(terms, "mean", ranks)
    return loss if logit_bias is None else loss + 0 * multiplier(logit_bias, image)


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
            gather_distributed=spans_ranks(self.world_size, self.group),
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss
