"""How fast a format is beside our own fp32, on the same execution path, in one interleaved run.

    python -m bench.formats [--seconds 90]

Two comparisons: with our own library's decode step on all sides, and with torch's operations on all
sides. So what a format gives stands apart from what the library gives. A prompt of 512 tokens is
read, and 64 tokens are written behind one of 64. Pinned to as many cores as there are threads.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from bench.results import keep
from bench.sides import pin
from gptcore.catalogue import Catalogue
from gptcore.device import cpu_name
from gptcore.host.worker import Watcher, Worker
from gptcore.measure.compare import SIDES, Compare
from gptcore.measure.statistics import StopRule
from gptcore.measure.timing import Cell
from gptcore.passes.runtime import Runtime
from gptcore.paths import models_dir
from gptcore.recipe import Recipe
from gptcore.records import Run, RunState, new_id, now

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
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure both paths, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=90.0, help="of each comparison, a cell")
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
    }
    text = markdown(result)
    print(text)
    if not options.dry:
        keep("formats", result, text)


if __name__ == "__main__":
    main()
