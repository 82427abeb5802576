"""The compiled step: found in the cache, or built there from ``native/`` by the C++ compiler.

The instructions are chosen for the CPU at hand, and the cache's key covers sources, compiler and
flags, so that a folder shared by different machines holds one library for each kind. Imports no
torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import subprocess
from pathlib import Path

from gptcore.device import cpu_flags
from gptcore.errors import StoreError
from gptcore.paths import cache_dir

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
BUILD_S = 300
"""Seconds that a compiler may take; it takes three on a quiet machine."""
COMMON_FLAGS = (
    *("-O2", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno"),
    *("-ffp-contract=fast", "-Wno-psabi"),
)
INSTRUCTIONS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma"}),
        (
            *("-DGPT_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
            *("-mavx512vnni", "-mfma", "-mprefer-vector-width=512"),
        ),
    ),
    "avx2": (frozenset({"avx2", "fma"}), ("-DGPT_AVX2", "-mavx2", "-mfma")),
    "portable": (frozenset(), ()),
}
"""By name, the fastest first: the CPU's flags that it takes, and the compiler's."""
SWITCH = "GPTLAB_KERNELS"
"""The environment variable: ``off``, or one of ``INSTRUCTIONS`` to be used in place of the best."""
CACHE = "GPTLAB_KERNELS_CACHE"
"""The environment variable with the folder for compiled steps; the data folder's cache if unset."""
FLAGS = "GPTLAB_KERNELS_FLAGS"
"""The environment variable with more flags for the compiler, such as those of a sanitizer."""


class NoKernels(Exception):
    """The step cannot be compiled or is switched off; the text is the reason in a sentence."""


def library_path() -> Path:
    """Return the compiled library, building it where the cache has none.

    Raises:
        NoKernels: there is no compiler, it fails, or the user switched the kernels off.
    """
    flags = (*COMMON_FLAGS, *INSTRUCTIONS[instructions()][1], *_more_flags())
    compiler = _compiler()
    try:
        kept = os.environ.get(CACHE)
        folder = Path(kept) if kept else cache_dir() / "kernels"
        target = folder / f"step-{_key(compiler, flags)}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _build(compiler, flags, target)
    except (OSError, StoreError) as error:
        raise NoKernels(f"The compiled step cannot be kept: {error}") from None
    return target


def instructions() -> str:
    """Return which of ``INSTRUCTIONS`` to compile for.

    Raises:
        NoKernels: the user switched the kernels off, or asked for what this CPU does not have.
    """
    asked = os.environ.get(SWITCH, "").strip().lower()
    if asked == "off":
        raise NoKernels(f"{SWITCH}=off.")
    usable = [name for name, (needed, _) in INSTRUCTIONS.items() if needed <= cpu_flags()]
    if asked in ("", "on"):
        return usable[0]
    if asked not in usable:
        raise NoKernels(f"{SWITCH}={asked[:40]} cannot be; use one of: off, {', '.join(usable)}.")
    return asked


def _more_flags() -> list[str]:
    return shlex.split(os.environ.get(FLAGS, ""))


def _compiler() -> str:
    names = (os.environ.get("CXX", ""), *COMPILERS)
    found = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if found is None:
        raise NoKernels(
            f"No C++ compiler was found (looked for {', '.join(COMPILERS)}); on Debian and Ubuntu "
            "apt install g++ brings one, on macOS xcode-select --install."
        )
    return found


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (compiler, _version(compiler), platform.machine(), *flags):
        digest.update(part.encode() + b"\0")
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False, timeout=BUILD_S
    )
    return done.stdout


def _build(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Compile beside the target and move it there, so that nobody sees half a library."""
    fresh = target.with_suffix(f".{secrets.token_hex(4)}")
    command = [compiler, *flags, "-o", str(fresh), str(SOURCES / "step.cpp")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_S)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason"]
            raise NoKernels(f"{Path(compiler).name} could not compile the step: {lines[0][:200]}")
        fresh.replace(target)
    except subprocess.TimeoutExpired:
        raise NoKernels(f"{Path(compiler).name} took longer than {BUILD_S} s.") from None
    finally:
        fresh.unlink(missing_ok=True)
