"""Our losses stand in for an installed library's, train as its own do, and step back."""

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn

import fastssl


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


def test_a_class_that_only_some_versions_have_is_swapped_where_it_is(
    lightly, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "lightly.loss.sym_neg_cos_sim_loss"
    with fastssl.patch("lightly", verbose=False) as done:
        assert lightly.loss.NegativeCosineSimilarity is fastssl.NegativeCosineSimilarity
        assert (f"{place}.SymNegCosineSimilarityLoss" in done.swapped) == (
            importlib.util.find_spec(place) is not None
        )
    old = importlib.util.module_from_spec(ModuleSpec(place, None))
    old.SymNegCosineSimilarityLoss = type("SymNegCosineSimilarityLoss", (nn.Module,), {})
    monkeypatch.setitem(sys.modules, place, old)
    with fastssl.patch("lightly", verbose=False):
        assert old.SymNegCosineSimilarityLoss is fastssl.SymNegCosineSimilarityLoss
    assert old.SymNegCosineSimilarityLoss is not fastssl.SymNegCosineSimilarityLoss


def test_it_says_what_was_swapped(lightly, capsys: pytest.CaptureFixture[str]) -> None:
    fastssl.patch("lightly").undo()
    assert "lightly.loss.VICRegLoss" in capsys.readouterr().out


def test_open_clips_factory_makes_our_losses() -> None:
    open_clip = pytest.importorskip("open_clip")
    with fastssl.patch("open_clip", verbose=False):
        assert open_clip.factory.ClipLoss is open_clip.loss.ClipLoss is fastssl.ClipLoss
        assert open_clip.loss.SigLipLoss is fastssl.SigLipLoss


def test_an_unknown_library_is_named() -> None:
    with pytest.raises(ValueError, match="'lightly', 'open_clip', got 'timm'"):
        fastssl.patch("timm")
    with pytest.raises(ValueError, match=r"library must be one of .* got \['lightly'\]"):
        fastssl.patch(["lightly"])


def test_import_of_fastssl_imports_no_library() -> None:
    code = "import sys, fastssl; print({'lightly', 'open_clip'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("memory_bank_size", [0, (64, 16)])
def test_lightlys_simclr_trains_alike_both_ways(lightly, memory_bank_size) -> None:
    """A backbone and lightly's head and loss, as its examples write them, for a few steps."""
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Flatten())
            self.projection_head = SimCLRProjectionHead(8 * 36, 32, 16)
            self.criterion = lightly.loss.NTXentLoss(memory_bank_size=memory_bank_size)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.projection_head(self.backbone(x))

    def train() -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = SimCLR()
        model.double()
        if memory_bank_size:
            model.criterion.memory_bank.bank.copy_(
                nn.functional.normalize(torch.randn(64, 16, dtype=torch.float64), dim=1)
            )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(4):
            x0, x1 = torch.randn(2, 16, 1, 8, 8, dtype=torch.float64)
            loss = model.criterion(model(x0), model(x1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, list(model.parameters())

    losses, weights = train()
    with fastssl.patch("lightly", verbose=False):
        our_losses, our_weights = train()
    assert our_losses == pytest.approx(losses, rel=1e-10)
    for ours, theirs in zip(our_weights, weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
