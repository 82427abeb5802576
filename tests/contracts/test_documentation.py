"""What the documentation says is so: commands, file tree, passes, models, signatures."""

import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gptcore.__main__ import _parser
from gptcore.catalogue import Catalogue
from gptcore.passes.registry import passes
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
MODELS = {
    *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    *("gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1.3b"),
    *("gpt3-2.7b", "gpt3-6.7b", "gpt3-13b", "gpt3-175b", "smollm2-135m"),
}


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of that language, continued lines joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands(program: str) -> list[str]:
    """Return the README's commands that begin with ``program``."""
    lines = [line.strip() for block in blocks(README, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(program + " ")]


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("command", commands("python -m gptcore"))
def test_every_command_of_the_readme_is_understood(command: str) -> None:
    words = shlex.split(command, comments=True)[3:]
    assert callable(_parser().parse_args(words).command)


def test_the_readme_shows_a_command_of_every_kind() -> None:
    shown = {command.split()[3] for command in commands("python -m gptcore")}
    assert shown >= {"models", "devices", "generate"}


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert named >= {"run", "test", "check"}
    assert named <= targets


def test_the_tree_of_the_readme_is_the_tree_on_disk() -> None:
    (tree,) = (block for block in blocks(README, "text") if "pages/main.py" in block)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing
    folders = {
        file.relative_to(ROOT).parts[0]
        for file in tracked_files()
        if len(file.relative_to(ROOT).parts) > 1
    }
    parts = {f"gptcore/{file.name}" for file in (ROOT / "gptcore").iterdir() if is_part(file)}
    assert folders | parts <= named


def is_part(file: Path) -> bool:
    return (file.is_dir() and file.name[0] not in "._") or (
        file.suffix == ".py" and file.name != "__init__.py"
    )


def test_every_pass_stands_in_the_table_of_the_readme() -> None:
    table = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(table) == sorted(passes())


def test_every_promised_model_name_is_in_the_catalogue(tmp_path: Path) -> None:
    assert {entry.name for entry in Catalogue(tmp_path).entries()} == MODELS


def test_every_picture_of_the_readme_is_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert [name for name in pictures if not (ROOT / name).is_file()] == []


def test_every_link_to_a_file_leads_to_one() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


def contracts() -> list[tuple[str, str]]:
    """Return (module, its code) for each contract in docs/architecture.md."""
    return re.findall(
        r"^\*\*(\w+)\*\*[^\n]*\n```python\n(.*?)^```", ARCHITECTURE, re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize(("name", "code"), contracts(), ids=[name for name, _ in contracts()])
def test_every_signature_of_the_architecture_exists(name: str, code: str) -> None:
    module = importlib.import_module(f"gptcore.{name}")
    owner: object = module
    checked = 0
    for line in code.splitlines():
        statement = line.split("  #")[0]
        kind = re.match(r"(\s*)(class|def) (\w+)", statement)
        if kind is None:
            continue
        indented, word, called = kind.groups()
        owner = owner if indented else module
        assert hasattr(owner, called), f"{owner} has no {called}"
        if word == "class":
            owner = getattr(owner, called)
        else:
            named = set(re.findall(r"[(,] *\*{0,2}(\w+)(?=[:,=)])", statement.split("->")[0]))
            real = set(inspect.signature(getattr(owner, called)).parameters)
            assert named <= real, f"{called}: {named - real} are no parameters of {real}"
        checked += 1
    assert checked


# Written in pieces, so that this file does not hold what it looks for.
FOREIGN = re.compile(
    "|".join(
        ["/wo" + r"rk/\w", "/ro" + "ot/", "pypi" + r"\.org", "python" + "hosted", "/t" + r"mp/\w"]
    )
)


def test_no_tracked_file_names_a_machine_path_or_a_registry() -> None:
    found = []
    for file in tracked_files():
        if file.suffix in {".png", ".gguf", ".safetensors", ".xz"}:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if FOREIGN.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_every_model_stands_in_the_table_of_what_was_checked(tmp_path: Path) -> None:
    table = README.partition("## What was checked")[2].partition("\n## ")[0]
    for entry in Catalogue(tmp_path).entries():
        cells = next(
            line.split("|")[2:-1]
            for line in table.splitlines()
            if line.startswith(f"| {entry.name} |")
        )
        assert len(cells) == 5, entry.name
        assert all(cell.strip() for cell in cells), entry.name
