"""What every loss does under PyTorch's transforms: forward-mode differentiation, checkpoints."""

from collections.abc import Callable

import pytest
import torch
from accuracy import value_and_gradients
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastssl import functional as F

# Losses of two batches and a positive scalar, through each operator.
OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "nt_xent": F.nt_xent,
    "info_nce": lambda x, y, s: F.info_nce(x, y, temperature=s),
    "info_nce of trained keys": lambda x, y, s: F.info_nce(x, x.flip(1), y, s),
    "info_nce of a queue": lambda x, y, s: F.info_nce(x, y, torch.eye(4), s),
    "dcl": F.dcl,
    "dclw": lambda x, y, s: F.dcl(x, y, s, weight_fn=F.mises_fisher_weights),
    "supcon": lambda x, y, s: F.supcon(torch.stack([x, y], 1), temperature=s),
    "supcon of a mask": lambda x, y, s: F.supcon(
        torch.stack([x, y], 1), mask=torch.ones(len(x), len(x)), temperature=s
    ),
    "clip": F.clip,
    "distill_clip": lambda x, y, s: F.distill_clip(x, y, s, torch.eye(6), torch.eye(6), 2.0)[1],
    "siglip": lambda x, y, s: F.siglip(x, y, s, -s),
    "barlow_twins": lambda x, y, s: s * F.barlow_twins(x, y),
    "vicreg": lambda x, y, s: s * F.vicreg(x, y),
    "swav": lambda x, y, s: s * F.swav([x, y], [x + y]),
}
WITHOUT_SCALAR = ("barlow_twins", "vicreg", "swav")
PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "negative_cosine_similarity": lambda x, y, s: s * F.negative_cosine_similarity(x, y),
    "sinkhorn_knopp": lambda x, y, s: (s * F.sinkhorn_knopp(x, 1.0, differentiable=True) * y).sum(),
}


def inputs() -> list[Tensor]:
    return [*torch.randn(2, 6, 4), torch.tensor(0.7)]


def dual(loss: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent


def jvp(loss: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(loss, (x,), (tangent,))[1]


def along_the_gradient(loss: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(torch.func.grad(loss), (x,), (tangent,))[1]


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, i) for name in OPERATORS for i in range(2 if name in WITHOUT_SCALAR else 3)],
)
@pytest.mark.parametrize("mode", [dual, jvp, along_the_gradient])
def test_forward_mode_raises(name: str, mode: Callable[..., Tensor], place: int) -> None:
    """An operator would drop a tangent and leave a wrong derivative."""
    given = inputs()

    def loss(x: Tensor) -> Tensor:
        return OPERATORS[name](*given[:place], x, *given[place + 1 :])

    with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
        mode(loss, given[place], torch.ones_like(given[place]))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("mode", [dual, jvp])
def test_forward_mode_is_exact_without_operators(name: str, mode: Callable[..., Tensor]) -> None:
    x, y, s = inputs()
    tangent = torch.randn(6, 4)
    _, dx, *_ = value_and_gradients(PLAIN[name], [x, y, s])
    found = mode(lambda x: PLAIN[name](x, y, s), x, tangent)
    torch.testing.assert_close(found, (dx * tangent).sum())


def test_constants_within_forward_mode_are_fine() -> None:
    x, y, s = inputs()
    found = jvp(lambda s: s * F.nt_xent(x, y), s, torch.tensor(1.0))
    torch.testing.assert_close(found, F.nt_xent(x, y))


@pytest.mark.parametrize("name", [*OPERATORS, *PLAIN])
def test_a_checkpoint_changes_nothing(name: str) -> None:
    loss = (OPERATORS | PLAIN)[name]
    given = inputs()
    again = value_and_gradients(lambda *x: checkpoint(loss, *x, use_reentrant=False), given)
    for found, expected in zip(again, value_and_gradients(loss, given), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [*OPERATORS, *PLAIN])
def test_autocast_of_both_passes_changes_nothing(name: str) -> None:
    loss = (OPERATORS | PLAIN)[name]
    given = inputs()
    expected = value_and_gradients(loss, given)
    with torch.autocast("cpu", torch.bfloat16):
        again = value_and_gradients(loss, given)
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)
