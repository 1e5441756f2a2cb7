"""A batch spread over processes has the loss and the gradients of the whole batch."""

import pytest
import ranks
import torch
from torch import multiprocessing


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks.run, (folder,), nprocs=len(ranks.SIZES))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(ranks.SIZES))]


@pytest.mark.parametrize("name", ranks.MODULES)
def test_ranks_agree_with_one_process(results: list[dict], name: str) -> None:
    model = ranks.network()
    z_a, z_b = model(ranks.images().flatten(0, 1)).chunk(2)
    expected = ranks.MODULES[name]()(z_a, z_b)
    expected.backward()
    losses, gradients = zip(*(result[name] for result in results), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-10, atol=0)
    for rank in gradients:
        for got, parameter in zip(rank, model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ranks.MODULES)
def test_without_a_process_group_gathering_changes_nothing(name: str) -> None:
    z = torch.randn(2, 8, 12).unbind()
    make = ranks.MODULES[name]
    assert torch.equal(make(gather_distributed=True)(*z), make()(*z))
