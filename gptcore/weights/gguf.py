"""GGUF files: converted once, in a bounded child process, to a Hugging Face directory.

The reading happens in a child with a limit on memory and time, which writes fp32 safetensors
that every later load maps; ``gguf_file`` holds what a file promises against its size.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from gptcore.errors import InvalidWeights
from gptcore.paths import ROOT, cache_dir

BASE_BYTES = 3 * 2**30
"""Memory of a child beside the file itself and its largest tensor; NumPy reserves much of it."""
BASE_S = 8.0
BYTES_PER_S = 8 * 2**20
"""A child that converts more slowly than this is ended; 60 MiB/s were seen here."""
POLL_S = 0.05


def converted(file: Path, progress: Callable[[float], None]) -> Path:
    """Return the directory that ``file`` was converted to, converting it if it was not.

    Raises:
        InvalidWeights: no GGUF, damaged, of another architecture, or beyond the child's limits.
    """
    directory = conversion_of(file)
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="converting-", dir=directory.parent) as folder:
            work = Path(folder) / "converted"
            work.mkdir()
            _run_child(file, work, progress)
            if not directory.is_dir():
                work.rename(directory)
    except OSError as error:
        if not directory.is_dir():  # else another process was first, and theirs is as good
            raise InvalidWeights(
                f"{file.name} could not be converted: {error.strerror or error}."
            ) from None
    return directory


def conversion_of(file: Path) -> Path:
    """Return where the conversion of ``file`` lies or would lie.

    Raises:
        InvalidWeights: the file is missing.
    """
    if not file.is_file():
        raise InvalidWeights(f"There is no file {file.name[:80]!r}.")
    stat = file.stat()
    # By inode, so that a conversion stays with a file that is renamed.
    stamp = f"{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}"
    return cache_dir() / "gguf" / hashlib.sha256(stamp.encode()).hexdigest()[:24]


def _run_child(file: Path, work: Path, progress: Callable[[float], None]) -> None:
    size = file.stat().st_size
    memory, seconds = BASE_BYTES + 4 * size, BASE_S + size / BYTES_PER_S
    with (work / "errors").open("w+b") as errors:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "gptcore.weights.gguf_child"),
                *(str(file.resolve()), str(work), str(memory), str(int(seconds) + 1)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=ROOT,
        )
        try:
            limit = _watch(child, work, size, memory, time.monotonic() + seconds, progress)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    (work / "errors").unlink()
    if limit:
        raise InvalidWeights(f"{file.name} {limit} and was given up: it is damaged, or too large.")
    if child.returncode == 0:
        return
    last = said.splitlines()[-1] if said else f"the reader ended with status {child.returncode}"
    if "MemoryError" in last or child.returncode < 0:
        last = "reading it took more memory or time than a file of its size may"
    raise InvalidWeights(f"{file.name} cannot be read: {last.removeprefix('refused: ')}.")


def _watch(
    child: subprocess.Popen[bytes],
    work: Path,
    size: int,
    memory: int,
    deadline: float,
    progress: Callable[[float], None],
) -> str | None:
    """Return which limit the child broke, None if it ended by itself."""
    target = work / "model.safetensors"
    watched = psutil.Process(child.pid)
    while child.poll() is None:
        if time.monotonic() > deadline:
            return "took too long"
        try:
            # Not every system holds a process to RLIMIT_AS; the resident set can be seen on all.
            if watched.memory_info().rss > memory:
                return "took too much memory"
        except psutil.NoSuchProcess:
            continue
        if target.exists():
            progress(min(0.95, target.stat().st_size / (6.5 * size)))
        time.sleep(POLL_S)
    progress(1.0)
    return None


def write_note(directory: Path, source_precision: str) -> None:
    """Leave the precision of the source beside converted weights."""
    (directory / "gptlab.json").write_text(json.dumps({"source_precision": source_precision}))
