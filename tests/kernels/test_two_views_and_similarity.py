"""Triton's launchers of the similarity log-sum-exp: any cut of the work, any input."""

import itertools

import pytest
import torch
from targets import NEEDS_INTERPRETER
from torch import Tensor

from fastssl import reference

gpu = pytest.importorskip("fastssl.kernels.gpu")
similarity = pytest.importorskip("fastssl.kernels.similarity")
tiles = pytest.importorskip("fastssl.kernels.tiles")
two_views = pytest.importorskip("fastssl.kernels.two_views")

pytestmark = [NEEDS_INTERPRETER, pytest.mark.usefixtures("outputs_begin_as_nan")]
ALL = (True, True, True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}  # of the largest entry


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


def check_two_views(z0: Tensor, z1: Tensor, s: float, ids: Tensor | None, dlse: Tensor) -> None:
    scale = torch.tensor(s)
    lse, *saved = two_views.two_view_lse_fwd(z0, z1, scale, ids)
    grads = two_views.two_view_lse_bwd(dlse, z0, z1, scale, ids, *saved, ALL)

    inputs = [x.double().requires_grad_() for x in (z0, z1, scale)]
    z = reference.normalize(torch.cat(inputs[:2]))
    logits = inputs[2] * z @ z.T
    positive = logits.diagonal(len(z0)).repeat(2)
    ids = (torch.arange(len(z0)) if ids is None else ids).repeat(2)
    hidden = ids[:, None] == ids
    exact = (logits.masked_fill(hidden, -torch.inf) - positive[:, None]).logsumexp(1)
    for got, grad in zip(grads, torch.autograd.grad(exact, inputs, dlse.double()), strict=True):
        assert_close(got, grad, z0.dtype)
    assert_close(lse, exact.detach(), z0.dtype)


def check_rows_and_columns(
    q: Tensor,
    k: Tensor,
    s: float,
    ids: tuple[Tensor | None, Tensor | None],
    dlse: Tensor,
    normalize: bool = True,
    pair: Tensor | None = None,
) -> None:
    scale = torch.tensor(s)
    lse, *saved = similarity.similarity_lse_fwd(q, k, scale, pair, *ids, normalize)
    grads = similarity.similarity_lse_bwd(dlse, q, k, scale, pair, *ids, *saved, normalize, ALL)
    assert normalize or not saved[2].numel() + saved[3].numel()

    inputs = [x.double().requires_grad_() for x in (q, k, scale)]
    rows, cols = (reference.normalize(x) if normalize else x for x in inputs[:2])
    logits = inputs[2] * rows @ cols.T
    if pair is not None:
        pairs = reference.normalize(pair.double()) if normalize else pair.double()
        logits = logits - inputs[2] * (rows * pairs).sum(1, keepdim=True)
    if ids[0] is not None:
        logits = logits.masked_fill(ids[0][:, None] == ids[1], -torch.inf)
    exact = logits.logsumexp(1)
    for got, grad in zip(grads, torch.autograd.grad(exact, inputs, dlse.double()), strict=True):
        assert_close(got, grad, q.dtype)
    assert_close(lse, exact.detach(), q.dtype)


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize(
    ("multiprocessors", "N", "D", "per_group", "splits"),
    [(1, 150, 16, 3, 1), (40, 200, 20, 1, 7), (16, 70, 300, 1, 1)],
    indirect=["multiprocessors"],
)
def test_two_views_whatever_the_cut(multiprocessors, N, D, per_group, splits, scale) -> None:
    config = (2 * N, 2 * N, D, torch.float32, False, "interpreter", multiprocessors)
    assert tiles.launch_config("two_view", *config)[1] == per_group
    assert tiles.launch_config("bwd", *config)[1] == splits
    z0, z1 = torch.randn(2, N, D)
    check_two_views(z0, z1, scale, None, torch.rand(2 * N))


@pytest.mark.parametrize(("scale", "normalize"), [(10.0, True), (100.0, True), (0.4, False)])
@pytest.mark.parametrize(
    ("multiprocessors", "M", "N", "D", "fwd_splits", "bwd_splits"),
    [(1, 70, 130, 20, 1, 1), (40, 70, 500, 20, 8, 8)],
    indirect=["multiprocessors"],
)
def test_rows_and_columns_whatever_the_cut(
    multiprocessors, M, N, D, fwd_splits, bwd_splits, scale, normalize
) -> None:
    config = (M, N, D, torch.float32, False, "interpreter", multiprocessors)
    assert tiles.launch_config("fwd", *config)[1] == fwd_splits
    assert tiles.launch_config("bwd", *config)[1] == bwd_splits
    q, k = torch.randn(M, D), torch.randn(N, D)
    check_rows_and_columns(q, k, scale, (None, None), torch.rand(M), normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("multiprocessors", "M", "D"),
    [(1, 70, 20), (40, 9, 20), (1, 20, 300), (40, 9, 300)],
    indirect=["multiprocessors"],
)
def test_the_score_of_a_pair_is_taken_off(multiprocessors, M: int, D: int, normalize) -> None:
    k, dlse = torch.randn(150, D), torch.randn(M)
    pair, wide = torch.randn(M, D), torch.randn(D, M).T
    s = 20.0 if normalize else 1.0
    ids = torch.arange(M) % 5, torch.arange(150) % 7
    for dtype in TOLERANCE:
        q = (pair + torch.randn(M, D)).to(dtype)
        for each in (pair, wide):
            check_rows_and_columns(q, k.to(dtype), s, ids, dlse, normalize, each.to(dtype))
    alone = torch.zeros(M), torch.zeros(150)
    given = (pair.flip(0), k, torch.tensor(s), pair, *alone)
    lse, *saved = similarity.similarity_lse_fwd(*given, normalize)
    grads = similarity.similarity_lse_bwd(dlse, *given, *saved, normalize, ALL)
    assert (lse == -torch.inf).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(("M", "D", "length"), [(40, 20, 300.0), (9, 300, 0.01)])
def test_rows_that_are_not_normalised_may_be_long(M: int, D: int, length: float) -> None:
    q, k = length * torch.randn(M, D), torch.randn(30, D)
    ids = (torch.randint(5, (M,)), torch.randint(5, (30,), dtype=torch.int32))
    check_rows_and_columns(q, k, 3.0, ids, torch.rand(M), normalize=False)
    check_rows_and_columns(q.half(), k.half(), 3.0, ids, torch.rand(M), normalize=False)


@pytest.mark.parametrize("multiprocessors", [16], indirect=True)
@pytest.mark.parametrize(("D", "scale"), [(24, 60.0), (260, 10.0)])
def test_float16_accumulates_in_float32(multiprocessors, D: int, scale: float) -> None:
    z0, z1 = torch.randn(2, 70, D).half()
    check_two_views(z0, z1, scale, torch.arange(70) // 2, torch.rand(140))
    check_rows_and_columns(z0, z1[:50], scale, (None, None), torch.rand(70))


@pytest.mark.parametrize("multiprocessors", [4, 40], indirect=True)
def test_any_strides(multiprocessors) -> None:
    z0 = torch.randn(18, 70).T  # features far apart
    z1 = torch.randn(140, 36)[::2, ::2]
    one = torch.tensor(0.1).expand(140)  # the gradient of a sum
    check_two_views(z0, z1, 5.0, torch.randint(30, (140,))[::2], one)
    check_rows_and_columns(z0, z1[:41], 5.0, (None, None), one[:70])


@pytest.mark.parametrize(
    ("multiprocessors", "scale"), [(1, 10.0), (40, 100.0)], indirect=["multiprocessors"]
)
def test_same_input_same_bits(multiprocessors, scale: float) -> None:
    z0, z1 = torch.randn(2, 100, 16)
    scale = torch.tensor(scale)

    def run() -> list[Tensor]:
        lse, *saved = two_views.two_view_lse_fwd(z0, z1, scale, None)
        dlse = torch.linspace(-1, 1, 200)
        return [lse, *two_views.two_view_lse_bwd(dlse, z0, z1, scale, None, *saved, ALL)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("upstream", [65536.0, 1e-8])
def test_float16_weights_hold_any_upstream_gradient(upstream: float) -> None:
    z0, z1 = 30 * torch.randn(2, 40, 16).half()
    scale, dlse = torch.tensor(10.0), torch.rand(80)
    _, *saved = two_views.two_view_lse_fwd(z0, z1, scale, None)
    want, _, dscale = two_views.two_view_lse_bwd(dlse, z0, z1, scale, None, *saved, ALL)
    got, _, big = two_views.two_view_lse_bwd(upstream * dlse, z0, z1, scale, None, *saved, ALL)
    torch.testing.assert_close(big, upstream * dscale, rtol=1e-3, atol=0)
    torch.testing.assert_close(got, (upstream * want.float()).half(), rtol=1e-2, atol=2**-24)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_a_gradient_that_is_not_needed_is_none(needs: tuple[bool, ...]) -> None:
    z0, z1 = torch.randn(2, 9, 5)
    scale, dlse = torch.tensor(3.0), torch.rand(18)
    _, *saved = two_views.two_view_lse_fwd(z0, z1, scale, None)
    every = two_views.two_view_lse_bwd(dlse, z0, z1, scale, None, *saved, ALL)
    some = two_views.two_view_lse_bwd(dlse, z0, z1, scale, None, *saved, needs)
    for one, other, needed in zip(every, some, needs, strict=True):
        assert torch.equal(one, other) if needed else other is None


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_nan_in_one_row_reaches_every_row(scale: float) -> None:
    z0, z1 = torch.randn(2, 70, 8)
    z1[3, 2] = torch.nan
    lse, *saved = two_views.two_view_lse_fwd(z0, z1, torch.tensor(scale), None)
    dz0, dz1, _ = two_views.two_view_lse_bwd(
        torch.rand(140), z0, z1, torch.tensor(scale), None, *saved, ALL
    )
    assert all(x.isnan().all() for x in (lse, dz0, dz1))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_workspaces_are_bounded(arch: str) -> None:
    sizes, widths = [2, 100, 3000, 65536, 1_000_000], [1, 128, 1000]
    for rows, columns, D, dtype in itertools.product(sizes, sizes, widths, DTYPES):
        config = (rows, columns, D, dtype, False, arch, 100)
        for kernel in ("fwd", "bwd"):
            options, splits = tiles.launch_config(kernel, *config)
            programs = -(-rows // options["BLOCK_M"]) * splits
            assert splits == 1 or programs <= 400  # twice what runs at once
        options, per_group = tiles.launch_config("two_view", *config)
        blocks = 2 * -(-(rows // 2) // options["BLOCK_N"])
        assert -(-blocks // per_group) <= 64
