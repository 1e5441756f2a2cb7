"""Count what a GPU runs in a step of each loss, and replay the step from a CUDA graph.

A replay on other inputs must give what a step gives, bit for bit. On a CPU there is nothing to
count or to capture: each step only runs.
"""

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.benchmarks import cases, measure

device = "cuda" if torch.cuda.is_available() else "cpu"
level = os.environ.get("SIZE", "key")
dtype = torch.bfloat16 if device == "cuda" else torch.float32


def replay(step: Callable[[], list[Tensor]], inputs: list[Tensor], others: list[Tensor]) -> bool:
    """Whether a captured step gives on other inputs what the step itself gives on them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    graph.replay()
    replayed = [x.clone() for x in captured]
    return all(torch.equal(x, y) for x, y in zip(replayed, step(), strict=True))


failures = 0
for case in cases.choose(None, None)[0]:
    for size in case.sizes[level][:1]:
        leaves, fixed = case.place(size, device, dtype)
        others = [x for inputs in case.place(size, device, dtype, seed=1) for x in inputs]
        for x in leaves:
            x.requires_grad_(case.backward)

        def step(
            case: cases.Case = case, leaves: list[Tensor] = leaves, fixed: list[Tensor] = fixed
        ) -> list[Tensor]:
            result = case.fused(*leaves, *fixed)
            if not case.backward:
                return [result]
            return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result))]

        step()
        words = f"{case.title} {' x '.join(map(str, size))}"
        if device == "cpu":
            print(f"{words}: ran on a CPU")
            continue
        try:
            same = replay(step, [*leaves, *fixed], others)
            found = "a replayed graph gives the same" if same else "FAIL: a replay differs"
        except RuntimeError as error:
            same, found = False, f"FAIL: {str(error).splitlines()[0]}"
        failures += not same
        print(f"{words}: {measure.launches(step, device)} launches, {found}", flush=True)
print(f"{failures} of the losses' graphs failed")
sys.exit(failures > 0)
