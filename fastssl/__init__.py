"""Fused losses for self-supervised learning, as drop-in PyTorch functions and modules."""

from fastssl import functional, reference
from fastssl.integrations import Patch, patch
from fastssl.losses.barlow_twins import BarlowTwinsLoss
from fastssl.losses.clip import ClipLoss
from fastssl.losses.dcl import DCLLoss, DCLWLoss
from fastssl.losses.info_nce import InfoNCELoss
from fastssl.losses.negative_cosine import NegativeCosineSimilarity, SymNegCosineSimilarityLoss
from fastssl.losses.nt_xent import NTXentLoss
from fastssl.losses.siglip import SigLipLoss
from fastssl.losses.supcon import SupConLoss
from fastssl.losses.swav import SwaVLoss
from fastssl.losses.vicreg import VICRegLoss
from fastssl.memory_bank import MemoryBankModule, SampleMemoryBank

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
