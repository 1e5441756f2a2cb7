"""Triton's launchers of CLIP's loss with a teacher: any cut of the work, any input."""

import itertools

import numpy as np
import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

from fastssl import reference

distill_clip = pytest.importorskip("fastssl.kernels.distill_clip")
pairs = pytest.importorskip("fastssl.kernels.pairs")
pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}  # of the largest entry
ALL = (True, True, True)


def exact_terms(q: Tensor, k: Tensor, s: Tensor, teacher: list[Tensor], first: int) -> list[Tensor]:
    x, y = s * q @ k.T, teacher[2] * teacher[0] @ teacher[1].T
    pair = torch.zeros(len(q), len(k), dtype=torch.bool)
    pair.diagonal(first).fill_(True)
    negatives, own = x.masked_fill(pair, -torch.inf), x[pair]
    of_rows = (negatives - own[:, None]).logsumexp(1), -(y.softmax(1) * x.log_softmax(1)).sum(1)
    terms = [torch.stack(of_rows)]
    if len(q) == len(k):
        of_cols = (negatives - own).logsumexp(0), -(y.softmax(0) * x.log_softmax(0)).sum(0)
        terms.append(torch.stack(of_cols))
    return terms


def fused(
    student: list[Tensor],
    teacher: list[Tensor],
    upstream: tuple[Tensor, Tensor],
    *,
    first: int = 0,
    columns: bool,
    needs: tuple[bool, ...] = ALL,
) -> list[Tensor | None]:
    """Return the terms of rows and of columns, perhaps empty, and the gradients."""
    terms, col_terms, *stats = distill_clip.distill_clip_fwd(*student, *teacher, first, columns)
    grads = distill_clip.distill_clip_bwd(
        *upstream, *student, *teacher, *stats, first, columns, needs
    )
    return [terms, col_terms, *grads]


def upstream_of(student: list[Tensor], columns: bool) -> tuple[Tensor, Tensor]:
    return torch.rand(2, len(student[0])), torch.rand(2, len(student[1]) if columns else 0)


def check(
    student: list[Tensor],
    teacher: list[Tensor],
    *,
    first: int = 0,
    columns: bool,
    upstream: tuple[Tensor, Tensor] | None = None,
    tolerance: float | None = None,
) -> None:
    upstream = upstream or upstream_of(student, columns)
    got = fused(student, teacher, upstream, first=first, columns=columns)
    inputs = [x.double().requires_grad_() for x in student]
    outputs = exact_terms(*inputs, [x.double() for x in teacher], first)[: 1 + columns]
    grads = torch.autograd.grad(outputs, inputs, [x.double() for x in upstream[: 1 + columns]])
    want = [*(x.detach() for x in outputs), *([] if columns else [torch.empty(2, 0)]), *grads]
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        if other.numel():
            error = (one.double() - other).abs().max()
            assert error <= (tolerance or TOLERANCE[student[0].dtype]) * other.abs().max()


def given(
    m: int, n: int, d: int, e: int, first: int = 0, scales: tuple[float, float] = (10.0, 30.0)
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and columns of which the pairs are alike, and a teacher's of another width."""
    sides = []
    for width, scale in zip((d, e), scales, strict=True):
        q, k = torch.randn(m, width), torch.randn(n, width)
        k[first : first + m] += q
        sides.append([reference.normalize(q), reference.normalize(k), torch.tensor(scale)])
    return sides[0], sides[1]


@pytest.mark.parametrize(
    ("multiprocessors", "N", "d", "e", "per_group"),
    [(1, 300, 20, 9, 5), (40, 150, 70, 40, 1)],
    indirect=["multiprocessors"],
)
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_rows_and_columns_whatever_the_cut(multiprocessors, N, d, e, per_group, scale) -> None:
    config = distill_clip.launch_config("pair", N, N, True, "interpreter", multiprocessors)
    assert config[1] == per_group
    check(*given(N, N, d, e, scales=(scale, 30.0)), columns=True)


@pytest.mark.parametrize("multiprocessors", [1, 40], indirect=True)
@pytest.mark.parametrize(
    ("M", "N", "first", "most"), [(20, 1000, 5, 16), (9, 141, 132, 1), (70, 140, 33, 1)]
)
def test_more_columns_than_rows(multiprocessors, M, N, first, most) -> None:
    config = distill_clip.launch_config("row", M, N, True, "interpreter", multiprocessors)
    assert config[1] == (most if multiprocessors == 40 else 1)
    check(*given(M, N, 24, 11, first), first=first, columns=False)


@pytest.mark.parametrize("columns", [True, False])
def test_weights_are_kept_a_panel_at_a_time(columns, monkeypatch) -> None:
    monkeypatch.setattr(pairs, "PANEL_BYTES", 0)
    monkeypatch.setattr(pairs, "PANEL_ROWS", 64)
    check(*given(150, 150, 20, 7), columns=columns)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("upstream", [65536.0, 1e-6])
def test_float16_holds_any_upstream_gradient(columns, upstream: float) -> None:
    student, teacher = given(70, 70, 130, 40)
    student[:2] = (x.half() for x in student[:2])
    terms = upstream_of(student, columns)
    want = fused(student, teacher, terms, columns=columns)
    got = fused(student, teacher, tuple(upstream * x for x in terms), columns=columns)
    check(student, teacher, columns=columns, upstream=terms)
    for one, other in zip(got[2:4], want[2:4], strict=True):
        torch.testing.assert_close(one, (upstream * other.float()).half(), rtol=1e-2, atol=2**-20)
    torch.testing.assert_close(got[4], upstream * want[4], rtol=1e-3, atol=1e-9)


def test_types_of_student_and_teacher_may_differ() -> None:
    for half in (0, 1):
        sides = given(40, 40, 20, 30)
        sides[half][:2] = (x.half() for x in sides[half][:2])
        check(*sides, columns=True)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_may_be_large_either_way(sign: int, side: int) -> None:
    sides = given(70, 70, 300, 200, scales=(1.0, 1.0))
    sides[side][0] *= sign * 2e4
    rounding = 2**-23 * 2e4  # of a score, which is a relative error of its exponential
    check(*sides, columns=True, tolerance=rounding)


def test_zero_rows_and_twins_are_finite() -> None:
    student, teacher = given(20, 20, 8, 5)
    for rows in (student[0], student[1], teacher[0], teacher[1]):
        rows[3], rows[7] = 0, rows[6]
    check(student, teacher, columns=True)


def test_one_pair_alone() -> None:
    student, teacher = given(1, 1, 8, 5)
    rows, cols, *grads = fused(student, teacher, upstream_of(student, True), columns=True)
    for terms in (rows, cols):
        assert terms[0] == -torch.inf
        assert terms[1] == 0
    assert all(grad.isfinite().all() for grad in grads)


def test_any_strides() -> None:
    student, teacher = given(70, 70, 18, 36)
    student[0] = student[0].T.contiguous().T  # features far apart
    teacher[1] = torch.stack([teacher[1]] * 2, 2).flatten(1)[:, ::2]
    one = torch.tensor(0.1).expand(2, 70)  # the gradient of a sum
    check(student, teacher, columns=True, upstream=(one, one))


def test_rows_more_than_int32_apart() -> None:
    student, teacher = given(2, 2, 16, 16)
    memory = np.empty(2**31 + 64, dtype=np.float16)  # of which only the rows are touched
    far = torch.from_numpy(memory).as_strided((2, 16), (2**31, 1))
    far.copy_(student[0])
    near = far.clone()
    upstream = upstream_of(student, True)
    rows, others = (
        fused([x, x, student[2]], [x, x, teacher[2]], upstream, columns=True) for x in (far, near)
    )
    for one, other in zip(rows, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_a_gradient_that_is_not_needed_is_none(needs: tuple[bool, ...], columns: bool) -> None:
    student, teacher = given(9, 9, 5, 4)
    upstream = upstream_of(student, columns)
    every = fused(student, teacher, upstream, columns=columns)[2:]
    some = fused(student, teacher, upstream, columns=columns, needs=needs)[2:]
    for one, other, needed in zip(every, some, needs, strict=True):
        assert torch.equal(one, other) if needed else other is None


@pytest.mark.parametrize("multiprocessors", [1, 40], indirect=True)
def test_same_input_same_bits(multiprocessors) -> None:
    student, teacher = given(100, 100, 16, 12)
    upstream = upstream_of(student, True)
    first, second = (fused(student, teacher, upstream, columns=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_one_row_reaches_every_row(side: int) -> None:
    sides = given(70, 70, 8, 6)
    sides[side][1][3, 2] = torch.nan
    rows, cols, dq, dk, dscale = fused(*sides, upstream_of(sides[0], True), columns=True)
    assert rows[1].isnan().all()
    assert cols[1, 3].isnan()
    assert all(x.isnan().all() for x in (dq, dk, dscale))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_workspaces_are_bounded(arch: str) -> None:
    sizes = [1, 100, 3000, 65536, 1_000_000]
    for N, wide in itertools.product(sizes, [True, False]):
        options, per_group = distill_clip.launch_config("pair", N, N, wide, arch, 100)
        assert -(-N // options["BLOCK_M"]) <= 64 * per_group
        options, splits = distill_clip.launch_config("row", N, N, wide, arch, 100)
        assert splits == 1 or -(-N // options["BLOCK_M"]) * splits <= 200
        weight, _ = distill_clip.launch_config("weight", N, N, wide, arch, 100)
        panel = pairs.panel_rows(N, N, 4 if wide else 2)
        assert panel == N or panel % weight["BLOCK_M"] == 0
