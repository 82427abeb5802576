"""Prefill beside llama.cpp, transformers, OpenVINO and ONNX Runtime, in turns: to the first logits.

Every side reads the same 512 tokens of a text that ships into an empty cache, the order drawn anew
each round. ``ratio_to_llama_cpp`` and the like hold our fastest format against the fastest of a
peer's (transformers in bf16); of ours those count whose Kullback-Leibler divergence from
the same weights in fp32 is at most ``decode.KL_LIMIT``, over the positions of ``decode.py``.
Seconds are those of the wall; beside them stands what the threads of a side worked (CPU seconds),
which other programs on the machine change less.

The result is printed, and written to bench/results/ and into bench/README.md.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import numpy as np

from bench import graph_files
from bench.decode import KL_LIMIT, KL_TOKENS, SMOLLM2, divergences, kept, smollm2_sides
from bench.results import keep
from bench.sides import ROOT, Side, installed, pin
from gptcore.catalogue import Catalogue
from gptcore.measure.statistics import compare
from gptcore.paths import models_dir
from gptcore.provenance import provenance
from gptcore.tokenizer import load_tokenizer

PEERS = {
    "ratio_to_llama_cpp": "llama.cpp",
    "ratio_to_transformers": "transformers bf16",
    "ratio_to_openvino": "OpenVINO",
    "ratio_to_onnxruntime": "ONNX Runtime",
}


@dataclass
class Row:
    """One side."""

    side: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    kl_mean: float | None = None
    kl_max: float | None = None
    same_top_ratio: float | None = None


def is_faithful(row: Row) -> bool:
    """Return whether a side loses no more than a format may that is held against others."""
    return row.kl_mean is not None and row.kl_mean <= KL_LIMIT


def against(rows: list[Row], peer: str) -> dict[str, object] | None:
    """Return how many times as fast as a peer's fastest side our fastest faithful one is."""
    ours = [row for row in rows if row.side.startswith("ours") and is_faithful(row)]
    theirs = [row for row in rows if row.side.startswith(peer)]
    if not theirs:
        return None
    best, other = (min(some, key=lambda row: np.median(row.seconds)) for some in (ours, theirs))
    found = compare(best.seconds, other.seconds)
    return {
        "ours": best.side,
        "theirs": other.side,
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
        "cpu_ratio": float(np.median(other.cpu_seconds) / np.median(best.cpu_seconds)),
    }


def markdown(result: dict[str, object], rows: list[Row], tokens: int) -> str:
    """Return the table, with what it takes to read it."""
    machine, load = result["machine"], result["load_average"]
    assert isinstance(machine, dict)
    assert isinstance(load, dict)
    lines = [
        f"{str(result['at'])[:10]}, {machine['cpu']}, {result['threads']} threads, "
        f"{machine['platform']}, torch {machine['torch']}, commit {machine['git_commit']}. "
        f"{SMOLLM2}, {tokens:,} tokens. Load average {load['before'][0]:.1f} before and "
        f"{load['after'][0]:.1f} after.",
        "",
        "| side | tokens/s, median (least – greatest) | tokens per CPU second, median | "
        "KL from fp32, mean (greatest) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        rates, own = tokens / np.array(row.seconds), tokens / np.array(row.cpu_seconds)
        kl = "" if row.kl_mean is None else f"{row.kl_mean:.5f} ({row.kl_max:.4f})"
        lines.append(
            f"| {row.side} | {np.median(rates):,.0f} ({rates.min():,.0f} – {rates.max():,.0f}) | "
            f"{np.median(own):,.0f} | {kl} |"
        )
    lines.append("")
    for key in PEERS:
        held = result[f"{key}_by"]
        if isinstance(held, dict) and held["ratio"]:
            lines.append(
                f"- {held['ours']} is {held['ratio']:.2f}× ({held['low']:.2f}–{held['high']:.2f}) "
                f"as fast as {held['theirs']}; by CPU time {held['cpu_ratio']:.2f}×."
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10, help="at least 6 for an interval")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    pin(options.threads)
    tokenizer = load_tokenizer(Catalogue(models_dir()).checkpoint(SMOLLM2).directory)
    ids = tokenizer.encode((ROOT / "data" / "texts" / "evaluation.txt").read_text())
    load_before = os.getloadavg()
    reference = Side("ours", model=SMOLLM2, precision="fp32", native=False, threads=options.threads)
    sides = smollm2_sides(options.threads)
    few = {"pass": "int8", "activation_bits": 8}
    sides["ours int8, activations too"] = Side(
        "ours", model=SMOLLM2, precision="fp32", recipe=[few], threads=options.threads
    )
    if installed("onnxruntime") and installed("onnx"):
        graph = graph_files.onnx_graph(SMOLLM2, kept("smollm2.onnx"))
        sides["ONNX Runtime fp32"] = Side("onnxruntime", file=str(graph), threads=options.threads)
    rows = {name: Row(name) for name in sides}
    draw = random.Random(0)
    for turn in range(options.rounds + 1):
        for name in draw.sample(list(sides), len(sides)):
            seconds, cpu_seconds = sides[name].prefill_s(ids[: options.tokens])
            if turn:  # the first round warms up
                rows[name].seconds.append(seconds)
                rows[name].cpu_seconds.append(cpu_seconds)
        print(f"round {turn} of {options.rounds}", flush=True)
    divergences(rows, sides, reference, ids[:KL_TOKENS])
    found = list(rows.values())
    held = {key: against(found, peer) for key, peer in PEERS.items()}
    result: dict[str, object] = {
        **{key: one and one["ratio"] for key, one in held.items()},
        **{f"{key}_by": one for key, one in held.items()},
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": options.threads,
        "prompt_tokens": options.tokens,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": asdict(provenance(threads=options.threads)),
        "sides": {name: f"{side.name}: {side.decoder}" for name, side in sides.items()},
        "rows": [asdict(row) for row in found],
    }
    for side in (reference, *sides.values()):
        side.close()
    table = markdown(result, found, options.tokens)
    print(table)
    if options.write:
        keep("prefill", result, table)


if __name__ == "__main__":
    main()
