"""A small trainer: pretrain a backbone with a fused loss, evaluate it, draw a report.

Needs the ``train`` extra: ``pip install '.[train]'`` in a checkout. Each name is imported when it
is first used, so that looking at an option's help does not load torchvision.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastssl.trainer.config import Config
    from fastssl.trainer.loop import Run, pretrain
    from fastssl.trainer.networks import load_backbone

__all__ = ["Config", "Run", "load_backbone", "pretrain"]
_HOME = {"Config": "config", "Run": "loop", "load_backbone": "networks", "pretrain": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
