"""The devices of this machine and what a model is put on. Imports no torch.

What torch itself would say about a device is asked of psutil, NVML and the installed package's
version, so that the server's process can show devices without loading torch.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field

from gptcore.errors import DeviceAbsent
from gptcore.spec import Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


class Placement(BaseModel):
    """The device and precision that a model is put on; threads belong to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field("cpu", pattern=r"^(cpu|mps|cuda:\d{1,2})$", title="Device")
    precision: Precision = Field("fp32", title="Precision")
    threads: int = Field(
        0, ge=0, le=1024, title="Threads", description="CPU threads; 0 takes every physical core."
    )

    @property
    def resolved_threads(self) -> int:
        """The number of CPU threads that ``threads`` stands for on this machine."""
        return self.threads or cores()


@dataclass(frozen=True, slots=True)
class Device:
    """One device: its name as a person knows it, its memory, or why it cannot be used."""

    id: str
    name: str
    absent: str | None = None
    """None where the device can be used, else the reason in a sentence."""
    total_bytes: int | None = None
    cautions: tuple[tuple[str, str], ...] = ()
    """(precision, what this device does badly with it)."""

    def caution(self, precision: str) -> str | None:
        """Return what this device does badly with ``precision``, or None."""
        return dict(self.cautions).get(precision)


def cores() -> int:
    """Return the CPU cores this process may run on (physical ones where they are known)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False) or usable or 1
    return max(1, min(usable or 1, physical))


def limit_spinning() -> None:
    """Let threads that wait for one another give way sooner; to be called before torch is imported.

    GNU OpenMP lets them spin for milliseconds at every operation, which costs nothing on a quiet
    machine and nearly everything on a busy one, where the one that is waited for has no core to run
    on. The count is the least that lost nothing here: see docs/architecture.md.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@functools.cache
def cpu_name() -> str | None:
    """Return the processor's model name, or None where the system does not tell."""
    if platform.system() == "Darwin":
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() or None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or None


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's instruction-set flags, empty where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    match = re.search(r"^flags\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def torch_version() -> str | None:
    """Return the installed torch's version without importing it, or None."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def memory_limit_bytes() -> int:
    """Return the memory this process may use: the machine's, or its control group's if less."""
    limit = psutil.virtual_memory().total
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.exists():
            text = path.read_text().strip()
            if text.isdigit():
                limit = min(limit, int(text))
    return limit


def free_bytes(device: str) -> int | None:
    """Return the bytes that could be allocated on ``device`` now, or None where unknown."""
    if device.startswith("cuda:"):
        with _Nvml() as nvml:
            if nvml is None:
                return None
            handle = nvml.nvmlDeviceGetHandleByIndex(int(device[5:]))
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
    available = psutil.virtual_memory().available
    return min(available, memory_limit_bytes())


def devices() -> tuple[Device, ...]:
    """Return every kind of device: those usable here, and the absent ones with the reason."""
    return (_cpu(), *_cuda(), _mps())


def require_device(device: str) -> Device:
    """Return the usable device of that id.

    Raises:
        DeviceAbsent: it is not on this machine, or this build of torch cannot use it.
    """
    known = {found.id: found for found in devices()}
    usable = ", ".join(found.id for found in known.values() if not found.absent)
    if device not in known:
        raise DeviceAbsent(f"There is no device {device!r} here; use one of: {usable}.")
    if known[device].absent:
        raise DeviceAbsent(f"{device} cannot be used: {known[device].absent} Use: {usable}.")
    return known[device]


def _cpu() -> Device:
    cautions = [
        ("fp16", "Most CPUs compute fp16 in software: prefill is several times slower than fp32.")
    ]
    flags = cpu_flags()
    if flags and not flags & {"amx_bf16", "avx512_bf16", "bf16"}:
        cautions.append(
            (
                "bf16",
                "This CPU has no bf16 instructions: prefill is several times slower than in fp32, "
                "and decode gains little.",
            )
        )
    return Device(
        id="cpu",
        name=f"{cpu_name() or 'CPU'}, {cores()} cores",
        total_bytes=memory_limit_bytes(),
        cautions=tuple(cautions),
    )


def _cuda() -> tuple[Device, ...]:
    with _Nvml() as nvml:
        if nvml is None:
            return (Device("cuda:0", "NVIDIA GPU", absent="no NVIDIA driver was found."),)
        build = torch_version() or ""
        reason = (
            "the installed torch is a CPU build; install a CUDA build of the same version."
            if "+cpu" in build
            else None
        )
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            found.append(Device(f"cuda:{index}", str(name), absent=reason, total_bytes=total))
    return tuple(found) or (Device("cuda:0", "NVIDIA GPU", absent="the driver lists no GPU."),)


def _mps() -> Device:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return Device("mps", "Apple GPU", total_bytes=memory_limit_bytes())
    return Device("mps", "Apple GPU", absent="this is not a Mac with Apple silicon.")


class _Nvml:
    """NVML while a ``with`` block lasts, or None where the driver does not answer."""

    def __enter__(self):  # type: ignore[no-untyped-def]
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            self.library = None
        else:
            self.library = pynvml
        return self.library

    def __exit__(self, *_: object) -> None:
        if self.library is not None:
            self.library.nvmlShutdown()
