"""Checkpoints: written whole or not at all, and never trusted blindly."""

import os
import pickle
import resource

import pytest
import torch

pytest.importorskip("torchvision")

from fastssl.trainer import checkpoint


def state(step):
    return {"step": step, "weights": torch.arange(1000.0) * step}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    checkpoint.save(tmp_path, state(3))
    found = checkpoint.load(checkpoint.latest(tmp_path))
    assert found["step"] == 3
    assert torch.equal(found["weights"], state(3)["weights"])


def test_the_one_before_is_kept_and_nothing_else(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "checkpoint.previous.pt")["step"] == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("links", [True, False])
def test_a_kept_one_stays_as_it_is(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
        if step == 2:
            checkpoint.keep(tmp_path, "best")
            checkpoint.keep(tmp_path, "best")
    assert checkpoint.load(tmp_path / "checkpoint.best.pt")["step"] == 2
    checkpoint.keep(tmp_path, "best")
    assert checkpoint.load(tmp_path / "checkpoint.best.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "checkpoint.previous.pt")["step"] == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_the_one_before_may_stay(tmp_path):
    for step, keep in ((1, True), (2, True), (3, False)):
        checkpoint.save(tmp_path, state(step), keep=keep)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "checkpoint.previous.pt")["step"] == 1


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("crash_at", range(1, 4))
def test_a_crash_at_any_point_leaves_a_whole_checkpoint(tmp_path, monkeypatch, crash_at):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    real, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, state(3))
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_an_error_that_names_the_one_before(tmp_path, share):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is truncated.*checkpoint\.previous\.pt"):
        checkpoint.load(path)
    assert checkpoint.load(tmp_path / "checkpoint.previous.pt")["step"] == 1


def test_a_foreign_file_is_an_error(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("some notes")
    with pytest.raises(ValueError, match="not a checkpoint of fastssl"):
        checkpoint.load(path)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"another kind of file.*remove it"):
        checkpoint.load(path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    for write in (torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))):
        write({"format": checkpoint.FORMAT, "step": Attack()}, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match="not a checkpoint of fastssl"):
            checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "attacked").exists()


def test_a_failed_write_keeps_what_was_there(tmp_path):
    checkpoint.save(tmp_path, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt.* cannot be written \(File too large\)"):
            checkpoint.save(tmp_path, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 1
