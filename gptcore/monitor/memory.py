"""Memory of the machine and of our own processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from gptcore.device import free_bytes, memory_limit_bytes
from gptcore.monitor.processes import Processes
from gptcore.records import Reading


class MemoryCollector:
    """Main memory, as ``gptcore.device`` counts it when it says whether a model fits.

    Args:
        processes: ours.
        clock: wall time in seconds, UTC.
        free: bytes that can be had now, None where unknown.
        total: bytes that this program may use at most.
    """

    def __init__(
        self,
        processes: Processes,
        clock: Callable[[], float] = time.time,
        free: Callable[[], int | None] = lambda: free_bytes("cpu"),
        total: Callable[[], int] = memory_limit_bytes,
    ) -> None:
        self._processes = processes
        self._clock = clock
        self._free = free
        self._total = total

    def collect(self) -> Iterable[Reading]:
        """Return ``memory_used_bytes``, ``memory_total_bytes``, ``process_resident_bytes``."""
        at = self._clock()
        free, total = self._free(), self._total()
        yield Reading("memory_total_bytes", float(total), at)
        if free is not None:
            yield Reading("memory_used_bytes", float(max(0, total - free)), at)
        for group, usage in self._processes.usage().items():
            yield Reading("process_resident_bytes", float(usage.resident_bytes), at, group)
