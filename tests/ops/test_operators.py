"""What all operators of similarities have in common."""

from collections.abc import Callable

import pytest
import torch
from targets import Target
from torch import Tensor

from fastssl import reference
from fastssl.ops import distill_clip, fixed_keys, pairs, sigmoid, similarity, two_views


def rows(target: Target, m: int, n: int, d: int, dtype: torch.dtype = torch.float32):
    return [torch.randn(size, d).to(target.device, dtype) for size in (m, n)]


def fused(target: Target, row_ids=None, col_ids=None):
    return lambda q, k, scale: similarity.similarity_lse(
        q, k, scale, row_ids, col_ids, backend=target.backend
    )


def fused_pairs(target: Target, *args: object, **options: object) -> Callable[..., Tensor]:
    return lambda q, k, scale: torch.cat(
        pairs.pair_lse(q, k, scale, *args, **options, backend=target.backend)
    )


def fused_classes(target: Target, *args: object) -> Callable[..., Tensor]:
    return lambda z, scale: similarity.class_lse(z, scale, *args, backend=target.backend)


def test_operators_agree_where_they_are_the_same(target: Target) -> None:
    """A matrix of rows with themselves, by each operator."""
    (z,) = rows(target, 30, 0, 8)[:1]
    z = reference.normalize(z)
    s = torch.tensor(4.0, device=target.device)
    at = torch.arange(30, device=target.device)
    lse = fused(target, at, at)(z, z, s)
    torch.testing.assert_close(fused_pairs(target)(z, z, s) + s, lse)
    mean = (s * z @ z.T).fill_diagonal_(0).sum(1) / 29
    torch.testing.assert_close(fused_classes(target, 0 * at)(z, s), lse - mean)
    partner = (s * z[:15] * z[15:]).sum(1).repeat(2)
    less = two_views.two_view_lse(z[:15], z[15:], s, backend=target.backend)
    torch.testing.assert_close(torch.nn.functional.softplus(less), lse - partner)


def operators(
    target: Target, with_ids: bool
) -> dict[str, tuple[Callable[..., object], tuple[object, ...]]]:
    q, k = (x.requires_grad_() for x in rows(target, 6, 6, 4))
    p = torch.randn_like(q).requires_grad_()
    s, b = (torch.tensor(x, device=target.device, requires_grad=True) for x in (3.0, -2.0))
    ids = torch.arange(6, device=target.device) // 2 if with_ids else None
    classes = torch.arange(6, device=target.device) % 3
    weights = torch.rand(3, 3, device=target.device)
    teacher = torch.randn(6, 7, device=target.device)
    to = target.backend
    fixed, sigmoids = fixed_keys._fixed_keys_lse, sigmoid._sigmoid_sum
    return {
        "rows": (similarity._similarity_lse, (q, k, s, None, ids, ids, True, to)),
        "rows and pairs": (similarity._similarity_lse, (q, k, s, p, ids, ids, True, to)),
        "rows as they are": (similarity._similarity_lse, (q, k, s, p, ids, ids, False, to)),
        "fixed keys": (fixed, (q, k.detach(), s, None, ids, ids, True, to)),
        "fixed keys and pairs": (fixed, (q, k.detach(), s, p, ids, ids, True, to)),
        "fixed keys, no gradient": (
            fixed,
            (q.detach(), k.detach(), s.detach(), None, ids, ids, False, to),
        ),
        "pairs": (pairs._pair_lse, (q[:3], k, s, ids, 2, False, True, to)),
        "pairs both sides": (pairs._pair_lse, (q, k, s, ids, 0, True, False, to)),
        "pairs with a teacher": (
            distill_clip._distill_clip_terms,
            (q[:3], k, s, teacher[:3], teacher, s.detach(), 2, False, to),
        ),
        "pairs with a teacher, both sides": (
            distill_clip._distill_clip_terms,
            (q, k, s, teacher, teacher, s.detach(), 0, True, to),
        ),
        "classes": (similarity._class_lse, (q, s, classes, None, to)),
        "classes with weights": (similarity._class_lse, (q, s, classes, weights, "torch")),
        "two views": (two_views._two_view_lse, (q, k, s, ids, to)),
        "sigmoid": (sigmoids, (q, k, s, b, ids, 0, [True] * 4, to)),
        "sigmoid of one side": (
            sigmoids,
            (q, k.detach(), s, b.detach(), ids, 0, [True, False, True, False], to),
        ),
    }


NAMES = list(operators(Target("torch", "cpu"), False))


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_operators_are_registered_as_torch_wants(target: Target, name: str, with_ids: bool) -> None:
    if target.interpreted and with_ids:
        pytest.skip("ids take no other way through the registration")
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    operator, arguments = operators(target, with_ids)[name]
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("name", [name for name in NAMES if "no gradient" not in name])
def test_second_derivatives_are_never_silently_zero(name: str) -> None:
    """Also where the upstream gradient is constant, which a penalty does not notice."""
    operator, (q, *others) = operators(Target("torch", "cpu"), False)[name]
    found = operator(q, *others)[0].sum()
    (grad,) = torch.autograd.grad(found, q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        (found + grad.square().sum()).backward()
