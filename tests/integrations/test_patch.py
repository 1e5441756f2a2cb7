"""Our losses stand in for an installed library's, and step back; a new library is a new file."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastssl
from fastssl import integrations


@pytest.fixture
def lightly():
    pytest.importorskip("lightly.loss")
    import lightly

    return lightly


def test_every_name_of_a_class_is_swapped_and_put_back(lightly) -> None:
    from lightly.loss import ntx_ent_loss
    from lightly.models.modules import memory_bank

    theirs = lightly.loss.NTXentLoss
    done = fastssl.patch("lightly", verbose=False)
    try:
        assert lightly.loss.NTXentLoss is ntx_ent_loss.NTXentLoss is fastssl.NTXentLoss
        assert lightly.loss.DCLWLoss is fastssl.DCLWLoss
        assert memory_bank.MemoryBankModule is fastssl.MemoryBankModule
        assert "lightly.loss.NTXentLoss" in done.swapped
        assert "lightly.loss.ntx_ent_loss.NTXentLoss" in done.swapped
    finally:
        done.undo()
    assert lightly.loss.NTXentLoss is ntx_ent_loss.NTXentLoss is theirs
    assert theirs is not fastssl.NTXentLoss


def test_a_with_statement_ends_it_whatever_happens(lightly) -> None:
    theirs = lightly.loss.SwaVLoss
    seen = []

    def fail() -> None:
        with fastssl.patch("lightly", verbose=False):
            seen.append(lightly.loss.SwaVLoss)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [fastssl.SwaVLoss]
    assert lightly.loss.SwaVLoss is theirs


def test_a_second_patch_swaps_and_undoes_nothing(lightly) -> None:
    with fastssl.patch("lightly", verbose=False):
        with fastssl.patch("lightly", verbose=False) as second:
            assert second.swapped == []
        assert lightly.loss.NTXentLoss is fastssl.NTXentLoss


def test_it_says_what_was_swapped(lightly, capsys: pytest.CaptureFixture[str]) -> None:
    fastssl.patch("lightly").undo()
    assert "lightly.loss.VICRegLoss" in capsys.readouterr().out


def test_a_new_library_is_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, site = tmp_path / "files", tmp_path / "site"
    (site / "toy").mkdir(parents=True)
    files.mkdir()
    (site / "toy" / "loss.py").write_text("class Loss: pass\ndef weights(): pass\n")
    (site / "toy" / "__init__.py").write_text("from toy.loss import Loss, weights\n")
    (files / "toy.py").write_text(
        "class Loss: pass\ndef weights(): pass\nclass Later: pass\n"
        "REPLACEMENTS = {'toy.loss': (Loss, weights, Later), 'toy.gone': (Loss,)}\n"
    )
    monkeypatch.setattr(integrations, "__path__", [str(files)])
    monkeypatch.syspath_prepend(site)
    with fastssl.patch("toy", verbose=False) as done:
        ours = importlib.import_module("fastssl.integrations.toy")
        toy = importlib.import_module("toy")
        assert (toy.Loss, toy.loss.weights) == (ours.Loss, ours.weights)
        assert sorted(done.swapped) == [
            "toy.Loss", "toy.loss.Loss", "toy.loss.weights", "toy.weights"
        ]  # fmt: skip
    assert toy.Loss is not ours.Loss
    for name in ("toy", "toy.loss", "fastssl.integrations.toy"):
        del sys.modules[name]


def test_a_library_that_is_missing_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.delitem(sys.modules, "lightly.loss", raising=False)
    with pytest.raises(ImportError, match="lightly"):
        fastssl.patch("lightly")


def test_an_unknown_library_is_named() -> None:
    with pytest.raises(ValueError, match="'lightly', 'open_clip', got 'timm'"):
        fastssl.patch("timm")
    with pytest.raises(ValueError, match=r"library must be one of .* got \['lightly'\]"):
        fastssl.patch(["lightly"])


def test_import_of_fastssl_imports_no_library() -> None:
    code = (
        "import sys, pkgutil, fastssl\n"
        "names = {each.name for each in pkgutil.iter_modules(fastssl.integrations.__path__)}\n"
        "assert {'lightly', 'open_clip'} <= names\n"
        "print({name.split('.')[-1] for name in sys.modules} & names)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
