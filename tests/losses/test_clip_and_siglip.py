"""The two language-image losses: softmax in both directions (CLIP) and sigmoid (SigLIP)."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from measure import extra_bytes
from targets import Target
from torch import Tensor

import fastssl
from fastssl import functional, reference

DOUBLE = torch.float64
CLASSES = {"clip": fastssl.ClipLoss, "siglip": fastssl.SigLipLoss}


@pytest.fixture(params=CLASSES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def pairs(target: Target, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    image = torch.randn(n, d)
    text = image + torch.randn(n, d)
    return [reference.normalize(x).to(target.device, dtype) for x in (image, text)]


def precise(target: Target) -> torch.dtype:
    return DOUBLE if target.backend == "torch" else torch.float32


def loss_of(module: ModuleType, name: str, **options: object) -> Callable[..., Tensor]:
    return partial(getattr(module, name), **options)


def test_two_pairs_by_hand() -> None:
    # Products of image i and text j, before scale 2: [[0.5, 0], [0.8, 3]].
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=DOUBLE)
    text = torch.tensor([[0.5, 0.4], [0.0, 1.5]], dtype=DOUBLE)
    s = 2.0
    x = [[s * p for p in row] for row in ((0.5, 0.0), (0.8, 3.0))]

    def cross_entropy(own: float, other: float) -> float:
        return math.log(math.exp(own) + math.exp(other)) - own

    images = cross_entropy(x[0][0], x[0][1]) + cross_entropy(x[1][1], x[1][0])
    texts = cross_entropy(x[0][0], x[1][0]) + cross_entropy(x[1][1], x[0][1])
    for module in (functional, reference):
        assert module.clip(image, text, s).item() == pytest.approx((images + texts) / 4)

    b = -1.5

    def softplus(y):
        return math.log(1 + math.exp(y))

    positives = softplus(-x[0][0] - b) + softplus(-x[1][1] - b)
    negatives = softplus(x[0][1] + b) + softplus(x[1][0] + b)
    for module in (functional, reference):
        found = module.siglip(image, text, s, b).item()
        assert found == pytest.approx((positives + negatives) / 2)


def test_orthogonal_pairs_have_the_loss_of_the_formula(target: Target) -> None:
    n, s, b = 16, 5.0, -3.0
    z = torch.eye(n, device=target.device)
    clip = functional.clip(z, z, s, backend=target.backend)
    assert clip.item() == pytest.approx(math.log(math.exp(s) + n - 1) - s, rel=1e-5)
    siglip = functional.siglip(z, z, s, b, backend=target.backend)
    expected = math.log1p(math.exp(-s - b)) + (n - 1) * math.log1p(math.exp(b))
    assert siglip.item() == pytest.approx(expected, rel=1e-5)


def test_one_pair(target: Target) -> None:
    z = pairs(target, 1, 8)
    value, *grads = value_and_gradients(partial(functional.clip, backend=target.backend), z)
    assert value == 0
    assert all((grad == 0).all() for grad in grads)
    found = functional.siglip(*z, 3.0, -1.0, backend=target.backend)
    y = 3 * (z[0] * z[1]).sum() - 1
    torch.testing.assert_close(found, torch.nn.functional.softplus(-y))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_scale_and_bias_get_their_gradients(target: Target, name: str, scale: float) -> None:
    if target.interpreted and scale > 1:
        pytest.skip("the others take the same way")
    dtype = precise(target)
    scalars = [torch.tensor(x, dtype=dtype, device=target.device) for x in (scale, -scale / 3)]
    inputs = [*pairs(target, 33, 20, dtype), *scalars]
    fused = loss_of(functional, name, backend=target.backend)
    check_accuracy(fused, loss_of(reference, name), inputs)


def test_bias_changes_nothing_in_clip(target: Target) -> None:
    bias = torch.tensor(-4.0, device=target.device)
    z = pairs(target, 20, 9)
    loss = partial(functional.clip, logit_scale=7.0, backend=target.backend)
    expected = value_and_gradients(loss, z)
    value, *grads, dbias = value_and_gradients(
        lambda image, text, bias: loss(image, text, logit_bias=bias), [*z, bias]
    )
    for a, b in zip([value, *grads], expected, strict=True):
        assert torch.equal(a, b)
    assert dbias == 0


def test_a_bias_is_any_number(target: Target) -> None:
    z = pairs(target, 14, 9, precise(target))
    for bias in (None, -200.0) if target.interpreted else (None, 0, -10.0, 4.0, -200.0):
        options = {"logit_scale": 10.0, "logit_bias": bias}
        fused = partial(functional.siglip, backend=target.backend, **options)
        check_accuracy(fused, partial(reference.siglip, **options), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1.0, 100.0])
def test_long_rows_at_the_largest_scale_are_finite(
    target: Target, name: str, dtype: torch.dtype, length: float
) -> None:
    if target.interpreted and dtype == torch.bfloat16:
        pytest.skip("its bfloat16 tl.dot is wrong")
    z = [length * x for x in pairs(target, 20, 12, dtype)]  # with 100, scores of 1e6
    s = torch.tensor(100.0, device=target.device)
    loss = loss_of(functional, name, backend=target.backend)
    assert all(x.isfinite().all() for x in value_and_gradients(loss, [*z, s]))


def test_opposite_pairs_are_the_worst(target: Target) -> None:
    z = torch.eye(8, device=target.device)
    clip = functional.clip(z, -z, 100.0, backend=target.backend)
    assert clip.item() == pytest.approx(100 + math.log(7), rel=1e-6)
    siglip = functional.siglip(z, -z, 100.0, backend=target.backend)
    assert siglip.item() == pytest.approx(100 + 7 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_nearly_solved_batches_keep_their_small_loss(
    target: Target, name: str, scale: float
) -> None:
    if target.interpreted and scale < 100:
        pytest.skip("the other takes the same way")
    image, _ = pairs(target, 24, 48)
    text = reference.normalize(image + 1e-3 * torch.randn_like(image))
    options = {"logit_scale": scale, "logit_bias": -scale / 2}
    fused = loss_of(functional, name, backend=target.backend, **options)
    check_accuracy(fused, loss_of(reference, name, **options), [image, text])


def test_clip_is_the_same_with_sides_exchanged(target: Target, name: str) -> None:
    image, text = pairs(target, 30, 9)
    loss = loss_of(functional, name, logit_scale=8.0, backend=target.backend)
    torch.testing.assert_close(loss(image, text), loss(text, image))


def test_clip_is_info_nce_of_both_directions(target: Target) -> None:
    image, text = pairs(target, 30, 9)
    one, other = (
        functional.info_nce(*z, temperature=0.1, backend=target.backend)
        for z in ((image, text), (text, image))
    )
    found = functional.clip(image, text, 10.0, backend=target.backend)
    torch.testing.assert_close(found, (one + other) / 2)


def test_only_duplicates_left(target: Target) -> None:
    """Then nothing but the pairs themselves counts."""
    ids = torch.zeros(6, dtype=torch.int64, device=target.device)
    z = pairs(target, 6, 8)
    clip, *grads = value_and_gradients(
        partial(functional.clip, logit_scale=9.0, ids=ids, backend=target.backend), z
    )
    assert clip == 0
    assert all((grad == 0).all() for grad in grads)
    siglip = functional.siglip(*z, 9.0, -2.0, ids=ids, backend=target.backend)
    y = 9 * torch.linalg.vecdot(*z) - 2
    torch.testing.assert_close(siglip, torch.nn.functional.softplus(-y).mean())


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1), (2,), (3,), (0, 1, 2, 3)])
def test_siglip_keeps_a_matrix_for_each_gradient(target: Target, trained: tuple[int, ...]) -> None:
    n, d = 200, 16
    z = pairs(target, n, d, torch.float32 if target.interpreted else torch.bfloat16)
    scalars = [torch.tensor(x, device=target.device) for x in (10.0, -10.0)]
    inputs = [x.requires_grad_(i in trained) for i, x in enumerate([*z, *scalars])]
    saved = {}

    def record(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        loss = functional.siglip(*inputs, backend=target.backend)
    for x in inputs:
        saved.pop(x.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    matrices = sum(i in trained for i in (0, 1))
    assert sum(saved.values()) <= matrices * 4 * n * d + 100


@pytest.mark.slow
def test_peak_memory_is_far_below_the_matrix(name: str) -> None:
    n, d = 8192, 16
    image, text = (x.requires_grad_() for x in pairs(Target("torch", "cpu"), n, d))
    loss = loss_of(functional, name, logit_scale=10.0, logit_bias=-10.0)
    loss(image[:8], text[:8]).backward()
    grown = extra_bytes(lambda: loss(image, text).backward())
    assert grown < 16 * 2**20 < n**2 * 4 / 10


class TestModule:
    def test_agrees_with_the_function(self, target: Target, name: str) -> None:
        z = pairs(target, 12, 8)
        ids = torch.arange(12, device=target.device) // 2
        s, b = (torch.tensor(x, device=target.device) for x in (9.0, -8.0))
        module = CLASSES[name](backend=target.backend)
        expected = loss_of(functional, name, ids=ids, backend=target.backend)(*z, s, b)
        assert torch.equal(module(*z, s, b, ids=ids), expected)
        assert torch.equal(module(*z, 9.0, -8.0, ids=ids), expected)
        found = module(*z, s, b, output_dict=True, ids=ids)
        assert list(found) == ["contrastive_loss"]
        assert torch.equal(found["contrastive_loss"], expected)

    def test_takes_open_clips_arguments(self, name: str) -> None:
        open_clip = pytest.importorskip("open_clip.loss")
        ours, theirs = CLASSES[name], getattr(open_clip, CLASSES[name].__name__)
        for of in (lambda cls: cls, lambda cls: cls.forward):
            found, expected = (
                [(p.name, p.default) for p in inspect.signature(of(cls)).parameters.values()]
                for cls in (ours, theirs)
            )
            assert found[: len(expected)] == expected

    def test_replaces_open_clips(self, name: str) -> None:
        open_clip = pytest.importorskip("open_clip.loss")
        ours, theirs = CLASSES[name](), getattr(open_clip, CLASSES[name].__name__)()
        z = [x.double() for x in pairs(Target("torch", "cpu"), 17, 9, DOUBLE)]
        for scale, bias in ((1.0, 0.0), (14.3, -10.0), (100.0, -50.0)):
            scalars = [torch.tensor(x, dtype=DOUBLE) for x in (scale, bias)]
            expected = value_and_gradients(theirs, [*z, *scalars])
            for a, b in zip(value_and_gradients(ours, [*z, *scalars]), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            expected = theirs(*z, scalars[0], None, output_dict=True)
            found = ours(*z, scalars[0], None, output_dict=True)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    def test_takes_open_clips_scalars_of_one_element(self, name: str) -> None:
        """Those of a model made with nonscalar_logit_scale."""
        open_clip = pytest.importorskip("open_clip.loss")
        ours, theirs = CLASSES[name](), getattr(open_clip, CLASSES[name].__name__)()
        z = [x.double() for x in pairs(Target("torch", "cpu"), 17, 9, DOUBLE)]
        given = [*z, *(torch.tensor([x], dtype=DOUBLE) for x in (14.3, -10.0))]
        expected = value_and_gradients(lambda *x: theirs(*x).sum(), given)
        for a, b in zip(value_and_gradients(ours, given), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    def test_takes_open_clips_options(self) -> None:
        z = pairs(Target("torch", "cpu"), 6, 4)
        options = {"local_loss": True, "gather_with_grad": True, "cache_labels": True, "rank": 0}
        assert torch.equal(fastssl.ClipLoss(**options)(*z, 5.0), fastssl.ClipLoss()(*z, 5.0))
        expected = fastssl.SigLipLoss()(*z, 5.0, -1.0)
        for dist_impl in ("bidir", "shift", "reduce", "gather", None):
            criterion = fastssl.SigLipLoss(cache_labels=True, dist_impl=dist_impl)
            assert torch.equal(criterion(*z, 5.0, -1.0), expected)

    def test_shows_its_options(self, name: str) -> None:
        assert "world_size=4" in repr(CLASSES[name](world_size=4))
        assert "cache_labels=True" in repr(CLASSES[name](cache_labels=True))

    def test_needs_as_many_ranks_as_it_was_told(self, name: str) -> None:
        z = pairs(Target("torch", "cpu"), 6, 4)
        with pytest.raises(ValueError, match=r"world_size must be .* process group, 1, got 4"):
            CLASSES[name](rank=2, world_size=4)(*z, 5.0, -1.0)

    def test_refuses_bad_options(self, name: str) -> None:
        with pytest.raises(ValueError, match="backend must be one of"):
            CLASSES[name](backend="gpu")
        with pytest.raises(ValueError, match="world_size must be at least 1, got -1"):
            CLASSES[name](world_size=-1)
        with pytest.raises(TypeError, match="world_size must be a whole number, got str"):
            CLASSES[name](world_size="x")
        with pytest.raises(ValueError, match="use_horovod must be False"):
            fastssl.ClipLoss(use_horovod=True)
        with pytest.raises(ValueError, match=r"dist_impl must be one of 'bidir', .* got 'ring'"):
            fastssl.SigLipLoss(dist_impl="ring")

    def test_refuses_a_bad_bias(self, name: str) -> None:
        z = pairs(Target("torch", "cpu"), 6, 4)
        for bias, error, message in (
            (math.nan, ValueError, "logit_bias must be finite, got nan"),
            ("high", TypeError, "logit_bias must be a number or a tensor of one element, got str"),
            (torch.ones(2), ValueError, r"logit_bias must be .* got shape \(2,\)"),
            (-1e300, ValueError, r"logit_bias must be finite in float32, got -1e\+300"),
            (torch.zeros((), device="meta"), ValueError, "logit_bias must be on .* cpu, got meta"),
        ):
            with pytest.raises(error, match=message):
                CLASSES[name]()(*z, 5.0, bias)

    def test_trains_the_scale_and_bias_of_a_model(self, name: str) -> None:
        z = pairs(Target("torch", "cpu"), 12, 8)
        log_scale, bias = (torch.nn.Parameter(torch.tensor(x)) for x in (2.0, -3.0))
        CLASSES[name]()(*z, log_scale.exp(), bias).backward()
        assert log_scale.grad != 0
        assert (bias.grad != 0) == (name == "siglip")
