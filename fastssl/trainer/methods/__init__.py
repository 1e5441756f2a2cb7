"""The pretraining methods by name.

A method is a `Method` built from ``(backbone, config, images)``, the last how many images there are
to pretrain on. It adds the networks it needs and states:

- ``defaults``: what options left open become, and so which of the options that are not for all
  methods it takes; ``recipes``: what they become instead, by data set;
- ``views(config, size)``: a transform for each view of an image it wants, which may differ in size;
- ``forward``: takes a `Batch` (views, index, labels) and returns the loss and a pair of embeddings
  [B, D] of two views, for the collapse monitors;
- ``loss``: the module that computes the loss, which `verify` exchanges for the reference;
- ``labelled``: whether it pretrains on the labelled images and sees their labels;
- ``constant_lr``: the networks of it whose learning rate follows no schedule;
- ``before_step``, ``after_backward``, ``after_step``, ``end_epoch``: what it does beside, if
  anything.

What must survive an interruption, a queue for example, is a parameter or a buffer. ``forward``
changes nothing but running statistics of batch norm, so that a step whose loss is not finite can be
undone; what else changes does so in ``after_step``. Random numbers come from PyTorch's global
generator, which is seeded at each step.
"""

from typing import Any

from fastssl.trainer.methods.barlow import BarlowTwins
from fastssl.trainer.methods.simclr import SimCLR
from fastssl.trainer.methods.swav import SwAV
from fastssl.trainer.methods.vicreg import VICReg

METHODS: dict[str, Any] = {
    "simclr": SimCLR,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "swav": SwAV,
}
