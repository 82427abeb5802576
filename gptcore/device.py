"""The devices of this machine and what a model is put on. Imports no torch.

What torch itself would say about a device is asked of psutil, NVML and the installed package's
version, so that the server's process can show devices without loading torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, Field

from gptcore.errors import DeviceAbsent
from gptcore.spec import Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells what a container may use."""
BF16_CAPABILITY = (8, 0)
"""The first CUDA compute capability (Ampere) whose tensor cores take bf16."""


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
    """Return the CPU cores this process may use: physical ones, those of its container at most."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False) or usable or 1
    return max(1, min(usable or 1, physical, _quota_cores() or physical))


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
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def torch_version() -> str | None:
    """Return the installed torch's version without importing it, or None."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def memory_limit_bytes() -> int:
    """Return the memory this process may use: the machine's, or its control group's if less."""
    total = int(psutil.virtual_memory().total)
    group = _group_memory()
    return total if group is None else min(total, group[0])


def free_bytes(device: str) -> int | None:
    """Return the bytes that could be allocated on ``device`` now, or None where unknown."""
    if device.startswith("cuda:"):
        with _Nvml() as nvml:
            gpus = _gpus(nvml) if nvml is not None else ()
            index = int(device[5:])
            memory = (
                _asked(nvml, "nvmlDeviceGetMemoryInfo", gpus[index]) if index < len(gpus) else None
            )
            return None if memory is None else int(memory.free)
    available = int(psutil.virtual_memory().available)
    group = _group_memory()
    return available if group is None else max(0, min(available, group[0] - group[1]))


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


def compute_capability(device: str) -> tuple[int, int] | None:
    """Return a CUDA device's generation, such as (9, 0) for Hopper; None where unknown."""
    if not device.startswith("cuda:"):
        return None
    with _Nvml() as nvml:
        gpus = _gpus(nvml) if nvml is not None else ()
        index = int(device[5:])
        if index >= len(gpus):
            return None
        found = _asked(nvml, "nvmlDeviceGetCudaComputeCapability", gpus[index])
        return None if found is None else (int(found[0]), int(found[1]))


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
        gpus = _gpus(nvml)
        if not gpus:
            hidden = "CUDA_VISIBLE_DEVICES hides every GPU."
            listed = hidden if "CUDA_VISIBLE_DEVICES" in os.environ else "the driver lists no GPU."
            return (Device("cuda:0", "NVIDIA GPU", absent=listed),)
        return tuple(_gpu(nvml, gpu, index) for index, gpu in enumerate(gpus))


def _gpu(nvml: Any, gpu: Any, index: int) -> Device:
    memory = _asked(nvml, "nvmlDeviceGetMemoryInfo", gpu)
    capability = _asked(nvml, "nvmlDeviceGetCudaComputeCapability", gpu)
    old = capability is not None and tuple(capability) < BF16_CAPABILITY
    caution = "This GPU has no bf16 arithmetic: it is emulated, and slower than fp16."
    return Device(
        f"cuda:{index}",
        str(_asked(nvml, "nvmlDeviceGetName", gpu) or "NVIDIA GPU"),
        absent="the installed torch is a CPU build; install a CUDA build of the same version."
        if "+cpu" in (torch_version() or "")
        else None,
        total_bytes=None if memory is None else int(memory.total),
        cautions=(("bf16", caution),) if old else (),
    )


def _gpus(nvml: Any) -> tuple[Any, ...]:
    """Return NVML's handles in the order of torch's numbers, which ``CUDA_VISIBLE_DEVICES`` sets.

    A name in it that NVML does not know hides itself and all after it, as CUDA does.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found: list[Any] = []
    try:
        count = nvml.nvmlDeviceGetCount()
        for name in map(str, range(count)) if named is None else named.split(","):
            if name.strip().isdecimal():
                found.append(nvml.nvmlDeviceGetHandleByIndex(int(name)))
            else:
                found.append(nvml.nvmlDeviceGetHandleByUUID(name.strip()))
    except nvml.NVMLError:
        pass
    return tuple(found)


def _asked(nvml: Any, function: str, gpu: Any) -> Any:
    """Return what NVML knows of a GPU, or None: some boards lack some numbers."""
    try:
        return getattr(nvml, function)(gpu)
    except nvml.NVMLError:
        return None


def _mps() -> Device:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return Device("mps", "Apple GPU", total_bytes=memory_limit_bytes())
    return Device("mps", "Apple GPU", absent="this is not a Mac with Apple silicon.")


def _group_memory() -> tuple[int, int] | None:
    """Return limit and use of this container's memory in bytes, None where it has no limit.

    Pages of files that the system would drop at once are not counted as used.
    """
    for folder, limit_name, used_name, droppable in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (
            CGROUP / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        limit = _number(folder / limit_name)
        if limit is not None:
            stat = folder / "memory.stat"
            text = stat.read_text() if stat.exists() else ""
            match = re.search(rf"^{droppable} (\d+)$", text, re.MULTILINE)
            used = (_number(folder / used_name) or 0) - (int(match[1]) if match else 0)
            return limit, max(0, used)
    return None


def _quota_cores() -> int | None:
    """Return the cores that this container's quota of CPU time is worth, None without a quota."""
    both = CGROUP / "cpu.max"
    if both.exists():
        parts = both.read_text().split()
        numbers = [int(part) if part.isdigit() else None for part in parts]
    else:
        numbers = [_number(CGROUP / "cpu" / f"cpu.cfs_{one}_us") for one in ("quota", "period")]
    match numbers:
        case [int(quota), int(period)] if quota and period:
            return math.ceil(quota / period)
        case _:
            return None


def _number(file: Path) -> int | None:
    """Return the whole number in a file; None where it is missing or says ``max`` or -1."""
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdigit() else None


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


def trim_heap() -> None:
    """Give freed heap pages back to the system at once, where the C library can (glibc)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
