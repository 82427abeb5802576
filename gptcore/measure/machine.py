"""What linear layers and attention reach on this machine, by precision: one JSON object.

``python -m gptcore.measure.machine DEVICE THREADS``. The layers are this program's own, passes
applied, on matrices that no cache holds; a step of one position is bound by reading, a step of many
by arithmetic. What a block takes beside that is timed on one too small to have any arithmetic.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from gptcore.device import cpu_name, torch_version
from gptcore.recipe import Recipe, place
from gptcore.spec import ModelSpec, gpt

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gptcore.model import GPT

WIDTH, HIDDEN, LAYERS = 1024, 4096, 12
TOKENS = 128
KNOWN = 2048
REPETITIONS = 7
BUDGET_S = 1.0
"""A slow precision is timed less often; the best time of at least two counts."""
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")


def best(work: Callable[[], object], device: str) -> float:
    """Return the least seconds of several tries after one to warm up."""
    work()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < 2 or (len(found) < REPETITIONS and time.perf_counter() - began < BUDGET_S):
        _synchronise(device)
        started = time.perf_counter()
        work()
        _synchronise(device)
        found.append(time.perf_counter() - started)
    return min(found)


def measure(device: str, threads: int) -> dict[str, object]:
    """Return the fields of ``plan.peaks.MachinePeaks``."""
    import torch

    began = time.monotonic()
    placement, _ = place("fp32", device, threads, Recipe())
    torch.set_num_threads(placement.resolved_threads)
    rates = {}
    for precision in PRECISIONS:
        try:
            rates[precision] = rates_of(precision, device, threads)
        except (RuntimeError, ValueError, NotImplementedError):
            continue  # this device has no such arithmetic
    with torch.inference_mode():
        plain = torch.ones(16 * 2**20, device=device)
        stream = 2 * plain.nbytes / best(lambda: plain + 1.0, device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    return {
        "rates": rates,
        "sampling_s_per_id": sampling_s() / 50257,
        "stream_bytes_per_s": stream,
        "device": device,
        "device_name": name or "CPU",
        "threads": placement.resolved_threads,
        "torch": torch_version() or "",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,
    }


def rates_of(precision: str, device: str, threads: int) -> dict[str, float]:
    """Return the fields of ``plan.peaks.Rates``.

    Raises:
        ValueError: a pass cannot run on this device.
    """
    import torch
    from torch.nn import functional as F

    from gptcore.passes.base import PassContext
    from gptcore.weights import build_random

    placement, recipe = place(precision, device, threads, Recipe())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        placement.precision
    ]

    def built(spec: ModelSpec) -> GPT:
        model = build_random(spec, placement)
        for one in recipe.passes:
            if said := one.blocked_by(spec, placement):
                raise ValueError(said)
            model = one.apply(model, PassContext(placement=placement))
        return model

    wide = gpt(LAYERS, WIDTH, 16, context=8, vocabulary=64)
    wide = wide.model_copy(update={"hidden": HIDDEN})
    with torch.inference_mode():
        named = list(built(wide).blocks.named_modules())
        ups = [one for name, one in named if name.endswith(".up")]
        downs = [one for name, one in named if name.endswith(".down")]
        held = sum(_bytes(one) for one in (*ups, *downs))
        read_s = best(partial(through, ups, downs, 1, dtype, device), device)
        work_s = best(partial(through, ups, downs, TOKENS, dtype, device), device)
        del named, ups, downs
        keys = torch.ones(4, 16, KNOWN, 64, dtype=dtype, device=device)
        query = torch.ones(4, 16, 1, 64, dtype=dtype, device=device)
        look_s = best(lambda: F.scaled_dot_product_attention(query, keys, keys.clone()), device)
        look_s -= best(keys.clone, device)
        square = torch.ones(1, 16, 512, 64, dtype=dtype, device=device)
        attend_s = best(
            lambda: F.scaled_dot_product_attention(square, square, square, is_causal=True), device
        )
        block_s = overhead_s(built, device)
    return {
        "flop_per_s": 4 * LAYERS * WIDTH * HIDDEN * TOKENS / work_s,
        "bytes_per_s": held / read_s,
        "attention_flop_per_s": 2 * 16 * 512 * 512 * 64 / attend_s,
        "attention_bytes_per_s": 2 * keys.nbytes / max(look_s, 1e-6),
        "block_s": block_s,
    }


def through(
    ups: Sequence[nn.Module],
    downs: Sequence[nn.Module],
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Send so many positions through each pair of layers."""
    import torch

    x = torch.ones(1, tokens, WIDTH, dtype=dtype, device=device)
    for up, down in zip(ups, downs, strict=True):
        down(up(x))


def overhead_s(built: Callable[[ModelSpec], GPT], device: str) -> float:
    """Return the seconds of one block of one position that has next to no arithmetic."""
    import torch

    from gptcore.engine import decode

    layers = 12
    model = built(gpt(layers, 64, 1, context=128, vocabulary=64))
    cache = model.new_cache(128)

    def step() -> None:
        cache.truncate(0)
        for id in range(8):
            decode(model, id, cache)

    with torch.inference_mode():
        return best(step, device) / 8 / layers


def sampling_s() -> float:
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

    return best(work, "cpu")


def _bytes(layer: object) -> int:
    from torch import nn

    assert isinstance(layer, nn.Module)
    packed = int(getattr(layer, "packed_bytes", 0))
    return packed + sum(one.nbytes for one in layer.parameters())


def _synchronise(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], int(sys.argv[2]))) + "\n")
