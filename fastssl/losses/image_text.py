"""What losses of images and their texts share."""

from torch import Tensor

from fastssl.checks import check_ids, check_no_tangents, check_scalar, check_views
from fastssl.distributed import Group, world_size


def check_pairs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    ids: Tensor | None,
) -> None:
    """Accept features of images and their texts, what scales and shifts logits, and ids."""
    check_views(image_features=image_features, text_features=text_features)
    check_scalar("logit_scale", logit_scale, image_features)
    if logit_bias is not None:
        check_scalar("logit_bias", logit_bias, image_features, positive=False)
    check_no_tangents(image_features, text_features, logit_scale, logit_bias)
    if ids is not None:
        check_ids("ids", ids, image_features)


def spans_ranks(expected: int, group: Group) -> bool:
    """Whether a loss with this option is one over several ranks, which must be there."""
    if expected > 1 and world_size(group) != expected:
        raise ValueError(
            f"world_size must be that of the process group, {world_size(group)}, got {expected}"
        )
    return expected > 1
