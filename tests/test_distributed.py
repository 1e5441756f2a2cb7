"""A batch spread over processes has the loss and the gradients of the whole batch."""

import pytest
import ranks
import torch
from torch import multiprocessing

import fastssl
from fastssl import functional


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks.run, (folder,), nprocs=len(ranks.SIZES))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(ranks.SIZES))]


@pytest.mark.parametrize("name", ranks.MODULES)
def test_ranks_agree_with_one_process(results: list[dict], name: str) -> None:
    model = ranks.network()
    z_a, z_b = model(ranks.images().flatten(0, 1)).chunk(2)
    criterion = ranks.MODULES[name]()
    expected = criterion(z_a, z_b)
    expected.backward()
    losses, gradients, buffers = zip(*(result[name] for result in results), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-10, atol=0)
    parameters = [*model.parameters(), *criterion.parameters()]
    for rank in gradients:
        for got, parameter in zip(rank, parameters, strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-12)
    for rank in buffers:
        torch.testing.assert_close(rank, dict(criterion.named_buffers()))


def test_the_bank_takes_the_rows_of_all_ranks(results: list[dict]) -> None:
    """Not those of one rank, which the buffers above would show as well, if they were the same."""
    begun = dict(ranks.MODULES["nt_xent with a memory bank"]().named_buffers())
    rows = sum(ranks.SIZES)
    for _, _, buffers in (result["nt_xent with a memory bank"] for result in results):
        changed = (buffers["loss.memory_bank.bank"] != begun["loss.memory_bank.bank"]).any(1)
        assert changed.tolist() == [True] * rows + [False] * (ranks.BANK[0] - rows)
        assert buffers["loss.memory_bank.bank_ptr"].tolist() == [rows]


WITHOUT_GROUP = {
    "barlow_twins": fastssl.BarlowTwinsLoss,
    "vicreg": fastssl.VICRegLoss,
    "swav": ranks.SwaV,
    "nt_xent": fastssl.NTXentLoss,
    "dcl": fastssl.DCLLoss,
    "dclw": fastssl.DCLWLoss,
    "clip": lambda **options: lambda *z: functional.clip(*z, 5.0, **options),
    "siglip": lambda **options: lambda *z: functional.siglip(*z, 5.0, -2.0, **options),
}


@pytest.mark.parametrize("name", WITHOUT_GROUP)
def test_without_a_process_group_gathering_changes_nothing(name: str) -> None:
    z = torch.randn(2, 8, 12).unbind()
    make = WITHOUT_GROUP[name]
    assert torch.equal(make(gather_distributed=True)(*z), make()(*z))


def test_without_a_process_group_a_bank_takes_what_it_is_given() -> None:
    z = torch.randn(3, 4)
    bank = fastssl.MemoryBankModule((8, 4), gather_distributed=True)
    bank(z, update=True)
    assert torch.equal(bank.bank[:3], z)
