"""What stands in for open_clip's losses."""

from fastssl.losses.clip import ClipLoss
from fastssl.losses.siglip import SigLipLoss

REPLACEMENTS = {"open_clip.loss": (ClipLoss, SigLipLoss)}
