"""The lock file of a device: whoever works on it holds it, and says who they are.

The lock belongs to the machine, not to a database, because two programs timing one device
measure each other. The operating system frees it when its holder dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from gptcore.errors import Cancelled, DeviceBusy

POLL_S = 0.05


def locks_dir() -> Path:
    """Return the folder of the lock files; ``GPTLAB_LOCKS`` moves it (for tests)."""
    default = Path(tempfile.gettempdir()) / f"gptlab-locks-{os.getuid()}"
    folder = Path(os.environ.get("GPTLAB_LOCKS") or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def device_lock(
    device: str,
    purpose: str,
    *,
    wait: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
    on_wait: Callable[[str], None] = lambda holder: None,
) -> Iterator[None]:
    """Hold ``device`` for the length of the block.

    Args:
        device: its id.
        purpose: shown to others who wait, such as ``generate``.
        wait: whether to wait for another holder.
        cancelled: asked while waiting.
        on_wait: told once who holds the device.

    Raises:
        DeviceBusy: it is taken and ``wait`` is False.
        Cancelled: while waiting.
    """
    stem = locks_dir() / device.replace(":", "-")
    lock = FileLock(stem.with_suffix(".lock"))
    told = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            holder = _holder(stem)
            if not wait:
                raise DeviceBusy(f"{device} is taken by {holder}: try again later.") from None
            if cancelled():
                raise Cancelled(f"Cancelled while waiting for {device}.") from None
            if not told:
                on_wait(holder)
                told = True
            time.sleep(POLL_S)
    try:
        _say_who(stem, purpose)
        yield
    finally:
        lock.release()


def _say_who(stem: Path, purpose: str) -> None:
    who = {
        "pid": os.getpid(),
        "purpose": purpose,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk only leaves the holder without a name
        stem.with_suffix(".json").write_text(json.dumps(who))


def _holder(stem: Path) -> str:
    try:
        value = json.loads(stem.with_suffix(".json").read_text())
        return f"process {value['pid']} ({value['purpose']}, since {value['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
