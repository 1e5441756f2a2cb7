"""Compile every kernel ahead of time, on a machine with no GPU, and print what it needs of one.

    python -m fastssl.kernels.aot                             # every kernel, width, type and target
    python -m fastssl.kernels.aot --primitive energy --target sm_90 --dtype bfloat16  # some of them

The launchers themselves run, on meta tensors, with the device and the launch replaced, so that what
is compiled here is what a GPU would be given. A line has registers, bytes of local memory to which
registers are spilled, how many instructions of inner loops go there, and shared memory. Exit status
1 when there are such instructions, or more shared memory than the target has: those are TOO MUCH. A
spill outside of inner loops costs next to nothing, and each release of ptxas has others.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastssl.kernels import (
    assembly,
    distill_clip,
    energy,
    fixed_keys,
    gpu,
    pairs,
    sigmoid,
    similarity,
    sinkhorn,
    soft_cross_entropy,
    two_views,
)


class Target(NamedTuple):
    """A GPU: what Triton compiles for, its multiprocessors, and a program's shared memory."""

    gpu: GPUTarget
    multiprocessors: int
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 108, 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 132, 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 148, 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 304, 64 * 1024),
}
DTYPES = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}


class Similarity(NamedTuple):
    """Which launchers of similarities, and whether ids are given; all that is left, both ways."""

    dtype: str
    features: int
    rows: int
    ids: bool
    launchers: str

    @property
    def variant(self):
        """What is printed of it beside dtype and features."""
        return "ids" if self.ids else "   "

    def launch(self, x):
        """Call them on rows x."""
        ids = torch.empty(self.rows, dtype=torch.int64) if self.ids else None
        scale, row, both = torch.empty(()), torch.empty(self.rows), torch.empty(2 * self.rows)
        needs = (True, True, True)
        if self.launchers == "two_view":
            two_views.two_view_lse_fwd(x, x, scale, ids)
            two_views.two_view_lse_bwd(both, x, x, scale, ids, both, both, both, needs)
        elif self.launchers == "class":
            classes = torch.empty(self.rows, dtype=torch.int64)
            similarity.class_lse_fwd(x, scale, classes, None)
            similarity.class_lse_bwd(row, x, scale, classes, None, row, row, row, needs[:2])
        elif self.launchers == "fixed_keys":
            for gradients in BOTH:
                fixed_keys.fixed_keys_lse_fwd(x, x, scale, x, ids, ids, gradients)
        elif self.launchers == "similarity":
            for normalize in BOTH:
                similarity.similarity_lse_fwd(x, x, scale, x, ids, ids, normalize)
                similarity.similarity_lse_bwd(
                    row, x, x, scale, x, ids, ids, row, row, row, row, normalize, needs
                )
        else:
            for normalize, columns in itertools.product(BOTH, BOTH):
                pairs.pair_lse_fwd(x, x, scale, ids, 0, columns, normalize)
                pairs.pair_lse_bwd(
                    row, row, x, x, scale, ids, 0, columns, *[row] * 6, normalize, needs
                )


class Sigmoid(NamedTuple):
    """The launcher of sigmoid.py, with every gradient and with none."""

    dtype: str
    features: int
    rows: int
    ids: bool

    variant = Similarity.variant

    def launch(self, x):
        """Call it on rows x."""
        ids = torch.empty(self.rows, dtype=torch.int64) if self.ids else None
        for needs in (True, False):
            sigmoid.sigmoid_fwd(x, x, torch.empty(()), torch.empty(()), ids, 0, (needs,) * 4)


class DistillClip(NamedTuple):
    """The launchers of distill_clip.py, with a teacher of twice the student's width."""

    dtype: str
    features: int
    rows: int
    columns: bool

    @property
    def variant(self):
        """What is printed of it beside dtype and features."""
        return "columns" if self.columns else "rows   "

    def launch(self, x):
        """Call them on rows x."""
        scale, teacher = torch.empty(()), torch.empty(self.rows, 2 * self.features, dtype=x.dtype)
        given = x, x, scale, teacher, teacher, scale
        terms, col_terms, *stats = distill_clip.distill_clip_fwd(*given, 0, self.columns)
        needs = (True, True, True)
        distill_clip.distill_clip_bwd(terms, col_terms, *given, *stats, 0, self.columns, needs)


class Energy(NamedTuple):
    """Which route of energy.py, as "barlow" (two views, standardised) or "vicreg" takes it."""

    dtype: str
    features: int
    rows: int
    variant: str
    dual: bool

    def launch(self, x):
        """Call the launchers on rows x."""
        standardize = self.variant == "barlow"
        y = x if standardize else None
        if not self.dual:
            energy.cross_energy_fwd(x, y, 1e-5, standardize, self.dual, save=False)
        _, diagonal, *stats, u_saved, v_saved = energy.cross_energy_fwd(
            x, y, 1e-5, standardize, self.dual, save=True
        )
        energy.cross_energy_bwd(
            torch.empty(()), diagonal, x, y, *stats, diagonal, u_saved, v_saved,
            standardize, self.dual, (True, standardize),
        )  # fmt: skip


class Sinkhorn(NamedTuple):
    """How many iterations of sinkhorn.py; features are prototypes."""

    dtype: str
    features: int
    rows: int
    iterations: int

    @property
    def variant(self):
        """What is printed of it beside dtype and features."""
        return f"T={self.iterations}"

    def launch(self, x):
        """Call the launcher on scores x."""
        sinkhorn.sinkhorn_fwd(x, 0.05, self.iterations)


class SoftCrossEntropy(NamedTuple):
    """The type of the targets of soft_cross_entropy.py; features are classes."""

    dtype: str
    features: int
    rows: int
    variant: str

    def launch(self, x):
        """Call the launchers on logits x."""
        targets, row = x.to(DTYPES[self.variant][0]), torch.empty(self.rows)
        soft_cross_entropy.soft_cross_entropy_fwd(x, targets, 0.1)
        soft_cross_entropy.soft_cross_entropy_bwd(row, x, targets, row, row, 0.1)


BOTH = [True, False]
LAUNCHERS = ["two_view", "similarity", "class", "fixed_keys", "pair"]
DEFAULTS = {  # which case, its D and N, and what else it takes
    "similarity": (Similarity, [16, 32, 64, 128, 256, 768], [256, 65536], BOTH, LAUNCHERS),
    "sigmoid": (Sigmoid, [32, 128, 256, 768], [256, 32768], BOTH),
    "distill_clip": (DistillClip, [32, 128, 512, 768], [256, 65536], BOTH),
    "energy": (Energy, [512, 8192], [256, 4096], ["barlow", "vicreg"], BOTH),
    "sinkhorn": (Sinkhorn, [64, 3000, 65536], [4096], [0, 2]),
    "soft_cross_entropy": (SoftCrossEntropy, [64, 3000, 65536], [4096], ["float32", "bfloat16"]),
}


class Row(NamedTuple):
    """A compiled kernel and what it needs."""

    target: str
    case: Similarity | Sigmoid | DistillClip | Energy | Sinkhorn | SoftCrossEntropy
    kernel: str
    options: str
    registers: int
    spilled: int
    in_loops: int
    shared: int

    @property
    def fits(self):
        """Whether inner loops stay in registers, and all of it in the target's shared memory."""
        return self.in_loops == 0 and self.shared <= TARGETS[self.target].shared


class _Offline:
    """What Triton asks of a driver. The target doubles as the device: kernels are cached by it."""

    def __init__(self, gpu):
        self.gpu = gpu

    def get_current_target(self):
        return self.gpu

    def get_current_device(self):
        return self.gpu

    def get_current_stream(self, device):
        return 0


def compile_case(name, case):
    """Compile what the launchers would launch for a case on the target of that name."""
    target = TARGETS[name]
    compiled = []

    def launch(kernel, grid, *, enable_fp_fusion=True, **arguments):
        binary = kernel.warmup(grid=grid, **arguments, enable_fp_fusion=enable_fp_fusion)
        tile = "x".join(str(arguments[key]) for key in arguments if key.startswith("BLOCK"))
        flags = [key[:3].lower() for key in arguments if key.isupper() and arguments[key] is True]
        options = " ".join(
            [tile, f"{arguments['num_warps']}w", f"{arguments.get('num_stages', '-')}s", *flags]
        )
        kernel_name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        resources = assembly.resources_of(binary)
        compiled.append(Row(name, case, kernel_name, options, *resources, binary.metadata.shared))

    dtype, precision = DTYPES[case.dtype]
    driver.set_active(_Offline(target.gpu))
    torch.backends.cuda.matmul.fp32_precision = precision
    arch = mock.Mock(return_value=(name, target.multiprocessors))
    with (
        mock.patch.object(gpu, "target", arch),
        mock.patch.object(gpu, "launch", launch),
        torch.device("meta"),
    ):
        case.launch(torch.empty(case.rows, case.features, dtype=dtype))
    return compiled


def main():
    """Print the table; see the module's docstring."""
    name = "python -m fastssl.kernels.aot"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--primitive", nargs="+", choices=DEFAULTS, default=list(DEFAULTS))
    parser.add_argument("--features", nargs="+", type=int, metavar="D")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N")
    parser.add_argument("--ids", choices=("both", "with", "without"), default="both")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")

    cases = []
    for primitive in chosen.primitive:
        case, widths, sizes, *more = DEFAULTS[primitive]
        widths, sizes, dtypes = chosen.features or widths, chosen.rows or sizes, chosen.dtype
        if case in (Similarity, Sigmoid):
            more[0] = {"both": [False, True], "with": [True], "without": [False]}[chosen.ids]
            more[1:] = [chosen.launchers] if case is Similarity else []
        elif case not in (DistillClip, Energy):  # they multiply no matrices
            dtypes = [dtype for dtype in dtypes if dtype != "tf32"]
        cases += itertools.starmap(case, itertools.product(dtypes, widths, sizes, *more))
    jobs = list(itertools.product(chosen.target, cases))
    seen, misfits = set(), 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(chosen.jobs, mp_context=context) as pool:
            compiled = pool.map(compile_case, *zip(*jobs, strict=True))
            for row in itertools.chain.from_iterable(compiled):
                case = row.case
                line = (
                    f"{row.target:6} {case.dtype:8} D={case.features:<4} "
                    f"{case.variant} {row.kernel:25} {row.options:28} "
                    f"{row.registers:4} registers {row.spilled:4} spilled "
                    f"{row.in_loops:4} in loops {row.shared / 1024:6.1f} KiB shared"
                    f"{'' if row.fits else '  TOO MUCH'}"
                )
                if line not in seen:
                    seen.add(line)
                    misfits += not row.fits
                    print(line, flush=True)
    print(f"{len(seen)} kernels, {misfits} of them too much for their target")
    sys.exit(misfits > 0)


if __name__ == "__main__":
    main()
