"""Decoupled contrastive learning, weighted and not."""

import inspect
import math
from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from targets import Target
from torch import Tensor

import fastssl
from fastssl import functional, reference

DOUBLE = torch.float64


def views(target: Target, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    z0 = torch.randn(n, d)
    return [z.to(target.device, dtype) for z in (z0, z0 + torch.randn(n, d))]


def test_two_samples_by_hand() -> None:
    # cos(z0_0, z1_0) = 1, cos(z0_1, z1_1) = 0.6, between samples 0 or 0.8.
    z0 = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=DOUBLE)
    z1 = torch.tensor([[3.0, 0.0], [0.8, 0.6]], dtype=DOUBLE)
    positives = [1, 0.6, 1, 0.6]
    negatives = [(0, 0.8), (0, 0), (0, 0.8), (0.8, 0.8)]
    terms = torch.tensor(
        [
            math.log(sum(math.exp(x / 0.5) for x in seen)) - p / 0.5
            for p, seen in zip(positives, negatives, strict=True)
        ],
        dtype=DOUBLE,
    )
    for loss in (functional.dcl, reference.dcl):
        torch.testing.assert_close(loss(z0, z1, 0.5, reduction="none"), terms)
        torch.testing.assert_close(loss(z0, z1, 0.5), terms.mean())
        torch.testing.assert_close(loss(z0, z1, 0.5, reduction="sum"), terms.sum())


def test_weights_by_hand() -> None:
    z0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    z1 = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=DOUBLE)
    close, far = (math.exp(x / 0.5) for x in (1.0, 0.6))
    weights = [2 - 2 * close / (close + far), 2 - 2 * far / (close + far)]
    for weigh in (functional.mises_fisher_weights, reference.mises_fisher_weights):
        found = weigh(z0.requires_grad_(), z1, sigma=0.5)
        torch.testing.assert_close(found, torch.tensor(weights, dtype=DOUBLE))
        assert not found.requires_grad
    plain = reference.dcl(z0, z1, 0.5, reduction="none")
    weighted = functional.dcl(
        z0, z1, 0.5, weight_fn=functional.mises_fisher_weights, reduction="none"
    )
    positives = torch.tensor([1, 0.6, 1, 0.6], dtype=DOUBLE) / 0.5
    less = 1 - torch.tensor(weights * 2, dtype=DOUBLE)
    torch.testing.assert_close(weighted, plain + less * positives)


def test_orthogonal_samples_have_the_loss_of_the_formula(target: Target) -> None:
    n, temperature = 16, 0.2
    z = torch.eye(n, device=target.device)
    for module in (fastssl.DCLLoss, fastssl.DCLWLoss):  # all weights are 1 here
        loss = module(temperature, backend=target.backend)(z, z)
        assert loss.item() == pytest.approx(math.log(2 * (n - 1)) - 1 / temperature, rel=1e-5)


def test_two_samples_of_one_feature(target: Target) -> None:
    z = torch.tensor([[2.0], [-3.0]], device=target.device)
    value, *grads = value_and_gradients(
        partial(functional.dcl, temperature=0.5, backend=target.backend), [z, z]
    )
    assert value.item() == pytest.approx(math.log(2) - 2 - 2, rel=1e-6)
    assert all(grad.abs().max() < 1e-6 for grad in grads)


def test_nt_xent_is_dcl_with_the_positive_among_the_negatives(target: Target) -> None:
    z = views(target, 23, 10)
    terms = functional.dcl(*z, 0.3, reduction="none", backend=target.backend)
    torch.testing.assert_close(
        functional.nt_xent(*z, 0.3, reduction="none", backend=target.backend),
        torch.nn.functional.softplus(terms),
    )


def test_weights_of_one_change_nothing(target: Target) -> None:
    z = views(target, 20, 8)

    def ones(z0, z1):
        return torch.ones_like(z0[:, 0])

    torch.testing.assert_close(
        functional.dcl(*z, weight_fn=ones, backend=target.backend),
        functional.dcl(*z, backend=target.backend),
    )


def test_weights_are_asked_for_each_view_with_unit_rows(target: Target) -> None:
    z0, z1 = (7 * z for z in views(target, 9, 5))
    asked = []

    def weight_fn(a: Tensor, b: Tensor) -> Tensor:
        asked.append((a, b))
        return torch.ones_like(a[:, 0])

    functional.dcl(z0, z1, weight_fn=weight_fn, backend=target.backend)
    u0, u1 = reference.normalize(z0), reference.normalize(z1)
    assert len(asked) == 2
    for found, expected in zip(asked, ((u0, u1), (u1, u0)), strict=True):
        torch.testing.assert_close(found, expected)


def test_weights_may_have_gradients(target: Target) -> None:
    dtype = DOUBLE if target.backend == "torch" else torch.float32

    def weigh(z0, z1):
        return (z0 * z1[:, :1]).sum(1).exp()

    check_accuracy(
        partial(functional.dcl, temperature=0.3, weight_fn=weigh, backend=target.backend),
        partial(reference.dcl, temperature=0.3, weight_fn=weigh),
        views(target, 15, 6, dtype),
    )


@pytest.mark.parametrize("sigma", [0.05, 0.5, 20.0])
def test_mean_weight_is_one(sigma: float) -> None:
    z = [reference.normalize(z) for z in torch.randn(2, 31, 7)]
    weights = functional.mises_fisher_weights(*z, sigma)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    cosines = (z[0] * z[1]).sum(1)
    assert (weights[cosines.argsort()].diff() <= 0).all()


def test_a_batch_of_two_views_needs_negatives() -> None:
    z = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="at least 2 rows, or there are no negatives, got 1"):
        functional.dcl(z, z)
    with pytest.raises(ValueError, match="at least 2 rows"):  # there is no process group
        fastssl.DCLLoss(gather_distributed=True)(z, z)


def test_rows_that_ids_leave_no_negatives_have_an_infinite_term(target: Target) -> None:
    """It is log 0, as the formula says; gradients are those of the positives."""
    ids = torch.ones(4, dtype=torch.int64, device=target.device)
    z = views(target, 4, 6)
    loss = partial(functional.dcl, temperature=0.5, backend=target.backend, ids=ids)
    assert (loss(*z, reduction="none") == -torch.inf).all()
    _, *grads = value_and_gradients(loss, z)

    def positives(*z):
        return -2 * torch.cosine_similarity(*z).mean()

    for got, expected in zip(grads, value_and_gradients(positives, z)[1:], strict=True):
        torch.testing.assert_close(got, expected)


def test_bad_options_are_named() -> None:
    z = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none'"):
        functional.dcl(z, z, reduction="max")
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        fastssl.DCLLoss(0)
    with pytest.raises(TypeError, match="weight_fn must be callable or None, got float"):
        fastssl.DCLLoss(weight_fn=0.5)
    with pytest.raises(TypeError, match="weight_fn must be callable or None, got float"):
        functional.dcl(z, z, weight_fn=0.5)
    with pytest.raises(ValueError, match=r"sigma must be positive and finite, got -0\.5"):
        fastssl.DCLWLoss(sigma=-0.5)
    with pytest.raises(TypeError, match="sigma must be a number, got str"):
        fastssl.DCLWLoss(sigma="wide")
    with pytest.raises(ValueError, match="backend must be one of"):
        fastssl.DCLWLoss(backend="gpu")


@pytest.mark.parametrize(
    ("weigh", "error", "message"),
    [
        (lambda a: 1.0, TypeError, "a floating-point tensor, got float"),
        (lambda a: torch.ones(4, dtype=torch.int64), TypeError, "a .* got torch.int64"),
        (lambda a: torch.tensor(1.0), ValueError, r"shape \(4,\) on cpu, .* got \(\) on cpu"),
        (lambda a: torch.ones(4, 1), ValueError, r"shape \(4,\) on cpu, .* got \(4, 1\) on cpu"),
        (lambda a: torch.ones(5), ValueError, r"shape \(4,\) on cpu, .* got \(5,\) on cpu"),
        (lambda a: a[:, 0].to("meta"), ValueError, r"shape \(4,\) on cpu, .* on meta"),
    ],
)
def test_bad_weights_are_named(weigh, error: type[Exception], message: str) -> None:
    z = torch.randn(4, 3)
    with pytest.raises(error, match=f"weight_fn must return {message}"):
        functional.dcl(z, z, weight_fn=lambda a, b: weigh(a))


def test_weights_of_another_type_do_not_change_that_of_the_loss() -> None:
    z = torch.randn(4, 3)
    loss = functional.dcl(z, z, weight_fn=lambda a, b: a.new_ones(4, dtype=torch.float64))
    torch.testing.assert_close(loss, functional.dcl(z, z))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((0.0,), ValueError, "sigma must be positive and finite, got 0.0"),
        ((torch.nan,), ValueError, "sigma must be positive and finite, got nan"),
        (("wide",), TypeError, "sigma must be a number, got str"),
    ],
)
def test_a_bad_sigma_is_named(given, error: type[Exception], message: str) -> None:
    z = torch.zeros(4, 3)
    with pytest.raises(error, match=message):
        functional.mises_fisher_weights(z, z, *given)


def test_weights_of_bad_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"z0 and z1 must have equal shapes, got \(4, 3\) and"):
        functional.mises_fisher_weights(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(TypeError, match="z1 must be a tensor, got list"):
        functional.mises_fisher_weights(torch.zeros(4, 3), [1.0])


class TestModule:
    def test_agrees_with_the_function(self, target: Target) -> None:
        z = views(target, 12, 8)
        ids = torch.arange(12, device=target.device) // 2
        module = fastssl.DCLLoss(0.3, backend=target.backend)
        assert torch.equal(
            module(*z, ids), functional.dcl(*z, 0.3, ids=ids, backend=target.backend)
        )
        weighted = fastssl.DCLWLoss(0.3, 0.7, backend=target.backend)
        weigh = partial(functional.mises_fisher_weights, sigma=0.7)
        assert torch.equal(
            weighted(*z, ids),
            functional.dcl(*z, 0.3, weight_fn=weigh, ids=ids, backend=target.backend),
        )

    @pytest.mark.parametrize("name", ["DCLLoss", "DCLWLoss"])
    def test_learns_a_parameter_temperature(self, name: str) -> None:
        module = getattr(fastssl, name)(torch.nn.Parameter(torch.tensor(0.5)))
        module(*torch.randn(2, 8, 4)).backward()
        assert [name for name, _ in module.named_parameters()] == ["temperature"]
        assert module.temperature.grad != 0

    def test_shows_its_options(self) -> None:
        assert "temperature=0.2" in repr(fastssl.DCLLoss(0.2))
        assert "sigma=0.7" in repr(fastssl.DCLWLoss(0.2, 0.7))

    @pytest.mark.parametrize("name", ["DCLLoss", "DCLWLoss"])
    def test_takes_lightlys_arguments(self, name: str) -> None:
        lightly = pytest.importorskip("lightly.loss")
        ours, theirs = (
            [
                (parameter.name, parameter.default)
                for parameter in inspect.signature(getattr(library, name)).parameters.values()
            ]
            for library in (fastssl, lightly)
        )
        assert ours[: len(theirs)] == theirs

    @pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # theirs
    @pytest.mark.parametrize("name", ["DCLLoss", "DCLWLoss"])
    def test_replaces_lightlys(self, name: str) -> None:
        lightly = pytest.importorskip("lightly.loss")
        z = torch.randn(2, 17, 9, dtype=DOUBLE).unbind()
        for temperature in (0.5, 0.1, 0.02):
            ours, theirs = (getattr(library, name)(temperature) for library in (fastssl, lightly))
            for a, b in zip(
                value_and_gradients(ours, z), value_and_gradients(theirs, z), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    def test_replaces_lightlys_with_its_weights(self) -> None:
        lightly = pytest.importorskip("lightly.loss")

        def weigh(a, b):
            return ((a - b) ** 2).sum(1)

        z = torch.randn(2, 17, 9, dtype=DOUBLE).unbind()
        ours, theirs = (library.DCLLoss(0.1, weigh) for library in (fastssl, lightly))
        for a, b in zip(value_and_gradients(ours, z), value_and_gradients(theirs, z), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
