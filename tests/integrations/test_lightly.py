"""Our losses in lightly's place: its signatures, its errors, and training as its own do."""

import importlib
import importlib.util
import inspect
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn

import fastssl
from fastssl.integrations import lightly as integration

pytest.importorskip("lightly.loss")
import lightly

REPLACED = [
    pytest.param(place, ours, id=ours.__name__)
    for place, replacements in integration.REPLACEMENTS.items()
    for ours in replacements
    if importlib.util.find_spec(place)  # versions differ in what they have
]
GATHERS = {
    "gather_distributed": (
        fastssl.NTXentLoss,
        fastssl.DCLLoss,
        fastssl.DCLWLoss,
        fastssl.BarlowTwinsLoss,
        fastssl.VICRegLoss,
    ),
    "sinkhorn_gather_distributed": (fastssl.SwaVLoss,),
}


@pytest.mark.parametrize(("place", "ours"), REPLACED)
def test_arguments_are_lightlys(place: str, ours) -> None:
    theirs = getattr(importlib.import_module(place), ours.__name__)
    pairs = [(ours, theirs)]
    if isinstance(ours, type):
        pairs.append((ours.forward, theirs.forward))
    for pair in pairs:
        found, expected = (
            [(p.name, p.default) for p in inspect.signature(each).parameters.values()]
            for each in pair
        )
        assert found[: len(expected)] == expected


@pytest.mark.parametrize(("place", "ours"), REPLACED)
def test_options_are_attributes_as_lightlys_are(place: str, ours) -> None:
    if not isinstance(ours, type):
        pytest.skip("a function")
    theirs = getattr(importlib.import_module(place), ours.__name__)
    size = ((4, 8),) if ours is fastssl.MemoryBankModule else ()
    for name, value in vars(theirs(*size)).items():
        if name in inspect.signature(theirs).parameters and name != "weight_fn":
            assert getattr(ours(*size), name) == value


@pytest.mark.parametrize(
    ("option", "ours"), [(option, ours) for option, all_ in GATHERS.items() for ours in all_]
)
def test_gathering_needs_a_pytorch_that_can(
    option: str, ours, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours(**{option: True})  # without a process group it makes no difference
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"{option} must be False, since torch.distributed is not"):
        ours(**{option: True})
    with pytest.raises(ValueError, match=f"{option} is True but"):
        getattr(lightly.loss, ours.__name__)(**{option: True})
    ours()


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_weights_are_those_of_lightlys_function(sigma: float) -> None:
    module = importlib.import_module("lightly.loss.dcl_loss")
    out0, out1 = nn.functional.normalize(torch.randn(2, 12, 8), dim=2)
    theirs = module.negative_mises_fisher_weights
    with pytest.warns(UserWarning, match="copy construct"):
        expected = theirs(out0, out1, sigma)
    with fastssl.patch("lightly", verbose=False):
        ours = module.negative_mises_fisher_weights
        assert ours is not theirs
        torch.testing.assert_close(ours(out0=out0, out1=out1, sigma=sigma), expected)
    assert module.negative_mises_fisher_weights is theirs
    with pytest.raises(ValueError, match="out0 and out1 must have equal shapes"):
        ours(out0, out1[:, :3])


def test_weights_are_a_weight_fn() -> None:
    z = torch.randn(2, 12, 8).double()
    criterion = fastssl.DCLLoss(weight_fn=integration.negative_mises_fisher_weights)
    torch.testing.assert_close(criterion(*z), fastssl.DCLWLoss()(*z))


def test_a_class_that_only_some_versions_have_is_swapped_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
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


@pytest.mark.parametrize("memory_bank_size", [0, (64, 16)])
def test_lightlys_simclr_trains_alike_both_ways(memory_bank_size) -> None:
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
