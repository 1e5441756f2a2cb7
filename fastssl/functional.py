"""The public loss functions."""

from fastssl.losses.contrastive import nt_xent

__all__ = ["nt_xent"]
