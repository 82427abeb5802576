"""What the tests share: folders of their own, a browser, SmolLM2, and reasons for what is skipped.

``GPTLAB_REQUIRE="browser smollm2 postgres"`` turns the skips of these markers into failures.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USERS_DATA = Path(os.environ.get("GPTLAB_DATA") or ROOT / "data").expanduser().resolve()
"""Only read, for the installed SmolLM2; tests write elsewhere."""
SMOLLM2 = "smollm2-135m"
REQUIRED = frozenset(os.environ.get("GPTLAB_REQUIRE", "").split())


def chromium() -> str | None:
    """Return the browser's path, or None."""
    named = os.environ.get("GPTLAB_CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    macos = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    found = next(filter(None, map(shutil.which, (named, *names) if named else names)), None)
    return found or (str(macos) if macos.exists() else None)


def browser_missing() -> str | None:
    """Return why there can be no browser test here."""
    return None if chromium() else "no Chromium on this machine (Debian: apt install chromium)"


def smollm2_missing() -> str | None:
    """Return why SmolLM2 cannot be tested here."""
    if any((USERS_DATA / "models" / SMOLLM2).glob("*.gguf")):
        return None
    return "SmolLM2 is not installed (python -m gptcore models pull smollm2-135m)"


def postgres_missing() -> str | None:
    """Return why PostgreSQL cannot be tested here."""
    if os.environ.get("GPTLAB_TEST_POSTGRES_URL"):
        return None
    return "GPTLAB_TEST_POSTGRES_URL is not set (make test-postgres starts a server)"


NEEDS: dict[str, Callable[[], str | None]] = {
    "browser": browser_missing,
    "smollm2": smollm2_missing,
    "postgres": postgres_missing,
}


def pytest_configure(config: pytest.Config) -> None:
    """Keep every test, and every process it starts, off the user's data, with two threads."""
    folder = Path(tempfile.mkdtemp(prefix="gptlab-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["GPTLAB_DATA"] = str(folder / "data")
    os.environ["GPTLAB_LOCKS"] = str(folder / "locks")
    os.environ.pop("GPTLAB_DATABASE_URL", None)
    os.environ["OMP_NUM_THREADS"] = "2"
    # Every test has a data folder of its own, and one compiled step serves them all.
    os.environ.setdefault("GPTLAB_KERNELS_CACHE", str(folder / "kernels"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests in the browser come last: what breaks under them is found first."""
    items.sort(key=lambda item: item.get_closest_marker("browser") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine lacks, with the reason; fail where it was said to be required."""
    for name, missing in NEEDS.items():
        if item.get_closest_marker(name) and (reason := missing()):
            (pytest.fail if name in REQUIRED else pytest.skip)(reason)


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of this test alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("GPTLAB_DATA", str(folder))
    monkeypatch.setenv("GPTLAB_LOCKS", str(tmp_path / "locks"))
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: a second only waits where models are this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The installed SmolLM2's GGUF file, only to be read."""
    if reason := smollm2_missing():
        (pytest.fail if "smollm2" in REQUIRED else pytest.skip)(reason)
    return next((USERS_DATA / "models" / SMOLLM2).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> str:
    """The catalogue name of SmolLM2, installed in the data folder of the whole session."""
    folder = Path(os.environ["GPTLAB_DATA"]) / "models" / SMOLLM2
    if not folder.exists():
        share(smollm2_gguf.parent, folder)
    return SMOLLM2


def share(source: Path, target: Path) -> None:
    """Show the files of ``source`` at ``target``, without a copy where the disk allows it."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            (target / file.name).hardlink_to(file)
        except OSError:
            shutil.copy2(file, target / file.name)
