"""The processes that do one piece of work together: one alone, or those that were started for it.

torchrun starts them, on one machine or on several, or ``started`` does, on this one. Those of one
machine talk over its loopback device alone, unless ``GLOO_SOCKET_IFNAME`` or ``NCCL_SOCKET_IFNAME``
says otherwise, and those that ``started`` starts find each other by a file.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.errors import GptcoreError, HostLost, InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

COUNT, RANK, LOCAL_RANK, LOCAL_COUNT = "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
"""What torchrun tells its processes in the environment."""
MEETING = "GPTLAB_MEETING"
"""Likewise the file by which processes find each other that torchrun did not start."""
MOST = 64
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
LAST_WORDS = 2000
"""Bytes of what a process said last."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, speaks and decides."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """Return this process's part of what all of them do together."""
        return rows[self.rank :: self.count]

    def sums(self, *values: float) -> list[float]:
        """Return each value summed over all processes."""
        if self.count == 1:
            return list(values)
        import torch
        from torch import distributed

        both = torch.tensor(values, dtype=torch.float64, device=_kind())
        distributed.all_reduce(both)
        found: list[float] = both.tolist()
        return found

    def agreed(self, text: str) -> str:
        """Return the first process's text in all of them."""
        if self.count == 1:
            return text
        import torch

        mine = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = self._from_first(torch.tensor([len(mine)]))
        room = mine if self.first else torch.empty(int(size), dtype=torch.uint8)
        return bytes(self._from_first(room).tolist()).decode()

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()

    def _from_first(self, numbers: Tensor) -> Tensor:
        from torch import distributed

        there = numbers.to(_kind())
        distributed.broadcast(there, src=0)
        return there.cpu()


def _kind() -> str:
    from torch import distributed

    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def several() -> bool:
    """Return whether this process was started as one of several."""
    return int(os.environ.get(COUNT, "1")) > 1


def is_first() -> bool:
    """Return whether this process is the first of them, or alone."""
    return int(os.environ.get(RANK, "0")) == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that were started with this one, and give out this one's device.

    Where it was started alone there is one process, on ``device``.
    """
    if not several():
        yield Processes(), device
        return
    import torch
    from torch import distributed

    count, rank = int(os.environ[COUNT]), int(os.environ[RANK])
    own = device
    if device.startswith("cuda"):
        own = f"cuda:{os.environ[LOCAL_RANK]}"
        torch.cuda.set_device(own)
    if os.environ.get(LOCAL_COUNT) == os.environ[COUNT]:
        for name in INTERFACES:
            os.environ.setdefault(name, LOOPBACK)
    meeting = os.environ.get(MEETING)
    distributed.init_process_group(
        "nccl" if own.startswith("cuda") else "gloo",
        init_method=f"file://{meeting}" if meeting else "env://",
        rank=rank,
        world_size=count,
    )
    try:
        yield Processes(rank, count), own
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def started(count: int, words: Sequence[str]) -> Iterator[None]:
    """Start ``python -m gptcore`` with these words, so often that with this process they are many.

    They end with the block at the latest. Their signals are this process's to answer.

    Args:
        count: of the processes, this one among them.
        words: the command that this process has, too.

    Raises:
        InvalidInput: too many, or fewer than one.
        HostLost: the work broke because one of them ended; its last words are in the sentence.
    """
    if not 1 <= count <= MOST:
        raise InvalidInput(f"{count:,} processes are asked for; 1 to {MOST} can be.")
    if count == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="gptlab-meeting-") as folder:
        shared = {COUNT: str(count), LOCAL_COUNT: str(count), MEETING: f"{folder}/meeting"}
        os.environ |= {**shared, RANK: "0", LOCAL_RANK: "0"}
        others = [_other(rank, Path(folder), shared, words) for rank in range(1, count)]
        try:
            yield
        except GptcoreError:
            raise
        except Exception as error:
            _say_who_ended(others, Path(folder), error)
            raise
        finally:
            for name in (*shared, RANK, LOCAL_RANK):
                del os.environ[name]
            for one in others:
                one.terminate()
            for one in others:
                try:
                    one.wait(10)
                except subprocess.TimeoutExpired:
                    one.kill()
                    one.wait()


def _other(
    rank: int, folder: Path, shared: dict[str, str], words: Sequence[str]
) -> subprocess.Popen[bytes]:
    with (folder / f"said-{rank}").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "gptcore", *words],
            env={**os.environ, **shared, RANK: str(rank), LOCAL_RANK: str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )


def _say_who_ended(
    others: Sequence[subprocess.Popen[bytes]], folder: Path, error: Exception
) -> None:
    for rank, one in enumerate(others, start=1):
        try:
            status = one.wait(5)
        except subprocess.TimeoutExpired:
            continue
        said = (folder / f"said-{rank}").read_bytes()[-LAST_WORDS:].decode(errors="replace")
        last = said.strip().rpartition("\n")[2] or "it said nothing"
        raise HostLost(
            f"Process {rank + 1} of {len(others) + 1} ended with status {status}: {last}"
        ) from error
