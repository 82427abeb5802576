"""The ring, the schedule, and what happens when a collector or the store fails."""

import logging
import threading
import time
from pathlib import Path

import pytest

from gptcore.monitor import Monitor
from gptcore.monitor.monitor import ROLL_UP_EVERY_S, next_due
from gptcore.monitor.traffic import Traffic
from gptcore.records import Reading
from gptcore.store import open_store
from tests.monitor.fake_machine import Clock, Counter, ListStore

LINE = ("looks_count", "")


def _monitor(clock: Clock, store: ListStore | None = None, *more: object) -> Monitor:
    return Monitor([Counter(clock), *more], store, clock, clock)


def _look(monitor: Monitor, clock: Clock, times: int) -> None:
    for _ in range(times):
        monitor.look()
        clock.now += 1.0


def test_a_window_holds_the_last_seconds_of_what_it_is_asked_for() -> None:
    clock = Clock()
    monitor = _monitor(clock)
    _look(monitor, clock, 100)
    times, values = monitor.window(["looks_count", "other_count"], 10)[LINE]
    assert values == tuple(float(n) for n in range(91, 101))
    assert times == tuple(clock.now - 10 + i for i in range(10))
    assert monitor.window(["other_count"], 10) == {}


def test_the_ring_keeps_a_quarter_of_an_hour_and_no_more() -> None:
    clock = Clock()
    monitor = _monitor(clock)
    _look(monitor, clock, 1000)
    assert len(monitor.window(["looks_count"], 10_000)[LINE][0]) == 900
    clock.now += 600
    assert len(monitor.window(["looks_count"], 10_000)[LINE][0]) == 300
    clock.now += 600
    assert monitor.window(["looks_count"], 10_000) == {}


def test_a_window_begins_with_what_the_store_knows_from_before() -> None:
    clock, store = Clock(), ListStore()
    store.kept = [Reading("looks_count", -float(i), clock.now - i) for i in range(2000, 0, -1)]
    monitor = _monitor(clock, store)
    _look(monitor, clock, 3)
    times, values = monitor.window(["looks_count"], 900)[LINE]
    assert values[-3:] == (1.0, 2.0, 3.0)
    assert values[-4] == -1.0
    assert len(times) == 900
    assert list(times) == sorted(set(times))
    monitor.save()
    assert monitor.window(["looks_count"], 900)[LINE] == (times, values)


def test_every_look_reaches_the_store_once_and_in_order() -> None:
    clock, store = Clock(), ListStore()
    monitor = _monitor(clock, store)
    for _ in range(5):
        _look(monitor, clock, 3)
        monitor.save()
    assert [one.value for one in store.kept] == [float(n) for n in range(1, 16)]


def test_the_store_is_rolled_up_once_a_minute() -> None:
    clock, store = Clock(), ListStore()
    monitor = _monitor(clock, store)
    for _ in range(181):
        _look(monitor, clock, 1)
        monitor.save()
    assert len(store.rolled_up) == 181 // ROLL_UP_EVERY_S + 1


def test_a_collector_that_raises_is_reported_once_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    broken = Counter(clock, "broken_count")
    broken.error = OSError("no such sensor")
    monitor = _monitor(clock, None, broken)
    with caplog.at_level(logging.WARNING):
        _look(monitor, clock, 10)
    assert monitor.problems == ("Counter cannot be read: OSError: no such sensor",)
    assert len(caplog.records) == 1
    assert len(monitor.window(["looks_count"], 60)[LINE][0]) == 10


def test_a_problem_that_ends_goes_away() -> None:
    clock = Clock()
    monitor = Monitor([broken := Counter(clock)], None, clock, clock)
    broken.error = OSError()
    _look(monitor, clock, 1)
    assert monitor.problems
    broken.error = None
    _look(monitor, clock, 1)
    assert monitor.problems == ()


def test_a_store_that_fails_does_not_stop_the_ring_and_gets_everything_later() -> None:
    clock, store = Clock(), ListStore()
    monitor = _monitor(clock, store)
    store.problem = "The disk is full: free some space."
    for _ in range(20):
        _look(monitor, clock, 1)
        monitor.save()
    assert monitor.problems == ("Readings are not being saved: The disk is full: free some space.",)
    assert len(monitor.window(["looks_count"], 60)[LINE][0]) == 20
    store.problem = None
    monitor.save()
    assert [one.value for one in store.kept] == [float(n) for n in range(1, 21)]
    assert monitor.problems == ()


def test_a_store_that_fails_for_hours_does_not_fill_the_memory() -> None:
    clock, store = Clock(), ListStore()
    monitor = _monitor(clock, store)
    store.problem = "no"
    _look(monitor, clock, 2000)
    store.problem = None
    monitor.save()
    assert [one.value for one in store.kept] == [float(n) for n in range(1101, 2001)]


def test_a_value_that_is_not_finite_is_left_out() -> None:
    clock = Clock()

    class Odd:
        def collect(self) -> list[Reading]:
            return [Reading("odd_ratio", value, clock()) for value in (float("nan"), 0.5)]

    assert [one.value for one in Monitor([Odd()], None, clock, clock).look()] == [0.5]


def test_a_listener_hears_every_reading_and_one_added_later_too() -> None:
    clock = Clock()
    heard: list[float] = []

    class Listener:
        def readings(self, readings: tuple[Reading, ...]) -> None:
            heard.extend(one.value for one in readings)

    monitor = _monitor(clock, None, Listener())
    monitor.add(Listener())
    _look(monitor, clock, 2)
    assert heard == [1.0, 1.0, 2.0, 2.0]


def test_a_listener_that_raises_is_reported_and_stops_nobody() -> None:
    clock = Clock()

    class Broken:
        def readings(self, readings: tuple[Reading, ...]) -> None:
            raise RuntimeError("deaf")

    monitor = _monitor(clock, None, Broken())
    _look(monitor, clock, 3)
    assert monitor.problems == ("Broken cannot take readings: RuntimeError: deaf",)
    assert len(monitor.window(["looks_count"], 60)[LINE][0]) == 3


@pytest.mark.parametrize(
    ("due", "now", "expected"),
    [
        (10.0, 10.0, 11.0),
        (10.0, 10.4, 11.0),
        (10.0, 11.0, 11.0),
        (10.0, 11.2, 12.0),
        (10.0, 17.9, 18.0),
        (10.0, 9.9, 11.0),
    ],
)
def test_the_schedule_does_not_drift_and_skips_what_it_missed(
    due: float, now: float, expected: float
) -> None:
    assert next_due(due, now) == expected


def test_a_thousand_late_looks_stay_on_the_second() -> None:
    due = 5.5
    for _ in range(1000):
        due = next_due(due, due + 0.3)
    assert due == 1005.5


def test_a_real_monitor_lands_each_point_within_two_seconds_and_stops(tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path / 'lab.db'}") as store:
        monitor = Monitor([Traffic(lambda: (1, 0), time.time)], store)
        monitor.start()
        monitor.start()
        began = time.time()
        try:
            while time.time() < began + 5.0:
                line = store.readings(["requests_running_count"], began - 1, began + 10)
                if line:
                    break
                time.sleep(0.02)
            assert time.time() - line["requests_running_count", ""][0][0] < 2.0
        finally:
            monitor.stop()
            monitor.stop()
        kept = store.readings(["requests_running_count"], began - 1, began + 10)
        assert len(kept["requests_running_count", ""][0]) >= 1
        assert monitor.problems == ()
    assert not [one for one in threading.enumerate() if one.name.startswith("monitor")]


def test_a_store_that_hangs_does_not_hold_up_the_looks() -> None:
    store, released = ListStore(), threading.Event()
    store.add_readings = lambda readings: released.wait(20)  # type: ignore[method-assign]
    counter = Counter(Clock())
    monitor = Monitor([counter], store)
    monitor.start()
    try:
        time.sleep(2.3)
        assert counter.looks >= 3
    finally:
        released.set()
        monitor.stop()
