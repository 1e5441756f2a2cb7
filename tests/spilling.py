"""Kernels with more numbers than registers: a module that a compiling process can import."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastssl.kernels import assembly

# The registers of eight threads at once, or 32 of them.
FEW_REGISTERS = {
    "sm_90": (GPUTarget("cuda", 90, 32), {"maxnreg": 32}),
    "gfx942": (GPUTarget("hip", "gfx942", 64), {"waves_per_eu": 8}),
}


@triton.jit
def in_a_loop(x_ptr, out_ptr, n, N: tl.constexpr):
    """All of two rows is needed in every step."""
    at = tl.arange(0, N)
    a = tl.load(x_ptr + at)
    b = tl.load(x_ptr + N + at)
    for i in range(n):
        c = tl.load(x_ptr + i * N + at)
        a = a * c + b
        b = b * c + a
    tl.store(out_ptr + at, a)
    tl.store(out_ptr + N + at, b)


@triton.jit
def around_a_loop(x_ptr, out_ptr, n, N: tl.constexpr):
    """A row is kept meanwhile."""
    at = tl.arange(0, N)
    kept = tl.load(x_ptr + at)
    total = 0.0
    for i in range(n):
        total += tl.load(x_ptr + i)
    tl.store(out_ptr + at, kept * total)


@triton.jit
def in_an_outer_loop(x_ptr, out_ptr, n, N: tl.constexpr):
    """A row is needed in every step of the outer loop, and kept during the inner one."""
    at = tl.arange(0, N)
    kept = tl.load(x_ptr + at)
    for j in range(n):
        total = 0.0
        for i in range(n):
            total += tl.load(x_ptr + j * n + i)
        kept = kept * total + 1.0
    tl.store(out_ptr + at, kept)


def accesses(kernel: str, target: str) -> tuple[int, int, int]:
    """Of local memory, where there are few registers: all, those in loops, in inner loops."""
    gpu, options = FEW_REGISTERS[target]
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
    source = ASTSource(globals()[kernel], types, {"N": 16384})
    compiled = triton.compile(source, target=gpu, options=options)
    instructions = assembly.instructions_of(compiled)
    local = {i for i, x in enumerate(instructions) if assembly.LOCAL.match(x.opcode)}
    looped = local & {i for loop in assembly.loops_of(instructions) for i in loop.body}
    return len(local), len(looped), assembly.resources_of(compiled).in_loops
