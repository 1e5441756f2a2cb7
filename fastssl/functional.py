"""The public loss functions."""

from fastssl.losses.barlow_twins import barlow_twins
from fastssl.losses.clip import clip
from fastssl.losses.dcl import dcl, mises_fisher_weights
from fastssl.losses.distill_clip import distill_clip
from fastssl.losses.info_nce import info_nce
from fastssl.losses.negative_cosine import negative_cosine_similarity
from fastssl.losses.nt_xent import nt_xent
from fastssl.losses.siglip import siglip
from fastssl.losses.sinkhorn_knopp import sinkhorn_knopp
from fastssl.losses.supcon import supcon
from fastssl.losses.swav import swav
from fastssl.losses.vicreg import vicreg

__all__ = [
    "barlow_twins",
    "clip",
    "dcl",
    "distill_clip",
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
