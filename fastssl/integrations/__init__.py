"""Our losses in the place of an installed library's, and back: a library a file.

The file of a library has its name. It states in ``REPLACEMENTS`` what stands in for which of the
library's names, by the module that defines them there, and holds what only that library needs.
"""

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType, TracebackType
from typing import Any

from fastssl.checks import check_choice


class Patch:
    """What ``patch`` swapped; ``undo`` takes it back, as the end of a with statement does.

    Attributes:
        swapped: The names that were swapped, ``"lightly.loss.NTXentLoss"`` and so on.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self._originals: list[tuple[ModuleType, str, Any, Any]] = []
        integration = importlib.import_module(f"{__name__}.{library}")
        for place, replacements in integration.REPLACEMENTS.items():
            if importlib.util.find_spec(place) is None:
                continue  # a module that this version of the library does not have
            module = importlib.import_module(place)
            for ours in replacements:
                theirs = getattr(module, ours.__name__, ours)
                if theirs is not ours:
                    self._swap(theirs, ours)
        self.swapped = [f"{module.__name__}.{name}" for module, name, *_ in self._originals]

    def _swap(self, theirs: Any, ours: Any) -> None:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").split(".")[0] == self.library:
                for name in [name for name, value in vars(module).items() if value is theirs]:
                    setattr(module, name, ours)
                    self._originals.append((module, name, theirs, ours))

    def undo(self) -> None:
        """Put the library's own back."""
        for module, name, theirs, ours in self._originals:
            if vars(module).get(name) is ours:
                setattr(module, name, theirs)
        self._originals, self.swapped = [], []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        names = "".join(f"\n  {name}" for name in self.swapped) or " nothing"
        return f"fastssl stands in {self.library} for:{names}"


def patch(library: str, *, verbose: bool = True) -> Patch:
    """Put our losses in the place of those of an installed library that they follow.

    Code that names a class through the library's modules from then on gets ours. Names that were
    imported from it before, and objects that were made before, stay: patch first.

    Args:
        library: Its name, one that there is a file for here: ``"lightly"`` or ``"open_clip"``.
        verbose: Whether to print which names were swapped.

    Returns:
        A Patch: undo it with ``undo()``, or use it in a with statement.

    Raises:
        ValueError: library is another.
        ImportError: The library is not installed.

    Example:
        >>> with fastssl.patch("lightly"):  # doctest: +SKIP
        ...     criterion = lightly.loss.NTXentLoss()
    """
    check_choice("library", library, [each.name for each in pkgutil.iter_modules(__path__)])
    done = Patch(library)
    if verbose:
        print(done)
    return done
