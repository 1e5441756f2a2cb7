"""Rows of several floating types, as autocast makes them, in every loss of several inputs."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from accuracy import value_and_gradients
from targets import Target
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastssl
from fastssl import functional

# Of three batches of rows.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": lambda x, y, _, **to: functional.nt_xent(x, y, **to),
    "dcl": lambda x, y, _, **to: functional.dcl(x, y, **to),
    "dcl, weighted": lambda x, y, _, **to: functional.dcl(
        x, y, weight_fn=functional.mises_fisher_weights, **to
    ),
    "info_nce": lambda x, y, _, **to: functional.info_nce(x, y, **to),
    "info_nce, shared negatives": lambda x, y, z, **to: functional.info_nce(x, y, z, **to),
    "info_nce, a queue": lambda x, y, z, **to: functional.info_nce(x, y, z.detach(), **to),
    "info_nce, own negatives": lambda x, y, z, **to: functional.info_nce(x, y, z[:, None], **to),
    "clip": lambda x, y, _, **to: functional.clip(x, y, 3.0, **to),
    "distill_clip": lambda x, y, _, **to: sum(
        functional.distill_clip(x, y, 3.0, y.detach(), x.detach(), 2.0, **to)
    ),
    "siglip": lambda x, y, _, **to: functional.siglip(x, y, 3.0, -1.0, **to),
    "barlow_twins": lambda x, y, _, **to: functional.barlow_twins(x, y, **to),
    "vicreg": lambda x, y, _, **to: functional.vicreg(x, y, **to),
    "swav": lambda x, y, z, **to: functional.swav([x, y], [z], **to),
    "swav, a queue": lambda x, y, z, **to: functional.swav([x, y], [], [z, z.flip(0)], **to),
    "negative_cosine": lambda x, y, _, **to: functional.negative_cosine_similarity(x, y),
}
TYPES = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16, torch.bfloat16),  # neither holds the other: float32
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_two_types_count_as_the_wider_and_each_gradient_has_its_own(
    name: str, autocast: bool, target: Target
) -> None:
    for types in TYPES:
        rows = [torch.randn(9, 6, device=target.device).to(dtype) for dtype in types]

        def loss(*rows: Tensor) -> Tensor:
            return LOSSES[name](*rows, backend=target.backend) + sum(0.0 * x.sum() for x in rows)

        casting = torch.autocast(target.device, torch.bfloat16) if autocast else nullcontext()
        expected = value_and_gradients(loss, [x.float() for x in rows])
        with casting:
            value, *grads = value_and_gradients(loss, rows)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[0])
        for x, grad, exact in zip(rows, grads, expected[1:], strict=True):
            assert torch.equal(grad, exact.to(x.dtype))


def test_float64_counts_as_the_widest() -> None:
    x, y = torch.randn(2, 9, 6, dtype=torch.float64)
    value = functional.nt_xent(x.float(), y)
    assert value.dtype == torch.float64
    assert torch.equal(value, functional.nt_xent(x.float().double(), y))


@pytest.mark.parametrize("loss", [fastssl.NTXentLoss(0.2, (20, 6)), fastssl.InfoNCELoss(0.2)])
def test_queues_and_banks_are_used_in_autocast(loss: nn.Module) -> None:
    encoder, x = nn.Linear(5, 6), torch.randn(4, 5)
    queue = fastssl.MemoryBankModule((20, 6), feature_dim_first=False)
    memory = fastssl.SampleMemoryBank(30, 6)
    index = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        query, key = encoder(x), normalize(encoder(x.flip(0)).detach().float())
        assert (query.dtype, key.dtype) == (torch.bfloat16, torch.float32)
        if isinstance(loss, fastssl.NTXentLoss):
            value = loss(query, key)
        else:
            _, negatives = queue(key, update=True)
            value = loss(query, key, negatives)
            value = value + loss(
                query, memory(index), memory.bank, ids=index, negative_ids=memory.ids
            )
            memory.update(query, index)
    value.backward()
    assert encoder.weight.grad.isfinite().all()
    assert encoder.weight.grad.any()
