"""Run every kernel under compute-sanitizer, a process for each tool, type and shape.

As many processes run at a time as there are cores: most of a process is compiling its kernels, and
each tool watches its own process alone. Without compute-sanitizer the kernels run as they are.
"""

import itertools
import os
import shutil
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

from fastssl.benchmarks.every_kernel import DTYPES, SHAPES

SANITIZER = shutil.which("compute-sanitizer")
OPTIONS = (
    *("--error-exitcode", "1", "--print-limit", "5"),
    *("--target-processes", "application-only"),  # not the compilers that Triton starts
    *("--report-api-errors", "no"),  # torch asks the driver for functions that it may not have
    *("--max-connections", "64", "--launch-timeout", "0"),  # the processes share a range of ports
)
TOOLS = {  # the most valuable first
    # Reads and writes outside of an allocation, or at an address that is not aligned.
    "memcheck": itertools.product(DTYPES, SHAPES),
    # Reads of global memory that nothing has written: masks of loads, and buffers of torch.empty.
    # Half precision reads and writes the same entries in both of its types.
    "initcheck": itertools.product(DTYPES[:2], SHAPES),
    # Threads that do not wait for each other, in shared memory: it knows no other, and is slow.
    "racecheck": itertools.product(DTYPES[-1:], SHAPES[:1]),
}


def run(job: tuple[str, str, str]) -> tuple[str, bool]:
    """What to print of a process, and whether all of its kernels ran and the tool found nothing."""
    tool, *kernels = job
    command = [sys.executable, str(Path(__file__).with_name("every_kernel.py")), *kernels]
    if SANITIZER:
        command = [SANITIZER, "--tool", tool, *OPTIONS, *command]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        # In torch's own segments neither the next tensor nor what an earlier one left is an error.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    clean = done.returncode == 0 and "every kernel ran" in done.stdout
    seconds = time.perf_counter() - start
    title = f"== {' '.join(job)}: exit status {done.returncode}, {seconds:.0f} s"
    return f"{title}\n{done.stdout}", clean


if not SANITIZER:
    TOOLS = {"no tool": itertools.product(DTYPES, SHAPES)}
jobs = [(tool, *kernels) for tool, runs in TOOLS.items() for kernels in runs]
ended = clean = 0
try:
    with ThreadPool(os.cpu_count()) as pool:
        for text, found_nothing in pool.imap_unordered(run, jobs):
            print(text, flush=True)
            ended += 1
            clean += found_nothing
except KeyboardInterrupt:
    print("stopped")
under = "under compute-sanitizer" if SANITIZER else "without compute-sanitizer, which is not here"
print(f"{clean} of {len(jobs)} runs of every kernel {under} are clean, {ended - clean} failed")
sys.exit(clean < len(jobs))
