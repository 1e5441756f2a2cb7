"""InfoNCE: the positive among negatives that are a batch's, a queue's, or each query's own."""

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


def rows(target: Target, *sizes: int, d: int = 12, dtype: torch.dtype = torch.float32):
    return [torch.randn(size, d).to(target.device, dtype) for size in sizes]


def precise(target: Target) -> torch.dtype:
    return DOUBLE if target.backend == "torch" else torch.float32


def test_a_batch_by_hand() -> None:
    # Cosines of query i and positive j: [[1, 0.8], [0, 0.6]].
    query = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=DOUBLE)
    positive = torch.tensor([[3.0, 0.0], [0.8, 0.6]], dtype=DOUBLE)
    terms = torch.tensor(
        [
            math.log(math.exp(1 / 0.5) + math.exp(0.8 / 0.5)) - 1 / 0.5,
            math.log(math.exp(0 / 0.5) + math.exp(0.6 / 0.5)) - 0.6 / 0.5,
        ],
        dtype=DOUBLE,
    )
    for loss in (functional.info_nce, reference.info_nce):
        torch.testing.assert_close(loss(query, positive, temperature=0.5, reduction="none"), terms)
        torch.testing.assert_close(loss(query, positive, temperature=0.5), terms.mean())


@pytest.mark.parametrize("own", [False, True])
def test_keys_by_hand(own: bool) -> None:
    query = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=DOUBLE)
    positive = torch.tensor([[3.0, 0.0], [0.8, 0.6]], dtype=DOUBLE)  # cosines 1 and 0.6
    keys = torch.tensor([[0.6, 0.8], [-1.0, 0.0], [0.0, 9.0]], dtype=DOUBLE)
    # Cosines with the keys: [0.6, -1, 0] and [0.8, 0, 1]; the second query's sample owns key 1.
    seen = [[0.6, -1.0, 0.0], [0.8, 1.0]]
    terms = torch.tensor(
        [
            math.log(sum(math.exp(x / 0.25) for x in [p, *others])) - p / 0.25
            for p, others in zip((1.0, 0.6), seen, strict=True)
        ],
        dtype=DOUBLE,
    )
    ids, negative_ids = torch.tensor([4, 8]), torch.tensor([5, 8, 6])
    if own:
        keys, negative_ids = keys.expand(2, 3, 2), negative_ids.expand(2, 3)
    for loss in (functional.info_nce, reference.info_nce):
        found = loss(
            query, positive, keys, 0.25, reduction="none", ids=ids, negative_ids=negative_ids
        )
        torch.testing.assert_close(found, terms)


def test_orthogonal_samples_have_the_loss_of_the_formula(target: Target) -> None:
    n, t = 16, 0.2
    eye = torch.eye(2 * n, device=target.device)
    loss = partial(functional.info_nce, temperature=t, backend=target.backend)
    batch = math.log(math.exp(1 / t) + n - 1) - 1 / t
    assert loss(eye[:n], eye[:n]).item() == pytest.approx(batch, rel=1e-5)
    queue = math.log(math.exp(1 / t) + n) - 1 / t
    assert loss(eye[:n], eye[:n], eye[n:]).item() == pytest.approx(queue, rel=1e-5)


@pytest.mark.parametrize("keys", [1, 700])
def test_any_number_of_keys(target: Target, keys: int) -> None:
    if target.interpreted and keys > 1:
        keys = 70
    # In the few numbers of one query the plain rounding of large scores is luck.
    for queries, temperatures in ((1, (0.5,)), (21, (0.5, 0.01))):
        inputs = rows(target, queries, queries, keys, dtype=precise(target))
        for t in temperatures:
            check_accuracy(
                partial(functional.info_nce, temperature=t, backend=target.backend),
                partial(reference.info_nce, temperature=t),
                inputs,
            )


def test_one_query_of_a_batch_has_no_loss(target: Target) -> None:
    loss = partial(functional.info_nce, backend=target.backend)
    value, *grads = value_and_gradients(loss, rows(target, 1, 1))
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("own", [False, True])
def test_keys_of_the_same_sample_alone_mean_no_loss(target: Target, own: bool) -> None:
    query, positive, keys = rows(target, 3, 3, 5)
    ids = torch.zeros(3, dtype=torch.int64, device=target.device)
    negative_ids = torch.zeros(5, dtype=torch.int64, device=target.device)
    if own:
        keys, negative_ids = keys.repeat(3, 1, 1), negative_ids.repeat(3, 1)
    loss = partial(functional.info_nce, ids=ids, negative_ids=negative_ids, backend=target.backend)
    value, *grads = value_and_gradients(loss, [query, positive, keys])
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


def test_a_batch_is_a_queue_of_the_others_positives(target: Target) -> None:
    query, positive = rows(target, 14, 14)
    sample = torch.arange(14, device=target.device)
    with_queue = functional.info_nce(
        query, positive, positive, ids=sample, negative_ids=sample, backend=target.backend
    )
    torch.testing.assert_close(
        functional.info_nce(query, positive, backend=target.backend), with_queue
    )


def test_shared_keys_are_each_querys_own(target: Target) -> None:
    inputs = rows(target, 9, 9, 20)
    shared = value_and_gradients(partial(functional.info_nce, backend=target.backend), inputs)
    own = value_and_gradients(
        lambda q, p, k: functional.info_nce(q, p, k.expand(9, 20, 12), backend=target.backend),
        inputs,
    )
    for a, b in zip(own, shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("temperature", [0.005, 0.2])
def test_own_keys_are_as_exact_as_promised(target: Target, mean: float, temperature: float) -> None:
    """With a mean of 10 cosines differ from 1, and from each other, by 1e-4."""
    spread = 0.1 if mean else 1.0
    query, positive, keys = (mean + spread * x for x in rows(target, 16, 16, 16 * 20))
    inputs = [query, positive, keys, torch.tensor(temperature, device=target.device)]
    check_accuracy(
        lambda q, p, k, t: functional.info_nce(q, p, k.view(16, 20, 12), t, backend=target.backend),
        lambda q, p, k, t: reference.info_nce(q, p, k.view(16, 20, 12), t),
        inputs,
    )


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("apart", [1e-5, 1e-4, 1e-3])
def test_close_cosines_are_as_exact_as_promised(
    target: Target, apart: float, trained: bool
) -> None:
    """The loss is a difference of nearly equal scores, its gradient one of nearly equal rows."""
    for temperature in (0.5, 0.1, 0.03):
        row = torch.randn(1, 12)
        query = row * (1 + torch.rand(16, 1)) + apart * torch.randn(16, 12)
        positive, keys = (row + apart * torch.randn(n, 12) for n in (16, 40))
        query, positive, keys = (x.to(target.device) for x in (query, positive, keys))

        def loss(q, p, k=keys, temperature=temperature):
            return functional.info_nce(q, p, k, temperature, backend=target.backend)

        def plain(q, p, k=keys, temperature=temperature):
            return reference.info_nce(q, p, k.to(q.dtype), temperature)

        check_accuracy(loss, plain, [query, positive, *([keys] if trained else [])])


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_identical_rows_are_told_apart_by_chance(target: Target, temperature: float) -> None:
    x = torch.randn(1, 16, device=target.device).expand(64, 16).contiguous()
    value = functional.info_nce(x, x, x[:1], temperature, backend=target.backend)
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)
    loss = fastssl.NTXentLoss(temperature, (63, 16), backend=target.backend).to(target.device)
    loss.memory_bank.bank.copy_(reference.normalize(x[:1]))
    assert loss(x, x).item() == pytest.approx(math.log(64), abs=1e-6)


@pytest.mark.parametrize("trained", ["query", "positive", "temperature"])
def test_a_queue_may_change_before_the_backward_pass(target: Target, trained: str) -> None:
    def gradient(change: bool) -> Tensor:
        torch.manual_seed(0)
        query, positive, queue = rows(target, 18, 18, 40)
        t = torch.tensor(0.1, device=target.device)
        leaf = {"query": query, "positive": positive, "temperature": t}[trained].requires_grad_()
        value = functional.info_nce(query, positive, queue, t, backend=target.backend)
        if change:
            queue.fill_(torch.nan)
        value.backward()
        return leaf.grad

    assert torch.equal(gradient(change=True), gradient(change=False))
    assert gradient(change=True).any()


def test_a_queue_is_not_kept(target: Target) -> None:
    query, positive, queue = rows(target, 6, 6, 500, d=8)
    saved = {}

    def record(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        value = functional.info_nce(
            query.requires_grad_(), positive.requires_grad_(), queue, backend=target.backend
        )
    assert value.requires_grad
    assert queue.untyped_storage().data_ptr() not in saved
    assert sum(saved.values()) < queue.nbytes / 2  # nor anything of its size


def test_a_queue_that_is_used_again_may_not_need_its_old_self(target: Target) -> None:
    """Two steps through one bank, as in MoCo, where the second changes what the first was given."""
    bank = fastssl.MemoryBankModule((32, 12)).to(target.device)
    losses, leaves = [], []
    for _ in range(2):
        query, positive = rows(target, 10, 10)
        leaves.append(query.requires_grad_())
        queue = bank.rows_for(positive)
        losses.append(functional.info_nce(query, positive, queue, backend=target.backend))
        bank.update(positive)
    sum(losses).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in leaves)


def test_keys_of_other_memory_give_the_same(target: Target) -> None:
    query, positive, keys = rows(target, 8, 8, 24)
    loss = partial(functional.info_nce, query, positive, backend=target.backend)
    torch.testing.assert_close(loss(keys.T.contiguous().T), loss(keys))
    own = keys.view(8, 3, 12)
    torch.testing.assert_close(loss(own.transpose(0, 2).contiguous().transpose(0, 2)), loss(own))


Z = torch.zeros(4, 3)
BAD_INPUT = {
    "keys of other features": (
        {"negatives": torch.zeros(7, 2)},
        ValueError,
        r"negatives must have shape \(K, 3\) or \(4, K, 3\) for queries of shape \(4, 3\), "
        r"got \(7, 2\)",
    ),
    "own keys of other queries": (
        {"negatives": torch.zeros(5, 7, 3)},
        ValueError,
        r"negatives must have shape .*got \(5, 7, 3\)",
    ),
    "keys of four dimensions": (
        {"negatives": torch.zeros(4, 7, 1, 3)},
        ValueError,
        r"negatives must have shape .*got \(4, 7, 1, 3\)",
    ),
    "no keys": (
        {"negatives": torch.zeros(0, 3)},
        ValueError,
        r"negatives must have shape .*got \(0, 3\)",
    ),
    "keys elsewhere": (
        {"negatives": Z.to("meta")},
        ValueError,
        "negatives must be on the device of query, cpu, got meta",
    ),
    "keys in a list": ({"negatives": [1.0]}, TypeError, "negatives must be a tensor, got list"),
    "negative_ids without keys": (
        {"negative_ids": torch.arange(4)},
        ValueError,
        "negative_ids need negatives, got None",
    ),
    "ids of queries alone": (
        {"negatives": Z, "ids": torch.arange(4)},
        ValueError,
        "ids with negatives need negative_ids too, got None",
    ),
    "ids of keys alone": (
        {"negatives": Z, "negative_ids": torch.arange(4)},
        ValueError,
        "negative_ids with negatives need ids too, got None",
    ),
    "negative_ids of another length": (
        {"negatives": Z, "ids": torch.arange(4), "negative_ids": torch.arange(3)},
        ValueError,
        r"negative_ids must have shape \(4,\).*got \(3,\)",
    ),
    "negative_ids not each query's own": (
        {"negatives": Z.repeat(4, 1, 1), "ids": torch.arange(4), "negative_ids": torch.arange(4)},
        ValueError,
        r"negative_ids must have shape \(4, 4\).*got \(4,\)",
    ),
    "unknown reduction": (
        {"reduction": "max"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'max'",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    options, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        functional.info_nce(Z, Z, **options)


class TestModule:
    def test_agrees_with_the_function(self, target: Target) -> None:
        query, positive, keys = rows(target, 12, 12, 30)
        ids = torch.arange(12, device=target.device)
        negative_ids = torch.arange(30, device=target.device) % 14
        module = fastssl.InfoNCELoss(0.3, "sum", backend=target.backend)
        options = {"temperature": 0.3, "reduction": "sum", "backend": target.backend}
        for given in (
            {},
            {"ids": ids // 2},
            {"negatives": keys},
            {"negatives": keys, "ids": ids, "negative_ids": negative_ids},
        ):
            expected = functional.info_nce(query, positive, **given, **options)
            assert torch.equal(module(query, positive, **given), expected)

    def test_takes_its_arguments_in_the_order_of_the_design(self) -> None:
        parameters = inspect.signature(fastssl.InfoNCELoss).parameters.values()
        assert [(p.name, p.default) for p in parameters][:2] == [
            ("temperature", 0.1),
            ("reduction", "mean"),
        ]
        assert list(inspect.signature(fastssl.InfoNCELoss.forward).parameters)[1:4] == [
            "query",
            "positive",
            "negatives",
        ]

    def test_learns_a_parameter_temperature(self) -> None:
        module = fastssl.InfoNCELoss(torch.nn.Parameter(torch.tensor(0.5)))
        module(*torch.randn(2, 8, 4), torch.randn(9, 4)).backward()
        assert [name for name, _ in module.named_parameters()] == ["temperature"]
        assert module.temperature.grad != 0

    def test_shows_its_options(self) -> None:
        shown = repr(fastssl.InfoNCELoss(0.2, "none"))
        assert "temperature=0.2" in shown
        assert "reduction='none'" in shown

    def test_refuses_bad_options(self) -> None:
        with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
            fastssl.InfoNCELoss(-1)
        with pytest.raises(ValueError, match="reduction must be one of"):
            fastssl.InfoNCELoss(reduction="max")
        with pytest.raises(ValueError, match="backend must be one of"):
            fastssl.InfoNCELoss(backend="gpu")

    def test_compiles_with_a_queue(self) -> None:
        torch.compiler.reset()
        z = torch.randn(2, 8, 6).unbind()
        module = fastssl.InfoNCELoss(0.2)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        queue = torch.randn(20, 6)
        expected = value_and_gradients(lambda q, p: module(q, p, queue), z)
        got = value_and_gradients(lambda q, p: compiled(q, p, queue), z)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


class TestNTXentWithMemoryBank:
    """MoCo's loss, as lightly's NTXentLoss has it."""

    @pytest.mark.parametrize("size", [(20, 9), (7, 9), (16, 9)])
    def test_replaces_lightlys(self, size: tuple[int, int]) -> None:
        lightly = pytest.importorskip("lightly.loss")
        ours, theirs = (cls(0.1, size) for cls in (fastssl.NTXentLoss, lightly.NTXentLoss))
        bank = reference.normalize(torch.randn(size, dtype=DOUBLE))
        for module in (ours, theirs):
            module.memory_bank.double().bank.copy_(bank)
        for _ in range(7):
            z = torch.randn(2, 8, 9, dtype=DOUBLE).unbind()
            expected = value_and_gradients(theirs, z)
            for a, b in zip(value_and_gradients(ours, z), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            if size == (16, 9):  # which batches divide: lightly drops what does not fit
                torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
            else:
                theirs.memory_bank.bank.copy_(ours.memory_bank.bank)
                theirs.memory_bank.bank_ptr.copy_(ours.memory_bank.bank_ptr)

    def test_is_info_nce_of_the_bank(self, target: Target) -> None:
        criterion = fastssl.NTXentLoss(0.2, (30, 12), reduction="none", backend=target.backend)
        criterion.to(target.device)
        z = rows(target, 11, 11)
        bank = criterion.memory_bank.bank.clone()
        expected = functional.info_nce(*z, bank, 0.2, reduction="none", backend=target.backend)
        assert torch.equal(criterion(*z), expected)

    def test_takes_the_keys_unit_rows_after_the_step(self, target: Target) -> None:
        criterion = fastssl.NTXentLoss(0.2, (30, 12), backend=target.backend).to(target.device)
        z0, z1 = rows(target, 11, 11)
        before = criterion.memory_bank.bank.clone()
        criterion(z0.requires_grad_(), z1.requires_grad_()).backward()
        bank = criterion.memory_bank.bank
        torch.testing.assert_close(bank[:11], reference.normalize(z1.detach()))
        assert torch.equal(bank[11:], before[11:])
        assert not bank.requires_grad

    def test_keeps_the_bank_where_nothing_is_trained(self, target: Target) -> None:
        criterion = fastssl.NTXentLoss(0.2, (30, 12), backend=target.backend).to(target.device)
        before = criterion.memory_bank.bank.clone()
        z0, z1 = rows(target, 11, 11)
        criterion(z0, z1.requires_grad_())
        assert torch.equal(criterion.memory_bank.bank, before)

    def test_takes_its_features_from_the_first_batch(self) -> None:
        criterion = fastssl.NTXentLoss(memory_bank_size=16)
        z = torch.randn(2, 5, 7, requires_grad=True)
        criterion(*z).backward()
        assert criterion.memory_bank.bank.shape == (16, 7)
        torch.testing.assert_close(
            criterion.memory_bank.bank[:5], reference.normalize(z[1].detach())
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_takes_half_precision(self, dtype: torch.dtype) -> None:
        criterion = fastssl.NTXentLoss(0.1, (16, 12))
        z0, z1 = torch.randn(2, 6, 12).to(dtype).unbind()
        criterion(z0.requires_grad_(), z1).backward()
        assert z0.grad.dtype == dtype
        assert criterion.memory_bank.bank.dtype == torch.float32

    def test_several_steps_before_one_backward_pass(self) -> None:
        criterion = fastssl.NTXentLoss(0.2, (10, 6))
        batches = torch.randn(3, 2, 8, 6)
        banks, leaves, losses = [], [], []
        for z0, z1 in batches:
            banks.append(criterion.memory_bank.bank.clone())
            leaves.append(z0.clone().requires_grad_())
            losses.append(criterion(leaves[-1], z1))
        sum(losses).backward()
        for leaf, bank, (z0, z1) in zip(leaves, banks, batches, strict=True):
            plain = partial(reference.info_nce, positive=z1, negatives=bank, temperature=0.2)
            torch.testing.assert_close(leaf.grad, value_and_gradients(plain, [z0])[1])

    def test_refuses_ids(self) -> None:
        with pytest.raises(ValueError, match="ids must be None with a memory bank"):
            fastssl.NTXentLoss(0.2, (10, 6))(*torch.randn(2, 4, 6), torch.arange(4))

    def test_refuses_other_features_than_the_banks(self) -> None:
        with pytest.raises(ValueError, match=r"\(N, 6\).* size \(10, 6\), got \(4, 5\)"):
            fastssl.NTXentLoss(0.2, (10, 6))(*torch.randn(2, 4, 5))

    def test_takes_lightlys_arguments(self) -> None:
        lightly = pytest.importorskip("lightly.loss")
        ours, theirs = (
            [
                (parameter.name, parameter.default)
                for parameter in inspect.signature(cls).parameters.values()
            ]
            for cls in (fastssl.NTXentLoss, lightly.NTXentLoss)
        )
        assert ours[: len(theirs)] == theirs
