"""The processes that train one model together: one alone, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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

        kind = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        both = torch.tensor(values, dtype=torch.float64, device=kind)
        distributed.all_reduce(both)
        found: list[float] = both.tolist()
        return found

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that torchrun started, and give out this one's device.

    Outside torchrun there is one process, on ``device``.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(), device
        return
    import torch
    from torch import distributed

    own = device
    if device.startswith("cuda"):
        own = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(own)
    distributed.init_process_group("nccl" if own.startswith("cuda") else "gloo")
    try:
        yield Processes(distributed.get_rank(), count), own
    finally:
        distributed.destroy_process_group()


def wrapped(model: torch.nn.Module, processes: Processes) -> torch.nn.Module:
    """Return the model such that its gradients are the mean over all processes."""
    if processes.count == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model)
