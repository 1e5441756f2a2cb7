"""Every kernel compiles for every target, inner loops in registers, within its shared memory."""

import os
import re
import subprocess
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest
import torch

aot = pytest.importorskip("fastssl.kernels.aot")
distill_clip = pytest.importorskip("fastssl.kernels.distill_clip")
energy_dual = pytest.importorskip("fastssl.kernels.energy_dual")
energy_features = pytest.importorskip("fastssl.kernels.energy_features")
energy_outliers = pytest.importorskip("fastssl.kernels.energy_outliers")
energy_statistics = pytest.importorskip("fastssl.kernels.energy_statistics")
energy_tiles = pytest.importorskip("fastssl.kernels.energy_tiles")
fixed_keys = pytest.importorskip("fastssl.kernels.fixed_keys")
gpu = pytest.importorskip("fastssl.kernels.gpu")
pairs = pytest.importorskip("fastssl.kernels.pairs")
sigmoid = pytest.importorskip("fastssl.kernels.sigmoid")
similarity = pytest.importorskip("fastssl.kernels.similarity")
sinkhorn = pytest.importorskip("fastssl.kernels.sinkhorn")
soft_cross_entropy = pytest.importorskip("fastssl.kernels.soft_cross_entropy")
tiles = pytest.importorskip("fastssl.kernels.tiles")
two_views = pytest.importorskip("fastssl.kernels.two_views")

every_target = pytest.mark.parametrize("target", list(aot.TARGETS))


def fitting(compiler: Executor, target: str, *cases: object) -> set[str]:
    """The kernels of these cases, each of which compiles and fits the target."""
    compiled = [compiler.submit(aot.compile_case, target, case) for case in cases]
    rows = {row for each in compiled for row in each.result()}
    assert not {row for row in rows if not row.fits}
    return {row.kernel for row in rows}


def kernels(*modules: ModuleType) -> set[str]:
    names = [name for module in modules for name in vars(module) if name.endswith("_kernel")]
    return {name.strip("_").removesuffix("_kernel") for name in names}


@pytest.mark.parametrize(
    ("hip", "name", "arch"),
    [(None, "NVIDIA H200", "sm_90"), ("6.4", "gfx942:sramecc+:xnack-", "gfx942")],
)
def test_tiles_are_chosen_by_what_a_gpu_is(
    hip: str | None, name: str, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(gcnArchName=name, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert gpu.target(torch.device("cuda")) == (arch, 132)


def table(*options: str) -> list[str]:
    """The lines of the command, which are of kernels that fit."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastssl.kernels.aot", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = done.stdout.splitlines()
    assert last == f"{len(rows)} kernels, 0 of them too much for their target"
    return rows


def test_the_command_prints_what_each_kernel_needs() -> None:
    case = ("--dtype", "bfloat16", "--features", "3000", "--target", "sm_90", "--jobs", "1")
    rows = table("--primitive", "soft_cross_entropy", *case)
    form = r"sm_90  bfloat16 D=3000 (bfloat16|float32) soft_cross_entropy_(fwd|bwd) .*"
    form += r" \d+ registers +\d+ spilled +0 in loops +\d+\.\d KiB shared"
    assert len(rows) == 4
    assert all(re.fullmatch(form, row) for row in rows)


@pytest.mark.parametrize(
    ("needs", "fits"),
    [
        ({"spilled": 56}, True),
        ({"spilled": 8, "in_loops": 1}, False),
        ({"shared": 227 * 1024}, True),
        ({"shared": 228 * 1024}, False),
    ],
)
def test_spills_in_inner_loops_and_shared_memory_are_too_much(
    needs: dict[str, int],
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def compiled(target: str, case: object) -> list:
        row = {"registers": 255, "spilled": 0, "in_loops": 0, "shared": 1024, **needs}
        return [aot.Row(target, case, "kernel", "64x64 4w 2s", **row)]

    def executor(jobs: int, mp_context: object) -> Executor:
        return ThreadPoolExecutor(jobs)

    monkeypatch.setattr(aot, "compile_case", compiled)
    monkeypatch.setattr(aot, "ProcessPoolExecutor", executor)
    monkeypatch.setattr(sys, "argv", ["aot", "--target", "sm_90", "--primitive", "sigmoid"])
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # the command sets it
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as exit_status:
        aot.main()
    assert exit_status.value.code == (not fits)
    assert ("TOO MUCH" in capsys.readouterr().out) == (not fits)


def test_nt_xent_on_hopper_fits(compiler: Executor) -> None:
    fitting(compiler, "sm_90", aot.Similarity("bfloat16", 128, 65536, False, "two_view"))


def test_barlow_twins_and_vicreg_on_hopper_fit(compiler: Executor) -> None:
    cases = [aot.Energy("bfloat16", 8192, 1024, name, True) for name in ("barlow", "vicreg")]
    fitting(compiler, "sm_90", *cases)


def test_swav_on_hopper_fits(compiler: Executor) -> None:
    codes = aot.Sinkhorn("bfloat16", 3000, 4096, 3)
    losses = [aot.SoftCrossEntropy("bfloat16", 3000, 4096, x) for x in ("float32", "bfloat16")]
    fitting(compiler, "sm_90", codes, *losses)


# Ids take registers: the kernels with them are the larger ones.


@pytest.mark.slow
@every_target
@pytest.mark.parametrize(
    ("dtype", "features", "rows"),
    [("bfloat16", 128, (4096, 65536)), ("bfloat16", 512, (65536,)), ("float32", 128, (65536,))],
)
def test_every_kernel_of_similarities_fits(
    dtype: str, features: int, rows: tuple[int, ...], target: str, compiler: Executor
) -> None:
    cases = [
        aot.Similarity(dtype, features, N, True, launchers)
        for N in rows
        for launchers in ("two_view", "similarity")
    ]
    expected = kernels(tiles, similarity, two_views)
    if len(rows) == 1:
        expected.remove("similarity_lse_bwd_finish")  # only few rows need it
    assert fitting(compiler, target, *cases) == expected


@pytest.mark.slow
@every_target
def test_every_kernel_of_classes_and_fixed_keys_fits(target: str, compiler: Executor) -> None:
    cases = [aot.Similarity("bfloat16", 128, 4096, True, x) for x in ("class", "fixed_keys")]
    assert fitting(compiler, target, *cases) == kernels(tiles, similarity, fixed_keys)


@pytest.mark.slow
@every_target
def test_every_kernel_of_pairs_fits(target: str, compiler: Executor) -> None:
    case = aot.Similarity("bfloat16", 768, 65536, True, "pair")
    assert fitting(compiler, target, case) == kernels(tiles, pairs) | {"similarity_lse_fwd"}


@pytest.mark.slow
@every_target
def test_every_kernel_of_pairs_with_a_teacher_fits(target: str, compiler: Executor) -> None:
    cases = [aot.DistillClip("bfloat16", 768, 65536, columns) for columns in (True, False)]
    expected = kernels(distill_clip) | {"pair_product", "pair_finish"}
    assert fitting(compiler, target, *cases) == expected


@pytest.mark.slow
@every_target
@pytest.mark.parametrize(("dtype", "features"), [("bfloat16", (256, 768)), ("float32", (768,))])
def test_every_sigmoid_kernel_fits(
    dtype: str, features: tuple[int, ...], target: str, compiler: Executor
) -> None:
    cases = [aot.Sigmoid(dtype, D, 8192, True) for D in features]
    assert fitting(compiler, target, *cases) == kernels(sigmoid)


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_energy_kernel_fits(dtype: str, target: str, compiler: Executor) -> None:
    cases = [
        aot.Energy(dtype, 8192, 4096, name, dual)
        for name in ("barlow", "vicreg")
        for dual in (True, False)
    ]
    expected = kernels(
        energy_dual, energy_features, energy_outliers, energy_statistics, energy_tiles
    )
    assert fitting(compiler, target, *cases) == expected


@pytest.mark.slow
@every_target
@pytest.mark.parametrize(("dtype", "targets"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_every_clustering_kernel_fits(
    dtype: str, targets: str, target: str, compiler: Executor
) -> None:
    """Rows that lie in one tile, and those that are walked."""
    codes = [aot.Sinkhorn(dtype, K, 4096, x) for K in (8192, 65536) for x in (0, 2)]
    losses = [aot.SoftCrossEntropy(dtype, K, 4096, targets) for K in (8192, 65536)]
    assert fitting(compiler, target, *codes, *losses) == kernels(sinkhorn, soft_cross_entropy)


@pytest.mark.slow
@pytest.mark.exhaustive
@every_target
@pytest.mark.parametrize("primitive", list(aot.DEFAULTS))
def test_every_launch_configuration_fits(primitive: str, target: str) -> None:
    """Of every width, type and number of rows that the command's own table has."""
    assert table("--primitive", primitive, "--target", target)
