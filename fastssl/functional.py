"""The public loss functions."""

from fastssl.losses.clustering import sinkhorn_knopp, swav
from fastssl.losses.contrastive import (
    clip,
    dcl,
    info_nce,
    mises_fisher_weights,
    nt_xent,
    siglip,
    supcon,
)
from fastssl.losses.redundancy import barlow_twins, vicreg
from fastssl.losses.regression import negative_cosine_similarity

__all__ = [
    "barlow_twins",
    "clip",
    "dcl",
    "info_nce",
    "mises_fisher_weights",
    "negative_cosine_similarity",
    "nt_xent",
    "siglip",
    "sinkhorn_knopp",
    "supcon",
    "swav",
    "vicreg",
]
