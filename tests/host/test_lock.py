"""The lock of a device, between real processes: held, named, waited for, and freed by death."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptcore.errors import Cancelled, DeviceBusy
from gptcore.host.lock import POLL_S, device_lock, locks_dir
from tests.conftest import ROOT

HOLD = """
import sys
from gptcore.host.lock import device_lock
with device_lock(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""
TAKE_TURNS = """
import sys, time
from pathlib import Path
from gptcore.host.lock import device_lock
busy = Path(sys.argv[1])
for _ in range(15):
    with device_lock("cpu", "turns"):
        busy.mkdir()
        time.sleep(0.002)
        busy.rmdir()
"""
Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def holder(data_folder: Path) -> Iterator[Hold]:
    """Start a process that holds a device until its standard input closes."""
    started: list[subprocess.Popen[str]] = []

    def start(device: str = "cpu", purpose: str = "a test") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, device, purpose],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_taken_device_says_by_whom_and_since_when(holder: Hold) -> None:
    process = holder("cpu", "generate")
    with pytest.raises(DeviceBusy) as busy, device_lock("cpu", "mine", wait=False):
        pytest.fail("two processes hold one device")
    sentence = str(busy.value)
    assert sentence.startswith(f"cpu is taken by process {process.pid} (generate, since 20")
    assert sentence.endswith("): try again later.")


def test_a_holder_killed_with_9_frees_the_device(holder: Hold) -> None:
    """Its name stays in the file beside the lock; the lock itself is the system's."""
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with device_lock("cpu", "mine", wait=False):
        pass


def test_a_holder_that_ends_frees_the_device(holder: Hold) -> None:
    holder().communicate()
    with device_lock("cpu", "mine", wait=False):
        pass


def test_who_waits_gets_the_device_when_its_holder_is_killed(holder: Hold) -> None:
    process = holder("cpu", "generate")
    told: list[str] = []
    threading.Timer(0.3, process.kill).start()
    before = time.monotonic()
    with device_lock("cpu", "mine", on_wait=told.append):
        waited = time.monotonic() - before
    assert 0.25 < waited < 5
    assert len(told) == 1
    assert told[0].startswith(f"process {process.pid} (generate, since ")


def test_a_wait_can_be_cancelled(holder: Hold) -> None:
    process = holder()
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    before = time.monotonic()
    with (
        pytest.raises(Cancelled, match=r"^Cancelled while waiting for cpu\.$"),
        device_lock("cpu", "mine", cancelled=cancelled.is_set),
    ):
        pytest.fail("two processes hold one device")
    assert 0.15 < time.monotonic() - before < 0.2 + 40 * POLL_S
    assert process.poll() is None


def test_one_device_does_not_lock_another(holder: Hold) -> None:
    holder("cuda:0")
    with device_lock("cpu", "mine", wait=False), device_lock("cuda:1", "mine", wait=False):
        pass
    with pytest.raises(DeviceBusy, match="cuda:0"), device_lock("cuda:0", "mine", wait=False):
        pass


def test_the_lock_is_given_back_after_an_error(data_folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), device_lock("cpu", "mine"):
        _ = 1 / 0
    with device_lock("cpu", "mine", wait=False):
        pass


def test_the_same_process_cannot_hold_a_device_twice(data_folder: Path) -> None:
    """Two threads that time one device measure each other as well."""
    with (
        device_lock("cpu", "first"),
        pytest.raises(DeviceBusy, match=rf"process {os.getpid()} \(first"),
        device_lock("cpu", "second", wait=False),
    ):
        pytest.fail("two of us hold one device")


def test_three_processes_take_turns(data_folder: Path, tmp_path: Path) -> None:
    """Each makes and removes one folder 15 times: two at once would fail to make it."""
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "busy")]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"pid": 3}', "\xff\x00"])
def test_a_damaged_note_about_the_holder_names_nobody(text: str, holder: Hold) -> None:
    """It is written after the lock is taken, so another process can see it half written."""
    holder()
    (locks_dir() / "cpu.json").write_bytes(text.encode("latin-1"))
    with (
        pytest.raises(DeviceBusy, match=r"^cpu is taken by another process: try again later\.$"),
        device_lock("cpu", "mine", wait=False),
    ):
        pass


def test_a_stale_note_is_replaced(data_folder: Path) -> None:
    (locks_dir() / "cpu.json").write_text('{"pid": 1, "purpose": "old", "since": "2020"}')
    with device_lock("cpu", "new"):
        assert f'"pid": {os.getpid()}, "purpose": "new"' in (locks_dir() / "cpu.json").read_text()


def test_the_folder_of_the_locks_is_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTLAB_LOCKS", str(tmp_path / "a" / "b"))
    assert locks_dir() == tmp_path / "a" / "b"
    assert stat.S_IMODE(locks_dir().stat().st_mode) == 0o700


def test_locks_belong_to_the_machine_and_not_to_a_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTLAB_LOCKS", "")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    found = set()
    for name in ("one", "two"):
        monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / name))
        found.add(locks_dir())
    assert found == {tmp_path / f"gptlab-locks-{os.getuid()}"}


def test_a_full_disk_only_leaves_the_holder_without_a_name(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with (
        device_lock("cpu", "first"),
        pytest.raises(DeviceBusy, match=r"^cpu is taken by another process"),
        device_lock("cpu", "second", wait=False),
    ):
        pytest.fail("two of us hold one device")
