"""What linear layers and attention reach on this machine, by precision: one JSON object.

``python -m gptcore.measure.machine DEVICE THREADS``. A model of this program, passes applied, takes
decode steps as an engine takes them (with the native step, where there is one): behind few
positions they are bound by reading weights, behind many by reading the cache too. Many positions
at once are bound by arithmetic. What a block takes beside that is timed on one too small to have
any arithmetic, for one position and for several.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from gptcore.device import cpu_name, torch_version
from gptcore.recipe import Recipe, place
from gptcore.spec import SMOLLM2_135M, ModelSpec, gpt

if TYPE_CHECKING:
    from torch import nn

    from gptcore.model import GPT

WIDTH, HIDDEN, LAYERS = 1024, 4096, 12
TOKENS = 128
KNOWN = 2048
STEPS = 4
SEVERAL = 72
"""More than the native step takes at once where torch reads long prompts."""
SMALL = gpt(LAYERS, 64, 1, context=128, vocabulary=64)
SMALL_ROTARY = SMOLLM2_135M.model_copy(
    update={"layers": LAYERS, "width": 64, "heads": 3, "kv_heads": 1, "hidden": 256,
            "head_width": 64, "context": 128, "vocabulary": 64}
)  # fmt: skip
REPETITIONS = 7
BUDGET_S = 1.0
"""A slow precision is timed less often; the best time of at least two counts."""
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Times work on a device.

    Attributes:
        device: waited for before each look at the clock.
        clock: seconds; one of processor time tells what one thread takes beside other work.
    """

    device: str
    clock: Callable[[], float] = time.perf_counter

    def best(self, work: Callable[[], object]) -> float:
        """Return the least seconds of several tries after one to warm up."""
        work()
        found: list[float] = []
        began = self._now()
        while len(found) < 2 or (len(found) < REPETITIONS and self._now() - began < BUDGET_S):
            started = self._now()
            work()
            found.append(self._now() - started)
        return min(found)

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
        elif self.device == "mps":
            import torch

            torch.mps.synchronize()
        return self.clock()


def measure(
    device: str, threads: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, object]:
    """Return the fields of ``plan.peaks.MachinePeaks``."""
    import torch

    began = time.monotonic()
    watch = Stopwatch(device, clock)
    placement, _ = place("fp32", device, threads, Recipe())
    torch.set_num_threads(placement.resolved_threads)
    rates = {}
    for precision in PRECISIONS:
        try:
            rates[precision] = rates_of(precision, watch, threads)
        except (RuntimeError, ValueError, NotImplementedError):
            continue  # this device has no such arithmetic
    with torch.inference_mode():
        plain, more = (torch.ones(16 * 2**20, device=device) for _ in range(2))
        stream = 2 * plain.nbytes / watch.best(lambda: torch.add(plain, 1.0, out=more))
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    return {
        "rates": rates,
        "sampling_s_per_id": sampling_s(Stopwatch("cpu", clock)) / 50257,
        "stream_bytes_per_s": stream,
        "device": device,
        "device_name": name or "CPU",
        "threads": placement.resolved_threads,
        "torch": torch_version() or "",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,
    }


def rates_of(precision: str, watch: Stopwatch, threads: int) -> dict[str, float]:
    """Return the fields of ``plan.peaks.Rates``.

    Raises:
        ValueError: a pass cannot run on this device.
    """
    import torch
    from torch.nn import functional as F

    from gptcore.kernels.step import adopt
    from gptcore.passes.base import PassContext
    from gptcore.weights import build_random

    device = watch.device
    placement, recipe = place(precision, device, threads, Recipe())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        placement.precision
    ]

    def built(spec: ModelSpec) -> GPT:
        model = build_random(spec, placement).eval()
        for one in recipe.passes:
            if said := one.blocked_by(spec, placement):
                raise ValueError(said)
            model = one.apply(model, PassContext(placement=placement))
        adopt(model)
        return model

    wide = gpt(LAYERS, WIDTH, WIDTH // 64, context=KNOWN + STEPS, vocabulary=64)
    wide = wide.model_copy(update={"hidden": HIDDEN})
    with torch.inference_mode():
        small, rotary = built(SMALL), built(SMALL_ROTARY)
        block_s = step_s(small, 0, watch) / LAYERS
        model = built(wide)
        held = sum(_bytes(one) for one in model.blocks.modules())
        near_s, far_s = step_s(model, 0, watch), step_s(model, KNOWN - 1, watch)
        together_s = prefill_s(small, SEVERAL, watch) / LAYERS
        whole_s = prefill_s(model, TOKENS, watch)
        cache = model.new_cache(1)
        cached = KNOWN * (cache.k.nbytes + cache.v.nbytes)
        weights = sum(one.rows * one.columns * one.count for one in wide.linears[:-1])
        del model
        square = torch.ones(1, 16, 512, 64, dtype=dtype, device=device)
        attend_s = watch.best(
            lambda: F.scaled_dot_product_attention(square, square, square, is_causal=True)
        )
        return {
            "flop_per_s": 2 * weights * TOKENS / max(whole_s - LAYERS * together_s, whole_s / 10),
            "bytes_per_s": held / max(near_s - LAYERS * block_s, near_s / 10),
            "attention_flop_per_s": 2 * 16 * 512 * 512 * 64 / attend_s,
            "attention_bytes_per_s": cached / max(far_s - near_s, 1e-6),
            "block_s": block_s,
            "together_block_s": together_s,
            "rotary_block_s": step_s(rotary, 0, watch) / LAYERS,
            "rotary_together_block_s": prefill_s(rotary, SEVERAL, watch) / LAYERS,
        }


def step_s(model: GPT, known: int, watch: Stopwatch) -> float:
    """Return the seconds of a decode step behind ``known`` positions, whatever they hold."""
    from gptcore.engine import decode

    cache = model.new_cache(known + STEPS)
    for one in (cache.k, cache.v):
        one.zero_()

    def work() -> None:
        cache.length = known
        for id in range(STEPS):
            decode(model, id, cache)

    return watch.best(work) / STEPS


def prefill_s(model: GPT, tokens: int, watch: Stopwatch) -> float:
    """Return the seconds of reading so many positions at once, as a prompt is read."""
    from gptcore.engine import prefill

    cache = model.new_cache(tokens)

    def work() -> None:
        cache.truncate(0)
        prefill(model, [0] * tokens, cache)

    return watch.best(work)


def sampling_s(watch: Stopwatch) -> float:
    """Return the seconds of drawing one token of GPT-2's vocabulary, alternatives included."""
    import numpy as np

    from gptcore.records import Sampling
    from gptcore.sampling import draw, likeliest, stages

    logits = np.random.default_rng(0).normal(size=50257).astype(np.float32)

    def work() -> None:
        chain = stages(logits, Sampling(temperature=0.8), ())
        draw(chain[-1], 0.5)
        others = likeliest(logits, 5)
        for stage in chain:
            stage.probabilities(others)

    return watch.best(work)


def _bytes(layer: nn.Module) -> int:
    """Return what a layer alone holds, without those inside it."""
    packed = int(getattr(layer, "packed_bytes", 0))
    return packed + sum(one.nbytes for one in layer.parameters(recurse=False))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], int(sys.argv[2]))) + "\n")
