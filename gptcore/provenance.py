"""What made a number: versions, commit, processor. Imports no torch."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

import psutil

from gptcore import __version__
from gptcore.device import cores, cpu_name, devices, memory_limit_bytes, torch_version
from gptcore.paths import ROOT
from gptcore.records import Provenance


def provenance(weights_hash: str | None = None, threads: int | None = None) -> Provenance:
    """Return what can be known of this machine and program; unknown is None."""
    gpus = [one.name for one in devices() if one.id.startswith("cuda") and one.total_bytes]
    return Provenance(
        app_version=__version__,
        git_commit=git_commit(),
        python=platform.python_version(),
        torch=torch_version(),
        platform=platform.platform(),
        cpu=cpu_name(),
        gpu=", ".join(gpus) or None,
        cores=cores(),
        memory_bytes=memory_limit_bytes(),
        weights_hash=weights_hash,
        threads=threads,
        power=power_state(),
    )


def power_state(governors: Path = Path("/sys/devices/system/cpu")) -> str | None:
    """Return what decides the clock of the cores, such as "governor powersave, on battery".

    Args:
        governors: where Linux shows a folder for each core.
    """
    known = []
    found = {
        file.read_text().strip()
        for file in sorted(governors.glob("cpu[0-9]*/cpufreq/scaling_governor"))
    }
    if found:
        known.append(f"governor {' and '.join(sorted(found))}")
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is not None:
        known.append("plugged in" if battery.power_plugged else "on battery")
    return ", ".join(known) or None


@functools.cache
def git_commit() -> str | None:
    """Return the checked-out commit, with ``+`` where files differ from it; None outside git."""
    if not (ROOT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def owner() -> str:
    """Return ``pid:start time`` of this process, which no later process shares."""
    return f"{os.getpid()}:{psutil.Process().create_time():.2f}"


def owner_lives(name: str) -> bool:
    """Return whether the process that ``owner`` named still runs."""
    pid, _, started = name.partition(":")
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == started
    except (ValueError, psutil.NoSuchProcess):
        return False
    except psutil.AccessDenied:
        return True


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=5, check=True
    )
    return done.stdout.strip()
