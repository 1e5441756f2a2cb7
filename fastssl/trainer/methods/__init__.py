"""The pretraining methods by name.

A method is a `Method` built from ``(backbone, config, images)``, the last how many images there are
to pretrain on. It adds the networks it needs and states:

- ``defaults``: what options left open become, and so which of the options that are not for all
  methods it takes; ``recipes``: what they become instead, by data set;
- ``views(config, size)``: a transform for each view of an image it wants, which may differ in size;
- ``forward``: takes a `Batch` (views, index, labels) and returns the loss and a pair of embeddings
  [B, D] of two views, or of one and what it is held against, for the collapse monitors: a task
  whose answer lies in what sets parts or turns of an image apart gives those of two of them, whose
  alignment is then no aim;
- ``loss``: the module that computes the loss, which `verify` exchanges for the reference;
- ``labelled``: whether it pretrains on the labelled images and sees their labels;
- ``constant_lr``: the networks of it whose learning rate follows no schedule;
- ``whole_batch_norm``: whether batch norm sees the images of all processes where there are several;
- ``before_step``, ``after_backward``, ``after_step``, ``end_epoch``: what it does beside, if
  anything.

What must survive an interruption, a queue for example, is a parameter or a buffer. Of several
processes each sees its share of a batch: a loss gathers what it needs (``gather_distributed``), and
a queue takes the rows of all, so that it is the same everywhere. ``forward``
changes nothing but running statistics of batch norm, so that a step whose loss is not finite can be
undone; what else changes does so in ``after_step``. Random numbers come from PyTorch's global
generator, which is seeded at each step.
"""

from typing import Any

from fastssl.trainer.methods.barlow import BarlowTwins
from fastssl.trainer.methods.byol import BYOL
from fastssl.trainer.methods.instance import InstanceDiscrimination
from fastssl.trainer.methods.jigsaw import Jigsaw
from fastssl.trainer.methods.moco import MoCo
from fastssl.trainer.methods.pirl import PIRL
from fastssl.trainer.methods.relative_patch import RelativePatch
from fastssl.trainer.methods.rotation import Rotation
from fastssl.trainer.methods.simclr import SimCLR
from fastssl.trainer.methods.simsiam import SimSiam
from fastssl.trainer.methods.supcon import SupCon
from fastssl.trainer.methods.swav import SwAV
from fastssl.trainer.methods.vicreg import VICReg

METHODS: dict[str, Any] = {
    "simclr": SimCLR,
    "supcon": SupCon,
    "moco": MoCo,
    "instance": InstanceDiscrimination,
    "pirl": PIRL,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "swav": SwAV,
    "byol": BYOL,
    "simsiam": SimSiam,
    "rotation": Rotation,
    "jigsaw": Jigsaw,
    "relative-patch": RelativePatch,
}
