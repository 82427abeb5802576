"""CPU utilization of the machine and of our own processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil

from gptcore.monitor.processes import Processes, Usage
from gptcore.records import Reading


class CpuCollector:
    """The share of CPU time that was used since the look before; the first look has none.

    Args:
        processes: ours.
        clock: wall time in seconds, UTC.
        monotonic: seconds that never go back.
        cpu_times: CPU seconds of the machine by kind, over all cores, as psutil gives them.
    """

    def __init__(
        self,
        processes: Processes,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        cpu_times: Callable[[], Any] = psutil.cpu_times,
    ) -> None:
        self._processes = processes
        self._clock = clock
        self._monotonic = monotonic
        self._cpu_times = cpu_times
        self._cores = psutil.cpu_count() or 1
        self._before: tuple[float, float] | None = None
        self._usage_before: tuple[float, Mapping[str, Usage]] | None = None

    def collect(self) -> Iterable[Reading]:
        """Return ``cpu_utilization_ratio``, and ``process_cpu_utilization_ratio`` by group.

        Both are shares of all cores of the machine.
        """
        at = self._clock()
        before, self._before = self._before, _busy_and_total(self._cpu_times())
        if before is not None:
            busy, total = (now - then for now, then in zip(self._before, before, strict=True))
            if total > 0:
                yield Reading("cpu_utilization_ratio", _ratio(busy / total), at)
        yield from self._of_processes(at)

    def _of_processes(self, at: float) -> Iterable[Reading]:
        before = self._usage_before
        moment, usage = self._monotonic(), self._processes.usage()
        self._usage_before = (moment, usage)
        if before is None or moment <= before[0]:
            return
        available_s = (moment - before[0]) * self._cores
        for group, now in usage.items():
            then = before[1].get(group)
            # A process that came or went takes its CPU seconds with it: wait for the next look.
            if then is not None and then.pids == now.pids:
                ratio = _ratio((now.cpu_s - then.cpu_s) / available_s)
                yield Reading("process_cpu_utilization_ratio", ratio, at, group)


def _busy_and_total(times: Any) -> tuple[float, float]:
    # Linux counts a guest's time in user and nice already; waiting for a disk is idle.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    idle = times.idle + getattr(times, "iowait", 0.0)
    return total - idle, total


def _ratio(value: float) -> float:
    """Keep a ratio of two clocks within 0 to 1; they tick in steps of 10 ms."""
    return min(1.0, max(0.0, value))
