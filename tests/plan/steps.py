"""What a model really takes: run as a process of its own, so that nothing else is in its memory."""

import sys

import psutil
import torch
from torch.nn import functional as F

from gptcore.device import trim_heap
from gptcore.engine import decode, prefill
from gptcore.kernels.step import adopt
from gptcore.measure.memory import PeakMemory
from gptcore.model import GPT
from gptcore.passes.base import PassContext
from gptcore.recipe import Recipe, place
from gptcore.spec import PRESETS, SMOLLM2_135M, ModelSpec, gpt
from gptcore.weights import build_random

TRAINED = {
    "gpt": gpt(6, 512, 8, context=512, vocabulary=8000),
    "llama": SMOLLM2_135M.model_copy(update={"layers": 8, "vocabulary": 8000}),
}


def generating(spec: ModelSpec, precision: str, context: int) -> int:
    """Return the bytes of a whole context, beyond those that torch alone took."""
    placement, recipe = place(precision, "cpu", 1, Recipe())
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = psutil.Process().memory_info().rss
    model = build_random(spec, placement)
    for one in recipe.passes:
        model = one.apply(model, PassContext(placement=placement))
    adopt(model)  # as an engine does
    trim_heap()
    with PeakMemory() as peak:
        cache = model.new_cache(context)
        while cache.length < context - 2:
            prefill(model, [1] * min(512, context - 2 - cache.length), cache)
        decode(model, 1, cache)
    return peak.peak_bytes - before


def training(spec: ModelSpec, batch: int, context: int) -> int:
    """Return the bytes of two steps with AdamW, beyond those that torch alone took."""
    warm = torch.nn.Linear(4, 4)
    F.cross_entropy(warm(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
    torch.optim.AdamW(warm.parameters()).step()
    before = psutil.Process().memory_info().rss
    with PeakMemory() as peak:
        model = GPT(spec).train()
        adam = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(2):
            ids = torch.randint(0, spec.vocabulary, (batch, context))
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            adam.step()
            adam.zero_grad(set_to_none=False)
    return peak.peak_bytes - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, name, *rest = sys.argv[1:]
    if kind == "generate":
        print(generating(PRESETS[name], rest[0], int(rest[1])))
    else:
        print(training(TRAINED[name], int(rest[0]), int(rest[1])))
