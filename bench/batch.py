"""Decode of several texts side by side: tokens/s over the number of streams, from one to 32.

Every stream has a prompt of its own, of its own length, and a cache of its own; a step reads the
weights once for eight of them. The sizes take turns, in an order drawn anew each round. The tokens
of every stream must be those that it writes alone.

The result is printed, and written to bench/results/ and into bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from bench.decode import RESULTS, SMOLLM2, into_readme
from bench.sides import Ours, pin
from gptcore.provenance import provenance

if TYPE_CHECKING:
    from gptcore.kernels.step import NativeStep
    from gptcore.model import GPT

STREAMS = (1, 2, 4, 8, 16, 32)
PROMPTS = (24, 96)
"""Tokens of the shortest and of the longest prompt."""


def written(
    model: GPT, step: NativeStep, prompts: list[list[int]], tokens: int
) -> tuple[float, float, np.ndarray]:
    """Return seconds and CPU seconds of decoding, and the tokens of each stream: (B, tokens)."""
    caches = [model.new_cache(len(one) + tokens) for one in prompts]
    first = [
        step.read(one, cache, last_only=True)[0] for one, cache in zip(prompts, caches, strict=True)
    ]
    latest = [int(one.argmax()) for one in first]
    found = [latest]
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(tokens - 1):
        latest = step.batch(latest, caches).argmax(1).tolist()
        found.append(latest)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    return seconds, cpu_seconds, np.array(found).T


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    pin(options.threads)
    load_before = os.getloadavg()
    rows = {}
    for precision in options.precisions:
        rows[precision] = sizes(precision, options.threads, options.rounds, options.new_tokens)
        print(f"{precision}: done", flush=True)
    result: dict[str, object] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": options.threads,
        "new_tokens": options.new_tokens,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": asdict(provenance(threads=options.threads)),
        "rows": rows,
    }
    table = markdown(result)
    print(table)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "batch.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "batch.md").write_text(table)
        into_readme("batch", table)


def sizes(precision: str, threads: int, rounds: int, tokens: int) -> dict[int, dict[str, object]]:
    """Return what each number of streams gave."""
    from gptcore.kernels.step import step_of

    model = Ours(SMOLLM2, precision, threads).engine.model
    step = step_of(model)
    if step is None:
        raise SystemExit("The native step is not available here.")
    random_ids = np.random.default_rng(0)
    prompts = [
        random_ids.integers(0, model.spec.vocabulary, length).tolist()
        for length in random_ids.integers(*PROMPTS, max(STREAMS))
    ]
    alone = np.concatenate([written(model, step, [one], tokens)[2] for one in prompts])
    taken: dict[int, list[tuple[float, float]]] = {one: [] for one in STREAMS}
    same = dict.fromkeys(STREAMS, True)
    draw = random.Random(0)
    for _ in range(rounds):
        for size in draw.sample(STREAMS, len(STREAMS)):
            seconds, cpu_seconds, found = written(model, step, prompts[:size], tokens)
            taken[size].append((seconds, cpu_seconds))
            same[size] &= bool((found == alone[:size]).all())
    rates = {size: size * (tokens - 1) / np.array(taken[size]) for size in STREAMS}
    return {
        size: {
            "tokens_per_s": rates[size][:, 0].tolist(),
            "tokens_per_cpu_s": rates[size][:, 1].tolist(),
            "ratio": float(np.median(rates[size][:, 0] / rates[1][:, 0])),
            "cpu_ratio": float(np.median(rates[size][:, 1]) / np.median(rates[1][:, 1])),
            "same_tokens": same[size],
        }
        for size in STREAMS
    }


def markdown(result: dict[str, object]) -> str:
    """Return the table, with what it takes to read it."""
    machine, load, rows = result["machine"], result["load_average"], result["rows"]
    assert isinstance(machine, dict)
    assert isinstance(load, dict)
    assert isinstance(rows, dict)
    lines = [
        f"{str(result['at'])[:10]}, {machine['cpu']}, {result['threads']} threads, "
        f"{machine['platform']}, commit {machine['git_commit']}. {SMOLLM2}, prompts of "
        f"{PROMPTS[0]} to {PROMPTS[1]} tokens. Load average {load['before'][0]:.1f} before and "
        f"{load['after'][0]:.1f} after.",
        "",
        "| precision | streams | tokens/s, median (least – greatest) | × one stream | "
        "by CPU time | tokens as alone |",
        "|---|---|---|---|---|---|",
    ]
    for precision, sizes_of in rows.items():
        for size, one in sizes_of.items():
            rates = np.array(one["tokens_per_s"])
            lines.append(
                f"| {precision} | {size} | {np.median(rates):,.0f} ({rates.min():,.0f} – "
                f"{rates.max():,.0f}) | {one['ratio']:.2f} | {one['cpu_ratio']:.2f} | "
                f"{'yes' if one['same_tokens'] else 'NO'} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
