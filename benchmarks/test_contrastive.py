"""The rest of the InfoNCE family, forward and backward, beside the libraries that it follows."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

import fastssl
from fastssl import functional, reference

PROVIDERS = ["fastssl", "plain", "compiled"]


def compiled_if(provider: str, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(plain) if provider == "compiled" else plain


def pairs(n: int, d: int) -> list[torch.Tensor]:
    """Unit rows of two kinds, a pair a little closer than others."""
    image = torch.randn(n, d)
    return [normalize(image, dim=1), normalize(image + 6 * torch.randn(n, d), dim=1)]


@pytest.mark.parametrize("provider", [*PROVIDERS, "open_clip"])
@pytest.mark.parametrize("logit_scale", [14.3, 100.0])
def test_clip(compare, logit_scale: float, provider: str) -> None:
    n, d = 4096, 512
    if provider == "fastssl":
        loss = functional.clip
    elif provider == "open_clip":
        loss = pytest.importorskip("open_clip.loss").ClipLoss()
    else:
        loss = compiled_if(provider, reference.clip)
    scale = torch.tensor(logit_scale)
    compare(
        f"CLIP at {logit_scale:g}",
        provider,
        loss,
        reference.clip,
        [*pairs(128, d), scale],
        [*pairs(n, d), scale],
        operations=4 * 2 * n * n * d,
        rounds=9,
        warmup=4,
    )


@pytest.mark.parametrize("provider", [*PROVIDERS, "open_clip"])
def test_siglip(compare, provider: str) -> None:
    n, d = 4096, 512
    if provider == "fastssl":
        loss = functional.siglip
    elif provider == "open_clip":
        loss = pytest.importorskip("open_clip.loss").SigLipLoss()
    else:
        loss = compiled_if(provider, reference.siglip)
    scalars = [torch.tensor(10.0), torch.tensor(-10.0)]
    compare(
        "SigLIP",
        provider,
        loss,
        reference.siglip,
        [*pairs(128, d), *scalars],
        [*pairs(n, d), *scalars],
        operations=3 * 2 * n * n * d,
        rounds=9,
        warmup=4,
    )


@pytest.mark.parametrize("provider", [*PROVIDERS, "lightly"])
def test_moco(compare, device: str, dtype: torch.dtype, provider: str) -> None:
    """A queue that is there already: what lightly's update of it takes is not counted."""
    n, k, d, temperature = 256, 65536, 128, 0.1
    queue = normalize(torch.randn(k, d), dim=1).to(device, dtype)

    few = queue[:500]

    def loss_with(queue: torch.Tensor) -> Callable[..., torch.Tensor]:
        if provider == "lightly":
            criterion = pytest.importorskip("lightly.loss").NTXentLoss(
                temperature, tuple(queue.shape)
            )
            criterion.memory_bank.bank = queue
            criterion.memory_bank._dequeue_and_enqueue = lambda batch: None
            return criterion
        ours = functional.info_nce if provider == "fastssl" else None
        run = ours or compiled_if(provider, reference.info_nce)
        return lambda query, key: run(query, key, queue, temperature)

    compare(
        "MoCo, 65,536 negatives",
        provider,
        loss_with(queue),
        lambda query, key: reference.info_nce(query, key, few.to(query), temperature),
        pairs(32, d),
        pairs(n, d),
        operations=2 * 2 * n * k * d,
        rounds=15,
        warmup=3,
        few_loss=loss_with(few),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_supcon(compare, device: str, provider: str) -> None:
    """The plain loss is SupContrast's own formula."""
    b, v, d, classes = 2048, 2, 128, 100
    labels = torch.randint(0, classes, (b,)).to(device)
    few = labels[:64] % 8

    def loss_of(labels: torch.Tensor) -> Callable[..., torch.Tensor]:
        run = (
            functional.supcon if provider == "fastssl" else compiled_if(provider, reference.supcon)
        )
        return lambda x: run(x, labels)

    compare(
        "SupCon, 100 classes",
        provider,
        loss_of(labels),
        lambda x: reference.supcon(x, few),
        [normalize(torch.randn(64, v, d), dim=2)],
        [normalize(torch.randn(b, v, d), dim=2)],
        operations=4 * (b * v) ** 2 * d,
        rounds=9,
        warmup=4,
        few_loss=loss_of(few),
    )


@pytest.mark.parametrize("provider", [*PROVIDERS, "lightly"])
def test_dcl(compare, provider: str) -> None:
    n, d = 2048, 128
    if provider == "fastssl":
        loss = functional.dcl
    elif provider == "lightly":
        loss = pytest.importorskip("lightly.loss").DCLLoss()
    else:
        loss = compiled_if(provider, reference.dcl)
    compare(
        "DCL",
        provider,
        loss,
        reference.dcl,
        pairs(128, d),
        pairs(n, d),
        operations=4 * (2 * n) ** 2 * d,
        rounds=15,
        warmup=4,
    )


@pytest.mark.parametrize("provider", ["fastssl", "plain", "pml"])
def test_nt_xent_beside_pytorch_metric_learning(compare, provider: str) -> None:
    n, d, temperature = 256, 128, 0.1
    plain = partial(reference.nt_xent, temperature=temperature)
    if provider == "pml":
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        criterion = losses.NTXentLoss(temperature)

        def loss(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
            return criterion(torch.cat([z0, z1]), torch.arange(len(z0), device=z0.device).repeat(2))

    elif provider == "fastssl":
        loss = fastssl.NTXentLoss(temperature)
    else:
        loss = plain
    compare(
        "NT-Xent beside pml",
        provider,
        loss,
        plain,
        pairs(32, d),
        pairs(n, d),
        operations=4 * (2 * n) ** 2 * d,
        rounds=2 if provider == "pml" else 100,
    )
