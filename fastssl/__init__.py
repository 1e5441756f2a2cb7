"""Fused losses for self-supervised learning, as drop-in PyTorch functions and modules."""

from fastssl import functional, reference
from fastssl.losses.contrastive import NTXentLoss

__version__ = "0.1.0"
__all__ = ["NTXentLoss", "__version__", "functional", "reference"]
