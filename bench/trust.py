"""Can the A/B verdict be trusted on this machine: what it claims of no difference, and of 10 %.

A hundred comparisons of a model with itself: how often is a difference claimed? A hundred with B
slowed by 10 % (it computes, then spends a tenth of that time on nothing): how often is that found,
and how often does the 95 % interval of the ratio hold 1.1? Each is what ``compare`` and ``regress``
do, with the default rule, on the real engine. The two hundred take turns, so that a busy hour of
the machine meets both.

It wants a core of its own: ``taskset -c 0 python -m bench.trust``. A stretch of work takes about a
millisecond, so that what a processor loses by waiting in a loop, about a microsecond, does not
count. Where other processes have half of the core, work that is longer by a tenth is interrupted
more often, and its median is longer by more than a tenth: then the intervals are right to leave 1.1
out. So they are also held against the ratio that the hundred find together.

The result is printed, and written to bench/results/ and into bench/README.md.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from math import exp, log
from statistics import fmean
from typing import Any

from bench.results import keep
from gptcore.catalogue import Catalogue
from gptcore.device import Placement
from gptcore.host.regress import Regress
from gptcore.host.worker import Watcher, Worker
from gptcore.measure.timing import Cell
from gptcore.paths import models_dir
from gptcore.provenance import provenance
from gptcore.recipe import Variant
from gptcore.records import Run, RunState, new_id, now
from gptcore.spec import gpt

SPEC = gpt(1, 128, 2, context=128, vocabulary=256)
CELL = Cell(prompt_tokens=96, new_tokens=32)
BLOCK_S = 0.06
DELAY = 0.1
SEED_OF_DELAYED = 10_000


def compared(worker: Worker, seed: int, delay: float) -> Mapping[str, Any]:
    """Return the result of one comparison of the model with itself, B slowed by ``delay``."""
    variant = Variant(
        model="random",
        spec=SPEC,
        weights_id="random:0",
        placement=Placement(device="cpu", precision="fp32", threads=1),
    )
    work = Regress(
        variants=(variant, variant),
        cells=(CELL,),
        block_s=BLOCK_S,
        seed=seed,
        delay_ratio=delay,
        baseline="itself",
    )
    run = Run(id=new_id(), kind=work.kind, state=RunState.RUNNING, created_at=now())
    done = worker.perform(run, work, Watcher())
    assert done.result is not None, done.error
    return done.result


def told(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what counts of a result."""
    times = {
        one["metric"]: {
            name: one[name] for name in ("verdict", "ratio", "low", "high", "p", "raw_ratio")
        }
        for one in result["comparisons"]
        if one["metric"] in ("prefill_s", "decode_s")
    }
    return {**times, "regressed": result["regressed"], "load": os.getloadavg()[0]}


def counts(found: list[dict[str, Any]], delay: float) -> dict[str, Any]:
    """Return how often something was claimed, found and covered."""

    def times(metric: str, test: Any) -> int:
        return sum(bool(test(one[metric])) for one in found)

    truth = 1 + delay
    together = {
        metric: exp(fmean(log(one[metric]["ratio"]) for one in found))
        for metric in ("prefill_s", "decode_s")
    }
    return {
        "comparisons": len(found),
        "regressed": sum(one["regressed"] for one in found),
        "any_claim": sum(
            any(one[name]["verdict"] in ("faster", "slower") for name in ("prefill_s", "decode_s"))
            for one in found
        ),
        **{
            metric: {
                "claimed": times(metric, lambda one: one["verdict"] in ("faster", "slower")),
                "slower": times(metric, lambda one: one["verdict"] == "slower"),
                "covered": times(metric, lambda one: one["low"] <= truth <= one["high"]),
                "together": together[metric],
                "covered_together": times(
                    metric,
                    lambda one, ratio=together[metric]: one["low"] <= ratio <= one["high"],
                ),
                "ratio_median": sorted(one[metric]["ratio"] for one in found)[len(found) // 2],
                "half_width_median": sorted(
                    (one[metric]["high"] / one[metric]["low"]) ** 0.5 - 1 for one in found
                )[len(found) // 2],
            }
            for metric in ("prefill_s", "decode_s")
        },
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the result as a table with what the promise was."""
    made = result["provenance"]
    lines = [
        f"{result['at'][:16]} UTC, {made['cpu']}, {made['cores']} cores, torch {made['torch']}; "
        f"load {result['load_min']:.1f} to {result['load_max']:.1f} while it ran, "
        f"{result['seconds'] / 60:.0f} minutes. {result['model']}; a decode takes "
        f"{1000 * result['decode_s']:.1f} ms and is repeated for "
        f"{1000 * result['block_s']:.0f} ms, a block, whose median counts.",
        "",
        "| 100 comparisons | prefill | decode | promised |",
        "| --- | --- | --- | --- |",
    ]
    same, slow = result["same"], result["delayed"]
    n = same["comparisons"]
    for what, where, key, promise in (
        (f"A/A of {n}: a difference is claimed", same, "claimed", "at most 10"),
        (f"A/A of {n}: the interval holds 1", same, "covered", ""),
        (f"10 % delay of {n}: found", slow, "slower", "at least 90"),
        (f"10 % delay of {n}: the interval holds 1.1", slow, "covered", "at least 90"),
    ):
        lines.append(
            f"| {what} | {where['prefill_s'][key]} | {where['decode_s'][key]} | {promise} |"
        )
    by_metric = [slow[name] for name in ("prefill_s", "decode_s")]
    lines += [
        "| 10 % delay: ratio of all together | "
        + " | ".join(f"{one['together']:.3f}" for one in by_metric)
        + " | |",
        f"| 10 % delay of {n}: the interval holds that | "
        + " | ".join(str(one["covered_together"]) for one in by_metric)
        + " | |",
        "| 10 % delay: half of an interval, median | "
        + " | ".join(f"± {one['half_width_median']:.1%}" for one in by_metric)
        + " | |",
    ]
    lines += [
        "",
        f"`regress`, which looks at both: a slowdown is claimed in {same['regressed']} of {n} A/A "
        f"(promised: at most 10), and in {slow['regressed']} of {n} with the delay (promised: at "
        "least 90).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--comparisons", type=int, default=100, help="of each kind")
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    options = parser.parse_args()
    worker = Worker("cpu", Catalogue(models_dir()))
    began, same, delayed, decode = time.monotonic(), [], [], []
    for seed in range(options.comparisons):
        for found, first, delay in ((same, 0, 0.0), (delayed, SEED_OF_DELAYED, DELAY)):
            result = compared(worker, first + seed, delay)
            found.append(told(result))
            decode += result["cells"][0]["blocks"]["decode_s"]["A"]
        print(
            f"{seed + 1}: {time.monotonic() - began:.0f} s, "
            f"claimed {counts(same, 0)['any_claim']}, found {counts(delayed, DELAY)['regressed']}",
            flush=True,
        )
    loads = [one["load"] for one in same + delayed]
    result = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,
        "load_min": min(loads),
        "load_max": max(loads),
        "model": f"{SPEC.layers} layers of width {SPEC.width}, fp32, one thread, {CELL.label}",
        "decode_s": sorted(decode)[len(decode) // 2],
        "block_s": BLOCK_S,
        "provenance": asdict(provenance(None, 1)),
        "same": counts(same, 0.0),
        "delayed": counts(delayed, DELAY),
        "every": {"same": same, "delayed": delayed},
    }
    text = markdown(result)
    print(text)
    if not options.dry:
        keep("trust", result, text)


if __name__ == "__main__":
    main()
