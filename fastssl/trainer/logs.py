"""TensorBoard's logs of a run."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

Log = Callable[[str, float, int], None]  # name, value, step


@contextmanager
def tensorboard(run: Path, first: int, again: str) -> Iterator[Log]:
    """What writes a number to the logs in a run's folder.

    Args:
        run: The folder of the run.
        first: The first step to come: what an earlier process wrote of it and later ones is void.
        again: What goes on with the run, for errors.

    Raises:
        OSError: The logs cannot be written.
    """
    usual = threading.excepthook

    def report(death: threading.ExceptHookArgs) -> None:
        # What its thread dies of is raised here, without a traceback beside it.
        if not type(death.thread).__module__.startswith("tensorboard."):
            usual(death)

    @contextmanager
    def named() -> Iterator[None]:
        """TensorBoard's errors with the run in them: its own name no file."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{run / 'tensorboard'} cannot be written ({error.strerror or error}); the run's "
                f"checkpoints are kept, and {again} goes on"
            ) from None

    def log(name: str, value: float, step: int) -> None:
        with named():
            writer.add_scalar(name, value, step)

    threading.excepthook = report
    try:
        with named():
            writer = SummaryWriter(str(run / "tensorboard"), purge_step=first)
        try:
            yield log
        finally:
            with named():
                writer.close()
    finally:
        threading.excepthook = usual
