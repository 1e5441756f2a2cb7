"""Supervised contrastive loss: labels, masks, and anchors without a positive."""

import inspect
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from measure import extra_bytes
from targets import Target
from torch import Tensor

import fastssl
from fastssl import functional, reference

DOUBLE = torch.float64


def features(target: Target, b: int, v: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    sample = torch.randn(b, 1, d)
    return reference.normalize(sample + torch.randn(b, v, d)).to(target.device, dtype)


def precise(target: Target) -> torch.dtype:
    return DOUBLE if target.backend == "torch" else torch.float32


def of_matrix(loss: Callable[..., Tensor], b: int, **options: object) -> Callable[..., Tensor]:
    """The loss as a function of the views' rows in one matrix [B V, D]."""
    return lambda rows: loss(rows.view(b, len(rows) // b, -1), **options)


def published(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
) -> Tensor:
    """The steps as SupContrast's authors write them, where every anchor has a positive."""
    b, v = features.shape[:2]
    if labels is not None:
        mask = torch.eq(labels.view(-1, 1), labels.view(-1, 1).T).to(features)
    elif mask is None:
        mask = torch.eye(b).to(features)
    contrast = torch.cat(torch.unbind(features, 1), 0)
    anchor, count = (features[:, 0], 1) if contrast_mode == "one" else (contrast, v)
    logits = anchor @ contrast.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = torch.ones(count * b, v * b).to(features)
    others[torch.arange(count * b), torch.arange(count * b)] = 0
    mask = mask.repeat(count, v) * others
    log_prob = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    mean = (mask * log_prob).sum(1) / mask.sum(1)
    return (-(temperature / base_temperature) * mean).view(count, b).mean()


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("kind", ["views", "labels", "mask"])
def test_the_published_steps_give_the_same(contrast_mode: str, kind: str) -> None:
    z = features(Target("torch", "cpu"), 14, 3, 9, DOUBLE)
    given = {
        "views": {},
        "labels": {"labels": torch.arange(14) % 4},
        "mask": {"mask": torch.rand(14, 14, dtype=DOUBLE)},
    }[kind]
    options = {"temperature": 0.1, "base_temperature": 0.2, "contrast_mode": contrast_mode}
    expected = value_and_gradients(partial(published, **given, **options), [z])
    for loss in (functional.supcon, reference.supcon):
        found = value_and_gradients(partial(loss, **given, **options), [z])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_three_samples_by_hand() -> None:
    # One view; samples 0 and 1 share a class, 2 is alone in its own. Products 0.6, 0.8, 0.96.
    z = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.8, 0.6]]], dtype=DOUBLE)
    labels = torch.tensor([3, 3, 5])
    t, base = 0.5, 0.25
    first = math.log(math.exp(0.6 / t) + math.exp(0.8 / t)) - 0.6 / t
    second = math.log(math.exp(0.6 / t) + math.exp(0.96 / t)) - 0.6 / t
    expected = t / base * (first + second + 0) / 3
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for loss in (functional.supcon, reference.supcon):
        options = {"temperature": t, "base_temperature": base}
        assert loss(z, labels, **options).item() == pytest.approx(expected)
        assert loss(z, mask=mask, **options).item() == pytest.approx(expected)


def test_a_mask_of_weights_by_hand() -> None:
    z = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.8, 0.6]]], dtype=DOUBLE)
    mask = torch.tensor([[9.0, 1.0, 3.0], [0.0, 9.0, 0.5], [0.0, 0.0, 9.0]], dtype=DOUBLE)
    lse = [math.log(math.exp(a) + math.exp(b)) for a, b in ((0.6, 0.8), (0.6, 0.96))]
    expected = (lse[0] - (0.6 + 3 * 0.8) / 4 + lse[1] - 0.96) / 3
    for loss in (functional.supcon, reference.supcon):
        found = loss(z, mask=mask, temperature=1.0, base_temperature=1.0)
        assert found.item() == pytest.approx(expected)


def test_without_labels_it_is_nt_xent(target: Target) -> None:
    z = features(target, 15, 2, 8)
    expected = functional.nt_xent(z[:, 0], z[:, 1], 0.2, backend=target.backend)
    found = functional.supcon(z, temperature=0.2, base_temperature=0.2, backend=target.backend)
    torch.testing.assert_close(found, expected)
    distinct = functional.supcon(
        z,
        torch.randperm(15, device=target.device) - 4,
        temperature=0.2,
        base_temperature=0.2,
        backend=target.backend,
    )
    torch.testing.assert_close(distinct, expected)


def test_orthogonal_classes_have_the_loss_of_the_formula(target: Target) -> None:
    classes, size, t = 6, 4, 0.2
    labels = torch.arange(classes, device=target.device).repeat(size)
    z = torch.eye(classes, device=target.device)[labels][:, None].repeat(1, 2, 1)
    alike = 2 * size - 1
    expected = math.log(alike * math.exp(1 / t) + 2 * size * (classes - 1)) - 1 / t
    for mode in ("all", "one"):
        loss = functional.supcon(z, labels, None, t, mode, t, backend=target.backend)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("contrast_mode", ["all", "one"])
def test_any_number_of_views(target: Target, views: int, contrast_mode: str) -> None:
    b = 13
    rows = features(target, b, views, 10, precise(target)).flatten(0, 1)
    labels = torch.arange(b, device=target.device) % 5  # of two or three samples each
    for t in (0.5, 0.07):
        options = {"labels": labels, "temperature": t, "contrast_mode": contrast_mode}
        fused = of_matrix(functional.supcon, b, backend=target.backend, **options)
        check_accuracy(fused, of_matrix(reference.supcon, b, **options), [rows])


def backend_for(target: Target, given: dict[str, Tensor]) -> str:
    return "auto" if "mask" in given else target.backend


@pytest.mark.parametrize("kind", ["labels", "mask"])
def test_an_anchor_without_a_positive_contributes_nothing(target: Target, kind: str) -> None:
    b = 7
    labels = torch.tensor([0, 1, 2, 1, 5, 0, 9], device=target.device)  # 2, 5 and 9 are alone
    rows = features(target, b, 1, 6, precise(target)).flatten(0, 1)
    given = {"labels": labels}
    if kind == "mask":
        given = {"mask": (labels[:, None] == labels).float()}
    backend = backend_for(target, given)
    fused = of_matrix(functional.supcon, b, temperature=0.1, backend=backend, **given)
    check_accuracy(fused, of_matrix(reference.supcon, b, temperature=0.1, **given), [rows])


@pytest.mark.parametrize("shape", [(1, 1, 4), (5, 1, 4)])
@pytest.mark.parametrize("contrast_mode", ["all", "one"])
def test_only_lonely_anchors_mean_no_loss(
    target: Target, shape: tuple[int, ...], contrast_mode: str
) -> None:
    z = features(target, *shape)
    for given in (
        {},
        {"labels": torch.arange(len(z), device=target.device)},
        {"mask": torch.zeros(len(z), len(z), device=target.device)},
    ):
        options = {"contrast_mode": contrast_mode, "backend": backend_for(target, given)}
        loss = partial(functional.supcon, **options, **given)
        value, grad = value_and_gradients(loss, [z])
        assert value == 0
        assert (grad == 0).all()


def test_labels_and_their_mask_are_the_same(target: Target) -> None:
    z = features(target, 20, 2, 9)
    labels = torch.randint(0, 6, (20,), device=target.device)
    loss = partial(functional.supcon, backend=target.backend)
    expected = value_and_gradients(partial(loss, labels=labels), [z])
    for mask in (labels[:, None] == labels, (labels[:, None] == labels).double()):
        found = value_and_gradients(partial(functional.supcon, mask=mask), [z])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_labels_are_called_does_not_matter(target: Target) -> None:
    z = features(target, 20, 2, 9)
    labels = torch.arange(20, device=target.device) * 7 % 6
    loss = partial(functional.supcon, z, backend=target.backend)
    expected = loss(labels)
    names = torch.tensor([2**62, -5, 0, 77, -(2**40), 3], device=target.device)
    for same in (labels[:, None], labels.to(torch.int16), names[labels]):
        torch.testing.assert_close(loss(same), expected)


LABELS = {
    "bool": torch.tensor([True, False, True, True, False, False, True]),
    "float32": torch.tensor([0.5, -1.0, 0.5, -0.0, 0.0, torch.inf, torch.inf]),
    "float64": torch.tensor([1, 1 + 1e-15, 1, 2, 1 + 1e-15, -1, 1e300], dtype=DOUBLE),
    "bfloat16": torch.tensor([1, 2, 1, 3, 2, 1, -7]).bfloat16(),
    "uint8": torch.tensor([255, 0, 255, 7, 7, 0, 3], dtype=torch.uint8),
    "NaN": torch.tensor([1.0, torch.nan, 1.0, torch.nan, 2.0, 2.0, 1.0]),
}


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_compared_as_they_are(target: Target, kind: str, contrast_mode: str) -> None:
    """As SupContrast does: 0 is -0, and NaN is not even itself."""
    rows = features(target, 7, 2, 6, precise(target)).flatten(0, 1)
    options = {"labels": LABELS[kind].to(target.device), "contrast_mode": contrast_mode}
    fused = of_matrix(functional.supcon, 7, backend=target.backend, **options)
    check_accuracy(fused, of_matrix(reference.supcon, 7, **options), [rows])


@pytest.mark.parametrize("name", ["labels", "mask"])
def test_what_is_on_a_cpu_is_brought_to_the_features(name: str) -> None:
    given = {"labels": torch.arange(4) // 2, "mask": torch.eye(4)}[name]
    z = torch.randn(4, 2, 6, device="meta", requires_grad=True)
    loss = functional.supcon(z, **{name: given})
    loss.backward()
    assert loss.device == z.grad.device == z.device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_labels_and_mask_of_a_cpu_are_those_of_the_gpu() -> None:
    z = features(Target("auto", "cuda"), 8, 2, 6)
    labels = torch.arange(8) % 3
    for kind in (labels, labels.float(), labels > 1):
        assert torch.equal(functional.supcon(z, kind), functional.supcon(z, kind.cuda()))
    mask = torch.rand(8, 8)
    assert torch.equal(functional.supcon(z, mask=mask), functional.supcon(z, mask=mask.cuda()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_labels_never_stop_the_device(dtype: torch.dtype) -> None:
    z = features(Target("auto", "cuda"), 8, 2, 6).requires_grad_()
    labels = (torch.arange(8, device="cuda") % 2).to(dtype)
    functional.supcon(z, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.supcon(z, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_labels_of_any_type_compile_as_one_graph(dtype: torch.dtype) -> None:
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations
    z = features(Target("torch", "cpu"), 8, 2, 6)
    labels = (torch.arange(8) % 2).to(dtype)
    compiled = torch.compile(functional.supcon, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(lambda z: functional.supcon(z, labels), [z])
    for a, b in zip(value_and_gradients(lambda z: compiled(z, labels), [z]), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1, 0.03])
def test_many_close_views_keep_their_digits(spread: float) -> None:
    """Through the normalisation, which takes most of a row's gradient off."""
    for seed in range(4):
        torch.manual_seed(seed)
        samples = torch.randn(12) + spread * torch.randn(20, 1, 12)
        z = samples + spread * torch.randn(20, 8, 12)
        fused, plain = (
            lambda rows, f=f: f.supcon(reference.normalize(rows).view(20, 8, 12), temperature=0.1)
            for f in (functional, reference)
        )
        check_accuracy(fused, plain, [z.flatten(0, 1)])


def test_the_order_of_samples_does_not_matter(target: Target) -> None:
    z = features(target, 24, 2, 9)
    labels = torch.arange(24, device=target.device) % 5
    order = torch.randperm(24, device=target.device)
    loss = partial(functional.supcon, backend=target.backend)
    torch.testing.assert_close(loss(z[order], labels[order]), loss(z, labels))


def test_further_dimensions_are_flattened(target: Target) -> None:
    z = features(target, 8, 2, 24)
    labels = torch.arange(8, device=target.device) // 2
    loss = partial(functional.supcon, labels=labels, backend=target.backend)
    assert torch.equal(loss(z.view(8, 2, 2, 3, 4)), loss(z))


def test_views_of_other_memory_give_the_same(target: Target) -> None:
    z = features(target, 12, 3, 8)
    labels = torch.arange(12, device=target.device) // 2
    loss = partial(functional.supcon, labels=labels, backend=target.backend)
    expected = value_and_gradients(loss, [z])
    value, grad = value_and_gradients(
        lambda x: loss(x.permute(2, 1, 0)), [z.permute(2, 1, 0).contiguous()]
    )
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(grad.permute(2, 1, 0), expected[1], rtol=1e-4, atol=1e-6)


def saved_bytes(loss: Callable[[Tensor], Tensor], z: Tensor) -> int:
    saved = {}

    def record(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        assert loss(z.requires_grad_()).requires_grad
    return sum(saved.values())


def test_a_mask_is_all_of_its_size_that_is_kept(target: Target) -> None:
    if target.backend == "triton":
        pytest.skip("PyTorch does the work")
    b = 400
    z = features(target, b, 2, 4)
    mask = torch.rand(b, b, device=target.device)
    found = saved_bytes(partial(functional.supcon, mask=mask), z)
    assert found <= mask.nbytes + 10 * z.nbytes + 40 * b


@pytest.mark.slow
def test_peak_memory_is_far_below_the_matrix() -> None:
    b = 4000
    z = features(Target("torch", "cpu"), b, 2, 16).requires_grad_()
    labels = torch.arange(b) % 100
    functional.supcon(z[:8], labels[:8]).backward()
    grown = extra_bytes(lambda: functional.supcon(z, labels).backward())
    assert grown < 24 * 2**20 < (2 * b) ** 2 * 4 / 10


Z = torch.zeros(4, 2, 3)
BAD_INPUT = {
    "two dimensions": (
        lambda: functional.supcon(Z[:, 0]),
        ValueError,
        r"features must have shape \(B, V, ...\), V views of B samples, got \(4, 3\)",
    ),
    "no samples": (lambda: functional.supcon(Z[:0]), ValueError, r"features .* got \(0, 2, 3\)"),
    "no views": (lambda: functional.supcon(Z[:, :0]), ValueError, r"features .* got \(4, 0, 3\)"),
    "integers": (
        lambda: functional.supcon(Z.int()),
        TypeError,
        "features must be float64.*got int32",
    ),
    "not a tensor": (
        lambda: functional.supcon([1.0]),
        TypeError,
        "features must be a tensor, got list",
    ),
    "labels and mask": (
        lambda: functional.supcon(Z, torch.arange(4), torch.eye(4)),
        ValueError,
        "labels and mask must not be given both",
    ),
    "labels of another length": (
        lambda: functional.supcon(Z, torch.arange(8)),
        ValueError,
        r"labels must have shape \(4,\).*got \(8,\)",
    ),
    "labels in two columns": (
        lambda: functional.supcon(Z, torch.zeros(4, 2)),
        ValueError,
        r"labels must have shape \(4,\).*got \(4, 2\)",
    ),
    "complex labels": (
        lambda: functional.supcon(Z, torch.zeros(4, dtype=torch.complex64)),
        TypeError,
        "labels must be real, got complex64",
    ),
    "labels in a list": (
        lambda: functional.supcon(Z, [0, 1, 2, 3]),
        TypeError,
        "labels must be a tensor or None, got list",
    ),
    "labels elsewhere": (
        lambda: functional.supcon(Z, torch.arange(4, device="meta")),
        ValueError,
        "labels must be on a CPU or the features' device cpu, got meta",
    ),
    "a mask of rows": (
        lambda: functional.supcon(Z, mask=torch.eye(8)),
        ValueError,
        r"mask must have shape \(4, 4\).*got \(8, 8\)",
    ),
    "a mask in a list": (
        lambda: functional.supcon(Z, mask=[[1.0]]),
        TypeError,
        "mask must be a tensor or None, got list",
    ),
    "a mask elsewhere": (
        lambda: functional.supcon(Z, mask=torch.eye(4, device="meta")),
        ValueError,
        "mask must be on a CPU or the features' device cpu, got meta",
    ),
    "a mask to be trained": (
        lambda: functional.supcon(Z, mask=torch.eye(4, requires_grad=True)),
        ValueError,
        "mask must not require a gradient",
    ),
    "a complex mask": (
        lambda: functional.supcon(Z, mask=torch.eye(4, dtype=torch.complex64)),
        TypeError,
        "mask must be real, got complex64",
    ),
    "a negative mask": (
        lambda: functional.supcon(Z, mask=torch.eye(4) - 0.5),
        ValueError,
        "mask must hold finite weights, none negative, got -0.5",
    ),
    "a mask of NaN": (
        lambda: functional.supcon(Z, mask=torch.eye(4) * torch.nan),
        ValueError,
        "mask must hold finite weights, none negative, got nan",
    ),
    "base temperature of too large an inverse": (
        lambda: functional.supcon(Z, base_temperature=1e-40),
        ValueError,
        "base_temperature must be positive and finite in float32, and so its inverse, got 1e-40",
    ),
    "unknown mode": (
        lambda: functional.supcon(Z, contrast_mode="some"),
        ValueError,
        "contrast_mode must be one of 'all', 'one', got 'some'",
    ),
    "base temperature 0": (
        lambda: fastssl.SupConLoss(base_temperature=0.0),
        ValueError,
        "base_temperature must be positive and finite, got 0.0",
    ),
    "unknown backend": (
        lambda: functional.supcon(Z, backend="gpu"),
        ValueError,
        "backend must be one of",
    ),
}


def test_triton_refuses_a_mask_by_name_only() -> None:
    z, mask = torch.randn(4, 2, 3), torch.eye(4)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*not a mask"):
        functional.supcon(z, mask=mask, backend="triton")
    torch.testing.assert_close(functional.supcon(z, mask=mask), functional.supcon(z))


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


class TestModule:
    def test_agrees_with_the_function(self, target: Target) -> None:
        z = features(target, 10, 2, 6)
        labels = torch.arange(10, device=target.device) % 3
        mask = torch.rand(10, 10, device=target.device)
        module = fastssl.SupConLoss(0.2, "one", 0.3, backend=target.backend)
        loss = partial(functional.supcon, backend=target.backend)
        assert torch.equal(module(z, labels), loss(z, labels, None, 0.2, "one", 0.3))
        module = fastssl.SupConLoss(0.2, "one", 0.3)
        assert torch.equal(module(z, mask=mask), functional.supcon(z, None, mask, 0.2, "one", 0.3))

    def test_takes_supcontrasts_arguments(self) -> None:
        parameters = inspect.signature(fastssl.SupConLoss).parameters.values()
        assert [(p.name, p.default) for p in parameters][:3] == [
            ("temperature", 0.07),
            ("contrast_mode", "all"),
            ("base_temperature", 0.07),
        ]
        assert list(inspect.signature(fastssl.SupConLoss.forward).parameters)[1:] == [
            "features",
            "labels",
            "mask",
        ]

    def test_learns_a_parameter_temperature(self) -> None:
        module = fastssl.SupConLoss(torch.nn.Parameter(torch.tensor(0.5)))
        module(features(Target("torch", "cpu"), 8, 2, 4), torch.arange(8) // 2).backward()
        assert [name for name, _ in module.named_parameters()] == ["temperature"]
        assert module.temperature.grad != 0

    def test_shows_its_options(self) -> None:
        shown = repr(fastssl.SupConLoss(0.2, "one", 0.3))
        for option in ("temperature=0.2", "contrast_mode='one'", "base_temperature=0.3"):
            assert option in shown

    def test_replaces_metric_learnings(self) -> None:
        metric_learning = pytest.importorskip("pytorch_metric_learning.losses")
        labels = torch.arange(24) % 5  # each of several samples: theirs averages over such alone
        z = torch.randn(24, 9, dtype=DOUBLE)
        for t in (0.5, 0.1):
            theirs = metric_learning.SupConLoss(temperature=t)
            ours = fastssl.SupConLoss(t, base_temperature=t)
            expected = value_and_gradients(lambda z, loss=theirs: loss(z, labels), [z])
            found = value_and_gradients(
                lambda z, loss=ours: loss(reference.normalize(z)[:, None], labels), [z]
            )
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

    def test_nt_xent_replaces_metric_learnings(self) -> None:
        metric_learning = pytest.importorskip("pytorch_metric_learning.losses")
        z = torch.randn(2, 12, 9, dtype=DOUBLE).unbind()
        for t in (0.5, 0.07):
            theirs = metric_learning.NTXentLoss(temperature=t)
            expected = value_and_gradients(
                lambda *z, loss=theirs: loss(torch.cat(z), torch.arange(12).repeat(2)), z
            )
            found = value_and_gradients(fastssl.NTXentLoss(t), z)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
