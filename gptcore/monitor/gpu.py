"""NVIDIA GPUs through NVML. A machine without one gives no readings, and says why.

``gpu_utilization_ratio`` is NVML's: the share of time in which at least one kernel ran. It is not
work done; memory-bandwidth utilization stands beside it on the pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from gptcore.records import Reading

TRY_AGAIN_S = 60.0
"""A driver that is not there now may be loaded later; asking costs a library look-up."""


class GpuCollector:
    """Utilization, memory, power and temperature of every GPU that NVML lists.

    Args:
        nvml: the module ``pynvml``, or one that answers like it.
        clock: wall time in seconds, UTC.
        monotonic: seconds that never go back.
    """

    absence: str | None
    """Why there are no numbers, in a few words; None where there are."""

    def __init__(
        self,
        nvml: Any,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = nvml
        self._clock = clock
        self._monotonic = monotonic
        self._tried_at: float | None = None
        self._ready = False
        self.absence = None
        self._connect()

    def collect(self) -> Iterable[Reading]:
        """Return the readings of every GPU, subject ``cuda:0`` and so on.

        A number that NVML does not have for a GPU is left out, and only that one.
        """
        if not self._ready and not self._connect():
            return []
        at = self._clock()
        found: list[Reading] = []
        refusal = None
        for index in range(self._count):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            except self._nvml.NVMLError as error:
                refusal = error
                continue
            for name, look in self._looks.items():
                try:
                    value = float(look(handle))
                except self._nvml.NVMLError as error:
                    refusal = error
                else:
                    found.append(Reading(name, value, at, f"cuda:{index}"))
        self.absence = None
        if not found and refusal is not None:
            self.absence = f"NVML gives no numbers: {refusal}."
            self._ready = False  # the driver may have been reloaded: start over in a minute
        return found

    @property
    def _looks(self) -> dict[str, Callable[[Any], float]]:
        nvml = self._nvml
        return {
            "gpu_utilization_ratio": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            "gpu_memory_used_bytes": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
            "gpu_memory_total_bytes": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
            "gpu_power_watts": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "gpu_temperature_celsius": lambda gpu: nvml.nvmlDeviceGetTemperature(
                gpu, nvml.NVML_TEMPERATURE_GPU
            ),
        }

    def _connect(self) -> bool:
        now = self._monotonic()
        if self._tried_at is not None and now - self._tried_at < TRY_AGAIN_S:
            return False
        self._tried_at = now
        try:
            self._nvml.nvmlInit()
            self._count = int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError as error:
            self.absence = f"no NVIDIA driver answers ({error})."
            return False
        if not self._count:
            self.absence = "the NVIDIA driver lists no GPU."
            return False
        self._ready, self.absence = True, None
        return True
