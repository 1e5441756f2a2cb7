"""Barlow Twins, VICReg and Sinkhorn over ranks: what they compute, hold and send.

That parameters get the gradients of one process is in tests/test_distributed.py.
"""

from functools import partial
from typing import Any

import pytest
import ranks
import ranks_statistics
import torch
from ranks import ROWS
from ranks_statistics import (
    EMPTY,
    EXCHANGES,
    FEATURES,
    LOSSES,
    SHARED,
    SIZES,
    place,
    scores,
    value_and_gradients,
    views,
)

from fastssl import functional, reference

LOSS = pytest.mark.parametrize("loss", LOSSES)
EXCHANGE = pytest.mark.parametrize("exchange", EXCHANGES)
WORLD = len(SIZES)
# What a rank sends of a tensor that is gathered, and of one that is added up; and of sizes.
GATHERED, REDUCED, BEGIN = WORLD - 1, 2 * (WORLD - 1) / WORLD, (WORLD - 1) * 24

Results = list[dict[Any, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    ranks.start(ranks_statistics.run, WORLD, folder)
    files = [folder / f"{rank}.pt" for rank in range(WORLD)]
    return [torch.load(file, weights_only=False) for file in files]


def check(found: list[list[torch.Tensor]], expected: list[torch.Tensor], rtol: float) -> None:
    """Compare the mean of values, and gradients, with those of one process."""
    values, grads_a, grads_b = zip(*found, strict=True)
    for got, want in (
        (torch.stack(values).double().mean(), expected[0]),
        (torch.cat(grads_a).double() / len(found), expected[1]),
        (torch.cat(grads_b).double() / len(found), expected[2]),
    ):
        error = torch.linalg.vector_norm(got - want.double())
        assert error <= rtol * torch.linalg.vector_norm(want.double())


@LOSS
@EXCHANGE
def test_ranks_may_weight_what_they_share(results: Results, loss: str, exchange: str) -> None:
    value, *grads = value_and_gradients(partial(LOSSES[loss], **SHARED[loss]), views())
    weights = range(1, WORLD + 1)
    for rank, weight in enumerate(weights):
        got, *got_grads = results[rank][loss, exchange]["weighted"]
        torch.testing.assert_close(got, weight * value, rtol=1e-10, atol=0)
        for a, b in zip(got_grads, grads, strict=True):
            torch.testing.assert_close(a, sum(weights) * b[place(rank)], rtol=1e-10, atol=1e-12)


@LOSS
@EXCHANGE
def test_bfloat16_rows(results: Results, loss: str, exchange: str) -> None:
    expected = value_and_gradients(LOSSES[loss], views(dtype=torch.bfloat16))
    found = [result[loss, exchange]["bfloat16"] for result in results]
    check(found, expected, 0.01)
    for value, *grads in found:
        assert value.dtype == torch.float32
        assert {grad.dtype for grad in grads} == {torch.bfloat16}


@LOSS
@EXCHANGE
def test_a_mean_far_from_zero_costs_no_digits(results: Results, loss: str, exchange: str) -> None:
    z = [x.double() for x in views(dtype=torch.float32, mean=1000.0)]
    expected = value_and_gradients(getattr(reference, loss), z)
    check([result[loss, exchange]["far mean"] for result in results], expected, 1e-5)


@LOSS
@EXCHANGE
def test_a_second_derivative_raises(results: Results, loss: str, exchange: str) -> None:
    for result in results:
        message = result[loss, exchange]["second derivative"]
        assert message.startswith("RuntimeError: fastssl::")
        assert "has no derivative" in message


@LOSS
def test_reducing_holds_neither_all_rows_nor_the_matrix(results: Results, loss: str) -> None:
    assert any(ROWS in shape for shape in results[0][loss, "gather"]["shapes"])
    for size, result in zip(SIZES, results, strict=True):
        found = result[loss, "reduce"]
        assert (size, FEATURES) in found["shapes"]
        assert not any(ROWS in shape for shape in found["shapes"])
        assert max(torch.Size(shape).numel() for shape in found["shapes"]) <= FEATURES**2 / 2
        assert found["saved"] <= FEATURES * max(size, 6)  # rows, or mean, rest, factor of two views


def test_reducing_sends_panels_of_the_matrix(results: Results) -> None:
    panel, moments, gradient = FEATURES // 4, 2 * 3 * FEATURES, 1
    halves = FEATURES * (FEATURES + panel)  # of two matrices
    for result in results:
        for loss, matrix in (("barlow_twins", FEATURES**2), ("vicreg", halves)):
            numbers = matrix + moments + gradient
            assert result[loss, "reduce"]["sent"] == BEGIN + REDUCED * 8 * numbers


@LOSS
def test_gathering_sends_rows_once(results: Results, loss: str) -> None:
    rows, gradient = 2 * max(SIZES) * FEATURES, 1
    for result in results:
        sent = BEGIN + GATHERED * 8 * rows + REDUCED * 8 * gradient
        assert result[loss, "gather"]["sent"] == sent


@LOSS
def test_auto_sends_less(results: Results, loss: str) -> None:
    """14 rows of 40 features; of 10; of 10 in bfloat16, whose sums take twice its bytes."""
    for result in results:
        for sent, less in zip(result[loss, "auto"], ("gather", "reduce", "gather"), strict=True):
            assert sent["auto"] == sent[less]
            assert sent["gather"] != sent["reduce"]


@pytest.mark.parametrize("case", ranks_statistics.CODES)
def test_codes_are_those_of_one_process(results: Results, case: ranks_statistics.Codes) -> None:
    found = [result[case] for result in results]
    codes = torch.cat([each["codes"] for each in found])
    expected = reference.sinkhorn_knopp(
        scores(case.spread, case.dtype).double(), 0.05, case.iterations
    )
    exact = {"rtol": 1e-10, "atol": 1e-12}
    tolerance = exact if case.backend == "torch" else {"rtol": 2e-5, "atol": 1e-7}
    torch.testing.assert_close(codes.double(), expected, **tolerance)
    sums = max(case.iterations, 1)
    for each in found:
        assert not any(ROWS in shape for shape in each["shapes"])
        numbers = (sums + 1) * FEATURES
        assert each["sent"] == BEGIN + REDUCED * numbers * codes.element_size()


def test_hard_codes_are_the_largest(results: Results) -> None:
    codes = torch.cat([result["hard"] for result in results])
    assert torch.equal(codes, functional.sinkhorn_knopp(scores(0.3), hard=True))


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "sinkhorn_knopp", "swav"])
def test_a_rank_without_rows_is_named_on_all(results: Results, name: str) -> None:
    for result in results:
        assert result["empty"][name].startswith("ValueError: ")
        assert f"rank {EMPTY} has no rows" in result["empty"][name]
