"""What stands in for lightly's losses and its memory bank."""

from torch import Tensor

from fastssl.checks import check_views
from fastssl.losses.barlow_twins import BarlowTwinsLoss
from fastssl.losses.dcl import DCLLoss, DCLWLoss, mises_fisher_weights
from fastssl.losses.negative_cosine import NegativeCosineSimilarity, SymNegCosineSimilarityLoss
from fastssl.losses.nt_xent import NTXentLoss
from fastssl.losses.swav import SwaVLoss
from fastssl.losses.vicreg import VICRegLoss
from fastssl.memory_bank import MemoryBankModule


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """``functional.mises_fisher_weights`` by lightly's name: small for positives that are close.

    Args:
        out0: [N, D] unit rows of one view.
        out1: [N, D] unit rows of the other.
        sigma: Positive number; large ones make all weights alike.

    Returns:
        [N] weights of mean 1, of out0's dtype.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: Shapes, devices or values do not fit.
    """
    check_views(out0=out0, out1=out1)
    return mises_fisher_weights(out0, out1, sigma)


REPLACEMENTS = {
    "lightly.loss.barlow_twins_loss": (BarlowTwinsLoss,),
    "lightly.loss.dcl_loss": (DCLLoss, DCLWLoss, negative_mises_fisher_weights),
    "lightly.loss.negative_cosine_similarity": (NegativeCosineSimilarity,),
    "lightly.loss.ntx_ent_loss": (NTXentLoss,),
    "lightly.loss.swav_loss": (SwaVLoss,),
    "lightly.loss.sym_neg_cos_sim_loss": (SymNegCosineSimilarityLoss,),
    "lightly.loss.vicreg_loss": (VICRegLoss,),
    "lightly.models.modules.memory_bank": (MemoryBankModule,),
}
