"""The queue of earlier batches and the bank of a row for each sample."""

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl import MemoryBankModule, NTXentLoss, SampleMemoryBank, functional, reference


def batch(first: int, count: int, d: int = 3) -> Tensor:
    """Rows that say when they came."""
    return torch.arange(first, first + count).float()[:, None].repeat(1, d)


def ages(bank: MemoryBankModule) -> list[int]:
    return bank.bank[:, 0].tolist()


def test_a_bank_first_seen_in_inference_mode_is_trained_with_later() -> None:
    bank = MemoryBankModule(8)
    with torch.inference_mode():
        bank(batch(0, 4), update=True)
    bank(batch(4, 4), update=True)
    assert ages(bank) == list(range(8))
    loss, (query, key) = NTXentLoss(memory_bank_size=8), torch.randn(2, 4, 3)
    with torch.inference_mode():
        loss(query, key)
    loss(query.requires_grad_(), key).backward()
    assert loss.memory_bank.bank_ptr.item() == 4


def test_it_begins_with_random_unit_rows() -> None:
    bank = MemoryBankModule((50, 8)).bank
    torch.testing.assert_close(torch.linalg.vector_norm(bank, dim=1), torch.ones(50))
    assert (bank @ bank.T).fill_diagonal_(0).abs().max() < 1 - 1e-6
    assert not torch.equal(MemoryBankModule((50, 8)).bank, bank)


@pytest.mark.parametrize(
    "counts", [[3, 3, 3], [4, 4, 4], [1] * 11, [8, 8], [5, 8, 2], [11], [20, 1], [3, 16], [7, 9, 8]]
)
def test_first_in_first_out(counts: list[int]) -> None:
    """A batch may not divide the size, reach past the end, or be larger than the bank."""
    bank = MemoryBankModule((8, 3))
    bank.bank.copy_(batch(-8, 8))
    came = list(range(-8, 0))
    for count in counts:
        first = came[-1] + 1
        bank(batch(first, count), update=True)
        came += range(first, first + count)
        assert sorted(ages(bank)) == came[-8:]
        oldest = ages(bank)[bank.bank_ptr.item()]
        assert oldest == came[-8]


def test_the_batch_goes_on_at_the_beginning() -> None:
    bank = MemoryBankModule((5, 3))
    bank(batch(0, 4), update=True)
    bank(batch(4, 3), update=True)
    assert ages(bank) == [5, 6, 2, 3, 4]
    assert bank.bank_ptr.tolist() == [2]


@pytest.mark.parametrize("feature_dim_first", [True, False])
def test_it_returns_what_was_there_before_the_batch(feature_dim_first: bool) -> None:
    bank = MemoryBankModule((6, 3), feature_dim_first=feature_dim_first)
    before = bank.bank.clone()
    output = batch(0, 4)
    same, negatives = bank(output, update=True)
    assert same is output
    assert torch.equal(negatives.T if feature_dim_first else negatives, before)
    bank(batch(4, 6), update=True)  # and it is a copy
    assert torch.equal(negatives.T if feature_dim_first else negatives, before)


def test_it_changes_only_when_asked() -> None:
    bank = MemoryBankModule((6, 3))
    before = bank.bank.clone()
    for given in ({}, {"update": False}, {"labels": torch.arange(4)}):
        _, negatives = bank(batch(0, 4), **given)
        assert torch.equal(negatives.T, before)
        assert torch.equal(bank.bank, before)
        assert bank.bank_ptr.tolist() == [0]


def test_it_is_never_differentiated() -> None:
    bank = MemoryBankModule((6, 3))
    z = nn.Parameter(torch.randn(4, 3))
    for _ in range(3):
        output, negatives = bank(2 * z, update=True)
        assert output.requires_grad
        assert not negatives.requires_grad
        assert not bank.bank.requires_grad
        assert bank.bank.grad_fn is None
    (output @ negatives).sum().backward()
    assert list(bank.parameters()) == []


def test_it_may_change_between_forward_and_backward() -> None:
    def gradient(update: bool) -> Tensor:
        torch.manual_seed(1)
        bank = MemoryBankModule((6, 3))
        z = torch.randn(4, 3, requires_grad=True)
        _, negatives = bank(z)
        loss = (z @ negatives).logsumexp(1).sum()
        if update:
            bank(z, update=True)
        loss.backward()
        return z.grad

    assert torch.equal(gradient(update=True), gradient(update=False))


def test_no_bank() -> None:
    for size in (0, (0,), (0, 5)):
        bank = MemoryBankModule(size)
        output = torch.randn(4, 7, requires_grad=True)
        for update in (False, True):
            same, negatives = bank(output, update=update)
            assert same is output
            assert negatives is None


def test_a_number_alone_takes_its_features_from_the_first_batch() -> None:
    bank = MemoryBankModule(6)
    assert bank.size == (6,)
    _, negatives = bank(batch(0, 4, d=5), update=True)
    assert negatives.shape == (5, 6)
    torch.testing.assert_close(torch.linalg.vector_norm(negatives, dim=0), torch.ones(6))
    assert bank.size == (6, 5)
    assert ages(bank)[:4] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"output must have shape \(N, 5\).*got \(4, 3\)"):
        bank(batch(0, 4, d=3))


def test_rows_are_kept_in_float32() -> None:
    bank = MemoryBankModule((6, 3))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        bank(batch(0, 4).to(dtype), update=True)
        assert bank.bank.dtype == torch.float32


def test_it_moves_with_its_module() -> None:
    for bank in (MemoryBankModule((6, 3)), MemoryBankModule(6)):
        bank.double()
        bank(torch.randn(4, 3, dtype=torch.float64), update=True)
        assert bank.bank.dtype == torch.float64
    assert MemoryBankModule((6, 3)).to("meta").bank.device.type == "meta"


def test_a_state_dict_holds_it_if_asked() -> None:
    assert MemoryBankModule((6, 3)).state_dict() == {}
    first, second = (MemoryBankModule((6, 3), persistent=True) for _ in range(2))
    first(batch(0, 4), update=True)
    state = first.state_dict()
    assert set(state) == {"bank", "bank_ptr"}
    second.load_state_dict(state)
    for bank in (first, second):
        bank(batch(4, 4), update=True)
    assert torch.equal(first.bank, second.bank)
    assert torch.equal(first.bank_ptr, second.bank_ptr)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (-1, ValueError, "size must be 0, .* none negative, got -1"),
        ((4, -2), ValueError, r"none negative, got \(4, -2\)"),
        ((4, 0), ValueError, r"got \(4, 0\)"),
        ((4, 3, 2), ValueError, r"got \(4, 3, 2\)"),
        ((), ValueError, r"got \(\)"),
        (4.0, TypeError, "size must be a whole number or two of them, got 4.0"),
        ((4, 2.5), TypeError, r"two of them, got \(4, 2.5\)"),
        (True, TypeError, "two of them, got True"),
        ("12", TypeError, "two of them, got '12'"),
        (None, TypeError, "two of them, got None"),
    ],
)
def test_a_bad_size_is_named(size: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryBankModule(size)


def test_other_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"size must be \(6, D\) with persistent, got 6"):
        MemoryBankModule(6, persistent=True)
    with pytest.raises(ValueError, match=r"output must have shape \(N, 3\).* got \(4, 2\)"):
        MemoryBankModule((6, 3))(torch.zeros(4, 2), update=True)
    with pytest.raises(ValueError, match="output must have shape"):
        MemoryBankModule(6)(torch.zeros(3))


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"output must have shape \(N, D\) .* got \(3,\)"),
        (torch.zeros(4, 1, 3), ValueError, r"output must have shape .* got \(4, 1, 3\)"),
        (torch.zeros(0, 3), ValueError, r"output must have shape .* got \(0, 3\)"),
        (torch.zeros(4, 0), ValueError, r"output must have shape .* got \(4, 0\)"),
        ([[1.0, 2.0, 3.0]], TypeError, "output must be a tensor, got list"),
        (None, TypeError, "output must be a tensor, got NoneType"),
        (np.zeros((4, 3)), TypeError, "output must be a tensor, got ndarray"),
        (torch.zeros(4, 3, dtype=torch.int64), TypeError, "output must be float64.*got int64"),
        (torch.zeros(4, 3, dtype=torch.bool), TypeError, "output must be float64.*got bool"),
        (torch.zeros(4, 3, dtype=torch.complex64), TypeError, "output must be .*got complex64"),
    ],
)
@pytest.mark.parametrize("size", [6, (6, 3)])
def test_bad_rows_are_named_and_change_nothing(
    output: object, error: type[Exception], message: str, size: int | tuple[int, int]
) -> None:
    memory = MemoryBankModule(size)
    before = memory.bank.clone()
    for call in (memory.update, memory.rows_for, lambda x: memory(x, update=True)):
        with pytest.raises(error, match=message):
            call(output)
    assert memory.bank.shape == before.shape
    if memory.bank.dim() == 2:
        assert torch.equal(memory.bank, before)


def test_no_bank_takes_no_rows() -> None:
    memory = MemoryBankModule(0)
    memory.update(torch.zeros(4, 3))
    assert memory.size == (0,)
    assert memory(torch.zeros(4, 3))[1] is None


def test_it_shows_its_options() -> None:
    assert "size=(6, 3)" in repr(MemoryBankModule((6, 3)))


def test_it_takes_lightlys_arguments() -> None:
    lightly = pytest.importorskip("lightly.models.modules.memory_bank")
    for of in (lambda cls: cls, lambda cls: cls.forward):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(of(cls)).parameters.values()]
            for cls in (MemoryBankModule, lightly.MemoryBankModule)
        )
        assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("feature_dim_first", [True, False])
def test_it_replaces_lightlys(feature_dim_first: bool) -> None:
    """But where lightly cuts off a batch at the end of the bank: there ours goes on."""
    lightly = pytest.importorskip("lightly.models.modules.memory_bank")
    ours, theirs = (
        cls((12, 5), feature_dim_first=feature_dim_first)
        for cls in (MemoryBankModule, lightly.MemoryBankModule)
    )
    theirs.bank.copy_(ours.bank)
    for i in range(8):
        z = torch.randn(4, 5)
        found, expected = (bank(z, update=i != 3) for bank in (ours, theirs))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert torch.equal(ours.bank_ptr, theirs.bank_ptr)


class TestSampleMemoryBank:
    def test_it_begins_with_random_unit_rows(self) -> None:
        memory = SampleMemoryBank(40, 6)
        torch.testing.assert_close(torch.linalg.vector_norm(memory.bank, dim=1), torch.ones(40))
        assert torch.equal(memory.ids, torch.arange(40))

    def test_it_returns_the_rows_of_samples(self) -> None:
        memory = SampleMemoryBank(10, 4)
        index = torch.tensor([7, 0, 7])
        rows = memory(index)
        assert torch.equal(rows, memory.bank[[7, 0, 7]])
        memory.update(torch.randn(3, 4), index)  # and they are copies
        assert not torch.equal(rows, memory.bank[[7, 0, 7]])

    def test_update_by_hand(self) -> None:
        memory = SampleMemoryBank(3, 2, momentum=0.75)
        memory.bank.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        memory.update(torch.tensor([[0.0, 5.0], [0.0, 5.0]]), torch.tensor([0, 2]))
        mean = torch.tensor([[0.75, 0.25], [0.45, 0.85]])
        expected = mean / torch.tensor([[(0.75**2 + 0.25**2) ** 0.5], [(0.45**2 + 0.85**2) ** 0.5]])
        torch.testing.assert_close(memory.bank[[0, 2]], expected)
        assert memory.bank[1].tolist() == [0, 1]

    def test_a_sample_that_is_there_twice_counts_with_its_mean(self) -> None:
        index = torch.tensor([2, 5, 2, 2])
        z = torch.randn(4, 4)
        unit = nn.functional.normalize(z, dim=1)
        memory = SampleMemoryBank(8, 4, momentum=0.3)
        before = memory.bank.clone()
        memory.update(z, index)
        expected = before.clone()
        for sample, mean in ((2, unit[[0, 2, 3]].mean(0)), (5, unit[1])):
            expected[sample] = nn.functional.normalize(0.3 * before[sample] + 0.7 * mean, dim=0)
        torch.testing.assert_close(memory.bank, expected)

    def test_the_order_of_a_batch_does_not_matter(self) -> None:
        first, second = (SampleMemoryBank(8, 4) for _ in range(2))
        second.load_state_dict(first.state_dict())
        z, index = torch.randn(6, 4), torch.tensor([1, 1, 3, 1, 3, 0])
        order = torch.randperm(6)
        first.update(z, index)
        second.update(z[order], index[order])
        torch.testing.assert_close(first.bank, second.bank)

    @pytest.mark.parametrize("momentum", [0.0, 1.0])
    def test_the_ends_of_momentum(self, momentum: float) -> None:
        memory = SampleMemoryBank(8, 4, momentum)
        before, z = memory.bank.clone(), torch.randn(2, 4)
        memory.update(z, torch.tensor([3, 6]))
        expected = before[[3, 6]] if momentum else nn.functional.normalize(z, dim=1)
        torch.testing.assert_close(memory.bank[[3, 6]], expected)

    def test_it_is_never_differentiated(self) -> None:
        memory = SampleMemoryBank(8, 4)
        z = torch.randn(2, 4, requires_grad=True)
        memory.update(z, torch.tensor([3, 6]))
        assert not memory.bank.requires_grad
        assert not memory(torch.tensor([3])).requires_grad
        assert list(memory.parameters()) == []

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_rows_are_kept_in_float32(self, dtype: torch.dtype) -> None:
        memory = SampleMemoryBank(8, 4)
        memory.update(torch.randn(2, 4).to(dtype), torch.tensor([3, 6]))
        assert memory.bank.dtype == torch.float32
        torch.testing.assert_close(torch.linalg.vector_norm(memory.bank, dim=1), torch.ones(8))

    def test_autocast_changes_nothing(self) -> None:
        first, second = SampleMemoryBank(8, 4), SampleMemoryBank(8, 4)
        second.load_state_dict(first.state_dict())
        z, index = torch.randn(6, 4), torch.tensor([1, 1, 3, 1, 3, 0])
        first.update(z, index)
        with torch.autocast("cpu", torch.bfloat16):
            second.update(z, index)
        assert torch.equal(first.bank, second.bank)

    def test_samples_follow_the_generator(self) -> None:
        memory = SampleMemoryBank(30, 4)
        rows, ids = memory.sample(100, torch.Generator().manual_seed(5))
        again, same = memory.sample(100, torch.Generator().manual_seed(5))
        assert torch.equal(ids, same)
        assert torch.equal(rows, again)
        assert torch.equal(rows, memory.bank[ids])
        assert not torch.equal(memory.sample(100)[1], memory.sample(100)[1])

    def test_samples_are_drawn_alike_with_replacement(self) -> None:
        memory = SampleMemoryBank(10, 4)
        _, ids = memory.sample(5000, torch.Generator().manual_seed(5))
        assert ids.shape == (5000,)
        counts = ids.bincount(minlength=10)
        assert counts.min() > 400
        assert counts.max() < 600

    def test_the_state_dict_holds_the_rows(self) -> None:
        first, second = SampleMemoryBank(8, 4), SampleMemoryBank(8, 4)
        assert set(first.state_dict()) == {"bank"}
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.bank, second.bank)

    def test_info_nce_of_it_is_instance_discrimination(self) -> None:
        """-log softmax over all rows at the sample's own (Wu et al. 2018, equation 2)."""
        memory = SampleMemoryBank(20, 6)
        query, index = torch.randn(5, 6), torch.tensor([3, 0, 19, 7, 8])
        found = functional.info_nce(
            query, memory(index), memory.bank, 0.07, ids=index, negative_ids=memory.ids
        )
        logits = reference.normalize(query) @ memory.bank.T / 0.07
        torch.testing.assert_close(found, nn.functional.cross_entropy(logits, index))

    def test_an_update_before_the_backward_pass_changes_no_gradient(self) -> None:
        def gradient(update: bool) -> Tensor:
            torch.manual_seed(1)
            memory = SampleMemoryBank(20, 6)
            query = torch.randn(5, 6, requires_grad=True)
            index = torch.arange(5)
            loss = functional.info_nce(
                query, memory(index), memory.bank, ids=index, negative_ids=memory.ids
            )
            if update:
                memory.update(query, index)
            loss.backward()
            return query.grad

        assert torch.equal(gradient(update=True), gradient(update=False))

    def test_it_shows_its_options(self) -> None:
        assert "num_samples=8, dim=4, momentum=0.9" in repr(SampleMemoryBank(8, 4, 0.9))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 4), "num_samples must be at least 1, got 0"),
            ((4, -1), "dim must be at least 1, got -1"),
            ((4, 4, -0.5), r"momentum must be from 0 to 1, got -0\.5"),
            ((4, 4, 1.5), r"momentum must be from 0 to 1, got 1\.5"),
            ((4, 4, float("nan")), "momentum must be finite, got nan"),
        ],
    )
    def test_bad_options_are_named(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SampleMemoryBank(*arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((2.5, 4), "num_samples must be a whole number, got float"),
            ((True, 4), "num_samples must be a whole number, got bool"),
            ((4, "4"), "dim must be a whole number, got str"),
            ((4, 4, "0.5"), "momentum must be a number, got str"),
            ((4, 4, None), "momentum must be a number, got NoneType"),
        ],
    )
    def test_options_of_other_types_are_named(self, arguments: tuple, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            SampleMemoryBank(*arguments)

    @pytest.mark.parametrize(
        ("index", "error", "message"),
        [
            ([0, 1], TypeError, "index must be an int64 or int32 tensor, got list"),
            (torch.zeros(2), TypeError, "index must be .* got torch.float32"),
            (torch.ones(2, dtype=torch.uint8), TypeError, "index must be .* got torch.uint8"),
            (torch.ones(2, dtype=torch.bool), TypeError, "index must be .* got torch.bool"),
            (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"index .* \(B,\), got \(2, 1\)"),
            (torch.tensor([7, 8]), ValueError, "index must be from 0 to 7, got 8"),
            (torch.tensor([0, -1]), ValueError, "index must be from 0 to 7, got -1"),
        ],
    )
    def test_a_bad_index_is_named(
        self, index: object, error: type[Exception], message: str
    ) -> None:
        memory = SampleMemoryBank(8, 4)
        before = memory.bank.clone()
        with pytest.raises(error, match=message):
            memory(index)
        with pytest.raises(error, match=message):
            memory.update(torch.randn(2, 4), index)
        assert torch.equal(memory.bank, before)

    def test_a_bad_count_is_named(self) -> None:
        with pytest.raises(ValueError, match="count must be at least 0, got -1"):
            SampleMemoryBank(8, 4).sample(-1)
        with pytest.raises(TypeError, match="count must be a whole number, got float"):
            SampleMemoryBank(8, 4).sample(2.0)

    def test_an_index_of_int32_is_one(self) -> None:
        first, second = SampleMemoryBank(8, 4), SampleMemoryBank(8, 4)
        second.load_state_dict(first.state_dict())
        z, index = torch.randn(3, 4), torch.tensor([5, 1, 5])
        first.update(z, index)
        second.update(z, index.int())
        assert torch.equal(first.bank, second.bank)

    def test_bad_input_is_named(self) -> None:
        memory = SampleMemoryBank(8, 4)
        with pytest.raises(ValueError, match=r"z .*\(2, 3\)"):
            memory.update(torch.zeros(2, 3), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"index .*\(3,\)"):
            memory.update(torch.zeros(2, 4), torch.tensor([0, 1, 2]))
        with pytest.raises(TypeError, match="z must be a tensor, got list"):
            memory.update([[1.0] * 4], torch.tensor([0]))
        with pytest.raises(TypeError, match=r"index .*float32"):
            memory.update(torch.zeros(2, 4), torch.zeros(2))
