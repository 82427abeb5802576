"""The same numbers for Prometheus: vLLM's names and meanings under the prefix ``gptlab_``.

Source: vLLM, "Production metrics"; units and suffixes as prometheus.io/docs/practices/naming.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector as RegistryCollector

from gptcore.records import FinishReason, Reading, Run, RunState

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

PREFIX = "gptlab"
STALE_S = 10.0
"""A gauge that was not read for so long is left out: a GPU that went has no value any more."""

GAUGES = {
    "requests_running_count": ("num_requests_running", "Requests that an engine works on."),
    "requests_waiting_count": ("num_requests_waiting", "Requests that wait in a queue."),
    "cpu_utilization_ratio": ("cpu_utilization_ratio", "Share of all CPU cores in use, 0 to 1."),
    "process_cpu_utilization_ratio": (
        "process_group_cpu_utilization_ratio",
        "Share of all CPU cores that the server or a host uses, 0 to 1.",
    ),
    "memory_used_bytes": ("memory_used_bytes", "Main memory in use."),
    "memory_total_bytes": ("memory_total_bytes", "Main memory that the program may use."),
    "process_resident_bytes": (
        "process_group_resident_memory_bytes",
        "Resident memory of the server or a host, with its child processes.",
    ),
    "gpu_utilization_ratio": (
        "gpu_utilization_ratio",
        "Share of time in which at least one kernel ran (NVML), 0 to 1.",
    ),
    "gpu_memory_used_bytes": ("gpu_memory_used_bytes", "GPU memory in use."),
    "gpu_memory_total_bytes": ("gpu_memory_total_bytes", "GPU memory in all."),
    "gpu_power_watts": ("gpu_power_watts", "Power that the GPU draws."),
    "gpu_temperature_celsius": ("gpu_temperature_celsius", "Temperature of the GPU."),
}
"""Reading -> (name behind the prefix, help). Rates are left to Prometheus, which has counters."""

LABELS = {"gpu": "gpu", "process": "process"}
"""What the subject of a reading is called, by the first word of its name."""

# fmt: off
TTFT_BUCKETS_S = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0,
)
ITL_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0,
)
E2E_BUCKETS_S = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0,
)
# fmt: on

# Each counter would bring a second series with the moment of its creation, which is of no use here.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Counts what the lab and the monitor tell it, in a registry of its own.

    Args:
        clock: wall time in seconds, UTC, the same that readings carry.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._registry = CollectorRegistry()
        self._ttft = self._histogram(
            "time_to_first_token_seconds",
            "From the request to its first token, queue included.",
            TTFT_BUCKETS_S,
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds",
            "Gaps between consecutive generated tokens of a request.",
            ITL_BUCKETS_S,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds",
            "From the request to its last token.",
            E2E_BUCKETS_S,
        )
        self._queued = self._histogram(
            "request_queue_time_seconds", "Time that a request waited for its turn.", E2E_BUCKETS_S
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens read.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._success = self._counter(
            "request_success", "Requests that succeeded, by why they ended.", "finished_reason"
        )
        self._errors = self._counter(
            "request_errors", "Requests that failed or were interrupted, by kind.", "kind"
        )
        self._cancelled = self._counter("request_cancelled", "Requests that somebody stopped.")
        for reason in (FinishReason.LENGTH, FinishReason.STOP, FinishReason.EOS):
            self._success.labels(reason.value)  # shows 0, so that a rate has a beginning
        self._gauges = _Gauges(clock)
        self._registry.register(self._gauges)

    def finished(self, run: Run, itl_s: Sequence[float]) -> None:
        """Count a generation that ended, however it did.

        Args:
            run: in a final state.
            itl_s: the gaps between its consecutive generated tokens.
        """
        numbers = run.numbers
        if numbers is not None:
            self._prompt.inc(numbers.prompt_tokens)
            self._generated.inc(numbers.new_tokens)
            self._queued.observe(numbers.queue_s)
            if numbers.ttft_s is not None:
                self._ttft.observe(numbers.ttft_s)
            for gap in itl_s:
                self._itl.observe(gap)
        if run.state is RunState.DONE:
            if numbers is not None:
                self._e2e.observe(numbers.e2e_s)
            reason = numbers.finish_reason if numbers else "unknown"
            self._success.labels(reason).inc()
        elif run.state is RunState.CANCELLED:
            self._cancelled.inc()
        else:
            self._errors.labels(run.error_kind or str(run.state)).inc()

    def queue(self, running: int, waiting: int) -> None:
        """Take how many requests run and wait now."""
        self._gauges.take("requests_running_count", "", float(running))
        self._gauges.take("requests_waiting_count", "", float(waiting))

    def readings(self, readings: Iterable[Reading]) -> None:
        """Take what the monitor saw; a name that is not in ``GAUGES`` is none of ours."""
        for reading in readings:
            if reading.name in GAUGES:
                self._gauges.take(reading.name, reading.subject, reading.value, reading.at)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format; its type is ``CONTENT_TYPE_LATEST``."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help: str, buckets_s: Sequence[float]) -> Histogram:
        return Histogram(
            f"{PREFIX}_{name}", help, buckets=tuple(buckets_s), registry=self._registry
        )

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", help, labels, registry=self._registry)


class _Gauges(RegistryCollector):
    """The last value of each reading, for as long as it is fresh."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, dict[str, tuple[float, float]]] = {}

    def take(self, name: str, subject: str, value: float, at: float | None = None) -> None:
        """Keep a value until a newer one comes."""
        at = self._clock() if at is None else at
        with self._lock:
            self._last.setdefault(name, {})[subject] = (at, value)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return what Prometheus' registry asks for."""
        oldest = self._clock() - STALE_S
        with self._lock:
            last = {name: dict(subjects) for name, subjects in self._last.items()}
        for name, (shown, help) in GAUGES.items():
            label = LABELS.get(name.partition("_")[0])
            family = GaugeMetricFamily(f"{PREFIX}_{shown}", help, labels=[label] if label else [])
            for subject, (at, value) in sorted(last.get(name, {}).items()):
                if at >= oldest:
                    family.add_metric([subject] if label else [], value)
            if family.samples:
                yield family
