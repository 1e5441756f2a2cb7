"""Run every kernel once, forward and backward, on small ragged shapes: for compute-sanitizer."""

import os
from typing import Any

import torch

from fastssl import functional

device = "cuda" if torch.cuda.is_available() else "cpu"
backend = "triton"
tiny = os.environ.get("SIZE") == "tiny"  # for the interpreter, which is slow
dtypes = (torch.float32,) if tiny else (torch.float32, torch.float16, torch.bfloat16)
shapes = ((14, 20),) if tiny else ((37, 24), (70, 130), (130, 520))


def rows(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that need a gradient."""
    return torch.randn(n, d, device=device).to(dtype).requires_grad_()


for dtype in dtypes:
    for n, d in shapes:
        ids = torch.arange(n, device=device) // 2
        a, b, keys = rows(n, d, dtype), rows(n, d, dtype), rows(2 * n + 3, d, dtype)
        for temperature in (0.1, 0.01):
            given: tuple[dict[str, Any], ...] = ({}, {"ids": ids})
            for options in given:
                functional.nt_xent(a, b, temperature, **options, backend=backend).backward()
                functional.info_nce(
                    a, b, temperature=temperature, **options, backend=backend
                ).backward()
                functional.clip(a, b, 1 / temperature, **options, backend=backend).backward()
            functional.info_nce(a, b, keys, temperature, backend=backend).backward()
            functional.info_nce(a, b, keys.detach(), temperature, backend=backend).backward()
        functional.siglip(a, b, 10.0, -10.0, backend=backend).backward()
        functional.siglip(a, b, 10.0, -10.0, ids=ids, backend=backend).backward()
        features = torch.stack([a, b], 1)
        functional.supcon(features, ids, backend=backend).backward()
        for x, y in ((a, b), (a[:6], b[:6])):  # over features, and over samples
            functional.barlow_twins(x, y, backend=backend).backward()
            functional.vicreg(x, y, backend=backend).backward()
        for k in (d, 40 * d):
            scores = [rows(n, k, dtype) for _ in range(4)]
            functional.swav(scores[:2], scores[2:], backend=backend).backward()
if device == "cuda":
    torch.cuda.synchronize()
print("every kernel ran")
