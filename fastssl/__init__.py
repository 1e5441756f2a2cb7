"""Fused losses for self-supervised learning, as drop-in PyTorch functions and modules."""

from fastssl import functional, reference
from fastssl.losses.clustering import SwaVLoss
from fastssl.losses.contrastive import NTXentLoss
from fastssl.losses.redundancy import BarlowTwinsLoss, VICRegLoss

__version__ = "0.1.0"
__all__ = [
    "BarlowTwinsLoss",
    "NTXentLoss",
    "SwaVLoss",
    "VICRegLoss",
    "__version__",
    "functional",
    "reference",
]
