"""How fast a format is beside our own fp32, on the same execution path, in one interleaved run.

    python -m bench.formats [--seconds 90]

Two comparisons: with our own library's decode step on all sides, and with torch's operations on all
sides. So what a format gives stands apart from what the library gives. A prompt of 512 tokens is
read, and 64 tokens are written behind one of 64. Pinned to as many cores as there are threads.

The engine reads prompts of packed weights with our library and prompts of floats with torch, where
that is faster. A second table therefore holds every format's prompt, read by our library, against
fp32 read by the same products, and against fp32 as the engine reads it.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Any

from bench.results import keep
from bench.sides import pin
from gptcore.catalogue import Catalogue
from gptcore.device import Placement, cpu_name
from gptcore.engine import read
from gptcore.host.worker import Watcher, Worker
from gptcore.kernels.step import NativeStep, adopt
from gptcore.measure.compare import SIDES, Compare
from gptcore.measure.corpora import evaluation_text
from gptcore.measure.statistics import StopRule, compare
from gptcore.measure.timing import Cell
from gptcore.model import GPT
from gptcore.passes.base import Pass, PassContext
from gptcore.passes.quantize import Int4, Int8
from gptcore.passes.runtime import Runtime
from gptcore.paths import models_dir
from gptcore.recipe import Recipe
from gptcore.records import Run, RunState, new_id, now
from gptcore.spec import Precision
from gptcore.tokenizer import load_tokenizer
from gptcore.weights import build

FORMATS = ("fp32", "bf16", "int8", "int4")
CELLS = (Cell(prompt_tokens=512, new_tokens=1), Cell(prompt_tokens=64, new_tokens=65))
TARGETS = (("prefill_s", 512, "prefill of 512"), ("decode_s", 64, "decode"))
PROMISED = {
    ("decode_s", "bf16"): "1.7",
    ("decode_s", "int8"): "3.0",
    ("decode_s", "int4"): "3.3",
    ("prefill_s", "bf16"): "2.5",
    ("prefill_s", "int8"): "3.0",
    ("prefill_s", "int4"): "0.9 of bf16's",
}
PRODUCTS: dict[str, tuple[Precision, tuple[Pass, ...]]] = {
    "fp32": ("fp32", ()),
    "bf16": ("bf16", ()),
    "int8": ("fp32", (Int8(),)),
    "int8, activations too": ("fp32", (Int8(activation_bits=8),)),
    "int4": ("bf16", (Int4(),)),
}
ENGINE = "fp32 as the engine reads it"
PROMPT_TOKENS = 512
PATHS = {"our library": "native", "torch": "torch"}


def compared(catalogue: Catalogue, model: str, decode: str, threads: int, seconds: float) -> Any:
    """Return the result of one comparison of all formats."""
    recipe = Recipe(passes=(Runtime.model_validate({"decode": decode}),))
    work = Compare(
        variants=tuple(
            catalogue.variant(model, precision=one, threads=threads, recipe=recipe)
            for one in FORMATS
        ),
        cells=CELLS,
        stop=StopRule(half_width=0.02, seconds=seconds),
        block_s=0.2,
    )
    run = Run(id=new_id(), kind=work.kind, state=RunState.RUNNING, created_at=now())
    done = Worker("cpu", catalogue).perform(run, work, Watcher())
    assert done.state is RunState.DONE, done.error
    return done.result


def prompts(catalogue: Catalogue, model: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return how many times as fast as fp32 our library's products read a prompt in each format."""
    checkpoint = catalogue.checkpoint(model)
    text = evaluation_text("evaluation").content
    ids = load_tokenizer(checkpoint.directory).encode(text)[:PROMPT_TOKENS]
    reads: dict[str, Callable[[], object]] = {}
    for name, (precision, passes) in PRODUCTS.items():
        placement = Placement(precision=precision, threads=threads)
        built = build(checkpoint, placement)
        for one in passes:
            built = one.apply(built, PassContext(placement=placement))
        step = adopt(built)
        if not isinstance(step, NativeStep):
            raise SystemExit(f"Our library does not read {name}: {step}.")
        reads[name] = partial(_read_by, step, built, ids)
        if name == "fp32":
            reads[ENGINE] = partial(_read_by, None, built, ids)
    seconds: dict[str, list[float]] = {name: [] for name in reads}
    draw = random.Random(0)
    for turn in range(rounds + 1):
        for name in draw.sample(list(reads), len(reads)):
            began = time.perf_counter()
            reads[name]()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    found = []
    for name in PRODUCTS:
        row: dict[str, Any] = {"format": name, "tokens_per_s": len(ids) / median(seconds[name])}
        for key, other in (("products", "fp32"), ("engine", ENGINE)):
            held = compare(seconds[name], seconds[other])
            row[key] = {"speedup": held.ratio, "low": held.low, "high": held.high}
        found.append(row)
    return found


def _read_by(step: NativeStep | None, model: GPT, ids: list[int]) -> object:
    cache = model.new_cache(len(ids))
    if step is None:
        return read(model, ids, cache, lambda: False)
    return step.read(ids, cache, last_only=True)


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how many times as fast as fp32 each format is, by target."""
    found = []
    for metric, prompt, label in TARGETS:
        for one in result["comparisons"]:
            if (one["metric"], one["cell"]["prompt_tokens"]) == (metric, prompt):
                side = FORMATS[SIDES.index(one["side"])]
                if one["ratio"] is None:
                    raise SystemExit("Too few pairs in that time: give more --seconds.")
                found.append(
                    {
                        "what": label,
                        "format": side,
                        "speedup": 1 / one["ratio"],
                        "low": 1 / one["high"],
                        "high": 1 / one["low"],
                        "promised": PROMISED[metric, side],
                    }
                )
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table of both paths."""
    lines = [
        f"{result['at'][:16]} UTC, {result['cpu']}, {result['threads']} threads, load "
        f"{result['load'][0]:.1f} before and {result['load'][1]:.1f} after; {result['model']}. "
        "Times as fast as fp32 on the same path, with the 95 % interval.",
        "",
        "| | " + " | ".join(PATHS) + " | at least |",
        "| --- |" + " --- |" * (len(PATHS) + 1),
    ]
    first = next(iter(result["paths"].values()))
    for at, one in enumerate(first):
        cells = [
            f"{row['speedup']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            for row in (path[at] for path in result["paths"].values())
        ]
        lines.append(
            f"| {one['what']}, {one['format']} | {' | '.join(cells)} | {one['promised']} |"
        )
    lines += [
        "",
        f"Prompts of {PROMPT_TOKENS} tokens by our library's products:",
        "",
        "| | tokens/s | × fp32 by the same products | × fp32 as the engine reads it |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["prompts"]:
        told = [
            f"{one['speedup']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
            for one in (row["products"], row["engine"])
        ]
        lines.append(f"| {row['format']} | {row['tokens_per_s']:,.0f} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure both paths, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=90.0, help="of each comparison, a cell")
    parser.add_argument("--rounds", type=int, default=12, help="of the second table")
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    options = parser.parse_args()
    pin(options.threads)
    catalogue, before = Catalogue(models_dir()), os.getloadavg()[0]
    paths = {
        name: rows(compared(catalogue, options.model, decode, options.threads, options.seconds))
        for name, decode in PATHS.items()
    }
    result = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": options.threads,
        "model": options.model,
        "load": (before, os.getloadavg()[0]),
        "paths": paths,
        "prompts": prompts(catalogue, options.model, options.threads, options.rounds),
    }
    text = markdown(result)
    print(text)
    if not options.dry:
        keep("formats", result, text)


if __name__ == "__main__":
    main()
