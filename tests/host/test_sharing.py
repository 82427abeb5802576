"""Long work gives way to whoever waits, and takes the device again behind them."""

import threading
from pathlib import Path

import pytest

from gptcore.errors import Cancelled, DeviceBusy
from gptcore.host.lock import device_lock
from gptcore.host.sharing import HELD_S, shared_device

pytestmark = pytest.mark.usefixtures("data_folder")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def taken(device: str = "cpu") -> bool:
    """Return whether somebody holds the device."""
    try:
        with device_lock(device, "look", wait=False):
            return False
    except DeviceBusy:
        return True


def test_it_is_held_until_the_time_is_up_and_free_for_a_moment_then() -> None:
    clock, seen = Clock(), []

    def sleep(seconds: float) -> None:
        seen.append(taken())

    with shared_device("cpu", "train", wait=False, clock=clock, sleep=sleep) as breathe:
        assert taken()
        breathe()
        assert seen == []
        clock.now += HELD_S
        breathe()
        assert seen == [False]
        assert taken()
        breathe()
        assert seen == [False]
    assert not taken()


def test_whoever_waits_gets_it_and_the_work_goes_on_behind_them() -> None:
    clock, order = Clock(), []

    def other() -> None:
        with device_lock("cpu", "generate"):
            order.append("generate")

    with shared_device("cpu", "train", wait=False, clock=clock) as breathe:
        waiting = threading.Thread(target=other)
        waiting.start()
        order.append("train")
        while waiting.is_alive():
            clock.now += HELD_S
            breathe()
        order.append("train")
    assert order == ["train", "generate", "train"]


def test_a_device_that_is_taken_is_said_or_waited_for(tmp_path: Path) -> None:
    told: list[str] = []
    with device_lock("cpu", "generate"):
        with (
            pytest.raises(DeviceBusy, match="generate"),
            shared_device("cpu", "train", wait=False),
        ):
            raise AssertionError("it was not held")
        with (
            pytest.raises(Cancelled),
            shared_device(
                "cpu", "train", wait=True, on_wait=told.append, cancelled=lambda: bool(told)
            ),
        ):
            raise AssertionError("it was not held")
    assert len(told) == 1
    assert "generate" in told[0]


def test_work_that_is_stopped_while_it_gives_way_does_not_hold_the_device() -> None:
    clock = Clock()
    stop: list[bool] = []
    held = threading.Event()
    done = threading.Event()

    def other() -> None:
        with device_lock("cpu", "generate"):
            held.set()
            done.wait(10)

    waiting = threading.Thread(target=other)

    def sleep(seconds: float) -> None:
        waiting.start()
        assert held.wait(10)
        stop.append(True)

    with shared_device(
        "cpu", "train", wait=False, clock=clock, sleep=sleep, cancelled=lambda: bool(stop)
    ) as breathe:
        clock.now += HELD_S
        with pytest.raises(Cancelled):
            breathe()
    done.set()
    waiting.join()
    assert not taken()
