"""Looks at the machine once a second, keeps a quarter of an hour in memory, the rest in the store.

Two threads: one looks and must never wait, one writes to the store, which may be locked or full.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from gptcore.errors import StoreError
from gptcore.monitor.collector import Collector, Listener, ReadingStore, Series
from gptcore.records import Reading

PERIOD_S = 1.0
RING_S = 900.0
ROLL_UP_EVERY_S = 60.0
UNSAVED_LOOKS = 900
"""As many looks as wait for a store that fails; older ones are given up."""

log = logging.getLogger(__name__)


class Monitor:
    """Collectors → ring in memory → store, once a second from ``start`` to ``stop``.

    Args:
        collectors: what to look at; one that is (also) a Listener hears of every reading.
        store: where readings are kept; None keeps them in memory only.
        clock: wall time in seconds, UTC.
        monotonic: seconds that never go back, for the schedule.
    """

    ring_seconds = RING_S
    """How far back ``window`` reaches."""

    def __init__(
        self,
        collectors: Iterable[Collector | Listener],
        store: ReadingStore | None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._collectors: list[Collector] = []
        self._listeners: list[Listener] = []
        self._store = store
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._ring: dict[tuple[str, str], deque[tuple[float, float]]] = {}
        self._fetched: set[str] = set()
        self._born = clock()
        self._problems: dict[str, str] = {}
        self._unsaved: deque[Sequence[Reading]] = deque(maxlen=UNSAVED_LOOKS)
        self._something_to_save = threading.Event()
        self._rolled_up_at: float | None = None
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        for one in collectors:
            self.add(one)

    def add(self, one: Collector | Listener) -> None:
        """Look at one more collector from the next second on; or tell one more listener."""
        if isinstance(one, Collector):
            self._collectors = [*self._collectors, one]
        if isinstance(one, Listener):
            self._listeners = [*self._listeners, one]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong at the moment, a sentence each; one that ends goes away."""
        return tuple(dict(self._problems).values())

    def start(self) -> None:
        """Begin to look; a second call does nothing."""
        if self._threads:
            return
        targets = [self._look_each_second]
        if self._store is not None:
            targets.append(self._save_each_second)
        self._threads = [
            threading.Thread(target=target, name=f"monitor{target.__name__}", daemon=True)
            for target in targets
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads and save what was not saved yet; a second call does nothing."""
        self._stopped.set()
        self._something_to_save.set()
        for thread in self._threads:
            thread.join()

    def look(self) -> tuple[Reading, ...]:
        """Ask every collector once, keep what they say, and return it."""
        found: list[Reading] = []
        for one in self._collectors:
            with self._watched(one, "cannot be read"):
                found.extend(one.collect())
        usable = tuple(r for r in found if math.isfinite(r.value))
        with self._lock:
            for reading in usable:
                line = self._ring.setdefault(
                    (reading.name, reading.subject), deque(maxlen=int(RING_S / PERIOD_S))
                )
                line.append((reading.at, reading.value))
        for listener in self._listeners:
            with self._watched(listener, "cannot take readings"):
                listener.readings(usable)
        if usable and self._store is not None:
            self._unsaved.append(usable)
            self._something_to_save.set()
        return usable

    def save(self) -> None:
        """Hand all looks that wait to the store, and roll it up once a minute."""
        assert self._store is not None
        waiting = list(self._unsaved)
        try:
            self._store.add_readings([reading for look in waiting for reading in look])
            for look in waiting:
                # By identity: looks may have been given up meanwhile, oldest first.
                if self._unsaved and self._unsaved[0] is look:
                    self._unsaved.popleft()
            now = self._monotonic()
            if self._rolled_up_at is None or now - self._rolled_up_at >= ROLL_UP_EVERY_S:
                self._rolled_up_at = now
                self._store.roll_up(self._clock())
        except StoreError as error:
            self._note("store", f"Readings are not being saved: {error}")
        else:
            self._problems.pop("store", None)

    def window(self, names: Sequence[str], seconds: float) -> Series:
        """Return the lines of the last ``seconds`` (900 at most), every look of them.

        What was seen before this start of the program is fetched from the store once a name.

        Args:
            names: of the readings; every subject of each is returned.
            seconds: how far back from now.

        Returns:
            (name, subject) -> (times, values), times in seconds since 1970, ascending.
        """
        start = self._clock() - min(seconds, RING_S)
        if start < self._born:
            self._fetch([name for name in names if name not in self._fetched])
        wanted = set(names)
        lines: Series = {}
        with self._lock:
            for key, line in self._ring.items():
                if key[0] in wanted:
                    points = [point for point in line if point[0] >= start]
                    if points:
                        times, values = zip(*points, strict=True)
                        lines[key] = (times, values)
        return lines

    def _fetch(self, names: Sequence[str]) -> None:
        if not names or self._store is None:
            return
        self._fetched.update(names)
        try:
            # The last moment before the first look of this program.
            before = math.nextafter(self._born, 0.0)
            old = self._store.readings(names, self._born - RING_S, before, int(RING_S))
        except StoreError as error:
            self._note("store", f"Earlier readings cannot be read: {error}")
            return
        with self._lock:
            for key, (times, values) in old.items():
                line = self._ring.setdefault(key, deque(maxlen=int(RING_S / PERIOD_S)))
                room = int(RING_S / PERIOD_S) - len(line)
                line.extendleft(
                    reversed(list(zip(times, values, strict=True))[max(0, len(times) - room) :])
                )

    def _look_each_second(self) -> None:
        due = self._monotonic()
        while not self._stopped.wait(max(0.0, due - self._monotonic())):
            self.look()
            due = next_due(due, self._monotonic())

    def _save_each_second(self) -> None:
        while not self._stopped.is_set():
            self._something_to_save.wait()
            self._something_to_save.clear()
            self.save()

    @contextmanager
    def _watched(self, part: object, what: str) -> Iterator[None]:
        """Note what a part raises, and forget it once it no longer does."""
        who = f"{type(part).__name__} {id(part)}"
        try:
            yield
        except Exception as error:  # a plug-in may raise anything; the others must go on
            kind = type(error).__name__
            self._note(who, f"{type(part).__name__} {what}: {kind}: {error}")
        else:
            self._problems.pop(who, None)

    def _note(self, who: str, problem: str) -> None:
        if self._problems.get(who) != problem:
            log.warning(problem)
            self._problems[who] = problem


def next_due(due: float, now: float, period_s: float = PERIOD_S) -> float:
    """Return the next moment of the schedule that ``due`` belongs to, after ``now``.

    Moments that were missed are skipped, never made up for, and the schedule does not drift.
    """
    return due + period_s * max(1, math.ceil((now - due) / period_s))
