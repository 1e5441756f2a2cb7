"""Our losses in the place of an installed library's, and back."""

import importlib
import importlib.util
import sys
from types import ModuleType, TracebackType

from fastssl.checks import check_choice
from fastssl.losses.barlow_twins import BarlowTwinsLoss
from fastssl.losses.clip import ClipLoss
from fastssl.losses.dcl import DCLLoss, DCLWLoss
from fastssl.losses.negative_cosine import NegativeCosineSimilarity, SymNegCosineSimilarityLoss
from fastssl.losses.nt_xent import NTXentLoss
from fastssl.losses.siglip import SigLipLoss
from fastssl.losses.swav import SwaVLoss
from fastssl.losses.vicreg import VICRegLoss
from fastssl.memory_bank import MemoryBankModule

# Our class for each of a library's that it follows, by the name of its module there.
LIBRARIES: dict[str, list[tuple[str, type]]] = {
    "lightly": [
        ("lightly.loss.barlow_twins_loss", BarlowTwinsLoss),
        ("lightly.loss.dcl_loss", DCLLoss),
        ("lightly.loss.dcl_loss", DCLWLoss),
        ("lightly.loss.negative_cosine_similarity", NegativeCosineSimilarity),
        ("lightly.loss.ntx_ent_loss", NTXentLoss),
        ("lightly.loss.swav_loss", SwaVLoss),
        ("lightly.loss.sym_neg_cos_sim_loss", SymNegCosineSimilarityLoss),
        ("lightly.loss.vicreg_loss", VICRegLoss),
        ("lightly.models.modules.memory_bank", MemoryBankModule),
    ],
    "open_clip": [("open_clip.loss", ClipLoss), ("open_clip.loss", SigLipLoss)],
}


class Patch:
    """What ``patch`` swapped; ``undo`` takes it back, as the end of a with statement does.

    Attributes:
        swapped: The names that were swapped, ``"lightly.loss.NTXentLoss"`` and so on.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self._originals: list[tuple[ModuleType, str, type, type]] = []
        for place, ours in LIBRARIES[library]:
            if importlib.util.find_spec(place) is None:
                continue  # a class that this version of the library does not have
            theirs = getattr(importlib.import_module(place), ours.__name__)
            if theirs is not ours:
                self._swap(theirs, ours)
        self.swapped = [f"{module.__name__}.{name}" for module, name, *_ in self._originals]

    def _swap(self, theirs: type, ours: type) -> None:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").split(".")[0] == self.library:
                for name in [name for name, value in vars(module).items() if value is theirs]:
                    setattr(module, name, ours)
                    self._originals.append((module, name, theirs, ours))

    def undo(self) -> None:
        """Put the library's own classes back."""
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
        return f"fastssl's classes stand in {self.library} for:{names}"


def patch(library: str, *, verbose: bool = True) -> Patch:
    """Put our losses in the place of those of an installed library that they follow.

    Code that names a class through the library's modules from then on gets ours. Names that were
    imported from it before, and objects that were made before, stay: patch first.

    Args:
        library: ``"lightly"`` or ``"open_clip"``.
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
    check_choice("library", library, tuple(LIBRARIES))
    done = Patch(library)
    if verbose:
        print(done)
    return done
