"""What made a number, who owns a run, and where things lie on disk."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import gptcore
from gptcore import paths
from gptcore import provenance as module
from gptcore.device import cores, memory_limit_bytes
from gptcore.errors import StoreError
from gptcore.provenance import git_commit, owner, owner_lives, provenance


def test_a_provenance_says_what_this_machine_and_program_are() -> None:
    found = provenance("sha256:1", 2)
    assert found.app_version == gptcore.__version__
    assert found.python == platform.python_version()
    assert found.torch is not None
    assert found.cores == cores()
    assert found.memory_bytes == memory_limit_bytes()
    assert (found.weights_hash, found.threads) == ("sha256:1", 2)
    assert found.platform


def test_what_is_not_known_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_name", lambda: None)
    monkeypatch.setattr(module, "torch_version", lambda: None)
    monkeypatch.setattr(module, "devices", lambda: ())
    monkeypatch.setattr(module, "git_commit", lambda: None)
    found = provenance()
    assert (found.cpu, found.torch, found.gpu, found.git_commit) == (None, None, None, None)
    assert (found.weights_hash, found.threads) == (None, None)


def test_the_power_state_names_governor_and_battery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert module.power_state(tmp_path) is None
    for core, governor in enumerate(["powersave", "powersave", "performance"]):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(governor + "\n")
    assert module.power_state(tmp_path) == "governor performance and powersave"
    battery = SimpleNamespace(power_plugged=False)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert module.power_state(tmp_path) == "governor performance and powersave, on battery"


def repository(folder: Path) -> str:
    """Make a repository of one commit and return the commit."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    git("init", "--quiet")
    (folder / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "m")
    return git("rev-parse", "HEAD")


def test_the_commit_has_a_plus_exactly_where_a_file_differs_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repository(tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert git_commit.__wrapped__() == commit[:12]
    (tmp_path / "untracked").write_text("a user's data")
    assert git_commit.__wrapped__() == commit[:12]
    (tmp_path / "file").write_text("two")
    assert git_commit.__wrapped__() == f"{commit[:12]}+"


def test_outside_a_repository_or_without_git_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert git_commit.__wrapped__() is None
    (tmp_path / ".git").mkdir()
    assert git_commit.__wrapped__() is None
    repository(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert git_commit.__wrapped__() is None


def test_an_owner_lives_as_long_as_its_process() -> None:
    assert owner_lives(owner())
    assert re.fullmatch(r"\d+:\d+\.\d\d", owner())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = f"{child.pid}:{psutil.Process(child.pid).create_time():.2f}"
    assert owner_lives(name)
    child.communicate()
    assert not owner_lives(name)


@pytest.mark.parametrize(
    "name", ["", "nobody", "1", "x:y", "-5:0.00", "PID:1.00", "99999999999:1.00"]
)
def test_a_name_that_no_process_has_does_not_live(name: str) -> None:
    """A pid that was given to a later process is told apart by its start."""
    assert not owner_lives(name.replace("PID", str(os.getpid())))


def test_everything_a_user_makes_moves_with_one_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "new" / "data"))
    assert paths.data_dir() == tmp_path / "new" / "data"
    assert paths.models_dir() == tmp_path / "new" / "data" / "models"
    assert paths.cache_dir() == tmp_path / "new" / "data" / "cache"
    assert paths.models_dir().is_dir()
    assert paths.cache_dir().is_dir()


def test_a_tilde_and_a_relative_path_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GPTLAB_DATA", "~/lab")
    assert paths.data_dir() == tmp_path / "lab"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTLAB_DATA", "./other")
    assert paths.data_dir() == tmp_path / "other"
    assert paths.data_dir().is_absolute()


def test_without_the_variable_data_lies_beside_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("GPTLAB_DATA")
        else:
            monkeypatch.setenv("GPTLAB_DATA", value)
        assert paths.data_dir() == tmp_path / "data"


def test_a_data_folder_that_cannot_be_made_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(StoreError, match=r"^The data folder .* cannot be used: .*GPTLAB_DATA"):
        paths.data_dir()
