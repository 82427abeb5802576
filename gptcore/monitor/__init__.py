"""What the machine does, looked at once a second. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from gptcore.monitor.collector import Collector, Listener
from gptcore.monitor.cpu import CpuCollector
from gptcore.monitor.gpu import GpuCollector
from gptcore.monitor.memory import MemoryCollector
from gptcore.monitor.monitor import Monitor
from gptcore.monitor.processes import Processes

__all__ = ["Collector", "Listener", "Monitor", "gpu_collector", "machine_collectors"]


def machine_collectors(clock: Callable[[], float] = time.time) -> tuple[Collector, ...]:
    """Return the collectors that work on every machine: processor and memory.

    Args:
        clock: wall time in seconds, UTC.
    """
    processes = Processes()
    return (CpuCollector(processes, clock), MemoryCollector(processes, clock))


def gpu_collector(clock: Callable[[], float] = time.time) -> GpuCollector:
    """Return the collector of NVIDIA GPUs; ``absence`` says why it has none, if it has none.

    Args:
        clock: wall time in seconds, UTC.
    """
    import pynvml

    return GpuCollector(pynvml, clock)
