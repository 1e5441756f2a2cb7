"""The plan of the house: what imports what, what a bare import costs, and what the wheel holds."""

import ast
import graphlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("benchmarks", "kernels")  # folders at the top that are installed in fastssl
MAY_IMPORT = {
    "__init__": {"functional", "losses", "memory_bank", "integrations", "reference"},
    "functional": {"losses"},
    "checks": {"distributed"},
    "reference": set(),
    "__main__": {"cli"},
    "cli": {"trainer", "ops", "benchmarks", "__version__"},
    "trainer": {
        *("trainer", "losses", "ops", "functional", "distributed", "reference", "__version__")
    },
    "losses": {"losses", "ops", "distributed", "memory_bank", "checks"},
    "memory_bank": {"distributed", "checks"},
    "integrations": {"losses", "distributed", "memory_bank", "checks"},
    "distributed": set(),
    "ops": {"ops", "kernels", "streaming", "distributed"},
    "kernels": {"kernels"},
    "streaming": {"streaming"},
}
VERIFY_ALONE_USES_REFERENCE = {"trainer/verify.py", "__init__.py"}
# From the ground up: each file or folder imports from the floors below its own.
FLOORS_OF_TRAINER = (
    ("checkpoint", "datasets", "environment", "parallel"),
    ("folders", "guard", "logs", "networks"),
    ("data",),
    ("augment",),
    ("given", "methods"),
    ("config",),
    ("evaluate", "optim"),
    ("loop", "report"),
    ("reproduce", "verify"),
    ("experiments",),
)


def sources() -> list[Path]:
    linked = (ROOT / folder for folder in LINKED)
    return sorted(
        [*(ROOT / "fastssl").glob("**/*.py"), *(path for x in linked for path in x.glob("*.py"))]
    )


def part_of(source: Path) -> str:
    where = source.relative_to(ROOT)
    inside = where.parts[1:] if where.parts[0] == "fastssl" else where.parts
    return inside[0].removesuffix(".py")


def module_of(source: Path) -> str:
    inside = source.relative_to(ROOT).with_suffix("").parts
    inside = inside[1:] if inside[0] == "fastssl" else inside
    return ".".join(["fastssl", *inside]).removesuffix(".__init__")


def nodes_of(tree: ast.AST) -> Iterator[ast.AST]:
    """All that runs: what is imported for types alone is no import."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes_of(node)


def imported_modules(source: Path) -> set[str]:
    names: set[str] = set()
    for node in nodes_of(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.level == 0 or part_of(source) == "kernels", f"{source}: relative import"
    return names


@pytest.mark.parametrize("source", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(source: Path) -> None:
    part = part_of(source)
    own = {name.split(".")[1] for name in imported_modules(source) if name.startswith("fastssl.")}
    own = {"losses" if name[0].isupper() else name for name in own}  # the Modules at the top
    if part == "benchmarks":  # anything
        return
    assert own <= MAY_IMPORT[part], f"{part} must not import {own - MAY_IMPORT[part]}"
    if "reference" in own:
        assert str(source.relative_to(ROOT / "fastssl")) in VERIFY_ALONE_USES_REFERENCE


def test_no_file_imports_itself_by_way_of_others() -> None:
    modules = {module_of(source): source for source in sources()}
    graph = {}
    for module, source in modules.items():
        names = imported_modules(source)
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = found & modules.keys() - {module}
    assert tuple(graphlib.TopologicalSorter(graph).static_order())  # or CycleError, which names it
    assert {"fastssl.trainer.config", "fastssl.kernels.gpu"} <= set(
        itertools.chain(*graph.values())
    )


def test_the_trainer_imports_downwards() -> None:
    floor = {name: i for i, names in enumerate(FLOORS_OF_TRAINER) for name in names}
    files = (ROOT / "fastssl/trainer").rglob("*.py")
    parts = {path: module_of(path).split(".")[2:3] for path in files}
    assert {part[0] for part in parts.values() if part} == floor.keys()
    for source, part in parts.items():
        for name in imported_modules(source):
            _, *inside = name.split(".")
            if inside[:1] == ["trainer"] and inside[1:2] != part:
                assert floor[inside[1]] < floor[part[0]], f"{source} must not import {name}"


# Tested with those that use them, or by name elsewhere.
TESTED_BY_OTHERS = {
    "losses": {
        *("image_text", "module", "multiplier", "negatives", "terms", "unit_rows", "whole_batch"),
    },
    "ops": {"backend", "energy", "reduced_energy", "registration", "ring", "sinkhorn", "two_views"},
    "kernels": {
        *("energy_dual", "energy_features", "energy_outliers", "energy_statistics"),
        *("energy_tiles", "gpu", "tiles"),
    },
    "trainer": {"datasets", "experiments", "guard", "logs"},
    "trainer/methods": {"barlow", "base", "simclr", "vicreg"},
    "integrations": set(),
}


@pytest.mark.parametrize("folder", TESTED_BY_OTHERS)
def test_a_test_file_is_found_from_the_file_it_tests(folder: str) -> None:
    sources = (ROOT / "fastssl" / folder).glob("[!_]*.py")
    tests = [path.stem for path in (ROOT / "tests" / folder).glob("test_*.py")]
    untested = {
        source.stem
        for source in sources
        if not any(re.search(rf"_{source.stem}(_|$)", test) for test in tests)
    }
    assert untested == TESTED_BY_OTHERS[folder]


def run_python(code: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_torch_and_numpy_only(tmp_path: Path) -> None:
    loaded = run_python(
        "import torch, numpy, sys; before = set(sys.modules)\n"
        "import fastssl; new = set(sys.modules) - before\n"
        "print(*sorted({name.split('.')[0] for name in new}))",
        cwd=tmp_path,
    )
    assert set(loaded.split()) - set(sys.stdlib_module_names) == {"fastssl"}


def test_the_torch_backend_never_imports_triton(tmp_path: Path) -> None:
    run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastssl\n"
        "z = torch.randn(2, 8, 4, requires_grad=True)\n"
        "fastssl.NTXentLoss()(z[0], z[1]).backward(); assert z.grad.any()",
        cwd=tmp_path,
    )


FIRST_CALLS = """
import sys
import torch, fastssl
from fastssl import functional as f
x, y = torch.randn(2, 8, 4).unbind()
steps = [
    lambda x, y: f.nt_xent(x, y), lambda x, y: f.info_nce(x, y), lambda x, y: f.dcl(x, y),
    lambda x, y: f.info_nce(x, y, x), lambda x, y: f.info_nce(x, y, torch.eye(4)),
    lambda x, y: f.supcon(torch.stack([x, y], 1)), lambda x, y: f.clip(x, y),
    lambda x, y: f.siglip(x, y), lambda x, y: f.barlow_twins(x, y), lambda x, y: f.vicreg(x, y),
    lambda x, y: f.swav([x, y]), lambda x, y: f.negative_cosine_similarity(x, y),
]
before = set(sys.modules)
for step in steps:
    leaf = x.clone().requires_grad_()
    step(leaf, y).backward()
    assert leaf.grad.any()
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("fastssl")))
"""


def test_the_first_call_of_a_loss_imports_nothing(tmp_path: Path) -> None:
    """The compiler, with what it needs, would take a second and more and 150 MB."""
    assert run_python(FIRST_CALLS, cwd=tmp_path).split() == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a build leaves files behind, which a later one would take for its own
    for folder in ("fastssl", *LINKED):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", out, source], check=True)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_fastssl_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastssl"}
    packed = {name for name in names if name.startswith("fastssl/") and name.endswith(".py")}
    expected = {
        str(Path("fastssl", path.parent.name, path.name))
        if path.parent.name in LINKED
        else str(path.relative_to(ROOT))
        for path in sources()
    }
    assert packed == expected
    assert "fastssl/py.typed" in names


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    where = run_python(
        "import torch, fastssl; from fastssl.kernels import similarity\n"
        "print(fastssl.__file__, similarity.__file__)\n"
        "fastssl.NTXentLoss(backend='triton')(*torch.randn(2, 4, 4))",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TRITON_INTERPRET": "1"},
    )
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in where.split())


@pytest.mark.slow
def test_the_wheel_measures_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    options = "--sizes tiny --losses sinkhorn_knopp --providers fastssl,plain --record out/rows"
    printed = run_python(
        "import sys, fastssl; assert 'site' in fastssl.__file__; from fastssl.cli import main\n"
        f"sys.exit(main('bench {options}'.split()) or main('bench --plot out/rows.json'.split()))",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTEST_ADDOPTS": ""},
    )
    assert "of floor" in printed
    assert "2 passed" in printed
    assert len(json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]) == 2
