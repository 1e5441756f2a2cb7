"""What stands in for open_clip's losses; CLIP's with captions and with a teacher."""

import math
from typing import cast

from torch import Tensor, nn

from fastssl.checks import check_count, check_number
from fastssl.distributed import Group
from fastssl.losses.clip import ClipLoss
from fastssl.losses.distill_clip import distill_clip
from fastssl.losses.image_text import spans_ranks
from fastssl.losses.siglip import SigLipLoss


class CoCaLoss(ClipLoss):
    """CLIP's loss and that of captions as a module, in the place of open_clip's ``CoCaLoss``.

    Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models", 2022, equation 4.
    The captions' loss is PyTorch's own.

    Args:
        caption_loss_weight: What the captions' loss is multiplied by.
        clip_loss_weight: What the contrastive loss is multiplied by; with 0 it is not computed.
        pad_id: The label of places in a caption that do not count.
        local_loss: See ``ClipLoss``, as for all that follow.
        gather_with_grad: See there.
        cache_labels: See there.
        rank: See there.
        world_size: See there.
        use_horovod: See there.
        group: See there.
        exchange: See there.
        backend: See there.

    Raises:
        TypeError: A weight is not a number, or pad_id or world_size not a whole number.
        ValueError: An argument's value is not accepted.

    Example:
        >>> criterion = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        >>> image, text = torch.randn(2, 8, 16, requires_grad=True)
        >>> logits, labels = torch.randn(8, 5, 100), torch.randint(100, (8, 5))
        >>> sum(criterion(image, text, logits, labels, logit_scale=1.0)).backward()
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
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
        check_number("caption_loss_weight", caption_loss_weight)
        check_number("clip_loss_weight", clip_loss_weight)
        check_count("pad_id", pad_id, -math.inf)
        super().__init__(
            local_loss,
            gather_with_grad,
            cache_labels,
            rank,
            world_size,
            use_horovod,
            group=group,
            exchange=exchange,
            backend=backend,
        )
        self.caption_loss_weight, self.clip_loss_weight = caption_loss_weight, clip_loss_weight
        self._shown = ("caption_loss_weight", "clip_loss_weight", *self._shown)
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Return the weighted contrastive loss and captions' loss; in a dict with output_dict.

        Args:
            image_features: [N, D], as ``functional.clip`` takes them.
            text_features: [N, D].
            logits: [N, L, V] scores of the V tokens at each of the L places of a caption.
            labels: [N, L] integers, the tokens.
            logit_scale: Positive number, or a tensor of one element, which then gets its gradient.
            output_dict: Whether to name the two.

        Returns:
            Two 0-dim losses, as ``contrastive_loss`` and ``caption_loss`` with output_dict.
        """
        contrastive = logits.new_zeros(())
        if self.clip_loss_weight:
            loss = super().forward(image_features, text_features, logit_scale)
            contrastive = self.clip_loss_weight * cast(Tensor, loss)
        captions = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": captions}
        return contrastive, captions


class DistillClipLoss(ClipLoss):
    """CLIP's loss with a teacher as a module, in the place of open_clip's ``DistillClipLoss``.

    Args:
        local_loss: See ``ClipLoss``, as for all that follow.
        gather_with_grad: See there.
        cache_labels: See there.
        rank: See there.
        world_size: See there.
        use_horovod: See there.
        group: See there.
        exchange: ``"gather"`` or ``"auto"``: rows of other ranks come all at once.
        backend: See there.

    Raises:
        TypeError: world_size is not a whole number.
        ValueError: An argument's value is not accepted.

    Example:
        >>> criterion = DistillClipLoss()
        >>> image, text = torch.randn(2, 8, 16, requires_grad=True)
        >>> teacher = torch.nn.functional.normalize(torch.randn(2, 8, 32), dim=2)
        >>> sum(criterion(image, text, 1.0, *teacher, 100.0)).backward()
    """

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
        if exchange == "ring":
            raise ValueError("exchange must be 'auto' or 'gather' with a teacher, got 'ring'")
        super().__init__(
            local_loss,
            gather_with_grad,
            cache_labels,
            rank,
            world_size,
            use_horovod,
            group=group,
            exchange=exchange,
            backend=backend,
        )

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Return ``functional.distill_clip`` of features [N, D] and the teacher's [N, E].

        With output_dict the two are ``contrastive_loss`` and ``distill_loss``.
        """
        losses = distill_clip(
            image_features,
            text_features,
            logit_scale,
            dist_image_features,
            dist_text_features,
            dist_logit_scale,
            gather_distributed=spans_ranks(self.world_size, self.group),
            group=self.group,
            backend=self.backend,
        )
        names = "contrastive_loss", "distill_loss"
        return dict(zip(names, losses, strict=True)) if output_dict else losses


REPLACEMENTS = {"open_clip.loss": (ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss)}
