"""From the start of a process to the first logits of a short prompt, with the files warm.

Ours, llama.cpp and transformers take turns, each time in a fresh process: the seconds hold Python's
start, the imports, loading (and packing, where the precision asks for it) and 16 tokens of a
prompt. Peak and resident memory are held against each other without what was there before the model
was loaded (Python, torch): at 1.0 nothing was in memory twice.

The result is printed, and written to bench/results/ and into bench/README.md.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np

from bench import gguf_files
from bench.decode import SMOLLM2, kept
from bench.results import keep
from bench.sides import first_token, installed, pin
from gptcore.catalogue import Catalogue
from gptcore.paths import models_dir
from gptcore.provenance import provenance

PROMPT = tuple(range(1000, 1016))


def sides() -> dict[str, tuple[str, dict[str, object]]]:
    """Return kind and options of every side that is there, by name."""
    directory = str(Catalogue(models_dir()).checkpoint(SMOLLM2).directory)
    found: dict[str, tuple[str, dict[str, object]]] = {
        f"ours {one}": ("ours", {"model": SMOLLM2, "precision": one})
        for one in ("fp32", "bf16", "int8", "int4")
    }
    if installed("llama-cpp-python"):
        gguf = next((models_dir() / SMOLLM2).glob("*.gguf"))
        eight = gguf_files.requantized(gguf, kept("smollm2-Q8_0.gguf"), "Q8_0")
        for label, file in (("Q4_1", gguf), ("Q8_0", eight)):
            found[f"llama.cpp {label}"] = "llama.cpp", {"file": str(file), "label": label}
    if installed("transformers"):
        for one in ("fp32", "bf16"):
            options: dict[str, object] = {"directory": directory, "precision": one}
            found[f"transformers {one}"] = "transformers", options
    return found


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    pin(options.threads)
    load_before, chosen = os.getloadavg(), sides()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    draw = random.Random(0)
    for turn in range(options.rounds + 1):
        for name in draw.sample(list(chosen), len(chosen)):
            kind, how = chosen[name]
            found = first_token(kind, PROMPT, **how, threads=options.threads)
            if turn:  # the first round warms the files
                rows[name].append(found)
        print(f"round {turn} of {options.rounds}", flush=True)
    result: dict[str, object] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": options.threads,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": asdict(provenance(threads=options.threads)),
        "rows": {name: summary(found) for name, found in rows.items()},
        "rounds": rows,
    }
    table = markdown(result)
    print(table)
    if options.write:
        keep("load", result, table)


def summary(found: list[dict[str, float]]) -> dict[str, float]:
    """Return the median and the least of what a side took."""
    median = {name: float(np.median([one[name] for one in found])) for name in found[0]}
    own = median["rss_bytes"] - median["base_bytes"]
    return {
        **median,
        "least_seconds": min(one["seconds"] for one in found),
        "resident_bytes": own,
        "peak_ratio": (median["peak_bytes"] - median["base_bytes"]) / own,
    }


def markdown(result: dict[str, object]) -> str:
    """Return the table, with what it takes to read it."""
    machine, load, rows = result["machine"], result["load_average"], result["rows"]
    assert isinstance(machine, dict)
    assert isinstance(load, dict)
    assert isinstance(rows, dict)
    lines = [
        f"{str(result['at'])[:10]}, {machine['cpu']}, {result['threads']} threads, "
        f"{machine['platform']}, commit {machine['git_commit']}. {SMOLLM2}. Load average "
        f"{load['before'][0]:.1f} before and {load['after'][0]:.1f} after.",
        "",
        "| side | seconds, median (least) | CPU seconds | memory of the model | peak ÷ that |",
        "|---|---|---|---|---|",
    ]
    for name, one in rows.items():
        lines.append(
            f"| {name} | {one['seconds']:.1f} ({one['least_seconds']:.1f}) | "
            f"{one['cpu_seconds']:.1f} | {one['resident_bytes'] / 2**20:,.0f} MiB | "
            f"{one['peak_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
