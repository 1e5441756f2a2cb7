"""A batch spread over processes has the loss and the gradients of the whole batch."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import exchange
import pytest
import ranks
import torch

import fastssl
from fastssl import functional
from fastssl.distributed import RING_BLOCK_BYTES, Ranks
from fastssl.ops.ring import _merged


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of so many ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.start(ranks.run, request.param, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


of_several_ranks = pytest.mark.parametrize(
    "results", ranks.SIZES, ids="{} ranks".format, indirect=True
)


def check_against_one_process(name: str, rows: list[int], results: list[tuple]) -> None:
    """A loss of these rows and its gradients, by what the ranks that have them found."""
    model = ranks.network()
    z_a, z_b = model(ranks.images()[:, rows].flatten(0, 1)).chunk(2)
    criterion = (ranks.MODULES | ranks.BY_TRITON)[name]()
    expected = criterion(z_a, z_b, ranks.IDS[rows])
    expected.backward()
    losses, gradients, buffers = zip(*results, strict=True)
    rtol, part = (2e-3, 3e-2) if "bfloat16" in name else (1e-5, 1e-5)
    cast = "bfloat16" in name or "Triton" in name
    close = partial(torch.testing.assert_close, rtol=rtol if cast else 1e-10)
    close(torch.stack(losses).mean(), expected.detach(), atol=0)
    parameters = [*model.parameters(), *criterion.parameters()]
    for rank in gradients:
        for got, parameter in zip(rank, parameters, strict=True):
            close(got, parameter.grad, atol=part * parameter.grad.abs().max() if cast else 1e-12)
    for rank in buffers:
        torch.testing.assert_close(rank, dict(criterion.named_buffers()))


@of_several_ranks
@pytest.mark.parametrize("name", ranks.MODULES)
def test_ranks_agree_with_one_process(results: list[dict], name: str) -> None:
    found = [result[name] for result in results]
    check_against_one_process(name, list(range(ranks.ROWS)), found)


@pytest.mark.parametrize("results", [4], indirect=True)
@pytest.mark.parametrize("name", ranks.GROUPED)
def test_a_group_of_some_ranks_agrees_with_one_process(results: list[dict], name: str) -> None:
    found = [results[rank][f"{name}, group"] for rank in ranks.GROUP]
    rows = [row for rank in ranks.GROUP for row in ranks.rows_of(rank, 4)]
    check_against_one_process(name, rows, found)


@pytest.mark.parametrize("results", [3], indirect=True)
@pytest.mark.parametrize("name", ranks.BY_TRITON)
def test_triton_ranks_agree_with_one_process(results: list[dict], name: str) -> None:
    found = [result[name] for result in results]
    check_against_one_process(name, list(range(ranks.ROWS)), found)


@of_several_ranks
def test_the_bank_takes_the_rows_of_all_ranks(results: list[dict]) -> None:
    """Not those of one rank, which the buffers above would show as well, if they were the same."""
    begun = dict(ranks.MODULES["nt_xent with a memory bank"]().named_buffers())
    for _, _, buffers in (result["nt_xent with a memory bank"] for result in results):
        changed = (buffers["loss.memory_bank.bank"] != begun["loss.memory_bank.bank"]).any(1)
        assert changed.tolist() == [True] * ranks.ROWS + [False] * (ranks.BANK[0] - ranks.ROWS)
        assert buffers["loss.memory_bank.bank_ptr"].tolist() == [ranks.ROWS]


WITHOUT_GROUP = {
    "barlow_twins": fastssl.BarlowTwinsLoss,
    "vicreg": fastssl.VICRegLoss,
    "swav": lambda **options: lambda *z: ranks.SwaV(**options)(*z, None),
    "nt_xent": fastssl.NTXentLoss,
    "dcl": fastssl.DCLLoss,
    "dclw": fastssl.DCLWLoss,
    "info_nce": fastssl.InfoNCELoss,
    "supcon": lambda **options: lambda *z: fastssl.SupConLoss(**options)(torch.stack(z, 1)),
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


@pytest.mark.parametrize("name", ["nt_xent", "dclw", "info_nce", "supcon", "clip", "siglip"])
def test_without_a_process_group_a_ring_changes_nothing(name: str) -> None:
    z = torch.randn(2, 8, 12).unbind()
    make = WITHOUT_GROUP[name]
    assert torch.equal(make(gather_distributed=True, exchange="ring")(*z), make()(*z))


def started(folder: Path, job: Callable[..., None], count: int, *args: object) -> list:
    ranks.start(job, count, folder, *args)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """What rank 0 of 2 and of 4 counted."""
    return {
        count: started(tmp_path_factory.mktemp("count"), ranks.count, count, ROWS)[0]
        for count in (2, 4)
    }


ROWS = 6


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("way", ["gather", "ring"])
@pytest.mark.parametrize("name", exchange.LOSSES)
def test_the_model_of_cost_knows_the_bytes_sent(
    counted: dict[int, dict], name: str, way: str, count: int
) -> None:
    sizes = 24 * (count - 1)
    expected = exchange.bytes_sent(name, way, count, ROWS, ranks.FEATURES, 2, 4)
    assert counted[count][name, way]["sent"] == expected + sizes


def test_the_page_has_the_tables_of_the_model() -> None:
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    assert exchange.tables() in page


def test_auto_changes_in_the_middle_of_what_the_model_says() -> None:
    machine = exchange.Machine()
    even = [
        keys.in_ring * D * 2 * exchange.even_batch(loss, W, D, 2, machine)
        for loss, keys in exchange.LOSSES.items()
        for W in exchange.RANKS
        for D in (128, 512, 2048)
    ]
    assert (min(even), max(even)) == (RING_BLOCK_BYTES // 4, RING_BLOCK_BYTES * 4)


@pytest.mark.parametrize("name", ranks.COUNTED)
def test_no_rank_of_a_ring_holds_all_keys(counted: dict[int, dict], name: str) -> None:
    views = 2 if name in ("nt_xent", "supcon") else 1
    assert counted[4][name, "gather"]["rows"] == 4 * ROWS * views
    assert counted[4][name, "ring"]["rows"] <= 2 * ROWS


@pytest.mark.parametrize("name", ranks.COUNTED)
def test_a_ring_saves_no_more_for_more_ranks(counted: dict[int, dict], name: str) -> None:
    two, four = (counted[count][name, "ring"]["saved"] for count in (2, 4))
    assert two == four


@pytest.mark.parametrize(
    ("numel", "sizes", "way", "expected"),
    [
        (2**18, [3, 4], "auto", False),
        (2**18, [3, 4], "ring", True),
        (2**18, [3, 5], "auto", True),  # 4 MiB a rank
        (2**18, [3, 5], "gather", False),
        (2**10, [2**8] * 1023, "auto", False),
        (2**10, [2**8] * 1024, "auto", True),  # 1 GiB in all
    ],
)
def test_auto_takes_the_ring_for_large_keys(
    numel: int, sizes: list[int], way: str, expected: bool
) -> None:
    keys = torch.empty(1, numel, device="meta")
    assert Ranks(sizes, 0, None).in_ring(way, keys) is expected


@pytest.mark.parametrize(("backend", "base"), [("torch", math.e), ("triton", 2.0)])
def test_merged_sums_are_those_of_both(backend: str, base: float) -> None:
    """Also of a row that one block, or each, hides all keys from; its maximum may be any number."""
    top = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, -500.0, -500.0, 7.0]])
    top[0, 1], top[1, 3] = (math.inf, math.inf) if backend == "triton" else (-math.inf, 7.0)
    total = torch.tensor([[2.0, 0.0, 0.0, 0.0], [4.0, 5.0, 6.0, 0.0]])
    merged = _merged([top[0], total[0]], [top[1], total[1]], backend=backend)
    nothing = math.inf if backend == "triton" else -math.inf
    assert merged[0].tolist() == [3, -500, -500, nothing]
    torch.testing.assert_close(merged[1], torch.tensor([2 + 4 * base**-2, 5, 6, 0]))


def test_rows_that_do_not_go_together_are_refused_on_every_rank(tmp_path: Path) -> None:
    for rank, messages in enumerate(started(tmp_path, ranks.refuse, 3)):
        assert messages == {
            "empty": "ValueError: z0 must have rows on every rank: rank 1 has no rows",
            "narrow": "ValueError: z0 must have rows of one size on all ranks, got 4 on rank 0 and "
            "3 on rank 1",
            "double": "TypeError: z0 must have the same dtype on all ranks, got float32 on rank 0 "
            "and float64 on rank 1",
            "mask": "mask must be None over several ranks: labels tell positives on other ranks "
            "too",
            "second derivative": "a loss with exchange='ring' has no second derivative",
            "size of a group": "group must be one that this rank, 1, is in" if rank == 1 else 2,
        }


@pytest.mark.parametrize(("way", "hops"), [("gather", 0), ("ring", 0), ("ring", 3)])
def test_a_rank_that_dies_ends_the_others(tmp_path: Path, way: str, hops: int) -> None:
    ranks.start(ranks.die, 3, tmp_path, way, hops)
    for rank in (0, 2):
        assert float((tmp_path / f"{rank}.txt").read_text()) < ranks.TIMEOUT


def test_weights_of_all_rows_need_all_rows() -> None:
    z = torch.randn(2, 8, 4).unbind()
    with pytest.raises(ValueError, match="exchange must be 'auto' or 'gather' with a weight_fn"):
        functional.dcl(*z, weight_fn=ranks.weights_of_the_batch, exchange="ring")


def test_an_exchange_goes_by_one_name() -> None:
    with pytest.raises(ValueError, match="exchange must be 'auto' with dist_impl, got 'ring'"):
        fastssl.SigLipLoss(dist_impl="shift", exchange="ring")
    with pytest.raises(ValueError, match="exchange must be one of 'auto', 'gather', 'ring'"):
        fastssl.NTXentLoss(exchange="reduce")
