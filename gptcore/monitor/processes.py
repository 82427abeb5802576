"""Which processes are ours: the server itself, and the hosts that it started."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

LOOK_AGAIN_S = 5.0
"""Finding one's children means reading every process of the machine, so it is not done each
second; a new host shows after so long."""
SERVER = "server"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group of processes uses at one moment."""

    cpu_s: float
    """CPU seconds used so far, over all cores."""
    resident_bytes: int
    """Resident sets added up; pages that two of them share count twice."""
    pids: tuple[int, ...]
    """Which processes these are: a sum over others cannot be compared with it."""


class Processes:
    """The server's process and its descendants, grouped by what they do.

    A host is a group of its own, named after its device: ``host cpu``. Everything else that the
    server started belongs to ``server``.

    Args:
        root: the server's process.
        monotonic: seconds that never go back.
    """

    def __init__(
        self,
        root: psutil.Process | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root or psutil.Process()
        self._monotonic = monotonic
        self._looked_at: float | None = None
        self._groups: dict[psutil.Process, str] = {}

    def usage(self) -> Mapping[str, Usage]:
        """Return what each group uses; a group that ended is left out."""
        now = self._monotonic()
        if self._looked_at is None or now - self._looked_at >= LOOK_AGAIN_S:
            self._groups, self._looked_at = self._look(), now
        found: dict[str, list[tuple[int, float, int]]] = {}
        for process, group in list(self._groups.items()):
            try:
                with process.oneshot():
                    times, memory = process.cpu_times(), process.memory_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                del self._groups[process]
            else:
                used = (process.pid, times.user + times.system, memory.rss)
                found.setdefault(group, []).append(used)
        return {
            group: Usage(
                sum(cpu_s for _, cpu_s, _ in parts),
                sum(resident for *_, resident in parts),
                tuple(sorted(pid for pid, *_ in parts)),
            )
            for group, parts in found.items()
        }

    def _look(self) -> dict[psutil.Process, str]:
        groups = {self._root: SERVER}
        try:
            children = self._root.children()
            for child in children:
                group = _group_of(child)
                groups[child] = group
                groups |= dict.fromkeys(child.children(recursive=True), group)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return groups  # one ended while we looked; the next look, in 5 s, is whole again
        return groups


def _group_of(child: psutil.Process) -> str:
    try:
        command = child.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return SERVER
    if "gptcore.host" not in command:
        return SERVER
    device = command[command.index("--device") + 1 :][:1] if "--device" in command else []
    return " ".join(["host", *device])
