"""Triton's launchers of the cross product energy: both routes, any cut of the work, any input."""

import itertools

import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

energy = pytest.importorskip("fastssl.kernels.energy")
energy_dual = pytest.importorskip("fastssl.kernels.energy_dual")
energy_outliers = pytest.importorskip("fastssl.kernels.energy_outliers")
energy_tiles = pytest.importorskip("fastssl.kernels.energy_tiles")

pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
EPS = 1e-5
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}  # of the largest entry
WAYS = list(itertools.product([False, True], repeat=3))  # symmetric, standardize, dual


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, shares of D and panels even of a small matrix."""

    def launch_config(kernel: str, *shape: object) -> tuple[dict[str, int], int]:
        if kernel == "columns":
            return {"BLOCK_N": 16, "BLOCK_F": 32, "num_warps": 4}, 1
        tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
        return tile, {"gram": 3, "panel": 32}.get(kernel, 1)

    monkeypatch.setattr(energy_tiles, "launch_config", launch_config)


def views(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    u = torch.randn(n, d)
    return u.to(dtype), (0.5 * u + torch.randn(n, d)).to(dtype)


def forward_and_backward(
    u: Tensor, v: Tensor | None, ddiagonal: Tensor, standardize: bool, dual: bool, eps: float = EPS
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, Tensor | None]]:
    out = energy.cross_energy_fwd(u, v, eps, standardize, dual, save=True)
    _, diagonal, *stats, u_saved, v_saved = out
    gradients = energy.cross_energy_bwd(
        torch.tensor(0.7), ddiagonal, u, v, *stats, diagonal, u_saved, v_saved,
        standardize, dual, (True, v is not None),
    )  # fmt: skip
    return out, gradients


def assert_close(got: Tensor, exact: Tensor, tolerance: float, at_least: float = 0.0) -> None:
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(at_least)


def check(
    u: Tensor, v: Tensor | None, standardize: bool, dual: bool, eps: float = EPS, loss: float = 1.0
) -> None:
    """Compare with the formula in float64; ``loss`` times the tolerance is allowed."""
    ddiagonal = torch.randn(u.shape[1])
    out, gradients = forward_and_backward(u, v, ddiagonal, standardize, dual, eps)
    inputs = [x.double().requires_grad_() for x in (u, v) if x is not None]
    units = []
    for x, factor in zip(inputs, (out[3], out[5]), strict=False):
        x = x - x.mean(0)
        std = (x.square().mean(0) + eps).sqrt()
        units.append(x / std if standardize else x * factor.double())
    c = units[0].T @ units[-1] / len(u)
    exact = c.square().sum() - c.diagonal().square().sum()
    loss64 = 0.7 * exact + (ddiagonal * c.diagonal()).sum()
    tolerance = loss * TOLERANCE[u.dtype]
    assert_close(out[0], exact.detach(), tolerance, at_least=1.0)
    assert_close(out[1], c.diagonal().detach(), tolerance)
    for got, grad in zip(gradients, torch.autograd.grad(loss64, inputs), strict=False):
        assert got.dtype == u.dtype
        assert_close(got, grad, tolerance)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("symmetric", "standardize", "dual"), WAYS)
def test_any_cut_of_the_work(symmetric, standardize, dual) -> None:
    u, v = views(37, 70)
    check(u, None if symmetric else v, standardize, dual)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("symmetric", "dual"), list(itertools.product([False, True], repeat=2)))
def test_float16_accumulates_in_float32(symmetric, dual) -> None:
    u, v = views(37, 70, torch.float16)
    check(u, None if symmetric else v, True, dual)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_tiles_of_a_gpu(symmetric: bool, dual: bool) -> None:
    u, v = views(70, 150) if dual else views(150, 140)
    check(u, None if symmetric else v, True, dual)


@pytest.mark.parametrize(("symmetric", "standardize", "dual"), WAYS)
@pytest.mark.parametrize("shape", [(2, 3), (17, 1)])
def test_few_samples_and_features(shape, symmetric, standardize, dual) -> None:
    u, v = views(*shape)
    check(u, None if symmetric else v, standardize, dual, eps=0.5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dual", [False, True])
def test_any_strides(dual: bool) -> None:
    u, v = views(37, 20)
    wide = torch.zeros(74, 40)
    wide[::2, ::2] = v
    check(u.T.contiguous().T, wide[::2, ::2], True, dual)
    one = torch.tensor(2.0).expand(20)  # the gradient of a sum
    _, strided = forward_and_backward(u, None, one, True, dual)
    _, gradients = forward_and_backward(u, None, one.contiguous(), True, dual)
    assert torch.equal(strided[0], gradients[0])


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nothing_is_lost_where_features_are_decorrelated(dtype: torch.dtype, dual: bool) -> None:
    """The diagonal that the dual route takes off is that of the rounded numbers it multiplied."""
    z = torch.randn(40, 39)
    u = 40**0.5 * torch.linalg.qr(z - z.mean(0)).Q
    out = energy.cross_energy_fwd(u.to(dtype), None, EPS, True, dual, save=False)
    assert abs(out[0]) < 1e-5  # of a total of 39
    torch.testing.assert_close(out[1], torch.ones(39), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_a_mean_far_above_the_deviation(standardize: bool, dual: bool) -> None:
    u, v = views(40, 30)
    check(u + 1000, v - 300, standardize, dual, loss=5)  # float32 has the mean to 3e-5


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_float16_of_any_scale(scale: float, standardize: bool, dual: bool) -> None:
    u, v = (scale * x for x in views(40, 30))
    eps = EPS if scale > 1 else 1e-3 * scale**2
    check(u.half(), v.half(), standardize, dual, eps=eps)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_a_constant_feature(standardize: bool, dual: bool) -> None:
    u, v = views(40, 30)
    u[:, 3] = v[:, 7] = 0.1
    check(u, v, standardize, dual)
    u.fill_(0.1)
    out, gradients = forward_and_backward(u, None, torch.ones(30), standardize, dual)
    assert all((x == 0).all() for x in (out[0], out[1], gradients[0]))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_one_factor_for_all_features_is_a_power_of_two(scale: float) -> None:
    u, v = (scale * x * torch.logspace(-6, 0, 30) for x in views(40, 30))
    out = energy.cross_energy_fwd(u, v, EPS, False, False, save=False)
    for x, factor in ((u, out[3]), (v, out[5])):
        assert (factor == factor[0]).all()
        assert factor[0].log2() == factor[0].log2().round()
        assert 0.5 <= factor[0] * x.double().std(0, correction=0).max() < 1


def test_without_deviation_the_factor_is_one() -> None:
    out = energy.cross_energy_fwd(torch.ones(4, 3), None, EPS, False, True, save=False)
    assert (out[3] == 1).all()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("dual", [False, True])
def test_a_variance_that_overflows_is_finite(dual: bool) -> None:
    u = 1e20 * torch.randn(8, 5)
    for standardize in (False, True):
        out, gradients = forward_and_backward(u, None, torch.ones(5), standardize, dual)
        assert all(x.isfinite().all() for x in (*out, gradients[0]))


@pytest.mark.parametrize("symmetric", [False, True])
def test_dual_saves_both_halves_of_the_gram_matrices(symmetric: bool, small_tiles) -> None:
    u, v = views(37, 70)
    out = energy.cross_energy_fwd(u, None if symmetric else v, EPS, True, True, save=False)
    for x, gram in zip((u, v), out[6:] if not symmetric else out[6:7], strict=False):
        x = (x - x.mean(0)) / (x.var(0, correction=0) + EPS).sqrt()
        torch.testing.assert_close(gram, x @ x.T / 70)
        assert torch.equal(gram, gram.T)
    assert (out[7].numel() == 0) == symmetric


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("symmetric", [False, True])
def test_features_without_save_keep_nothing(symmetric: bool) -> None:
    u, v = views(37, 70)
    v = None if symmetric else v
    some = energy.cross_energy_fwd(u, v, EPS, True, False, save=False)
    every = energy.cross_energy_fwd(u, v, EPS, True, False, save=True)
    torch.testing.assert_close(some[0], every[0])
    assert some[6].numel() == some[7].numel() == 0
    assert every[6].shape == u.shape
    assert (every[7].numel() == 0) == symmetric


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_a_gradient_that_is_not_needed_is_none(needs: tuple[bool, bool], dual: bool) -> None:
    u, v = views(9, 5)
    ones = torch.ones(5)
    (_, diagonal, *stats, u_saved, v_saved), every = forward_and_backward(u, v, ones, True, dual)
    some = energy.cross_energy_bwd(
        torch.tensor(0.7), ones, u, v, *stats, diagonal, u_saved, v_saved, True, dual, needs
    )
    for one, other, needed in zip(every, some, needs, strict=True):
        assert torch.equal(one, other) if needed else other is None


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_nan_in_gives_nan_out(standardize: bool, dual: bool) -> None:
    u, v = views(20, 10)
    v[3, 2] = torch.nan
    out, (du, dv) = forward_and_backward(u, v, torch.ones(10), standardize, dual)
    assert out[0].isnan()
    assert out[1][2].isnan()
    assert du.isnan().any(0).all()
    assert dv[:, 2].isnan().all()


def check_each_feature(u: Tensor) -> tuple[Tensor, ...]:
    """Compare VICReg's dual route with float64, each feature's gradient relative to its own size.

    Upstream gradients are such that both terms of each count, and that float16 has room for it.
    """
    N, D = u.shape
    out = energy.cross_energy_fwd(u, None, EPS, False, True, save=True)
    total, diagonal, *stats, u_saved, v_saved = out
    z = u.double().requires_grad_()
    unit = (z - z.mean(0)) * stats[1].double()
    c = unit.T @ unit / N
    off = c - c.diagonal().diag()
    along = (unit @ off).norm(dim=0) / unit.norm(dim=0).clamp_min(1e-300)
    along = along.where(along > 0, c.diagonal())  # one feature alone
    ddiagonal = (along * torch.linspace(-1, 1, D)).detach().float()
    loss = off.square().sum() + (ddiagonal * c.diagonal()).sum()
    (exact,) = torch.autograd.grad(loss, z)
    upstream = 2.0 ** (10 - int(exact.abs().max().log2()))
    du, _ = energy.cross_energy_bwd(
        torch.tensor(upstream), upstream * ddiagonal, u, None, *stats, diagonal, u_saved, v_saved,
        False, True, (True, False),
    )  # fmt: skip
    tolerance, tiny = TOLERANCE[u.dtype], torch.finfo(u.dtype).smallest_normal
    assert_close(total, off.square().sum().detach(), tolerance)
    assert ((diagonal - c.diagonal()).abs() <= tolerance * c.diagonal()).all()
    exact *= upstream
    allowed = tolerance * exact.abs().amax(0) + tiny * torch.finfo(u.dtype).eps
    assert ((du - exact).abs() <= allowed).all()
    return *out, du


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("large", [1, 16, 40])  # one; as many as there is room for; more
def test_a_few_large_features_drown_no_small_ones(large: int, dtype: torch.dtype) -> None:
    scales = torch.full((100,), 1e-3)
    scales[torch.randperm(100)[:large]] = 1e3
    check_each_feature((torch.randn(37, 100) * scales).to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_features_of_all_sizes(dtype: torch.dtype) -> None:
    u = torch.randn(37, 100) * 10 ** (6 * torch.rand(100) - 3)
    check_each_feature(u.to(dtype))


@pytest.mark.parametrize("shape", [(2, 100), (2, 1), (5, 7), (9, 16), (9, 17)])
@pytest.mark.parametrize("ratio", [1.0, 1e6])
def test_outliers_of_few_samples_and_features(shape: tuple[int, int], ratio: float) -> None:
    u = torch.randn(shape)
    u[:, -1] *= ratio
    check_each_feature(u)


def test_a_large_constant_feature_is_no_outlier() -> None:
    u = 1e-3 * torch.randn(20, 100)
    u[:, 5] *= 1e6
    u[:, 50] = 1e3
    _, diagonal, *_, du = check_each_feature(u)
    assert diagonal[50] == 0
    assert (du[:, 50] == 0).all()


def test_an_outlier_far_from_zero() -> None:
    u = torch.randn(20, 100)
    u[:, 5] = 1e5 + 1e3 * u[:, 5].round(decimals=1)
    check_each_feature(u)


def test_outliers_may_lie_anywhere_in_memory() -> None:
    u = torch.randn(17, 90)
    u[:, 3] *= 1e4
    wide = torch.zeros(180, 34)
    wide[::2, ::2] = u.T
    for got, expected in zip(
        check_each_feature(wide.T[::2, ::2]), check_each_feature(u), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_nan_beside_an_outlier_gives_nan_out() -> None:
    u = torch.randn(20, 100)
    u[:, 5] *= 1e3
    u[3, 50] = torch.nan
    out, (du, _) = forward_and_backward(u, None, torch.ones(100), False, True)
    assert out[0].isnan()
    assert du.isnan().any(0).all()


def test_a_gradient_with_outliers_that_is_not_needed_is_none() -> None:
    u = torch.randn(9, 20)
    _, diagonal, *rest = energy.cross_energy_fwd(u, None, EPS, False, True, save=False)
    *stats, u_saved, v_saved = rest
    assert energy.cross_energy_bwd(
        torch.tensor(0.7), torch.ones(20), u, None, *stats, diagonal, u_saved, v_saved,
        False, True, (False, False),
    ) == (None, None)  # fmt: skip


def test_of_more_outliers_than_there_is_room_for_the_first_are_taken() -> None:
    diagonal = torch.full((100,), 1e-6)
    diagonal[7:27] = 0.5
    found = energy_outliers.find_outliers(diagonal, torch.ones(100))
    assert found.features.tolist() == list(range(7, 23))
    assert (found.rest_factor == 0).nonzero().flatten().tolist() == list(range(7, 23))
    assert (found.rest_factor[23:] == 1).all()


def test_outliers_are_the_same_each_time() -> None:
    u = torch.randn(20, 100)
    u[:, 7:27] = 1e3 * u[:, 7:8]  # more than there is room for, and equal
    ones = torch.ones(100)
    results = [forward_and_backward(u, None, ones, False, True) for _ in range(2)]
    for first, second in zip(*([*out, du] for out, (du, _) in results), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("ratio", [1.0, 1e3])
def test_only_outliers_are_computed_apart(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def spy(diagonal: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        found.append(energy_outliers.find_outliers(diagonal, factor))
        return found[-1]

    monkeypatch.setattr(energy_dual, "find_outliers", spy)
    u = torch.randn(20, 100)
    u /= u.std(0)  # else some of so few features have twice the variance of others
    u[:, [70, 20]] *= ratio
    u[:, 20] *= ratio**0.1
    forward_and_backward(u, None, torch.ones(100), False, True)
    forward, backward = found
    places = [20, 70] if ratio > 1 else []
    free = [100] * (16 - len(places))
    assert forward.features.tolist() == backward.features.tolist() == places + free
    factor = forward.rest_factor
    assert (factor == 0).nonzero().flatten().tolist() == places
    rest = factor[factor != 0]
    assert (rest == rest[0]).all()
    stds = u.std(0, correction=0)[factor != 0]
    assert 0.5 <= rest[0] * stds.max() < 1
    found.clear()
    for v, standardize in ((None, True), (u, False)):
        forward_and_backward(u, v, torch.ones(100), standardize, True)
    assert not found


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_workspaces_are_bounded(arch: str) -> None:
    sizes = [2, 100, 3000, 16384, 1_000_000]
    dtypes = (torch.float32, torch.bfloat16)
    for N, D, inputs, dtype in itertools.product(sizes, sizes, (1, 2), dtypes):
        config = (N, D, inputs, dtype, arch, 100)
        options, splits = energy_tiles.launch_config("gram", *config)
        blocks = -(-N // options["BLOCK_M"])
        tiles = inputs * blocks * (blocks + 1) // 2
        assert splits == 1 or splits * tiles <= 200  # twice what runs at once
        options, rows = energy_tiles.launch_config("panel", *config)
        assert rows % options["BLOCK_N"] == 0
        assert rows <= max(options["BLOCK_M"], min(2048, D // 2 + options["BLOCK_M"]))
