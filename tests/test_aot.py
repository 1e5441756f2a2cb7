"""Every kernel compiles for every target, within its registers and shared memory."""

import os
import subprocess
import sys

import pytest

similarity = pytest.importorskip("fastssl.kernels.similarity")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def table(*options: str) -> list[str]:
    """Print it in another process, since the interpreter replaces the compiler in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastssl.kernels.aot", "--jobs", "2", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = done.stdout.splitlines()
    assert last == f"{len(rows)} kernels, 0 of them too large for their target"
    return rows


def test_nt_xent_on_hopper_fits() -> None:
    case = ("--dtype", "bfloat16", "--features", "128", "--rows", "65536", "--ids", "without")
    assert table("--target", "sm_90", *case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "features", "rows"),
    [
        ("bfloat16", "128", ["4096", "65536"]),
        ("bfloat16", "512", ["65536"]),
        ("float32", "128", ["65536"]),
    ],
)
def test_every_kernel_fits_every_target(dtype: str, features: str, rows: list[str]) -> None:
    """Ids take registers: the kernels with them are the larger ones."""
    compiled = table("--dtype", dtype, "--features", features, "--rows", *rows, "--ids", "with")
    seen = {(row.split()[0], row.split()[4]) for row in compiled}
    names = [name for name in vars(similarity) if name.endswith("_kernel")]
    if len(rows) == 1:
        names.remove("_similarity_lse_bwd_finish_kernel")  # only few rows need it
    kernels = {name.strip("_").removesuffix("_kernel") for name in names}
    assert seen == {(target, kernel) for target in TARGETS for kernel in kernels}
