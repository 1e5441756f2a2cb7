"""The public loss functions."""

from fastssl.losses.clustering import sinkhorn_knopp, swav
from fastssl.losses.contrastive import nt_xent
from fastssl.losses.redundancy import barlow_twins, vicreg

__all__ = ["barlow_twins", "nt_xent", "sinkhorn_knopp", "swav", "vicreg"]
