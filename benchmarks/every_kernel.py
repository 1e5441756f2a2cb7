"""Run every kernel once, forward and backward, on small ragged shapes: for sanitize.py.

python benchmarks/every_kernel.py [DTYPE ROWSxFEATURES]     without them, all types and shapes
"""

import os
import sys

import torch

from fastssl import functional

TINY = os.environ.get("SIZE") == "tiny"  # for the interpreter, which is slow
DTYPES = ("float32",) if TINY else ("float32", "float16", "bfloat16")
# Features of several tiles of a kernel, of less than one, and of more than it holds at a time.
SHAPES = ("14x20",) if TINY else ("70x130", "37x24", "130x520")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "triton"


def rows(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that need a gradient."""
    return torch.randn(n, d, device=DEVICE).to(dtype).requires_grad_()


def run(dtype: torch.dtype, n: int, d: int) -> None:
    """Every loss of n samples of d features."""
    ids = torch.arange(n, device=DEVICE) // 2
    a, b, keys = rows(n, d, dtype), rows(n, d, dtype), rows(2 * n + 3, d, dtype)
    for temperature in (0.1, 0.01):  # exponentials taken as they are, and relative to the largest
        for given in (None, ids):
            functional.nt_xent(a, b, temperature, ids=given, backend=BACKEND).backward()
            functional.info_nce(
                a, b, temperature=temperature, ids=given, backend=BACKEND
            ).backward()
            functional.clip(a, b, 1 / temperature, ids=given, backend=BACKEND).backward()
        teacher = b.detach()[:, : d // 2 + 1], a.detach()[:, : d // 2 + 1], 5.0
        losses = functional.distill_clip(a, b, 1 / temperature, *teacher, backend=BACKEND)
        torch.stack(losses).sum().backward()
        functional.info_nce(a, b, keys, temperature, backend=BACKEND).backward()
        functional.info_nce(a, b, keys.detach(), temperature, backend=BACKEND).backward()
    functional.siglip(a, b, 10.0, -10.0, backend=BACKEND).backward()
    functional.siglip(a, b, 10.0, -10.0, ids=ids, backend=BACKEND).backward()
    functional.supcon(torch.stack([a, b], 1), ids, backend=BACKEND).backward()
    for x, y in ((a, b), (a[:6], b[:6])):  # over features, and over samples
        functional.barlow_twins(x, y, backend=BACKEND).backward()
        functional.vicreg(x, y, backend=BACKEND).backward()
    for k in (d, 40 * d):
        scores = [rows(n, k, dtype) for _ in range(4)]
        functional.swav(scores[:2], scores[2:], backend=BACKEND).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    chosen = sys.argv[1:]
    for dtype in chosen[:1] or DTYPES:
        for shape in chosen[1:] or SHAPES:
            run(getattr(torch, dtype), *map(int, shape.split("x")))
    print("every kernel ran")
