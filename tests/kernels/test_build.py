"""Building the library: which compiler, which instructions, the cache, and what can go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptcore.kernels import build
from tests.conftest import ROOT

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi
echo run >> "{log}"
while [ "$1" != -o ]; do shift; done
printf 'half' > "$2"; sleep 0.3; printf ' a library' >> "$2"
"""


@pytest.fixture
def compiler(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes its time; it writes down how often it ran."""
    made = tmp_path / "cxx"
    made.write_text(FAKE.format(log=tmp_path / "log"))
    made.chmod(0o755)
    monkeypatch.setenv("CXX", str(made))
    for name in (build.SWITCH, build.FLAGS, build.CACHE):
        monkeypatch.delenv(name, raising=False)
    return made


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().splitlines())


def test_a_library_is_built_once(compiler: Path, tmp_path: Path) -> None:
    first = build.library_path()
    assert build.library_path() == first
    assert first.read_text() == "half a library"
    assert first.is_relative_to(tmp_path / "data" / "cache")
    assert runs(tmp_path) == 1


def test_flags_instructions_compiler_and_sources_have_libraries_of_their_own(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {build.library_path()}
    monkeypatch.setenv(build.FLAGS, "-g")
    found.add(build.library_path())
    monkeypatch.delenv(build.FLAGS)
    monkeypatch.setenv(build.SWITCH, "portable")
    found.add(build.library_path())
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "step.cpp").write_text("int one;")
    found.add(build.library_path())
    (tmp_path / "sources" / "step.cpp").write_text("int two;")
    found.add(build.library_path())
    assert len(found) == 5 if build.instructions() != "portable" else 4


def test_builds_at_the_same_time_do_not_meet(compiler: Path) -> None:
    # Every one must find a whole library, whoever wrote it.
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(build.library_path().read_text()))
        for _ in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == ["half a library"] * 4
    assert len(list(build.library_path().parent.iterdir())) == 1


def test_a_failing_compiler_is_told_in_one_line(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'step.cpp:1: error: no such thing' >&2\necho more\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.delenv(build.CACHE, raising=False)
    with pytest.raises(build.NoKernels, match=r"broken could not compile .* error: no such thing"):
        build.library_path()
    assert not list((data_folder / "cache" / "kernels").iterdir())


def test_no_compiler_is_told_with_the_way_out(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(data_folder))
    with pytest.raises(build.NoKernels, match=r"No C\+\+ compiler .* apt install"):
        build.library_path()


def test_the_switch_turns_the_kernels_off(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.SWITCH, "off")
    with pytest.raises(build.NoKernels, match="GPTLAB_KERNELS=off"):
        build.library_path()
    monkeypatch.setenv(build.SWITCH, "mmx")
    with pytest.raises(build.NoKernels, match=r"use one of: off, .*portable"):
        build.library_path()
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("avx512f avx512bw avx512vl avx512dq avx512_vnni avx2 fma", "avx512"),
        ("avx512f avx512bw avx512vl avx512dq avx2 fma", "avx2"),
        ("avx2 fma", "avx2"),
        ("avx", "portable"),
        ("asimd asimddp", "portable"),
        ("", "portable"),
    ],
)
def test_the_best_instructions_of_the_processor_are_chosen(
    flags: str, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flags.split()))
    assert build.instructions() == best


def test_without_a_compiler_torch_decodes_and_the_reason_is_known() -> None:
    code = """
import torch
from gptcore import kernels
from gptcore.kernels.step import adopt
from tests.kernels.shapes import SPECS, random_model
reason = adopt(random_model(SPECS["llama"]).bfloat16())
assert reason == kernels.unavailable() and reason.startswith("No C++ compiler"), reason
"""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"PATH": "/nowhere", build.SWITCH: ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
