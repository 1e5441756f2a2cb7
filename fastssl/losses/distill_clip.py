"""CLIP's loss with a teacher, whose softmaxes over the batch the student learns to have."""

from typing import Any

import torch
from torch import Tensor

from fastssl.checks import (
    check_device,
    check_no_tangents,
    check_ranks,
    check_scalar,
    check_views,
)
from fastssl.distributed import Group
from fastssl.losses.common_type import in_common_type
from fastssl.losses.image_text import check_pairs
from fastssl.losses.multiplier import multiplier
from fastssl.losses.terms import cross_entropy, reduced
from fastssl.ops import backend as backends
from fastssl.ops.distill_clip import distill_clip_terms


def distill_clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    dist_image_features: Tensor,
    dist_text_features: Tensor,
    dist_logit_scale: float | Tensor,
    *,
    gather_distributed: bool = False,
    group: Group = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Contrastive language-image loss, and its distillation from a teacher, in one pass.

    Equivalent, without any of the N x N matrices, to::

        logits = logit_scale * image_features @ text_features.T
        teacher = dist_logit_scale * dist_image_features @ dist_text_features.T
        contrastive = clip(image_features, text_features, logit_scale)
        distillation = (
            cross_entropy(logits, teacher.softmax(1))
            + cross_entropy(logits.T, teacher.T.softmax(1))
        ) / 2

    Yang et al., "CLIP-KD: An Empirical Study of CLIP Model Distillation", 2024, contrastive
    relational distillation, but for the teacher's own entropy, which is constant. Rows are
    multiplied as they are: normalise them first. The contrastive term costs no product of its own.

    Args:
        image_features: [N, D], float64, float32, bfloat16 or float16.
        text_features: [N, D], on image_features' device; two types count as the wider one.
        logit_scale: Positive number, or a tensor of one element, which then gets its gradient.
        dist_image_features: [N, E] the teacher's, of any of these dtypes, that need no gradient.
        dist_text_features: [N, E], likewise.
        dist_logit_scale: Positive number, or a tensor of one element that needs no gradient.
        gather_distributed: Whether the batch is that of all ranks of a process group, of which
            these rows are a part; without one it makes no difference.
        group: The process group; None for the default one.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        The contrastive loss and the distillation, 0-dim; float64 if any features are, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit, or the teacher requires a gradient.
        RuntimeError: The backend that was named cannot run here.

    Example:
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> teacher = torch.nn.functional.normalize(torch.randn(2, 8, 32), dim=2)
        >>> contrastive, distillation = distill_clip(image, text, 14.3, *teacher, 100.0)
        >>> contrastive.shape, distillation.shape
        (torch.Size([]), torch.Size([]))
    """
    ranks = check_ranks("image_features", image_features, gather_distributed, group)
    check_ranks("dist_image_features", dist_image_features, gather_distributed, group)
    check_pairs(image_features, text_features, logit_scale, None, None)
    _check_teacher(image_features, dist_image_features, dist_text_features, dist_logit_scale)
    image, text = in_common_type(image_features, text_features)
    dist_image, dist_text = in_common_type(dist_image_features, dist_text_features)
    if torch.float64 in (image.dtype, dist_image.dtype):  # then all is
        image, text, dist_image, dist_text = in_common_type(image, text, dist_image, dist_text)
    backend = backends.resolve(backend, image)
    scale, dist_scale = multiplier(logit_scale, image), multiplier(dist_logit_scale, dist_image)
    if ranks is None:
        rows, cols = distill_clip_terms(
            image, text, scale, dist_image, dist_text, dist_scale, columns=True, backend=backend
        )
    else:
        images, texts = ranks.gather(image), ranks.gather(text)
        dist_images, dist_texts = ranks.gather(dist_image), ranks.gather(dist_text)
        here: dict[str, Any] = {"first": ranks.own.start, "backend": backend}
        rows, _ = distill_clip_terms(
            image, texts, scale, dist_image, dist_texts, dist_scale, **here
        )
        cols, _ = distill_clip_terms(
            text, images, scale, dist_text, dist_images, dist_scale, **here
        )
    negatives, distillation = torch.cat([rows, cols], 1).unbind()
    return reduced(cross_entropy(negatives), "mean", ranks), reduced(distillation, "mean", ranks)


def _check_teacher(
    image_features: Tensor,
    dist_image_features: Tensor,
    dist_text_features: Tensor,
    dist_logit_scale: float | Tensor,
) -> None:
    """Accept a teacher's features and scale for image_features of as many rows."""
    check_views(dist_image_features=dist_image_features, dist_text_features=dist_text_features)
    if len(dist_image_features) != len(image_features):
        raise ValueError(
            "dist_image_features and image_features must have as many rows, got "
            f"{tuple(dist_image_features.shape)} and {tuple(image_features.shape)}"
        )
    check_device("dist_image_features", dist_image_features, "image_features", image_features)
    check_scalar("dist_logit_scale", dist_logit_scale, image_features)
    given = {
        "dist_image_features": dist_image_features,
        "dist_text_features": dist_text_features,
        "dist_logit_scale": dist_logit_scale,
    }
    check_no_tangents(*given.values())
    for name, x in given.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, since it gets none: detach it")
