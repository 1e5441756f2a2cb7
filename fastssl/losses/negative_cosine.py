"""Losses by which one view predicts the other's embedding: BYOL's and SimSiam's.

They cost a few passes over N x D numbers and build no matrix, so there is nothing for a kernel to
save: they are plain PyTorch on every device, and torch.compile makes one pass of them.
"""

import math

import torch
from torch import Tensor

from fastssl.checks import check_count, check_number, check_views
from fastssl.losses.module import LossModule


def negative_cosine_similarity(x0: Tensor, x1: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Minus the cosine between two views' embeddings, averaged over all pairs.

    Equivalent to::

        loss = -torch.cosine_similarity(x0, x1, dim, eps).mean()

    Chen & He, "Exploring Simple Siamese Representation Learning", 2021, equation 1. BYOL's loss
    (Grill et al. 2020, equation 2) is 2 + 2 times this one. Half precision is computed in float32,
    rows whose squares would over- or underflow are safe, and a row of zeros, whose cosine is 0,
    gets no gradient (PyTorch's own is its partner's direction over eps).

    Args:
        x0: [N, D], or any shape of two or more dimensions; float64, float32, bfloat16 or float16.
        x1: Of x0's shape, dtype and device. Detach it to stop the gradient, as both methods do.
        dim: Dimension of the features.
        eps: Positive number; a row shorter than it is divided by it instead of by its length.

    Returns:
        0-dim loss between -1 and 1; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit.

    Example:
        >>> x = torch.randn(8, 16)
        >>> round(negative_cosine_similarity(x, 3 * x).item(), 4)
        -1.0
    """
    check_views(x0=x0, x1=x1, positions=True)
    check_count("dim", dim, -math.inf)
    if not -x0.dim() <= dim < x0.dim():
        raise ValueError(
            f"dim must be {-x0.dim()} to {x0.dim() - 1} for shape {tuple(x0.shape)}, got {dim}"
        )
    check_number("eps", eps, x0, positive=True)
    return -(_unit(x0, dim, eps) * _unit(x1, dim, eps)).sum(dim).mean()


def _unit(x: Tensor, dim: int, eps: float) -> Tensor:
    """Scale rows to unit length, or by 1 / eps where they are shorter than that."""
    x = x if x.dtype == torch.float64 else x.float()
    # Squares of large entries would overflow, those of small ones vanish. A power of two rounds
    # nothing.
    large = 2.0 ** (384 if x.dtype == torch.float64 else 48)
    largest = x.detach().abs().amax(dim, keepdim=True)
    factor = torch.ones_like(largest).masked_fill(largest > large, large**-2)
    factor = factor.masked_fill(largest < 1 / large, large**2)
    x = x * factor
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    rnorm = torch.where(norm > 0, 1 / torch.maximum(norm, eps * factor), torch.zeros_like(norm))
    return x * rnorm


class NegativeCosineSimilarity(LossModule):
    """SimSiam's loss as a module, in the place of lightly's ``NegativeCosineSimilarity``.

    Args:
        dim: Dimension of the features.
        eps: Positive number; a row shorter than it is divided by it instead of by its length.

    Raises:
        TypeError: dim is not a whole number, or eps not a number.
        ValueError: eps is not positive and finite.

    Example:
        >>> criterion = NegativeCosineSimilarity()
        >>> prediction, target = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(prediction, target.detach()).backward()
    """

    dim: int
    eps: float

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        check_count("dim", dim, -math.inf)
        check_number("eps", eps, positive=True)
        super().__init__(dim=dim, eps=eps)

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Return ``functional.negative_cosine_similarity`` of two views' embeddings."""
        return negative_cosine_similarity(x0, x1, self.dim, self.eps)


class SymNegCosineSimilarityLoss(LossModule):
    """SimSiam's loss of both directions, in the place of ``SymNegCosineSimilarityLoss``.

    That is a class of lightly up to 1.5; later versions have `NegativeCosineSimilarity` alone. Each
    view's prediction meets the other's projection, which gets no gradient (Chen & He 2021, equation
    4).

    Example:
        >>> criterion = SymNegCosineSimilarityLoss()
        >>> z0, p0, z1, p1 = torch.randn(4, 8, 16, requires_grad=True)
        >>> criterion((z0, p0), (z1, p1)).backward()
    """

    def forward(self, out0: tuple[Tensor, Tensor], out1: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of two views.

        Args:
            out0: Projections [N, D] of one view and the predictions [N, D] made from them.
            out1: Those of the other view.

        Returns:
            0-dim loss, the mean of both directions.
        """
        (z0, p0), (z1, p1) = out0, out1
        forth = negative_cosine_similarity(p0, z1.detach(), -1)
        back = negative_cosine_similarity(p1, z0.detach(), -1)
        return (forth + back) / 2
