"""What the monitor asks, and what it tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from gptcore.records import Reading

Series = dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]]
"""(name, subject) -> (times, values); times in seconds since 1970, ascending."""


@runtime_checkable
class Collector(Protocol):
    """Something that can be looked at once a second.

    A number that is not there is left out: a reading is never a guess and never a stand-in zero.
    Names end in their unit, ratios go from 0 to 1, and ``at`` comes from the clock that the
    collector was given.
    """

    def collect(self) -> Iterable[Reading]:
        """Return what there is to see now."""


@runtime_checkable
class Listener(Protocol):
    """Something that wants to hear of every reading."""

    def readings(self, readings: Sequence[Reading]) -> None:
        """Take the readings of one look."""


class ReadingStore(Protocol):
    """As much of ``gptcore.store.Store`` as the monitor needs; each method may raise StoreError."""

    def add_readings(self, readings: Sequence[Reading]) -> None:
        """Keep readings."""

    def readings(self, names: Sequence[str], start: float, end: float, points: int) -> Series:
        """Return the lines between two moments."""

    def roll_up(self, at: float) -> None:
        """Sum up what is older than ``at``, and forget what is old."""
