"""NT-Xent keeps every promise about numbers, on every backend."""

import math
from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measure import extra_bytes
from targets import Target

import fastssl
from fastssl import functional, reference

# Aligned to tiles; ragged in rows; ragged in all; one row; more features than a tile holds.
SHAPES = [(64, 32), (37, 32), (65, 19), (1, 8), (9, 300)]
GPU_SHAPES = [(1024, 128), (1000, 100), (2049, 96), (4096, 256), (513, 768), (1, 8)]


def shapes(target: Target) -> list[tuple[int, int]]:
    return GPU_SHAPES if target.device == "cuda" else SHAPES


def dtypes(target: Target) -> list[torch.dtype]:
    if target.interpreted:  # its bfloat16 tl.dot is wrong
        return [torch.float32, torch.float16]
    low = [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float64, *low] if target.backend == "torch" else low


def precise(target: Target) -> torch.dtype:
    return torch.float64 if target.backend == "torch" else torch.float32


def views(
    target: Target, n: int, d: int, dtype: torch.dtype, closeness: float = 1.0
) -> list[torch.Tensor]:
    z0 = torch.randn(n, d)
    z1 = closeness * z0 + torch.randn(n, d)
    return [z.to(target.device, dtype) for z in (z0, z1)]


def fused(target: Target, **options: object):
    return partial(functional.nt_xent, backend=target.backend, **options)


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.005])
def test_value_and_gradients_are_as_exact_as_promised(target: Target, temperature: float) -> None:
    options = {"temperature": temperature}
    for n, d in shapes(target):
        for dtype in dtypes(target):
            check_accuracy(
                fused(target, **options),
                partial(reference.nt_xent, **options),
                views(target, n, d, dtype),
            )


@pytest.mark.parametrize("temperature", [0.5, 0.005])
def test_nearly_solved_batches_keep_their_small_loss(target: Target, temperature: float) -> None:
    options = {"temperature": temperature}
    z = views(target, 24, 48, torch.float32, closeness=1e3)
    check_accuracy(fused(target, **options), partial(reference.nt_xent, **options), z)


def test_terms_and_their_gradients_are_those_of_the_reference(target: Target) -> None:
    n = 37
    upstream = torch.randn(2 * n, device=target.device)
    options = {"reduction": "none", "temperature": 0.1}
    z = views(target, n, 24, precise(target))
    check_accuracy(
        fused(target, **options), partial(reference.nt_xent, **options), z, upstream.to(z[0].dtype)
    )


@pytest.mark.parametrize("upstream", [65536.0, -3.0, 1e-8])
def test_upstream_gradient_is_passed_on(target: Target, upstream: float) -> None:
    for dtype in dtypes(target):
        z = views(target, 33, 16, dtype)
        if dtype == torch.float16 and upstream < 1:
            continue  # such gradients vanish in float16 itself
        check_accuracy(fused(target), reference.nt_xent, z, upstream)


@pytest.mark.parametrize("temperature", [0.3, 0.01])
def test_ids_leave_duplicates_out(target: Target, temperature: float) -> None:
    n = 45
    ids = torch.randint(0, 12, (n,), device=target.device)
    options = {"temperature": temperature, "ids": ids, "reduction": "none"}
    z = views(target, n, 20, precise(target))
    check_accuracy(fused(target, **options), partial(reference.nt_xent, **options), z)


def test_distinct_ids_change_nothing(target: Target) -> None:
    z0, z1 = views(target, 21, 8, torch.float32)
    ids = torch.randperm(21, device=target.device) - 7
    with_ids = functional.nt_xent(z0, z1, ids=ids, backend=target.backend)
    torch.testing.assert_close(with_ids, functional.nt_xent(z0, z1, backend=target.backend))


def test_only_positives_left_means_no_loss(target: Target) -> None:
    ids = torch.zeros(6, dtype=torch.int64, device=target.device)
    value, *grads = value_and_gradients(fused(target, ids=ids), views(target, 6, 8, torch.float32))
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


def test_one_pair_has_no_loss(target: Target) -> None:
    value, *grads = value_and_gradients(fused(target), views(target, 1, 8, torch.float32))
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


def test_one_feature_has_no_gradient(target: Target) -> None:
    # A row at unit length is then 1 or -1, and stays it.
    z0, z1 = (torch.where(z > 0, z + 1, z - 1) for z in views(target, 5, 1, torch.float32))
    value, *grads = value_and_gradients(fused(target), [z0, z1])
    torch.testing.assert_close(value, reference.nt_xent(z0, z1))
    assert all(grad.abs().max() < 1e-6 for grad in grads)


def test_orthogonal_samples_have_the_loss_of_the_formula(target: Target) -> None:
    n, temperature = 16, 0.2
    z = torch.eye(n, device=target.device)
    expected = math.log(math.exp(1 / temperature) + 2 * (n - 1)) - 1 / temperature
    loss = functional.nt_xent(z, z, temperature, backend=target.backend)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert reference.nt_xent(z, z, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_two_samples_by_hand() -> None:
    # cos(z0_0, z1_0) = 1, cos(z0_1, z1_1) = 0.6, every other pair 0 or 0.8.
    z0 = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    z1 = torch.tensor([[3.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    terms = [
        math.log(math.exp(1) + math.exp(0) + math.exp(0.8)) - 1,
        math.log(math.exp(0) + math.exp(0) + math.exp(0.6)) - 0.6,
        math.log(math.exp(1) + math.exp(0) + math.exp(0.8)) - 1,
        math.log(math.exp(0.6) + math.exp(0.8) + math.exp(0.8)) - 0.6,
    ]
    expected = torch.tensor(terms, dtype=torch.float64)
    for loss in (functional.nt_xent, reference.nt_xent):
        torch.testing.assert_close(loss(z0, z1, 1.0, reduction="none"), expected)
        torch.testing.assert_close(loss(z0, z1, 1.0), expected.mean())
        torch.testing.assert_close(loss(z0, z1, 1.0, reduction="sum"), expected.sum())


@pytest.mark.parametrize("temperature", [0.4, 0.008])
def test_a_tensor_temperature_gets_its_gradient(target: Target, temperature: float) -> None:
    z = views(target, 30, 12, precise(target))
    t = torch.tensor(temperature, dtype=z[0].dtype, device=target.device)
    check_accuracy(fused(target), reference.nt_xent, [*z, t])


def test_float64_gradients_pass_gradcheck() -> None:
    z0, z1 = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True).unbind()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for loss in (functional.nt_xent, reference.nt_xent):
        assert torch.autograd.gradcheck(partial(loss, reduction="none"), (z0, z1, t))


def test_a_gradient_asked_for_on_one_side_is_the_same(target: Target) -> None:
    z0, z1 = views(target, 40, 16, torch.float32)
    _, *both = value_and_gradients(fused(target), [z0, z1])
    for side, expected in enumerate(both):
        leaves = [z0.clone(), z1.clone()]
        leaves[side].requires_grad_()
        functional.nt_xent(*leaves, backend=target.backend).backward()
        torch.testing.assert_close(leaves[side].grad, expected, rtol=1e-6, atol=1e-8)
        assert leaves[1 - side].grad is None


def test_views_of_other_memory_give_the_same(target: Target) -> None:
    z0, z1 = views(target, 40, 16, torch.float32)
    expected = value_and_gradients(fused(target), [z0, z1])
    strided = torch.stack([z0, z1], dim=-1).requires_grad_()
    transposed = z1.T.contiguous().requires_grad_()
    loss = functional.nt_xent(strided[..., 0], transposed.T, backend=target.backend)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(strided.grad[..., 0], expected[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(transposed.grad.T, expected[2], rtol=1e-5, atol=1e-7)


def test_same_input_gives_same_bits(target: Target) -> None:
    for dtype in dtypes(target):
        z = views(target, 70, 24, dtype)
        first, second = (value_and_gradients(fused(target), z) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_deterministic_mode_finds_no_unwritten_memory(target: Target) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        for n, d in shapes(target):
            result = value_and_gradients(fused(target), views(target, n, d, torch.float32))
            assert all(x.isfinite().all() for x in result)
    finally:
        torch.use_deterministic_algorithms(False)


def test_loss_is_float32_and_gradients_keep_the_type(target: Target) -> None:
    for dtype in dtypes(target):
        value, *grads = value_and_gradients(fused(target), views(target, 8, 8, dtype))
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert {grad.dtype for grad in grads} == {dtype}


def test_autocast_changes_nothing(target: Target) -> None:
    for dtype in dtypes(target):
        z = views(target, 33, 16, dtype)
        expected = value_and_gradients(fused(target), z)
        with torch.autocast(target.device, torch.bfloat16):
            got = value_and_gradients(fused(target), z)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_loss_ignores_the_length_of_rows(target: Target) -> None:
    z0, z1 = views(target, 26, 16, torch.float32)
    scale = torch.logspace(-9, 12, 26, device=target.device)[:, None]
    got = functional.nt_xent(scale * z0, z1 / scale, backend=target.backend)
    torch.testing.assert_close(got, functional.nt_xent(z0, z1, backend=target.backend))


def degenerate(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    z0, z1 = torch.randn(2, 20, 12, dtype=torch.float32)
    if kind == "zero rows":
        z0[3] = z1[3] = z1[5] = 0
    elif kind == "identical rows":
        z0[:] = z1[:] = z0[0]
    elif kind == "opposite rows":
        z1 = -z0
    elif kind == "largest numbers":
        z0 *= min(torch.finfo(dtype).max, 1e30) / z0.abs().max()
    elif kind == "smallest numbers":
        z0 *= torch.finfo(dtype).tiny
        z1[::2] *= torch.finfo(dtype).tiny
    return z0.to(dtype), z1.to(dtype)


@pytest.mark.parametrize(
    "kind",
    ["zero rows", "identical rows", "opposite rows", "largest numbers", "smallest numbers"],
)
@pytest.mark.parametrize("temperature", [0.5, 0.005, 1e-4])
def test_any_finite_input_gives_finite_results(
    target: Target, kind: str, temperature: float
) -> None:
    for dtype in dtypes(target):
        z = [x.to(target.device) for x in degenerate(kind, dtype)]
        result = value_and_gradients(fused(target, temperature=temperature), z)
        if (
            kind == "smallest numbers"
        ):  # gradients grow as rows shrink, past any type's largest number
            result = result[:1]
        assert all(x.isfinite().all() for x in result), (dtype, result)


def test_a_zero_row_gets_no_gradient(target: Target) -> None:
    z0, z1 = (z.to(target.device) for z in degenerate("zero rows", torch.float32))
    _, dz0, dz1 = value_and_gradients(fused(target), [z0, z1])
    assert (dz0[3] == 0).all()
    assert (dz1[5] == 0).all()
    assert (dz1[4] != 0).any()


def test_float16_survives_a_gradient_scaler(target: Target) -> None:
    z = views(target, 32, 16, torch.float16)
    z = [8 * x for x in z]  # so that the scaled gradient itself fits float16
    check_accuracy(
        fused(target, temperature=0.1), partial(reference.nt_xent, temperature=0.1), z, 65536.0
    )
    _, *grads = value_and_gradients(fused(target, temperature=0.1), z, 65536.0)
    assert all(grad.isfinite().all() and (grad != 0).any() for grad in grads)


def test_nan_comes_out_as_nan(target: Target) -> None:
    z0, z1 = views(target, 40, 8, torch.float32)
    z1[7, 3] = math.nan
    value, dz0, _ = value_and_gradients(fused(target), [z0, z1])
    assert value.isnan()
    assert dz0.isnan().any()


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # rounding is luck: one case in thousands is past any multiple of another's
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(1, 40),
    d=st.integers(4, 40),  # with fewer, the orders of features hardly change the plain rounding
    exponent=st.integers(-6, 6),
    temperature=st.sampled_from([2.0, 0.3, 0.05, 0.02]),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_scale_and_type_is_as_exact_as_promised(
    target: Target, n: int, d: int, exponent: int, temperature: float, half: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    z0, z1 = views(target, n, d, torch.float32)
    dtype = torch.float16 if half else torch.float32
    z = [(z0 * 2.0**exponent).to(dtype), z1.to(dtype)]
    options = {"temperature": temperature}
    check_accuracy(fused(target, **options), partial(reference.nt_xent, **options), z)


def test_second_derivatives_raise(target: Target) -> None:
    z0, z1 = (z.requires_grad_() for z in views(target, 6, 4, torch.float32))
    loss = functional.nt_xent(z0, z1, backend=target.backend)
    (grad,) = torch.autograd.grad(loss, z0, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        grad.square().sum().backward()


def test_compiles_as_one_graph(target: Target) -> None:
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations
    z = views(target, 24, 16, torch.float32)
    t = torch.tensor(0.2, device=target.device)
    compiled = torch.compile(fused(target), fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(fused(target), [*z, t])
    got = value_and_gradients(compiled, [*z, t])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_saved_tensors_grow_with_rows_only(target: Target) -> None:
    n, d = 300, 4  # past the one tile that the torch backend may keep
    z0, z1 = (z.requires_grad_() for z in views(target, n, d, torch.float32))
    saved = {}

    def record(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        loss = functional.nt_xent(z0, z1, backend=target.backend)
    for z in (z0, z1):
        saved.pop(z.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    assert sum(saved.values()) <= 12 * 4 * n  # a few float32 numbers a view


@pytest.mark.slow
def test_peak_memory_is_far_below_the_matrix() -> None:
    n, d = 8192, 16
    z0, z1 = torch.randn(2, n, d, requires_grad=True).unbind()
    functional.nt_xent(z0[:8], z1[:8]).backward()
    grown = extra_bytes(lambda: functional.nt_xent(z0, z1).backward())
    assert grown < 32 * 2**20 < (2 * n) ** 2 * 4 / 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnGpu:
    def test_peak_memory_is_far_below_the_matrix(self) -> None:
        z0, z1 = torch.randn(2, 16384, 128, device="cuda", dtype=torch.bfloat16).unbind()
        z0.requires_grad_(), z1.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        functional.nt_xent(z0, z1).backward()
        assert torch.cuda.max_memory_allocated() - before < 150 * 2**20  # the matrix: 2 GiB

    def test_never_waits_for_the_device(self) -> None:
        z = torch.randn(2, 512, 128, device="cuda", requires_grad=True)
        t = torch.tensor(0.1, device="cuda", requires_grad=True)
        functional.nt_xent(z[0], z[1], t).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            functional.nt_xent(z[0], z[1], t).backward()
            functional.nt_xent(z[0], z[1], 0.1).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_replays_from_a_captured_graph(self) -> None:
        z = torch.randn(2, 512, 128, device="cuda", requires_grad=True)
        step = torch.cuda.make_graphed_callables(
            lambda z: functional.nt_xent(z[0], z[1], 0.1), (z,)
        )
        fresh = torch.randn_like(z).requires_grad_()
        loss = step(fresh)
        loss.backward()
        expected, grad = value_and_gradients(lambda z: functional.nt_xent(z[0], z[1], 0.1), [fresh])
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(fresh.grad, grad)

    def test_float32_follows_torchs_precision_switch(self) -> None:
        z = torch.randn(2, 2048, 128, device="cuda")
        truth = reference.nt_xent(*z.double(), 0.05)
        errors = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = (functional.nt_xent(*z, 0.05) - truth).abs().item()
        torch.set_float32_matmul_precision("highest")
        assert errors["highest"] <= 8 * torch.finfo(torch.float32).eps * truth
        assert errors["high"] > errors["highest"]


BAD_INPUT = {
    "unequal shapes": (
        lambda: functional.nt_xent(torch.zeros(8, 128), torch.zeros(8, 64)),
        ValueError,
        r"z0 and z1 must have equal shapes, got \(8, 128\) and \(8, 64\)",
    ),
    "one dimension": (
        lambda: functional.nt_xent(torch.zeros(8), torch.zeros(8)),
        ValueError,
        r"z0 must have shape \(N, D\).*got \(8,\)",
    ),
    "no rows": (
        lambda: functional.nt_xent(torch.zeros(0, 8), torch.zeros(0, 8)),
        ValueError,
        r"N and D at least 1, got \(0, 8\)",
    ),
    "integers": (
        lambda: functional.nt_xent(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)),
        TypeError,
        "z0 must be float64.*got int64",
    ),
    "not a tensor": (
        lambda: functional.nt_xent([[1.0]], torch.zeros(1, 1)),
        TypeError,
        "z0 must be a tensor, got list",
    ),
    "two devices": (
        lambda: functional.nt_xent(torch.zeros(2, 2), torch.zeros(2, 2, device="meta")),
        ValueError,
        "same device, got cpu and meta",
    ),
    "temperature 0": (
        lambda: functional.nt_xent(torch.zeros(2, 2), torch.zeros(2, 2), 0.0),
        ValueError,
        "temperature must be positive and finite, got 0.0",
    ),
    "temperature infinite": (
        lambda: fastssl.NTXentLoss(math.inf),
        ValueError,
        "temperature must be positive and finite, got inf",
    ),
    "temperature NaN in a tensor": (
        lambda: fastssl.NTXentLoss(torch.tensor(math.nan)),
        ValueError,
        "temperature must be positive and finite, got nan",
    ),
    "temperature of two elements": (
        lambda: fastssl.NTXentLoss(torch.ones(2)),
        ValueError,
        r"tensor of one element, got shape \(2,\)",
    ),
    "temperature a word": (
        lambda: fastssl.NTXentLoss("low"),
        TypeError,
        "temperature must be a number or a tensor of one element, got str",
    ),
    "unknown reduction": (
        lambda: fastssl.NTXentLoss(reduction="max"),
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'max'",
    ),
    "unknown backend": (
        lambda: fastssl.NTXentLoss(backend="cuda"),
        ValueError,
        "backend must be one of 'auto', 'triton', 'torch', got 'cuda'",
    ),
    "ids of another length": (
        lambda: functional.nt_xent(torch.zeros(2, 2), torch.zeros(2, 2), ids=torch.arange(3)),
        ValueError,
        r"ids must have shape \(2,\).*got \(3,\)",
    ),
    "ids that are not integers": (
        lambda: functional.nt_xent(torch.zeros(2, 2), torch.zeros(2, 2), ids=torch.zeros(2)),
        TypeError,
        "ids must be integers, got float32",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


def test_triton_refuses_float64_by_name_only() -> None:
    z = torch.randn(2, 4, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*float64"):
        functional.nt_xent(*z, backend="triton")
    assert functional.nt_xent(*z, backend="auto").dtype == torch.float64


class TestModule:
    def test_agrees_with_the_function(self, target: Target) -> None:
        z0, z1 = views(target, 12, 8, torch.float32)
        ids = torch.arange(12, device=target.device) // 2
        module = fastssl.NTXentLoss(0.3, reduction="sum", backend=target.backend)
        expected = functional.nt_xent(z0, z1, 0.3, reduction="sum", ids=ids, backend=target.backend)
        assert torch.equal(module(z0, z1, ids), expected)

    def test_learns_a_parameter_temperature(self) -> None:
        module = fastssl.NTXentLoss(torch.nn.Parameter(torch.tensor(0.5)))
        module(*torch.randn(2, 8, 4)).backward()
        assert [name for name, _ in module.named_parameters()] == ["temperature"]
        assert module.temperature.grad != 0

    def test_shows_its_options(self) -> None:
        assert "temperature=0.2" in repr(fastssl.NTXentLoss(0.2))

    def test_replaces_lightlys(self) -> None:
        lightly = pytest.importorskip("lightly.loss")
        z = torch.randn(2, 17, 9, dtype=torch.float64).unbind()
        for temperature in (0.5, 0.1, 0.02):
            ours = value_and_gradients(fastssl.NTXentLoss(temperature), z)
            theirs = value_and_gradients(lightly.NTXentLoss(temperature), z)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert fastssl.NTXentLoss().temperature == lightly.NTXentLoss().temperature
        for criterion in (fastssl.NTXentLoss, lightly.NTXentLoss):
            with pytest.raises(ValueError, match="temperature"):
                criterion(temperature=0.0)
