"""What the tests of the host share: a data folder with a tiny model, and a lab on it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptcore.lab import Lab
from gptcore.records import RunState
from tests.tiny import tiny_checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return made_home(tmp_path, monkeypatch)


@pytest.fixture
def lab(home: Path) -> Iterator[Lab]:
    with Lab.open(monitor=False) as opened:
        add(opened, home / "source" / "tiny")
        yield opened


def made_home(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make ``folder`` the data folder, with a tiny model beside it."""
    patch.setenv("GPTLAB_DATA", str(folder))
    patch.setenv("GPTLAB_LOCKS", str(folder / "locks"))
    patch.delenv("GPTLAB_DATABASE_URL", raising=False)
    tiny_checkpoint(folder / "source" / "tiny")
    return folder


def add(lab: Lab, folder: Path) -> None:
    """Put a model into the catalogue under its folder's name."""
    ended = lab.wait(lab.add_model(folder, folder.name), 30)
    assert ended.run.state is RunState.DONE, ended.run.error


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
