"""Triton's launchers of the log-sum-exp of classes: any cut of the work, any input."""

import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

from fastssl import reference

gpu = pytest.importorskip("fastssl.kernels.gpu")
similarity = pytest.importorskip("fastssl.kernels.similarity")
tiles = pytest.importorskip("fastssl.kernels.tiles")
pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
ALL = (True, True, True)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}  # of the largest entry


def assert_close(got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


def exact_classes(z: Tensor, scale: Tensor, classes: Tensor) -> Tensor:
    scores, itself = scale * z @ z.T, torch.eye(len(z), dtype=torch.bool)
    positive = (classes[:, None] == classes) & ~itself
    count = positive.sum(1)
    mean = (scores * positive).sum(1) / count.clamp_min(1)
    lse = scores.masked_fill(itself, -torch.inf).logsumexp(1)
    return torch.where(count > 0, lse - mean, 0)


def fused_classes(
    z: Tensor, s: float, classes: Tensor, dlse: Tensor, needs: tuple[bool, bool] = ALL[:2]
) -> list[Tensor | None]:
    """Return the log-sum-exp and the gradients."""
    scale = torch.tensor(s)
    lse, *saved = similarity.class_lse_fwd(z, scale, classes, None)
    return [lse, *similarity.class_lse_bwd(dlse, z, scale, classes, None, *saved, needs)]


def check_classes(
    z: Tensor, s: float, classes: Tensor, dlse: Tensor, tolerance: float | None = None
) -> None:
    got = fused_classes(z, s, classes, dlse)
    inputs = [x.double().requires_grad_() for x in (z, torch.tensor(s))]
    exact = exact_classes(*inputs, classes)
    want = [exact.detach(), *torch.autograd.grad(exact, inputs, dlse.double())]
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, tolerance or TOLERANCE[z.dtype])


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_of_classes_that_is_not_needed_is_none(needs: tuple[bool, bool]) -> None:
    given = (torch.randn(9, 5), 3.0, torch.arange(9) % 4, torch.rand(9))
    for one, other, needed in zip(
        fused_classes(*given)[1:], fused_classes(*given, needs)[1:], needs, strict=True
    ):
        assert torch.equal(one, other) if needed else other is None


CLASSES = {
    "pairs": lambda at: at // 2,
    "several and singletons": lambda at: at * 7 % 90 - 20,
    "one": lambda at: torch.full_like(at, 3, dtype=torch.int32),
    "large names": lambda at: at % 11 + 2**62,
}


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    ("multiprocessors", "N", "splits", "kind"),
    [*((1, 150, 1, kind) for kind in CLASSES), (40, 400, 7, "several and singletons")],
    indirect=["multiprocessors"],
)
def test_classes_whatever_the_cut(multiprocessors, N, splits, kind: str, scale) -> None:
    config = (N, N, 20, torch.float32, True, "interpreter", multiprocessors)
    assert tiles.launch_config("fwd", *config)[1] == splits
    assert tiles.launch_config("bwd", *config)[1] == splits
    z = reference.normalize(torch.randn(N, 20))
    check_classes(z, scale, CLASSES[kind](torch.arange(N)), torch.randn(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wide_rows_of_classes(dtype: torch.dtype) -> None:
    z = torch.randn(70, 300).to(dtype)
    check_classes(z, 0.3, torch.arange(70) % 20, 1000 * torch.rand(70))


@pytest.mark.parametrize("upstream", [65536.0, 1e-6])
def test_float16_classes_hold_any_upstream_gradient(upstream: float) -> None:
    z, classes, dlse = torch.randn(70, 130).half() / 4, torch.arange(70) % 9, torch.rand(70)
    _, want, dscale = fused_classes(z, 2.0, classes, dlse)
    _, got, big = fused_classes(z, 2.0, classes, upstream * dlse)
    torch.testing.assert_close(got, (upstream * want.float()).half(), rtol=1e-2, atol=2**-20)
    torch.testing.assert_close(big, upstream * dscale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("multiprocessors", [4, 40], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [24, 128, 300])
def test_a_solved_class_has_no_gradient(multiprocessors, D: int, dtype: torch.dtype) -> None:
    """Where all probability is on the one positive, two large terms cancel without a rest."""
    sample = torch.eye(24)[:, torch.arange(D) % 24]  # orthogonal
    views = sample[:, None] + 0.01 * torch.randn(24, 2, D)
    z = reference.normalize(views.flatten(0, 1)).to(dtype)
    for kept in (48, 47):  # in the second case the last row has no positive
        classes = torch.arange(kept) // 2
        lse, *grads = fused_classes(z[:kept], 1000.0, classes, torch.randn(kept))
        assert all((x == 0).all() for x in (lse, *grads))


def test_rows_without_positives_give_nothing() -> None:
    for n in (1, 5, 70):
        for x in fused_classes(torch.randn(n, 6), 2.0, torch.arange(n), torch.randn(n)):
            assert (x == 0).all()


@pytest.mark.parametrize("multiprocessors", [1, 40], indirect=True)
def test_same_input_same_bits(multiprocessors) -> None:
    z, classes, dlse = torch.randn(100, 16), torch.arange(100) % 9, torch.rand(100)
    both = (fused_classes(z, 3.0, classes, dlse) for _ in range(2))
    assert all(map(torch.equal, *both))


def test_nan_in_one_row_reaches_every_row() -> None:
    z = torch.randn(70, 8)
    z[3, 2] = torch.nan
    lse, dz, _ = fused_classes(z, 2.0, torch.arange(70) % 9, torch.rand(70))
    assert lse.isnan().all()
    assert dz.isnan().all()


def test_any_strides() -> None:
    classes = torch.randint(30, (140,))[::2]
    one = torch.tensor(0.1).expand(70)  # the gradient of a sum
    check_classes(torch.randn(18, 70).T, 0.3, classes, one)  # features far apart
    check_classes(torch.randn(140, 36)[::2, ::2], 0.5, classes, one)


def test_scores_may_be_large() -> None:
    z = 50 * torch.randn(70, 300)
    rounding = 2**-23 * float((z @ z.T).abs().max())  # of an exponential, by that of its score
    check_classes(z, 1 / 50, torch.arange(70) // 3, torch.rand(70), tolerance=rounding)


def test_zero_rows_and_twins_are_finite() -> None:
    z = torch.randn(20, 8)
    z[3], z[5], z[7] = 0, 0, z[6]
    check_classes(z, 5.0, torch.arange(20) % 7, torch.rand(20))
