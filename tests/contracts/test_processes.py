"""The server's process never has torch, and the core never has Streamlit."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

SERVER = (
    "import gptcore.lab, gptcore.spec, gptcore.catalogue, gptcore.recipe, gptcore.serve\n"
    "from gptcore.passes.registry import passes\n"
    "passes()\n"
    "gptcore.catalogue.Catalogue(__import__('gptcore.paths').paths.models_dir()).entries()\n"
)
PAGES = (
    "import importlib, pathlib\n"
    "for file in sorted(pathlib.Path('pages/parts').glob('*.py')):\n"
    "    importlib.import_module(f'pages.parts.{file.stem}')\n"
)


def modules_after(code: str) -> set[str]:
    """Return the names of all modules of a fresh process that ran ``code``."""
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


@pytest.mark.parametrize("code", [SERVER, PAGES], ids=["lab and passes", "parts of the pages"])
def test_what_the_server_imports_brings_no_torch(code: str) -> None:
    loaded = modules_after(code)
    assert "gptcore" in loaded  # the code did import something
    assert not loaded & {"torch", "transformers"}


def test_the_host_brings_no_streamlit() -> None:
    loaded = modules_after("import gptcore.host.process, gptcore.__main__, gptcore.engine")
    assert "torch" in loaded
    assert "streamlit" not in loaded
