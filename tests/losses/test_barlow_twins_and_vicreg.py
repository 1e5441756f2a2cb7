"""Barlow Twins and VICReg keep every promise about numbers, on every backend and both routes."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import extra_bytes
from targets import Target
from torch import distributed as dist

import fastssl
from fastssl import functional, reference
from fastssl.ops import energy, reduced_energy
from fastssl.streaming import energy_dual, energy_features, energy_tiles

# Aligned to tiles; ragged; more features than samples; two samples; one feature.
SHAPES = [(64, 32), (37, 19), (9, 300), (2, 5), (40, 1)]
GPU_SHAPES = [(1024, 512), (1000, 300), (256, 4096), (300, 3001), (2, 5), (512, 1)]
LOSSES = ["barlow_twins", "vicreg"]


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> str:
    return request.param


def fused(loss: str, target: Target, **options: object) -> Callable[..., torch.Tensor]:
    return partial(getattr(functional, loss), backend=target.backend, **options)


def plain(loss: str) -> Callable[..., torch.Tensor]:
    return getattr(reference, loss)


def shapes(target: Target) -> list[tuple[int, int]]:
    return GPU_SHAPES if target.device == "cuda" else SHAPES


def dtypes(target: Target) -> list[torch.dtype]:
    if target.interpreted:  # its bfloat16 tl.dot is wrong
        return [torch.float32, torch.float16]
    low = [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float64, *low] if target.backend == "torch" else low


def views(target: Target, n: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    z_a = torch.randn(n, d)
    z_b = z_a + torch.randn(n, d)
    return [z.to(target.device, dtype) for z in (z_a, z_b)]


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
def test_value_and_gradients_are_as_exact_as_promised(loss: str, target: Target) -> None:
    for n, d in shapes(target):
        for dtype in dtypes(target):
            check_accuracy(fused(loss, target), plain(loss), views(target, n, d, dtype))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles and panels in PyTorch even of a small matrix."""
    monkeypatch.setattr(energy_features, "TILE", 16)
    monkeypatch.setattr(energy_dual, "GRAM_TILE", 8)
    monkeypatch.setattr(energy_tiles, "PANEL", 512)


@pytest.mark.usefixtures("small_tiles", "unwritten_memory_is_nan")
# Panels of features on either route; panels of rows, where one tile is all of c.
@pytest.mark.parametrize(("n", "d"), [(30, 150), (150, 130), (100, 11)])
def test_any_number_of_tiles_is_as_exact_as_promised(loss: str, n: int, d: int) -> None:
    target = Target("torch", "cpu")
    for dtype in dtypes(target):
        check_accuracy(fused(loss, target), plain(loss), views(target, n, d, dtype))


@pytest.mark.parametrize("upstream", [65536.0, -3.0, 1e-8])
def test_upstream_gradient_is_passed_on(loss: str, target: Target, upstream: float) -> None:
    for n, d in ((33, 16), (8, 40)):
        z = views(target, n, d, torch.float32)
        check_accuracy(fused(loss, target), plain(loss), z, upstream)


@pytest.mark.parametrize(("n", "d"), [(64, 24), (24, 64)])
def test_both_routes_lead_to_the_same(
    loss: str, target: Target, n: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = views(target, n, d, torch.float32)
    results = []
    for dual in (False, True):
        monkeypatch.setattr(energy, "takes_dual_route", lambda n, d, dual=dual: dual)
        results.append(value_and_gradients(fused(loss, target), z))
    assert not torch.equal(results[0][1], results[1][1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_route_is_the_shorter_one() -> None:
    assert energy.takes_dual_route(512, 8192)
    assert energy.takes_dual_route(256, 16384)
    assert not energy.takes_dual_route(4096, 1024)
    assert not energy.takes_dual_route(1024, 1024)


@pytest.mark.parametrize(("n", "d"), [(64, 16), (16, 40)])
def test_decorrelated_features_keep_their_small_energy(
    loss: str, target: Target, n: int, d: int
) -> None:
    """With 16 samples of 40 features, those of a tight frame repeat each other least."""
    z = torch.randn(n, d, dtype=torch.float64)
    for _ in range(50):  # equal lengths of features, equal singular values, zero means
        z -= z.mean(0)
        u, _, vh = torch.linalg.svd(z, full_matrices=False)
        rank = min(n - 1, d)
        z = u[:, :rank] @ vh[:rank] * math.sqrt(n * d / rank)
        z = z / z.std(0, correction=0)
    z = z.to(target.device, torch.float32)
    check_accuracy(fused(loss, target), plain(loss), [z, z + 1e-4 * torch.randn_like(z)])


def test_barlow_twins_ignores_an_affine_map_of_each_feature(target: Target) -> None:
    for n, d in ((40, 12), (10, 50)):
        z_a, z_b = (100 * z for z in views(target, n, d, torch.float32))  # eps is then nothing
        scale, shift = 1 + torch.rand(d), 30 * torch.randn(d)
        mapped = z_a * scale.to(target.device) + shift.to(target.device)
        loss = fused("barlow_twins", target)
        torch.testing.assert_close(loss(mapped, z_b), loss(z_a, z_b), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("n", "d"), [(2000, 3), (12, 60)])
@pytest.mark.parametrize("scale", [1e12, 1e18, 1e19, 1e30])
def test_barlow_twins_of_rows_whose_squares_overflow(n: int, d: int, scale: float) -> None:
    for mean in (0.0, 10.0):
        z = [scale * (x + mean) for x in views(Target("torch", "cpu"), n, d, torch.float32)]
        exact = value_and_gradients(reference.barlow_twins, [x.double() for x in z])
        for found, truth in zip(
            value_and_gradients(functional.barlow_twins, z), exact, strict=True
        ):
            assert (found - truth).abs().max() <= 2e-5 * truth.abs().max()


def test_means_far_from_zero_cost_no_digits(loss: str, target: Target) -> None:
    for n, d in ((50, 20), (12, 60)):
        z = [x + 1000 for x in views(target, n, d, torch.float32)]
        check_accuracy(fused(loss, target), plain(loss), z)


@pytest.mark.parametrize("std", [1e-3, 1e3])
def test_low_precision_at_any_scale(loss: str, target: Target, std: float) -> None:
    for dtype in {torch.float16, torch.bfloat16} & set(dtypes(target)):
        for n, d in ((40, 16), (12, 60)):
            z = [(std * x.float()).to(dtype) for x in views(target, n, d, torch.float32)]
            if loss == "vicreg" and std > 1:  # its gradient grows as std^3, past float16
                value = fused(loss, target)(*z)
                truth = plain(loss)(*(x.double() for x in z))
                torch.testing.assert_close(value.double(), truth, rtol=0.02, atol=0)
            else:
                check_accuracy(fused(loss, target), plain(loss), z)


@pytest.mark.parametrize("large", [1, 3, 20])
@pytest.mark.parametrize(("n", "d"), [(16, 40), (40, 24)])
def test_a_few_large_features_drown_no_small_ones(
    target: Target, n: int, d: int, large: int
) -> None:
    scales = torch.full((d,), 1e-3)
    scales[torch.randperm(d)[:large]] = 1e3
    weights = {"lambda_param": 0.0, "mu_param": 0.0}
    for dtype in dtypes(target):
        if dtype == torch.float16:
            continue  # gradients of features so different do not fit it
        z = [(torch.randn(n, d) * scales).to(target.device, dtype) for _ in range(2)]
        check_accuracy(fused("vicreg", target, **weights), partial(reference.vicreg, **weights), z)


@pytest.mark.parametrize("kind", ["constant feature", "identical rows", "two samples", "zeros"])
def test_any_finite_input_gives_finite_results(loss: str, target: Target, kind: str) -> None:
    for dtype in dtypes(target):
        for n, d in ((20, 12), (6, 30)):
            z_a, z_b = views(target, 2 if kind == "two samples" else n, d, dtype)
            if kind == "constant feature":
                z_a[:, 3] = z_b[:, 5] = 7
            elif kind == "identical rows":
                z_a[:] = z_a[0].clone()
            elif kind == "zeros":
                z_a, z_b = torch.zeros_like(z_a), torch.zeros_like(z_b)
            result = value_and_gradients(fused(loss, target), [z_a, z_b])
            assert all(x.isfinite().all() for x in result), (dtype, n, d)


def test_a_constant_feature_has_no_correlation(target: Target) -> None:
    z_a, z_b = views(target, 30, 4, torch.float32)
    z_a[:, 1] = z_b[:, 1] = 1e4
    value, dz_a, _ = value_and_gradients(
        fused("barlow_twins", target, lambda_param=0.0), [z_a, z_b]
    )
    rest = [0, 2, 3]
    torch.testing.assert_close(
        value, 1 + functional.barlow_twins(z_a[:, rest], z_b[:, rest], 0.0, backend=target.backend)
    )
    assert (dz_a[:, 1] == 0).all()


def test_float16_survives_a_gradient_scaler(loss: str, target: Target) -> None:
    for n, d in ((64, 16), (16, 64)):
        z = views(target, n, d, torch.float16)
        check_accuracy(fused(loss, target), plain(loss), z, 65536.0 / 64)
        _, *grads = value_and_gradients(fused(loss, target), z, 65536.0 / 64)
        assert all(grad.isfinite().all() and (grad != 0).any() for grad in grads)


def test_nan_comes_out_as_nan(loss: str, target: Target) -> None:
    for n, d in ((40, 8), (8, 40)):
        z_a, z_b = views(target, n, d, torch.float32)
        z_b[7, 3] = math.nan
        value, dz_a, dz_b = value_and_gradients(fused(loss, target), [z_a, z_b])
        assert value.isnan()
        assert dz_a.isnan().any()
        assert dz_b.isnan().any()


def test_any_shape_scale_and_type_is_as_exact_as_promised(loss: str, target: Target) -> None:
    @settings(max_examples=10 if target.interpreted else 25, deadline=None, derandomize=True)
    @given(
        n=st.integers(3, 40),
        d=st.integers(4, 70),
        exponent=st.integers(-5, 5),
        half=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def check(n: int, d: int, exponent: int, half: bool, seed: int) -> None:
        torch.manual_seed(seed)
        dtype = torch.float16 if half else torch.float32
        scale = 2.0 ** (min(exponent, 1) if half else exponent)
        z = [(scale * x).to(dtype) for x in views(target, n, d, torch.float32)]
        check_accuracy(fused(loss, target), plain(loss), z)

    check()


def test_two_samples_by_hand() -> None:
    # Features standardised: (1, -1) and (1, -1) of a; (1, -1) and (-1, 1) of b. c = [[1, -1], ...].
    z_a = torch.tensor([[3.0, 8.0], [1.0, 2.0]], dtype=torch.float64)
    z_b = torch.tensor([[5.0, 0.0], [1.0, 6.0]], dtype=torch.float64)
    for module in (functional, reference):
        barlow = module.barlow_twins(z_a, z_b, 0.25, eps=1e-15)
        assert barlow.item() == pytest.approx((0 + 4) + 0.25 * (1 + 1))
        # Variances 2 and 18, 8 and 18; covariances 6 and -12; squared differences 4, 64, 0, 16.
        vicreg = module.vicreg(0.1 * z_a, 0.1 * z_b, 2.0, 3.0, 5.0, eps=1e-15)
        hinges = [1 - 0.1 * math.sqrt(x) for x in (2, 18, 8, 18)]
        variance = (sum(hinges[:2]) / 2 + sum(hinges[2:]) / 2) / 2
        covariance = (2 * 6**2 + 2 * 12**2) / 2 * 1e-4
        assert vicreg.item() == pytest.approx(2 * 0.84 / 4 + 3 * variance + 5 * covariance)


def test_float64_gradients_pass_gradcheck(loss: str) -> None:
    for n, d in ((7, 5), (4, 9)):
        z = torch.randn(2, n, d, dtype=torch.float64, requires_grad=True).unbind()
        for function in (getattr(functional, loss), getattr(reference, loss)):
            assert torch.autograd.gradcheck(function, z)


def test_positions_have_their_own_statistics(target: Target) -> None:
    z_a, z_b = (z.view(14, 2, 3, 6) for z in views(target, 14, 36, torch.float32))
    check_accuracy(fused("vicreg", target), reference.vicreg, [z_a, z_b])


def test_weights_are_those_of_the_terms(target: Target) -> None:
    z = [0.3 * x for x in views(target, 20, 9, torch.float32)]
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (-2.0, 3.0, 0.5)):
        got = functional.vicreg(*z, *weights, backend=target.backend)
        torch.testing.assert_close(got, reference.vicreg(*z, *weights))


def test_a_gradient_asked_for_on_one_side_is_the_same(loss: str, target: Target) -> None:
    for n, d in ((40, 16), (10, 40)):
        z = views(target, n, d, torch.float32)
        _, *both = value_and_gradients(fused(loss, target), z)
        for side, expected in enumerate(both):
            leaves = [x.clone() for x in z]
            leaves[side].requires_grad_()
            fused(loss, target)(*leaves).backward()
            torch.testing.assert_close(leaves[side].grad, expected, rtol=1e-6, atol=1e-8)
            assert leaves[1 - side].grad is None


def test_a_graph_can_be_walked_twice(loss: str, target: Target) -> None:
    for n, d in ((30, 8), (8, 30)):
        z_a, z_b = (z.requires_grad_() for z in views(target, n, d, torch.float32))
        value = fused(loss, target)(z_a, z_b)
        value.backward(retain_graph=True)
        first = z_a.grad.clone()
        value.backward()
        torch.testing.assert_close(z_a.grad, 2 * first)


def test_no_gradient_asked_for_means_the_same_value(loss: str, target: Target) -> None:
    for n, d in ((30, 8), (8, 30)):
        z = views(target, n, d, torch.float32)
        value, *_ = value_and_gradients(fused(loss, target), z)
        with torch.no_grad():
            assert torch.equal(fused(loss, target)(*z), value)


def test_views_of_other_memory_give_the_same(loss: str, target: Target) -> None:
    for n, d in ((40, 16), (10, 40)):
        z_a, z_b = views(target, n, d, torch.float32)
        expected = value_and_gradients(fused(loss, target), [z_a, z_b])
        strided = torch.stack([z_a, z_b], dim=-1).requires_grad_()
        transposed = z_b.T.contiguous().requires_grad_()
        value = fused(loss, target)(strided[..., 0], transposed.T)
        value.backward()
        torch.testing.assert_close(value.detach(), expected[0])
        torch.testing.assert_close(strided.grad[..., 0], expected[1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(transposed.grad.T, expected[2], rtol=1e-4, atol=1e-6)


def test_same_input_gives_same_bits(loss: str, target: Target) -> None:
    # Programs of the interpreter run one after another, whatever the type.
    for dtype in dtypes(target)[: 1 if target.interpreted else None]:
        for n, d in ((70, 24), (24, 70)):
            z = views(target, n, d, dtype)
            first, second = (value_and_gradients(fused(loss, target), z) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_loss_is_float32_and_gradients_keep_the_type(loss: str, target: Target) -> None:
    for dtype in dtypes(target):
        value, *grads = value_and_gradients(fused(loss, target), views(target, 8, 8, dtype))
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert {grad.dtype for grad in grads} == {dtype}


def test_autocast_changes_nothing(loss: str, target: Target) -> None:
    for dtype in dtypes(target):
        z = views(target, 33, 16, dtype)
        expected = value_and_gradients(fused(loss, target), z)
        with torch.autocast(target.device, torch.bfloat16):
            got = value_and_gradients(fused(loss, target), z)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_second_derivatives_raise(loss: str, target: Target) -> None:
    z_a, z_b = (z.requires_grad_() for z in views(target, 6, 4, torch.float32))
    (grad,) = torch.autograd.grad(fused(loss, target)(z_a, z_b), z_a, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        grad.square().sum().backward()


def test_compiles_as_one_graph(loss: str, target: Target) -> None:
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations
    for n, d in ((24, 16), (8, 30)):
        z = views(target, n, d, torch.float32)
        compiled = torch.compile(fused(loss, target), fullgraph=True, backend="aot_eager")
        expected = value_and_gradients(fused(loss, target), z)
        for a, b in zip(value_and_gradients(compiled, z), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("two", [False, True])
def test_the_operator_is_registered_as_torch_wants(target: Target, dual: bool, two: bool) -> None:
    u, v = (x.requires_grad_() for x in views(target, 6, 4, torch.float32))
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    arguments = (u, v if two else None, 1e-5, True, dual, True, target.backend)
    torch.library.opcheck(energy._cross_energy, arguments, test_utils=checks)


@pytest.mark.parametrize("dual", [False, True])
def test_two_batches_need_not_be_standardised(target: Target, dual: bool) -> None:
    """No loss asks for it; the operator takes it."""

    def ours(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        arguments = (u, v, 1e-5, False, dual, True, target.backend)
        value, diagonal, _, u_factor, _, v_factor, *_ = energy._cross_energy(*arguments)
        scale = u_factor[0] * v_factor[0]
        return value / scale**2 + (diagonal / scale).sum()

    def theirs(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        c = (u - u.mean(0)).T @ (v - v.mean(0)) / len(u)
        return c.square().sum() - c.diagonal().square().sum() + c.diagonal().sum()

    check_accuracy(ours, theirs, views(target, 20, 30, torch.float32))


@pytest.mark.parametrize(("n", "d"), [(8, 400), (150, 100)])
def test_what_is_saved_is_no_larger_than_the_input(
    loss: str, target: Target, n: int, d: int
) -> None:
    z = [x.requires_grad_() for x in views(target, n, d, torch.float32)]
    saved = {}

    def record(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        value = fused(loss, target)(*z)
    for x in z:
        saved.pop(x.untyped_storage().data_ptr(), None)
    assert value.requires_grad
    difference = 4 * n * d if loss == "vicreg" else 0
    vectors = 20 * 4 * d
    assert sum(saved.values()) <= 2 * 4 * n * min(n, d) + difference + vectors


@pytest.fixture
def one_rank(target: Target, tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "nccl" if target.device == "cuda" else "gloo",
        init_method=f"file://{tmp_path / 'rendezvous'}",
        rank=0,
        world_size=1,
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.usefixtures("one_rank")
def test_reducing_over_one_rank_is_the_same(target: Target, standardize: bool) -> None:
    """The losses would leave it alone; this is how a GPU meets the products of several ranks."""
    options = {"eps": 1e-5, "standardize": standardize, "backend": target.backend}

    def measured(
        function: Callable[..., tuple[torch.Tensor, ...]], *z: torch.Tensor
    ) -> torch.Tensor:
        value, diagonal, factor = function(*z, **options)
        scale = 1 if standardize else factor[0].square()
        return value / scale**2 + (diagonal / scale).sum()

    for dtype in dtypes(target):
        z = views(target, 40, 30, dtype)[: 2 if standardize else 1]
        reduced = partial(reduced_energy.reduced_cross_energy, samples=40)
        got, expected = (
            value_and_gradients(partial(measured, function), z)
            for function in (reduced, energy.cross_energy)
        )
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            error = torch.linalg.vector_norm(a.double() - b.double())
            assert error <= 8 * torch.finfo(dtype).eps * torch.linalg.vector_norm(b.double())


@pytest.mark.slow
def test_peak_memory_is_far_below_the_matrix(loss: str) -> None:
    n, d = 64, 8192
    z_a, z_b = (z.requires_grad_() for z in torch.randn(2, n, d).unbind())
    function = getattr(functional, loss)
    function(z_a[:, :64], z_b[:, :64]).backward()
    assert extra_bytes(lambda: function(z_a, z_b).backward()) < d * d * 4 / 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnGpu:
    @pytest.mark.parametrize(("n", "d"), [(512, 8192), (4096, 2048)])
    def test_peak_memory_is_below_the_matrix(self, loss: str, n: int, d: int) -> None:
        z_a, z_b = torch.randn(2, n, d, device="cuda", dtype=torch.bfloat16).unbind()
        z_a.requires_grad_(), z_b.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(functional, loss)(z_a, z_b).backward()
        inputs = 2 * n * d * 4  # as float32
        assert torch.cuda.max_memory_allocated() - before < 3 * inputs + 4 * min(n, d) ** 2 * 4

    @pytest.mark.parametrize(("n", "d"), [(256, 2048), (1024, 512)])
    def test_never_waits_for_the_device(self, loss: str, n: int, d: int) -> None:
        z = torch.randn(2, n, d, device="cuda", requires_grad=True)
        function = getattr(functional, loss)
        function(z[0], z[1]).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(z[0], z[1]).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize(("n", "d"), [(256, 2048), (1024, 512)])
    def test_replays_from_a_captured_graph(self, loss: str, n: int, d: int) -> None:
        function = getattr(functional, loss)
        z = torch.randn(2, n, d, device="cuda", requires_grad=True)
        step = torch.cuda.make_graphed_callables(lambda z: function(z[0], z[1]), (z,))
        fresh = torch.randn_like(z).requires_grad_()
        value = step(fresh)
        value.backward()
        expected, grad = value_and_gradients(lambda z: function(z[0], z[1]), [fresh])
        torch.testing.assert_close(value.detach(), expected)
        torch.testing.assert_close(fresh.grad, grad)


ZEROS = torch.zeros(4, 3)
BAD_INPUT = {
    "unequal shapes": (
        lambda loss: loss(torch.zeros(8, 128), torch.zeros(8, 64)),
        ValueError,
        r"z_a and z_b must have equal shapes, got \(8, 128\) and \(8, 64\)",
    ),
    "a batch of one": (
        lambda loss: loss(torch.zeros(1, 8), torch.zeros(1, 8)),
        ValueError,
        r"z_a must have at least 2 rows.* need 2 samples, got shape \(1, 8\)",
    ),
    "one dimension": (
        lambda loss: loss(torch.zeros(8), torch.zeros(8)),
        ValueError,
        r"z_a must have shape \(N, .*got \(8,\)",
    ),
    "no features": (
        lambda loss: loss(torch.zeros(8, 0), torch.zeros(8, 0)),
        ValueError,
        r"z_a must have shape .* got \(8, 0\)",
    ),
    "integers": (
        lambda loss: loss(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)),
        TypeError,
        "z_a must be float64.*got int64",
    ),
    "not a tensor": (lambda loss: loss(ZEROS, 3.0), TypeError, "z_b must be a tensor, got float"),
    "two devices": (
        lambda loss: loss(ZEROS, ZEROS.to("meta")),
        ValueError,
        "same device, got cpu and meta",
    ),
    "weight a word": (
        lambda loss: loss(ZEROS, ZEROS, "much"),
        TypeError,
        "lambda_param must be a number, got str",
    ),
    "weight not finite": (
        lambda loss: loss(ZEROS, ZEROS, math.nan),
        ValueError,
        "lambda_param must be finite, got nan",
    ),
    "weight past float32": (
        lambda loss: loss(ZEROS, ZEROS, 1e300),
        ValueError,
        r"lambda_param must be finite in float32, got 1e\+300",
    ),
    "eps that float32 does not hold": (
        lambda loss: loss(ZEROS, ZEROS, eps=1e-300),
        ValueError,
        "eps must be positive and finite in float32, and so its inverse, got 1e-300",
    ),
    "eps of 0": (
        lambda loss: loss(ZEROS, ZEROS, eps=0.0),
        ValueError,
        "eps must be positive and finite, got 0.0",
    ),
    "unknown exchange": (
        lambda loss: loss(ZEROS, ZEROS, exchange="ring"),
        ValueError,
        "exchange must be one of 'auto', 'gather', 'reduce', got 'ring'",
    ),
    "unknown backend": (
        lambda loss: loss(ZEROS, ZEROS, backend="cuda"),
        ValueError,
        "backend must be one of 'auto', 'triton', 'torch', got 'cuda'",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(loss: str, case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call(getattr(functional, loss))


MODULES = {"barlow_twins": fastssl.BarlowTwinsLoss, "vicreg": fastssl.VICRegLoss}


class TestModule:
    def test_agrees_with_the_function(self, loss: str, target: Target) -> None:
        z = views(target, 12, 8, torch.float32)
        module = MODULES[loss](0.3, eps=1e-3, backend=target.backend)
        assert torch.equal(module(*z), fused(loss, target)(*z, 0.3, eps=1e-3))

    def test_shows_its_options(self, loss: str) -> None:
        assert "lambda_param=0.2" in repr(MODULES[loss](lambda_param=0.2))

    def test_refuses_bad_options(self, loss: str) -> None:
        with pytest.raises(ValueError, match="lambda_param must be finite, got inf"):
            MODULES[loss](lambda_param=math.inf)
        with pytest.raises(ValueError, match="eps must be positive"):
            MODULES[loss](eps=-1.0)
        with pytest.raises(ValueError, match="backend must be one of"):
            MODULES[loss](backend="gpu")
        with pytest.raises(ValueError, match="exchange must be one of"):
            MODULES[loss](exchange="ring")

    def test_replaces_lightlys(self, loss: str) -> None:
        lightly = pytest.importorskip("lightly.loss")
        theirs = {"barlow_twins": lightly.BarlowTwinsLoss, "vicreg": lightly.VICRegLoss}[loss]
        for shape in ((17, 9), (6, 30), (6, 4, 5)) if loss == "vicreg" else ((17, 9), (6, 30)):
            z = torch.randn(2, *shape, dtype=torch.float64).unbind()
            expected = value_and_gradients(theirs(), z)
            for a, b in zip(value_and_gradients(MODULES[loss](), z), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert MODULES[loss]().lambda_param == theirs().lambda_param
