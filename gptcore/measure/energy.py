"""The energy of a stretch of work, with a label that says how it was found.

Measured where a counter can be read (NVML for a GPU, RAPL for a CPU package), else estimated from
the processor time that was used, else unavailable. A counter covers the whole card or package,
whoever uses it; the estimate covers this process alone and knows nothing of memory or fans.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gptcore.errors import InvalidInput

WATTS_A_CORE = 10.0
"""Assumed for a busy core of a server, where no counter can be read; GPTLAB_WATTS_PER_CORE."""
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of a stretch of work; None where unavailable."""

    joules: float | None
    label: str
    """Begins with "measured", "estimated" or "unavailable", and says how."""


class EnergyMeter:
    """Watches the energy while a ``with`` block lasts; ``energy`` is what it took.

    Args:
        device: ``cpu``, ``mps`` or ``cuda:N``.
        powercap: where Linux shows RAPL's counters.
        cpu_seconds: processor seconds of this process so far, all threads together.
        gpu_joules: joules of a CUDA device's whole life, or None where NVML cannot say.
    """

    def __init__(
        self,
        device: str,
        *,
        powercap: Path = POWERCAP,
        cpu_seconds: Callable[[], float] = time.process_time,
        gpu_joules: Callable[[str], float | None] | None = None,
    ) -> None:
        self.energy = Energy(None, "unavailable: the work has not ended")
        self._device = device
        self._packages = _packages(powercap)
        self._cpu_seconds = cpu_seconds
        self._gpu_joules = gpu_joules or nvml_joules
        self._watts = watts_a_core()

    def __enter__(self) -> EnergyMeter:
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self.energy = self._between(self._before, self._read())

    def so_far(self) -> Energy:
        """Return what the block, which still lasts, took until now."""
        return self._between(self._before, self._read())

    def _between(self, before: tuple[float, ...], after: tuple[float, ...]) -> Energy:
        if self._device.startswith("cuda"):
            if not (before and after):
                return Energy(None, "unavailable: NVML has no energy counter for this GPU")
            return Energy(after[0] - before[0], "measured: NVML, the whole card")
        if self._device != "cpu":
            return Energy(None, f"unavailable: no counter is known for {self._device}")
        if not self._packages:
            joules = (after[0] - before[0]) * self._watts
            return Energy(joules, f"estimated: processor seconds × {self._watts:g} W a core")
        # A counter starts again at its range; no stretch of ours is as long as two of them.
        joules = sum(
            (end - begin) % one.range_joules
            for one, begin, end in zip(self._packages, before, after, strict=True)
        )
        return Energy(joules, "measured: RAPL, the whole package")

    def _read(self) -> tuple[float, ...]:
        if self._device.startswith("cuda"):
            joules = self._gpu_joules(self._device)
            return () if joules is None else (joules,)
        if self._packages:
            return tuple(one.joules() for one in self._packages)
        return (self._cpu_seconds(),)


@dataclass(frozen=True, slots=True)
class _Package:
    counter: Path
    range_joules: float

    def joules(self) -> float:
        return int(self.counter.read_text()) / 1e6


def _packages(powercap: Path) -> tuple[_Package, ...]:
    """Return the RAPL packages whose counters this user may read; often only root may."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") > 1:
            continue  # a part of a package, counted with it
        try:
            one = _Package(
                folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()) / 1e6
            )
            one.joules()
        except (OSError, ValueError):
            continue
        found.append(one)
    return tuple(found)


def watts_a_core() -> float:
    """Return the watts of a busy core that an estimate assumes.

    Raises:
        InvalidInput: GPTLAB_WATTS_PER_CORE is no positive number.
    """
    said = os.environ.get("GPTLAB_WATTS_PER_CORE", "")
    if not said:
        return WATTS_A_CORE
    try:
        watts = float(said)
    except ValueError:
        watts = 0.0
    if not 0 < watts < 10_000:
        raise InvalidInput(
            f"GPTLAB_WATTS_PER_CORE is {said[:40]!r}; it must be a number of watts above 0."
        )
    return watts


def nvml_joules(device: str) -> float | None:
    """Return the joules that a CUDA device has used since its driver was loaded, if it says."""
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
