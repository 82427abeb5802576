"""Peak memory while something runs: the largest resident set (CPU) or allocation (GPU)."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from gptcore.device import trim_heap

if TYPE_CHECKING:
    from torch import nn

INTERVAL_S = 0.01


MADV_DONTNEED = 4
DROP_BYTES = 24 * 2**20
"""How much may come into memory before what is not needed any more is let go of."""
UNWRITTEN = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) .* (?P<file>/.*)\n(?:[A-Z].*\n)*?Anonymous: +0 kB$", re.MULTILINE
)
"""A file's mapping in smaps, none of whose pages is this process's own."""


def drop_mapped_weights(suffix: str = ".safetensors") -> None:
    """Take the pages of mapped weight files out of this process, on Linux.

    What is looked at again comes back from the system's cache of the file. A mapping that was
    written to is left alone: what was written would be lost.
    """
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return
    library = ctypes.CDLL(None)
    for found in UNWRITTEN.finditer(smaps.read_bytes()):
        begin, end = (int(one, 16) for one in found.group(1, 2))
        if found["file"].endswith(suffix.encode()):
            library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)


def dropping() -> Callable[[float], None]:
    """Return what frees a load's or a pass's memory whenever much came in since the last time.

    A layer that was converted is there twice otherwise: as it was, in its file or on the heap, and
    as it is now. To look for what may be let go of takes 10 to 60 ms, so it is not done at every
    step.
    """
    process = psutil.Process()
    least: int = process.memory_info().rss
    """Right after the last time."""

    def drop(ratio: float) -> None:
        nonlocal least
        allowed = DROP_BYTES if ratio < 1 else 0
        if process.memory_info().rss > least + allowed:
            drop_mapped_weights()
            trim_heap()
            least = process.memory_info().rss

    return drop


class PeakMemory:
    """Watches this process while a ``with`` block lasts; ``peak_bytes`` is the largest seen.

    On a CPU that is the resident set, looked at 100 times a second, mapped weights included. On
    a CUDA device it is the largest number of bytes that torch had allocated.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.peak_bytes = 0
        self._parts: list[PeakPart] = []
        self._device = device
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._look()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._look()
        if not self._on_cuda:
            self._ended.set()
            self._thread.join()

    def part(self) -> PeakPart:
        """Return the peak from now on, until it is ended; many can share one watch."""
        made = PeakPart(self)
        self._parts.append(made)
        return made

    def leave(self, part: PeakPart) -> None:
        """End a part: what comes now is no more its own."""
        self._look()
        self._parts.remove(part)

    @property
    def _on_cuda(self) -> bool:
        return self._device.startswith("cuda")

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        if self._on_cuda:
            import torch

            seen = torch.cuda.max_memory_allocated(self._device)
        else:
            seen = self._process.memory_info().rss
        self.peak_bytes = max(self.peak_bytes, seen)
        for one in tuple(self._parts):
            one.peak_bytes = max(one.peak_bytes, seen)


class PeakPart:
    """The largest that a watch has seen since this was made."""

    def __init__(self, whole: PeakMemory) -> None:
        self.peak_bytes = 0
        self._whole = whole

    def end(self) -> None:
        """Look once more, and no further."""
        self._whole.leave(self)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of all weights, and of those that one decode step reads.

    A step multiplies with every linear layer, the head included, and picks one row of an
    embedding, which is not counted. Tensors that share storage (a tied head) count once. A
    module that packs its weights out of torch's sight says how many in ``packed_bytes``, and in
    ``looked_up_bytes`` how many of these are picked by rows. A draft counts with what it does not
    share; a step does not read it.
    """
    from torch import nn

    from gptcore.model import local

    seen: dict[int, int] = {}
    packed = step = 0
    for module in model.modules():
        held = (local(p) for p in module.parameters(recurse=False))
        own = {p.data_ptr(): p.nbytes for p in held}
        if not isinstance(module, nn.Embedding):
            step += sum(own.values())
        seen |= own
        packed += getattr(module, "packed_bytes", 0)
        step -= getattr(module, "looked_up_bytes", 0)
    extra = 0
    if (draft := getattr(model, "draft", None)) is not None:
        for module in draft.model.modules():
            seen |= {p.data_ptr(): p.nbytes for p in module.parameters(recurse=False)}
            extra += getattr(module, "packed_bytes", 0)
    return sum(seen.values()) + packed + extra, step + packed
