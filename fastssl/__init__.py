"""Fused losses for self-supervised learning, as drop-in PyTorch functions and modules."""

from fastssl import functional, reference
from fastssl.losses.clustering import SwaVLoss
from fastssl.losses.contrastive import (
    ClipLoss,
    DCLLoss,
    DCLWLoss,
    InfoNCELoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)
from fastssl.losses.redundancy import BarlowTwinsLoss, VICRegLoss
from fastssl.losses.regression import NegativeCosineSimilarity, SymNegCosineSimilarityLoss
from fastssl.memory_bank import MemoryBankModule, SampleMemoryBank
from fastssl.patching import Patch, patch

__version__ = "0.1.0"
__all__ = [
    "BarlowTwinsLoss",
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "InfoNCELoss",
    "MemoryBankModule",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "Patch",
    "SampleMemoryBank",
    "SigLipLoss",
    "SupConLoss",
    "SwaVLoss",
    "SymNegCosineSimilarityLoss",
    "VICRegLoss",
    "__version__",
    "functional",
    "patch",
    "reference",
]
