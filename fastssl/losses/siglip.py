"""SigLIP's loss: whether an image and a text belong together, pair by pair."""

from torch import Tensor

from fastssl.checks import check_choice, check_count, check_ranks
from fastssl.distributed import EXCHANGES, Group
from fastssl.losses.common_type import in_common_type
from fastssl.losses.image_text import check_pairs, spans_ranks
from fastssl.losses.module import LossModule
from fastssl.losses.multiplier import multiplier
from fastssl.ops import backend as backends
from fastssl.ops.ring import ring_sigmoid_sum
from fastssl.ops.sigmoid import sigmoid_sum

OPEN_CLIP_EXCHANGES = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}


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
        text_features: [N, D], on image_features' device; two types count as the wider one.
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
    check_pairs(image_features, text_features, logit_scale, logit_bias, ids)
    check_choice("exchange", exchange, EXCHANGES)
    image, text = in_common_type(image_features, text_features)
    backend = backends.resolve(backend, image)
    scale = multiplier(logit_scale, image)
    bias = multiplier(0.0 if logit_bias is None else logit_bias, image)
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
        chunk_size: Accepted for open_clip's sake: a number of images or None. No more than a tile
            of scores is ever held.
        group: The process group; None for the default one.
        exchange: How rows of other ranks come here: ``"gather"``, ``"ring"`` or ``"auto"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError: world_size or chunk_size is not a whole number.
        ValueError: dist_impl, world_size, chunk_size, exchange or backend is not accepted.

    Example:
        >>> criterion = SigLipLoss()
        >>> image, text = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(image, text, logit_scale=1.0, logit_bias=0.0).backward()
    """

    cache_labels: bool
    rank: int
    world_size: int
    dist_impl: str | None
    chunk_size: int | None
    group: Group
    exchange: str
    backend: str

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = 0,
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
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        super().__init__(
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
            dist_impl=dist_impl,
            chunk_size=chunk_size,
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
            gather_distributed=spans_ranks(self.world_size, self.group),
            group=self.group,
            exchange=OPEN_CLIP_EXCHANGES[self.dist_impl] if self.dist_impl else self.exchange,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss
