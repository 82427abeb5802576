"""What the engines served in the last second, as readings; fed by the lab, read by the monitor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from gptcore.records import Reading


class Traffic:
    """A Collector over counters: each look gives the rates since the look before.

    Args:
        queue: returns how many runs are running and how many wait.
        clock: wall time in seconds, UTC.
    """

    def __init__(self, queue: Callable[[], tuple[int, int]], clock: Callable[[], float]) -> None:
        self._queue = queue
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = {"input": 0, "output": 0, "requests": 0}
        self._looked_at: float | None = None

    def read_prompt(self, tokens: int) -> None:
        """Count a prompt that has been read."""
        with self._lock:
            self._counts["input"] += tokens

    def wrote_token(self) -> None:
        """Count one generated token."""
        with self._lock:
            self._counts["output"] += 1

    def ended(self) -> None:
        """Count a request that ended, however it did."""
        with self._lock:
            self._counts["requests"] += 1

    def collect(self) -> Iterable[Reading]:
        """Return the rates since the last look, and the queue as it is."""
        at = self._clock()
        with self._lock:
            counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        since, self._looked_at = self._looked_at, at
        running, waiting = self._queue()
        yield Reading("requests_running_count", float(running), at)
        yield Reading("requests_waiting_count", float(waiting), at)
        if since is not None and at > since:
            seconds = at - since
            yield Reading("input_tokens_per_s", counts["input"] / seconds, at)
            yield Reading("output_tokens_per_s", counts["output"] / seconds, at)
            yield Reading("requests_per_s", counts["requests"] / seconds, at)
