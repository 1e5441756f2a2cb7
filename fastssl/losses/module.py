"""What the loss Modules share."""

from typing import Any

from torch import nn

from fastssl.checks import check_choice
from fastssl.ops.backend import BACKENDS


class LossModule(nn.Module):
    """A loss whose options are its attributes, and are shown when it is printed."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if "backend" in options:
            check_choice("backend", options["backend"], BACKENDS)
        self._shown = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        """Show what was chosen."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)
