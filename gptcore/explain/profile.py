"""Where the time of a decode step goes, operation by operation, with torch's own profiler.

Each operation counts with the time that it spends itself, so that the parts add up. On a CPU what
is left of the step is Python and the dispatch between operations, a row of its own. On a GPU the
operations are its kernels, and what is left is the time in which none ran.

The profiler slows the step down; its duration without the profiler stands beside it. Where the
program decodes by its native step, that is one call which no profiler looks into: it is timed
whole, and the parts are those of torch's way through the same layers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.explain.excerpt import stream_of

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

MOST_TOKENS = 512
WARM_UP = 3
STEPS = 8
TRACED = 2
"""Steps in the trace that can be downloaded."""
COVERED_RATIO = 0.9
"""The share of the step that the operations named one by one make up at least."""
BETWEEN = "Python and dispatch, between operations"
IDLE = "no kernel running"
MARK = "decode step"
NATIVE = "native packed layer"
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of operation in a step."""

    name: str
    seconds: float
    """In a step, without the operations that it calls."""
    calls: float
    """In a step."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A decode step in parts."""

    operations: tuple[Operation, ...]
    """The longest first; with the rest they add up to the step."""
    step_s: float
    """Of a profiled step, on average."""
    plain_s: tuple[float, ...]
    """Of steps without the profiler, by torch."""
    native_s: tuple[float, ...]
    """Of steps by the native step, with which this model decodes; empty where torch does."""
    trace: str
    """Chrome's trace format, as Perfetto opens it."""

    @property
    def named(self) -> int:
        """How many of the longest operations make up 90 % of the step."""
        reached = 0.0
        for count, one in enumerate(self.operations, start=1):
            reached += one.seconds
            if reached >= COVERED_RATIO * self.step_s:
                return count
        return len(self.operations)


def profile(
    model: GPT,
    ids: Sequence[int],
    *,
    check: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> Profile:
    """Return where a decode step behind a text spends its time.

    Args:
        model: on its device.
        ids: T token ids, at least 1; the text that is known before the step.
        check: called before each step; may raise to stop.
        clock: in seconds.
    """
    import torch
    from torch.profiler import ProfilerActivity, record_function

    from gptcore.engine import decode, prefill
    from gptcore.kernels.step import step_of

    on_gpu = stream_of(model).device.type == "cuda"
    room = len(ids) + 2 * WARM_UP + STEPS + STEPS + TRACED
    room = min(room, model.spec.context)
    ids = list(ids)[-(room - 1) :]
    cache = model.new_cache(room)
    prefill(model, ids, cache)

    latest = torch.tensor([ids[-1:]], device=cache.k.device)  # (1, 1)

    def by_torch() -> Tensor:
        return model(latest, cache, last_only=True)[0, -1]  # type: ignore[no-any-return]

    def native() -> Tensor:
        return decode(model, ids[-1], cache)

    def step(compute: Callable[[], Tensor] = by_torch) -> float:
        check()
        cache.truncate(min(cache.length, len(ids)))
        began = clock()
        with record_function(MARK), torch.inference_mode():
            compute().argmax().item()  # waits for the device
        return clock() - began

    native_s: tuple[float, ...] = ()
    if step_of(model) is not None:
        native_s = tuple(step(native) for _ in range(WARM_UP + STEPS))[WARM_UP:]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for _ in range(WARM_UP):
        step()
    plain_s = tuple(step() for _ in range(STEPS))
    with _native_layers_named(model):
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(STEPS):
                step()
        with torch.profiler.profile(activities=activities) as traced:
            for _ in range(TRACED):
                step()
    operations, step_s = _operations(profiler, on_gpu)
    return Profile(operations, step_s, plain_s, native_s, _trace(traced))


@contextmanager
def _native_layers_named(model: GPT) -> Iterator[None]:
    """Let the profiler see the layers that our own library computes."""
    from torch.profiler import record_function

    from gptcore.kernels.linear import NativeEmbedding, NativeLinear

    open_marks: list[Any] = []

    def begin(module: Any, given: Any) -> None:
        open_marks.append(record_function(NATIVE))
        open_marks[-1].__enter__()

    def end(module: Any, given: Any, made: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    hooks = []
    for module in model.modules():
        if isinstance(module, NativeLinear | NativeEmbedding):
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _operations(profiler: Any, on_gpu: bool) -> tuple[tuple[Operation, ...], float]:
    """Return the parts of a step, the longest first, and its duration."""
    rows = profiler.key_averages()
    (mark,) = (one for one in rows if one.key == MARK and one.cpu_time_total > 0)
    step_s = mark.cpu_time_total / 1e6 / STEPS
    found = []
    for one in rows:
        spent = one.self_device_time_total if on_gpu else one.self_cpu_time_total
        is_part = one.key != MARK and (not on_gpu or str(one.device_type).endswith("CUDA"))
        if is_part and spent > 0:
            found.append(Operation(one.key, spent / 1e6 / STEPS, one.count / STEPS))
    left = max(0.0, step_s - sum(one.seconds for one in found))
    found.append(Operation(IDLE if on_gpu else BETWEEN, left, 1.0))
    return tuple(sorted(found, key=lambda one: -one.seconds)), step_s


def _trace(profiler: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return file.read_text(encoding="utf-8")
