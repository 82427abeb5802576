"""Long work that lets others have the device between its steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from gptcore.host.lock import POLL_S, device_lock

HELD_S = 3.0
FREE_S = 3 * POLL_S
"""Long enough for everybody who waits to look."""


@contextlib.contextmanager
def shared_device(
    device: str,
    purpose: str,
    *,
    wait: bool,
    on_wait: Callable[[str], None] = lambda holder: None,
    cancelled: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Callable[[], None]]:
    """Hold ``device`` for the length of the block, and give out what to call between two steps.

    Every few seconds that call frees the device for a moment; whoever waits for it takes it, and
    the call returns when they are done. ``wait`` is about the beginning alone.

    Raises:
        DeviceBusy: it is taken at the beginning and ``wait`` is False.
        Cancelled: while waiting, from the block's beginning or from the call.
    """
    held = contextlib.ExitStack()

    def take(patient: bool) -> float:
        held.enter_context(
            device_lock(device, purpose, wait=patient, cancelled=cancelled, on_wait=on_wait)
        )
        return clock()

    since = take(wait)

    def breathe() -> None:
        nonlocal since
        if clock() - since >= HELD_S:
            held.close()
            sleep(FREE_S)
            since = take(True)

    with held:
        yield breathe
