"""Checkpoints that survive a crash: written whole or not at all, and the one before is kept."""

import io
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "fastssl checkpoint 1"
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def expanded(name: str | Path) -> Path:
    """A path in which ~ is the user's folder."""
    return Path(os.path.expanduser(name))


def writable(name: str | Path) -> Path:
    """The folder of that name, made if need be."""
    folder = expanded(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written, got {folder} ({error.strerror})"
        ) from None
    return folder


def write(path: Path, content: bytes | memoryview) -> None:
    """Replace a file's content in one step: a reader sees the old or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path} cannot be written ({error.strerror}); what was there is kept"
        ) from error


def save(folder: Path, state: dict[str, Any], *, keep: bool = True) -> None:
    """Write the folder's checkpoint, and keep the one before it unless told otherwise."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    fresh = folder / (NAME + ".new")
    write(fresh, content.getbuffer())
    if keep and (folder / NAME).exists():
        os.replace(folder / NAME, folder / PREVIOUS)
    os.replace(fresh, folder / NAME)


def keep(folder: Path, name: str) -> None:
    """Keep the folder's newest checkpoint under a name of its own."""
    newest, kept = folder / NAME, folder / f"checkpoint.{name}.pt"
    if kept.exists() and kept.samefile(newest):
        return
    partial = kept.with_name(kept.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(newest, partial)  # no file is ever changed, so that the two need no room
    except OSError:  # some file systems have no links
        shutil.copyfile(newest, partial)
    os.replace(partial, kept)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder: the previous one after a crash in the middle of `save`."""
    return next((folder / name for name in (NAME, PREVIOUS) if (folder / name).exists()), None)


def resume_command(run: Path) -> str:
    """What goes on with the run in a folder."""
    return f"fastssl pretrain --resume --out {shlex.quote(str(run))}"


def remedy(run: Path) -> str:
    """How the run in a folder gets a file of its own back, as an error says it."""
    return f"; where it is missing, {resume_command(run)} writes it anew" if latest(run) else ""


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only, onto the CPU.

    Raises:
        ValueError: The file is truncated, or something else than a checkpoint of fastssl.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("it is another kind of file")
        return state
    except Exception as error:  # torch.load raises almost anything, by what it trips over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise damaged(path, reason) from None


def damaged(path: Path, reason: str) -> ValueError:
    """What to raise for a checkpoint that cannot be used."""
    previous = path.with_name(PREVIOUS)
    advice = "remove it to start again"
    if previous.exists() and previous != path:
        advice = f"the one before it is kept: rename {previous} to {NAME} to go on from there"
    return ValueError(f"{path} is truncated or not a checkpoint of fastssl ({reason}); {advice}")
