"""What keeps a run whole: one process writes to its folder, and a signal waits for the step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastssl.trainer import parallel

_locks: set[int] = set()  # handles of the folders that this process writes runs to


@contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """A folder that nobody else may write a run to meanwhile, where the system has such locks."""
    if os.name != "posix" or parallel.rank():  # the lead alone writes
        yield folder
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some file systems of networks have no locks
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"out: another run is being written to {folder}; wait for its end, or name another "
                f"folder"
            ) from None
    _locks.add(handle)
    try:
        yield folder
    finally:
        _locks.remove(handle)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # whoever else has the file open
        os.close(handle)


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second acts as it usually does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    usual: dict[signal.Signals, Any] = {}

    def ask(*_: Any) -> None:
        stop.set()
        for number, handler in usual.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        usual[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def start_worker(_: int) -> None:
    """Make a worker live to the end of the step, and no lock live as long as the worker."""
    if hasattr(os, "setpgrp"):  # Ctrl-C goes to a whole process group
        os.setpgrp()
    for handle in _locks:  # inherited; a worker outlives a killed run by seconds
        os.close(handle)
    _locks.clear()


@contextmanager
def agreed() -> Iterator[None]:
    """An error that ends the block in one of several processes ends it in all, with RuntimeError.

    The others would wait for what never comes.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    told = parallel.gathered(problem and reason(problem))
    if problem:
        raise problem
    if any(told):
        raise RuntimeError(next(filter(None, told)))


def reason(error: BaseException) -> str:
    """An error in a line: what a DataLoader's worker raises begins with the worker's traceback."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].removeprefix("ValueError: ")
