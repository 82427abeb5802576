"""Decode on CUDA without Python in between: a step is recorded once, and replayed.

An eager step of a small model is hundreds of launches, each of which takes longer to ask for than
to do. A CUDA graph asks once for all of them. What it replays has fixed shapes and addresses, so
the step looks at the whole of a cache behind a mask, and is told tokens and positions in tensors.

A text that is alone has a step over its own cache, recorded anew for every cache; a text that is
nearly at its end is not worth it. Texts side by side share a step over a pool that follows their
caches: whoever joins is copied in, and what a step adds is copied back, so that each cache always
knows its text. Sums of several rows are not those of one to the last bit, so this is for weights of
16 bits and fewer, whose rounding is larger; in fp32 the texts take turns.

Letters of shapes: B texts, S positions of a cache, G key/value heads, H query heads, D head width,
V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn import functional as F

from gptcore.model import GPT, Block, KVCache

DEVICES = ("cuda",)
"""Kinds of devices that can record."""
LEAST_STEPS = 16
"""Steps that a cache must have room for, or recording takes longer than it saves."""
WARM_UP = 3
"""Eager steps before a recording, in which kernels are chosen and buffers made."""
SHARED = (torch.bfloat16, torch.float16)
"""Types of caches whose texts may share a step."""
POOL_POSITIONS = 256
"""A pool has room for a multiple of so many positions, so that few texts want a larger one."""
MOST_POOL = 2
"""A pool takes at most so many times what the caches take that it follows."""

Replay = Callable[[], object]
T = TypeVar("T")


def record(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Record what a function does on the current CUDA device.

    Returns:
        What does it again, and the tensor in which its result then stands.

    Raises:
        RuntimeError: something in it cannot be recorded.
    """
    apart = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    apart.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(apart):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(apart)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class _Recording:
    """One more token for each row of a cache, at a position of its own."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        device, rows = cache.k.device, cache.k.shape[1]
        began = time.perf_counter()
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.positions = torch.full((rows,), cache.length, dtype=torch.int64, device=device)
        self.device: AbstractContextManager[object] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )
        with torch.inference_mode(), self.device:
            # What the mask hides counts for nothing, unless it is NaN.
            for filled in (cache.k, cache.v):
                filled[:, :, :, cache.length :].zero_()
            self.replay, self.logits = record(
                partial(step_at, model, self.ids, self.positions, cache)
            )
        self.seconds = time.perf_counter() - began


class CapturedStep:
    """One more token for the texts of a cache, which stand at one position.

    Attributes:
        seconds: what recording took.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        """Record a step.

        Raises:
            RuntimeError: an operation of the model cannot be recorded.
        """
        self._cache, self._model = ref(cache), ref(model)
        self._recording = _Recording(model, cache)
        self.seconds = self._recording.seconds

    def serves(self, model: GPT) -> bool:
        """Return whether it was recorded of this model."""
        return self._model() is model

    def __call__(self, ids: Tensor) -> Tensor:
        """Read one token of each text, (B,) int64, and return the logits after it: (B, V).

        Raises:
            ContextOverflow: the cache or the context is full.
        """
        cache, model, recording = self._cache(), self._model(), self._recording
        assert cache is not None
        assert model is not None
        model.check_room(cache.length + 1, cache)
        with torch.inference_mode(), recording.device:
            recording.ids.copy_(ids[:, None])
            recording.positions.fill_(cache.length)
            recording.replay()
            cache.length += 1
            return recording.logits.clone()


@dataclass(slots=True)
class _Slot:
    """A row of a pool, and what it knows."""

    cache: Callable[[], KVCache | None] = lambda: None
    length: int = 0
    cuts: int = 0

    def follows(self, cache: KVCache) -> bool:
        """Return whether the row is what the cache is."""
        return self.cache() is cache and (self.length, self.cuts) == (cache.length, cache.cuts)


class CapturedRows:
    """One more token for each of several caches, by one step over a pool that follows them."""

    def __init__(self, model: GPT, rows: int, capacity: int) -> None:
        """Record a step of so many rows.

        Raises:
            RuntimeError: an operation of the model cannot be recorded, or the pool does not fit.
        """
        self.capacity = capacity
        self._model = ref(model)
        self._pool = model.new_cache(capacity, rows)
        self._recording = _Recording(model, self._pool)
        self._slots = [_Slot() for _ in range(rows)]

    def __call__(self, ids: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """Read one token into each cache, (B,) int64, and return the logits after it: (B, V).

        Raises:
            ContextOverflow: a cache or the context is full; nothing was read then.
        """
        model, recording, pool = self._model(), self._recording, self._pool
        assert model is not None
        for cache in caches:
            model.check_room(cache.length + 1, cache)
        with torch.inference_mode(), recording.device:
            rows = [self._row(cache, caches) for cache in caches]
            # A row without a text writes at its own end, behind the mask of whoever comes.
            ids_of = torch.zeros(len(self._slots), 1, dtype=torch.int64)
            positions = torch.full((len(self._slots),), self.capacity - 1)
            ids_of[rows, 0] = ids.to(ids_of.device)
            positions[rows] = torch.tensor([cache.length for cache in caches])
            recording.ids.copy_(ids_of)
            recording.positions.copy_(positions)
            recording.replay()
            for row, cache in zip(rows, caches, strict=True):
                at = cache.length
                cache.k[:, 0, :, at] = pool.k[:, row, :, at]
                cache.v[:, 0, :, at] = pool.v[:, row, :, at]
                cache.length += 1
                self._slots[row].length = cache.length
            return recording.logits[rows]

    def _row(self, cache: KVCache, caches: Sequence[KVCache]) -> int:
        """Return the row that follows a cache; what it does not know is copied in."""
        row = next((i for i, slot in enumerate(self._slots) if slot.cache() is cache), None)
        if row is None:
            taken = {id(one) for one in caches}
            row = next(i for i, slot in enumerate(self._slots) if id(slot.cache()) not in taken)
        if not self._slots[row].follows(cache):
            known = cache.length
            self._pool.k[:, row, :, :known] = cache.k[:, 0, :, :known]
            self._pool.v[:, row, :, :known] = cache.v[:, 0, :, :known]
            self._slots[row] = _Slot(ref(cache), known, cache.cuts)
        return row


_steps: WeakKeyDictionary[KVCache, CapturedStep | str] = WeakKeyDictionary()
"""What was recorded for a cache, or why nothing was."""
_rows: WeakKeyDictionary[GPT, dict[int, CapturedRows]] = WeakKeyDictionary()
"""What was recorded of a model for several texts, by how many there may be."""
_refused: WeakKeyDictionary[GPT, str] = WeakKeyDictionary()
"""Why a model could not be recorded; it is not tried again."""


def captured_step(model: GPT, cache: KVCache) -> CapturedStep | None:
    """Return what decodes with a cache, recorded now if that was not done.

    None where torch's operations are asked for one by one; ``told`` says why.
    """
    if cache not in _steps:
        reason = why_not(model, cache)
        if reason is None:
            _steps[cache] = _recorded(model, lambda: CapturedStep(model, cache))
        else:
            _steps[cache] = reason
    known = _steps[cache]
    return known if isinstance(known, CapturedStep) and known.serves(model) else None


def captured_rows(model: GPT, caches: Sequence[KVCache]) -> CapturedRows | None:
    """Return what decodes several texts in one step, None where they have to take turns."""
    if len(caches) < 2:
        return None
    if any(why_not(model, cache, steps=1) or cache.k.dtype not in SHARED for cache in caches):
        return None
    rows = 1 << (len(caches) - 1).bit_length()
    wanted = -(-max(cache.capacity for cache in caches) // POOL_POSITIONS) * POOL_POSITIONS
    capacity = min(wanted, model.spec.context)
    if rows * capacity > MOST_POOL * max(
        sum(cache.capacity for cache in caches), len(caches) * POOL_POSITIONS
    ):
        return None
    known = _rows.setdefault(model, {})
    if rows not in known or known[rows].capacity < capacity:
        known.pop(rows, None)  # its pool makes room first
        made = _recorded(model, lambda: CapturedRows(model, rows, capacity))
        if isinstance(made, str):
            return None
        known[rows] = made
    return known[rows]


def _recorded(model: GPT, make: Callable[[], T]) -> T | str:
    """Return what was made, or why it could not be, which is noted for the model."""
    try:
        return make()
    except RuntimeError as error:
        said = str(error).strip().splitlines()
        _refused[model] = (
            f"a step could not be recorded ({said[0][:200] if said else 'no reason'})."
        )
        return _refused[model]


def told(cache: KVCache) -> str | None:
    """Return what decodes with a cache, in words; None where nobody asked for a recorded step."""
    known = _steps.get(cache)
    if known is None or cache.k.device.type not in DEVICES:
        return None
    if isinstance(known, str):
        return f"torch: {known}"
    return f"CUDA graph, recorded in {1000 * known.seconds:.0f} ms"


def why_not(model: GPT, cache: KVCache, steps: int = LEAST_STEPS) -> str | None:
    """Return why no step is recorded, or None where one is and the cache has room for ``steps``."""
    if cache.k.device.type not in DEVICES:
        return f"steps are recorded on {' and '.join(DEVICES)}, not on {cache.k.device.type}."
    if not model.native:
        return "torch's operations were asked for, one by one."
    if type(cache) is not KVCache:
        return f"no step is recorded over a {type(cache).__name__}."
    if not model.divisible:
        return "a pass put something in the place of the forward function."
    if cache.capacity - cache.length < steps:
        return f"for fewer than {steps} tokens recording a step takes longer than it saves."
    return _refused.get(model)


def step_at(model: GPT, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """Return the logits after one more token a text, (B, V), without a look at ``cache.length``.

    Args:
        model: on its device.
        ids: (B, 1) int64.
        positions: (B,) int64, where each of these tokens stands.
        cache: of B texts; its numbers behind their positions are masked, and must be finite.
    """
    x, where = model.enter_at(ids, positions, cache.capacity)
    whole = cast("KVCache", _Whole(cache, positions))
    for layer, block in enumerate(model.blocks):
        x = cast("Block", block)(x, where, whole, layer)
    logits: Tensor = model.head(model.norm(x))
    return logits[:, 0]


class _Whole:
    """A cache of which all positions are looked at, behind a mask."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self._cache, self._positions = cache, positions
        self._rows = torch.arange(len(positions), device=positions.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Write (B, G, 1, D) at the positions, and return what (B, H, 1, D) find in all."""
        known_k, known_v = self._cache.k[layer], self._cache.v[layer]  # (B, G, S, D)
        known_k[self._rows, :, self._positions] = k[:, :, 0]
        known_v[self._rows, :, self._positions] = v[:, :, 0]
        batch, heads, _, width = q.shape
        # The queries that share a key head stand where positions would: see ``model.attend``.
        q = q.reshape(batch, known_k.shape[1], -1, width)
        y = F.scaled_dot_product_attention(q, known_k, known_v, attn_mask=mask)
        return y.reshape(batch, heads, 1, width)
