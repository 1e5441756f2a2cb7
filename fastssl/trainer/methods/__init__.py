"""The pretraining methods by name.

A method is a Module built from ``(backbone, config)``: it adds the networks it needs, says in
``views`` how many views of each image it wants and in ``defaults`` what options left open become,
and its forward takes the views, a list of [B, C, H, W], and returns the loss and a pair of
embeddings [B, D] of two views, for the collapse monitors. Its attribute ``loss`` is the module that
computes the loss, which `verify` exchanges for the reference.
"""

from typing import Any

from fastssl.trainer.methods.barlow import BarlowTwins
from fastssl.trainer.methods.simclr import SimCLR
from fastssl.trainer.methods.vicreg import VICReg

METHODS: dict[str, Any] = {"simclr": SimCLR, "barlow": BarlowTwins, "vicreg": VICReg}
