"""Every kernel compiles for every target, within its registers and shared memory."""

import itertools
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

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


def kernels(module: ModuleType) -> set[str]:
    names = [name for name in vars(module) if name.endswith("_kernel")]
    return {name.strip("_").removesuffix("_kernel") for name in names}


def targets_and_kernels(rows: list[str]) -> set[tuple[str, str]]:
    return {(row.split()[0], row.split()[4]) for row in rows}


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


def test_nt_xent_on_hopper_fits() -> None:
    case = ("--dtype", "bfloat16", "--features", "128", "--rows", "65536", "--ids", "without")
    primitive = ("--primitive", "similarity", "--launchers", "two_view")
    assert table(*primitive, "--target", "sm_90", *case)


def test_barlow_twins_and_vicreg_on_hopper_fit() -> None:
    case = ("--dtype", "bfloat16", "--features", "8192", "--rows", "1024")
    assert table("--primitive", "energy", "--target", "sm_90", *case)


def test_swav_on_hopper_fits() -> None:
    case = ("--dtype", "bfloat16", "--features", "3000", "--rows", "4096")
    assert table("--primitive", "sinkhorn", "soft_cross_entropy", "--target", "sm_90", *case)


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
    case = ("--dtype", dtype, "--features", features, "--rows", *rows, "--ids", "with")
    case = ("--primitive", "similarity", "--launchers", "two_view", "similarity", *case)
    compiled = targets_and_kernels(table(*case))
    expected = kernels(tiles) | kernels(similarity) | kernels(two_views)
    if len(rows) == 1:
        expected.remove("similarity_lse_bwd_finish")  # only few rows need it
    assert compiled == set(itertools.product(TARGETS, expected))


@pytest.mark.slow
def test_every_kernel_of_classes_and_fixed_keys_fits_every_target() -> None:
    case = ("--dtype", "bfloat16", "--features", "128", "--rows", "4096", "--ids", "with")
    compiled = table("--primitive", "similarity", "--launchers", "class", "fixed_keys", *case)
    expected = kernels(tiles) | kernels(similarity) | kernels(fixed_keys)
    assert targets_and_kernels(compiled) == set(itertools.product(TARGETS, expected))


@pytest.mark.slow
def test_every_kernel_of_pairs_fits_every_target() -> None:
    case = ("--dtype", "bfloat16", "--features", "768", "--rows", "65536", "--ids", "with")
    compiled = table("--primitive", "similarity", "--launchers", "pair", *case)
    expected = kernels(tiles) | kernels(pairs) | {"similarity_lse_fwd"}
    assert targets_and_kernels(compiled) == set(itertools.product(TARGETS, expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "features"), [("bfloat16", ["256", "768"]), ("float32", ["768"])]
)
def test_every_sigmoid_kernel_fits_every_target(dtype: str, features: list[str]) -> None:
    case = ("--dtype", dtype, "--features", *features, "--rows", "8192", "--ids", "with")
    compiled = table("--primitive", "sigmoid", *case)
    assert targets_and_kernels(compiled) == set(itertools.product(TARGETS, kernels(sigmoid)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_energy_kernel_fits_every_target(dtype: str) -> None:
    compiled = table(
        "--primitive", "energy", "--dtype", dtype, "--features", "8192", "--rows", "4096"
    )
    modules = [energy_dual, energy_features, energy_outliers, energy_statistics, energy_tiles]
    expected = set().union(*map(kernels, modules))
    assert targets_and_kernels(compiled) == set(itertools.product(TARGETS, expected))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_clustering_kernel_fits_every_target(dtype: str) -> None:
    case = ("--dtype", dtype, "--features", "8192", "65536", "--rows", "4096")
    compiled = table("--primitive", "sinkhorn", "soft_cross_entropy", *case)
    expected = kernels(sinkhorn) | kernels(soft_cross_entropy)
    assert targets_and_kernels(compiled) == set(itertools.product(TARGETS, expected))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "primitive", ["similarity", "sigmoid", "energy", "sinkhorn", "soft_cross_entropy"]
)
def test_every_launch_configuration_fits(primitive: str, target: str) -> None:
    """Of every width, type and number of rows that the command's own table has."""
    assert table("--primitive", primitive, "--target", target)
