"""CLIP's loss with a teacher, whose softmaxes the student learns to have."""

import itertools
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from accuracy import check_accuracy, value_and_gradients
from measure import extra_bytes
from targets import Target
from torch import Tensor

from fastssl import functional, reference

DOUBLE = torch.float64


def pairs(n: int, d: int, noise: float = 1.0) -> list[Tensor]:
    image = reference.normalize(torch.randn(n, d))
    return [image, reference.normalize(image + noise * torch.randn(n, d) / d**0.5)]


def given(
    target: Target, n: int, d: int, e: int, dtype: torch.dtype = torch.float32, noise: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """A student's features of width d and a scale, a teacher's of width e and a scale."""
    kind = torch.promote_types(dtype, torch.float32)
    student, teacher = (
        [*(x.to(target.device, dtype) for x in pairs(n, width, noise)),
         torch.tensor(scale, dtype=kind, device=target.device)]
        for width, scale in ((d, 14.3), (e, 50.0))
    )  # fmt: skip
    return student, teacher


def loss_of(module: ModuleType, target: Target, part: int | None = None) -> Callable[..., Tensor]:
    """The contrastive loss (0), the distillation (1), or both with weights."""
    options = {"backend": target.backend} if module is functional else {}

    def loss(*inputs: Tensor) -> Tensor:
        found = module.distill_clip(*inputs, **options)
        return found[0] + 2 * found[1] if part is None else found[part]

    return loss


def check(target: Target, student: list[Tensor], teacher: list[Tensor]) -> None:
    for part in (0, 1, None):
        check_accuracy(
            loss_of(functional, target, part),
            loss_of(reference, target, part),
            student,
            fixed=teacher,
        )


def precise(target: Target) -> torch.dtype:
    return DOUBLE if target.backend == "torch" else torch.float32


def test_two_pairs_by_hand() -> None:
    # Scores of image i and text j, the student's and the teacher's.
    x = [[1.0, 0.0], [1.6, 6.0]]
    y = [[2.0, 1.0], [0.0, 0.5]]
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=DOUBLE)
    text = torch.tensor([[0.5, 0.8 / 2], [0.0, 3 / 2]], dtype=DOUBLE)
    dist_image, dist_text = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=DOUBLE), torch.eye(2)

    def cross_entropy(x: tuple[float, float], y: tuple[float, float]) -> float:
        total, teacher = (sum(math.exp(z) for z in each) for each in (x, y))
        return sum(math.exp(b) / teacher * (math.log(total) - a) for a, b in zip(x, y, strict=True))

    directions = zip((*x, *zip(*x, strict=True)), (*y, *zip(*y, strict=True)), strict=True)
    expected = sum(cross_entropy(*each) for each in directions) / 4
    for module in (functional, reference):
        contrastive, distillation = module.distill_clip(
            image, text, 2.0, dist_image, dist_text.double(), 1.0
        )
        assert contrastive.item() == pytest.approx(module.clip(image, text, 2.0).item())
        assert distillation.item() == pytest.approx(expected)


def test_the_contrastive_loss_is_clips(target: Target) -> None:
    student, teacher = given(target, 33, 20, 9)
    found = value_and_gradients(loss_of(functional, target, 0), student, fixed=teacher)
    expected = value_and_gradients(lambda *z: functional.clip(*z, backend=target.backend), student)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "d", "e"), [(37, 19, 40), (9, 300, 5), (1, 8, 3), (40, 1, 130)])
def test_a_teacher_may_be_narrower_or_wider(target: Target, n: int, d: int, e: int) -> None:
    check(target, *given(target, n, d, e, precise(target)))


@pytest.mark.parametrize("length", [1.0, 10.0])
def test_many_tiles_agree_with_one_matrix(length: float) -> None:
    """With short rows, maxima of rows and columns are close enough to share an exponential."""
    target = Target("torch", "cpu")
    for dtype in (DOUBLE, torch.float32):
        student, teacher = given(target, 520, 24, 40, dtype)
        teacher[0] *= length
        inputs = [length * student[0], *student[1:]]
        losses = loss_of(functional, target), loss_of(reference, target)
        check_accuracy(*losses, inputs, fixed=teacher)


def test_scores_of_student_and_teacher_may_be_large(target: Target) -> None:
    student, teacher = given(target, 26, 16, 12)
    for far in (student, teacher):
        scaled = [*(100 * x for x in far[:2]), torch.ones_like(far[2])]  # scores of 1e4
        inputs = (scaled, teacher) if far is student else (student, scaled)
        check(target, *inputs)
        found = value_and_gradients(loss_of(functional, target), inputs[0], fixed=inputs[1])
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nearly_solved_batches_keep_their_small_gradients(
    target: Target, dtype: torch.dtype
) -> None:
    """Both softmaxes are nearly 1 at the pairs, and nearly the same."""
    student, teacher = given(target, 24, 48, 30, dtype, noise=1e-3)
    student[2], teacher[2] = torch.full_like(student[2], 40.0), torch.full_like(teacher[2], 42.0)
    check(target, student, teacher)


def test_a_student_like_its_teacher_has_nothing_to_learn(target: Target) -> None:
    student, _ = given(target, 30, 12, 12)
    value, *grads = value_and_gradients(
        loss_of(functional, target, 1), student, fixed=[x.detach() for x in student]
    )
    logits = student[2] * student[0] @ student[1].T
    entropies = [torch.distributions.Categorical(logits=x).entropy() for x in (logits, logits.T)]
    torch.testing.assert_close(value, torch.cat(entropies).mean())
    assert max(grad.abs().max() for grad in grads) < 1e-6


def test_one_pair_has_no_loss(target: Target) -> None:
    student, teacher = given(target, 1, 8, 5)
    for x in value_and_gradients(loss_of(functional, target), student, fixed=teacher):
        assert (x == 0).all()


def test_zero_rows_of_either_are_finite(target: Target) -> None:
    student, teacher = given(target, 20, 8, 6, precise(target))
    student[0][3], student[1][3], teacher[0][5], teacher[1][:] = 0, 0, 0, 0
    check(target, student, teacher)


@pytest.mark.parametrize("place", [0, 1])
def test_nan_of_the_teacher_comes_out_as_nan(target: Target, place: int) -> None:
    student, teacher = given(target, 20, 8, 6)
    teacher[place][7, 3] = math.nan
    value, dimage, *_ = value_and_gradients(loss_of(functional, target, 1), student, fixed=teacher)
    assert value.isnan()
    assert dimage.isnan().any()


def test_a_teacher_may_be_of_another_type(target: Target) -> None:
    student, teacher = given(target, 20, 8, 6)
    half = [*(x.half() for x in teacher[:2]), teacher[2]]
    expected = value_and_gradients(
        loss_of(functional, target), student, fixed=[x.float() for x in half]
    )
    found = value_and_gradients(loss_of(functional, target), student, fixed=half)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    mixed = [half[0].float(), half[1], half[2]]
    found = value_and_gradients(loss_of(functional, target), student, fixed=mixed)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_float64_of_either_is_float64_of_both() -> None:
    target = Target("auto", "cpu")
    student, teacher = given(target, 12, 8, 6)
    wide = [x.double() for x in teacher]
    for inputs in ((student, wide), ([x.double() for x in student], teacher)):
        value, *grads = value_and_gradients(loss_of(functional, target), inputs[0], fixed=inputs[1])
        assert value.dtype == DOUBLE
        assert [grad.dtype for grad in grads] == [x.dtype for x in inputs[0]]
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*float64"):
        functional.distill_clip(*student, *wide, backend="triton")


def test_float64_gradients_pass_gradcheck() -> None:
    student, teacher = given(Target("torch", "cpu"), 4, 3, 5, DOUBLE)

    def losses(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return functional.distill_clip(*inputs, *teacher)

    assert torch.autograd.gradcheck(losses, [x.requires_grad_() for x in student])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_teacher_that_requires_a_gradient_is_refused(place: int) -> None:
    student, teacher = given(Target("torch", "cpu"), 6, 4, 3)
    teacher[place].requires_grad_()
    name = ("dist_image_features", "dist_text_features", "dist_logit_scale")[place]
    with pytest.raises(ValueError, match=f"{name} must not require a gradient, since it gets none"):
        functional.distill_clip(*student, *teacher)
    with torch.no_grad():
        functional.distill_clip(*student, *teacher)


Z = torch.zeros(4, 3)
BAD_TEACHER = {
    "fewer rows": ((Z[:3], Z[:3], 1.0), ValueError, r"as many rows, got \(3, 3\) and \(4, 3\)"),
    "unequal shapes": (
        (Z, Z[:, :2], 1.0),
        ValueError,
        r"dist_image_features and dist_text_features must have equal shapes",
    ),
    "integers": ((Z, Z.int(), 1.0), TypeError, "dist_text_features must be float64.*got int32"),
    "elsewhere": (
        (Z.to("meta"), Z.to("meta"), 1.0),
        ValueError,
        "dist_image_features must be on the device of image_features, cpu, got meta",
    ),
    "no scale": ((Z, Z, 0.0), ValueError, "dist_logit_scale must be positive and finite, got 0"),
}


@pytest.mark.parametrize("kind", BAD_TEACHER)
def test_a_bad_teacher_is_named(kind: str) -> None:
    teacher, error, message = BAD_TEACHER[kind]
    with pytest.raises(error, match=message):
        functional.distill_clip(Z, Z, 1.0, *teacher)


def test_a_bad_student_is_named() -> None:
    with pytest.raises(ValueError, match=r"image_features and text_features must have equal sh"):
        functional.distill_clip(Z, Z[:2], 1.0, Z, Z, 1.0)
    with pytest.raises(ValueError, match="logit_scale must be positive and finite, got -1"):
        functional.distill_clip(Z, Z, -1.0, Z, Z, 1.0)


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3))[1:])
def test_gradients_asked_for_alone_are_the_same(target: Target, trained: tuple[bool, ...]) -> None:
    if target.interpreted and sum(trained) == 2:
        pytest.skip("one alone and all take every way")
    student, teacher = given(target, 20, 8, 6)
    _, *expected = value_and_gradients(loss_of(functional, target), student, fixed=teacher)
    leaves = [x.requires_grad_(need) for x, need in zip(student, trained, strict=True)]
    loss_of(functional, target)(*leaves, *teacher).backward()
    for x, grad, need in zip(leaves, expected, trained, strict=True):
        if need:
            torch.testing.assert_close(x.grad, grad, rtol=1e-5, atol=1e-7)
        else:
            assert x.grad is None


def test_any_layout_counts_the_same(target: Target) -> None:
    student, teacher = given(target, 20, 8, 6)
    expected = value_and_gradients(loss_of(functional, target), student, fixed=teacher)
    far = [
        [torch.stack([x, x + 1], 2)[..., 0] if x.dim() else x for x in side]
        for side in (student, teacher)
    ]
    leaves = [x.requires_grad_() for x in far[0]]
    value = loss_of(functional, target)(*leaves, *far[1])
    found = [value.detach(), *torch.autograd.grad(value, leaves)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_peak_memory_is_far_below_the_matrix() -> None:
    n, d = 4096, 16
    image, text = (x.requires_grad_() for x in pairs(n, d))
    teacher = pairs(n, d)

    def step(count: int) -> None:
        features = image[:count], text[:count], 10.0, *(x[:count] for x in teacher), 10.0
        sum(functional.distill_clip(*features)).backward()

    step(8)
    assert extra_bytes(lambda: step(n)) < 12 * 2**20 < n**2 * 4 / 5
