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
MAPPED = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .* /.*\.safetensors$", re.MULTILINE)
"""A weight file's mapping in /proc/self/maps, and its first line in smaps."""
UNWRITTEN = re.compile(MAPPED.pattern + rb"\n(?:[A-Z].*\n)*?Anonymous: +0 kB$", re.MULTILINE)
"""Such a mapping in smaps, none of whose pages is this process's own."""


class MappedWeights:
    """The mapped weight files of this process on Linux, whose pages can be let go of.

    What is looked at again comes back from the system's cache of the file. A mapping that was
    written to before is left alone, since what was written would be lost; none may be written to
    while this is used. To look for that takes 10 to 60 ms, so it is done again only where the
    mappings changed.
    """

    def __init__(self) -> None:
        self._mapped: list[tuple[int, int]] = []
        self._unwritten: list[tuple[int, int]] = []

    def drop(self) -> None:
        """Take their pages out of this process."""
        mapped = self._ranges("maps", MAPPED)
        if mapped != self._mapped:
            self._unwritten = self._ranges("smaps", UNWRITTEN)
            self._mapped = mapped
        library = ctypes.CDLL(None)
        for begin, end in self._unwritten:
            library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)

    def own_bytes(self, model: nn.Module) -> int:
        """Return the bytes of a model's weights that are in no mapped file."""
        ranges = self._ranges("maps", MAPPED)
        there = {
            one.data_ptr(): one.nbytes
            for one in model.parameters()
            if any(begin <= one.data_ptr() < end for begin, end in ranges)
        }
        return weight_bytes(model)[0] - sum(there.values())

    def _ranges(self, name: str, pattern: re.Pattern[bytes]) -> list[tuple[int, int]]:
        file = Path("/proc/self", name)
        found = pattern.findall(file.read_bytes()) if file.exists() else []
        return [(int(begin, 16), int(end, 16)) for begin, end in found]


def dropping() -> Callable[[float], None]:
    """Return what frees a load's or a pass's memory whenever much came in since the last time.

    A layer that was converted is there twice otherwise: as it was, in its file or on the heap, and
    as it is now.
    """
    process, mapped = psutil.Process(), MappedWeights()
    least: int = process.memory_info().rss
    """Right after the last time."""

    def drop(ratio: float) -> None:
        nonlocal least
        allowed = DROP_BYTES if ratio < 1 else 0
        if process.memory_info().rss > least + allowed:
            mapped.drop()
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
        self._look()
        if not self._on_cuda:
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
