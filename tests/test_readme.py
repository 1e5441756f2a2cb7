"""The README's blocks and those of docs/ work as they stand, and name only what exists."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


DOCS = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    "code", blocks("python", README + DOCS), ids=lambda code: code.splitlines()[0]
)
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "code",
    [code for code in blocks("python", DOCS) if "MemoryBank" in code and "query" in code],
    ids=lambda code: code.splitlines()[0],
)
def test_steps_with_a_queue_run_in_autocast(code: str) -> None:
    """There an encoder's rows are bfloat16, and those that were normalised float32."""
    given = "query, key = query.bfloat16().detach().requires_grad_(), normalize(key)\n"
    assert "query.requires_grad_()\n" in code
    code = code.replace("query.requires_grad_()\n", given)
    with torch.autocast("cpu", torch.bfloat16):
        exec(compile(code, "docs", "exec"), {})


def test_make_targets_exist() -> None:
    named = {word for block in blocks("bash") for word in re.findall(r"\bmake (\w+)", block)}
    assert named >= {"pretrain", "test"}
    for target in named:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_commands_parse() -> None:
    cli = pytest.importorskip("fastssl.cli")
    named = re.findall(r"^fastssl (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert named
    for command in set(named):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_package_index_name_is_never_the_other_project() -> None:
    assert not re.search(r"pip install fastssl(?!-losses)", README)
