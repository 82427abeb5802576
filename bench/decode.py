"""Decode beside llama.cpp, OpenVINO and transformers, in turns: the same weights and tokens.

For each model and each length of context, every side decodes the same 128 tokens behind the same
prompt; the order of the sides is drawn anew each round, so that a drift of the machine meets all.
What stands in the table: the median of a side's rounds with the least and the greatest, how many
times as fast our int8 is (the ratio of neighbouring rounds, with a 95 % interval), the Kullback-
Leibler divergence of the side's next-token distribution from that of the same weights in fp32, and
the share of the bandwidth that was measured between the rounds.

``ratio_to_llama_cpp`` holds our fastest format against the faster of llama.cpp's files, where our
divergence is at most ``KL_LIMIT``; where no divergence was measured, int8 counts.

It needs ``requirements-bench.txt`` for the peers; those that are not installed are left out.
The result is printed, and written to bench/results/ and into bench/README.md.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from bench import gguf_files, graph_files
from bench.results import keep
from bench.sides import ROOT, Side, installed, pin
from gptcore.catalogue import Catalogue
from gptcore.measure.statistics import compare
from gptcore.paths import cache_dir, models_dir
from gptcore.provenance import provenance
from gptcore.spec import PRESETS
from gptcore.tokenizer import load_tokenizer

SMOLLM2 = "smollm2-135m"
LARGE = "gpt3-1.3b"
NEW_TOKENS = 128
KL_TOKENS = 257
OURS = "ours int8"
"""The side that the others are held against."""
LIKE_Q4_1 = "ours Q4_1's form"
"""Blocks in 4 bits and groups of 32, the head in 8: what SmolLM2's file has."""
KL_LIMIT = 0.01
"""What a format of ours may lose at most to be held against llama.cpp."""


class Diverging(Protocol):
    """What is filled in of a side's next-token distributions."""

    kl_mean: float | None
    kl_max: float | None
    same_top_ratio: float | None


@dataclass
class Row:
    """One side at one length of context."""

    model: str
    prompt_tokens: int
    side: str
    seconds_per_token: list[float] = field(default_factory=list)
    cpu_seconds_per_token: list[float] = field(default_factory=list)
    kl_mean: float | None = None
    kl_max: float | None = None
    same_top_ratio: float | None = None
    step_bytes: int = 0
    ceiling_ratio: float = 0.0
    ratio: float = 1.0
    """How many times as fast ``OURS`` is."""
    low: float = 1.0
    high: float = 1.0

    @property
    def tokens_per_cpu_s(self) -> float:
        """The median; other programs on the machine change it less than the wall's."""
        return float(1 / np.median(self.cpu_seconds_per_token))

    @property
    def tokens_per_s(self) -> tuple[float, float, float]:
        """Least, median and greatest."""
        rates = 1 / np.array(self.seconds_per_token)
        return float(rates.min()), float(np.median(rates)), float(rates.max())


def smollm2_sides(threads: int) -> dict[str, Side]:
    """Start every side for SmolLM2 that is there."""
    catalogue = Catalogue(models_dir())
    checkpoint = catalogue.checkpoint(SMOLLM2)
    sides = {
        f"ours {one}": Side("ours", model=SMOLLM2, precision=one, threads=threads)
        for one in ("int8", "int4", "bf16", "fp32")
    }
    form = {"pass": "mixed_bits", "group": 32, "layers": "head:8"}
    sides[LIKE_Q4_1] = Side("ours", model=SMOLLM2, precision="bf16", recipe=[form], threads=threads)
    gguf = next((models_dir() / SMOLLM2).glob("*.gguf"))
    files = {"Q4_1": gguf}
    if installed("llama-cpp-python"):
        files["Q8_0"] = gguf_files.requantized(gguf, kept("smollm2-Q8_0.gguf"), "Q8_0")
        for label, file in files.items():
            sides[f"llama.cpp {label}"] = Side(
                "llama.cpp", file=str(file), label=label, threads=threads
            )
    if installed("openvino-genai"):
        for label, file in files.items():
            graph = graph_files.openvino_graph(file, kept(f"smollm2-openvino-{label}"))
            sides[f"OpenVINO {label}"] = Side(
                "openvino", graph=str(graph), label=label, threads=threads
            )
    if installed("transformers"):
        for one in ("fp32", "bf16"):
            sides[f"transformers {one}"] = Side(
                "transformers",
                directory=str(checkpoint.directory),
                precision=one,
                threads=threads,
            )
    return sides


def large_sides(threads: int) -> dict[str, Side]:
    """Start the sides for the large shape with random weights."""
    sides = {
        f"ours {one}": Side("ours", model=f"random:{LARGE}", precision=one, threads=threads)
        for one in ("int8", "int4")
    }
    if installed("llama-cpp-python"):
        for form in ("Q4_1", "Q8_0"):
            file = gguf_files.random_gpt2(LARGE, kept(f"{LARGE}-{form}.gguf"), form)
            sides[f"llama.cpp {form}"] = Side(
                "llama.cpp", file=str(file), label=form, threads=threads
            )
    return sides


def chosen(sides: dict[str, Side], parts: list[str] | None) -> dict[str, Side]:
    """Return the sides whose names hold one of the parts, and ``OURS``; end the others."""
    for name in tuple(sides):
        if parts and name != OURS and not any(part in name for part in parts):
            sides.pop(name).close()
    return sides


def kept(name: str) -> Path:
    """Return where a file lies that takes long to make."""
    folder = cache_dir() / "bench"
    folder.mkdir(exist_ok=True)
    return folder / name


def divergences(
    rows: Mapping[str, Diverging], sides: dict[str, Side], reference: Side, ids: list[int]
) -> None:
    """Fill in how far each side's next-token distributions are from the reference's."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = reference.logprobs(ids, Path(folder))
        for name, side in sides.items():
            found = side.logprobs(ids, Path(folder))[:, : wanted.shape[1]]
            kl = (np.exp(wanted) * (wanted - found)).sum(axis=1)
            rows[name].kl_mean, rows[name].kl_max = float(kl.mean()), float(kl.max())
            rows[name].same_top_ratio = float((wanted.argmax(1) == found.argmax(1)).mean())


def measured(
    model: str, sides: dict[str, Side], text: list[int], prompt: int, rounds: int
) -> tuple[list[Row], list[float]]:
    """Let all sides decode in turns; return a row for each, and the bandwidth of each round."""
    ids = text[prompt : prompt + NEW_TOKENS]
    rows = {name: Row(model, prompt, name) for name in sides}
    ceilings = []
    draw = random.Random(prompt)
    for turn in range(rounds + 1):
        order = draw.sample(list(sides), len(sides))
        for name in order:
            seconds, cpu_seconds = sides[name].decode_s(text[:prompt], ids)
            if turn:  # the first round warms up
                rows[name].seconds_per_token.append(seconds)
                rows[name].cpu_seconds_per_token.append(cpu_seconds)
        ceilings.append(sides[OURS].ceiling())
        print(f"{model}, {prompt} tokens: round {turn} of {rounds}", flush=True)
    for name, row in rows.items():
        row.step_bytes = sides[name].step_bytes(prompt + NEW_TOKENS // 2)
        row.ceiling_ratio = row.step_bytes * row.tokens_per_s[1] / max(ceilings)
        if name != OURS:
            found = compare(rows[OURS].seconds_per_token, row.seconds_per_token)
            if found.ratio is not None and found.low is not None and found.high is not None:
                row.ratio, row.low, row.high = found.ratio, found.low, found.high
    return list(rows.values()), ceilings


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10, help="at least 6 for an interval")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 1024], help="tokens")
    parser.add_argument("--sides", nargs="+", help="parts of the names of those to measure")
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    pin(options.threads)

    checkpoint = Catalogue(models_dir()).checkpoint(SMOLLM2)
    tokenizer = load_tokenizer(checkpoint.directory)
    shipped = (ROOT / "data" / "texts" / "evaluation.txt").read_text()
    text = tokenizer.encode(shipped)[: max(options.prompts) + NEW_TOKENS]
    load_before = os.getloadavg()

    reference = Side("ours", model=SMOLLM2, precision="fp32", native=False, threads=options.threads)
    greedy = reference.greedy(text[: options.prompts[0]], NEW_TOKENS)
    sides = chosen(smollm2_sides(options.threads), options.sides)
    rows: list[Row] = []
    ceilings = {}
    for prompt in options.prompts:
        known = text[: options.prompts[0]] + greedy if prompt == options.prompts[0] else text
        found, seen = measured(SMOLLM2, sides, known, prompt, options.rounds)
        divergences({row.side: row for row in found}, sides, reference, text[:KL_TOKENS])
        rows += found
        ceilings[f"{SMOLLM2}, {prompt}"] = seen
    names = {name: f"{side.name}: {side.decoder}" for name, side in sides.items()}
    for side in (reference, *sides.values()):
        side.close()
    if options.large:
        spec = PRESETS[LARGE]
        sides = chosen(large_sides(options.threads), options.sides)
        ids = np.random.default_rng(0).integers(0, spec.vocabulary, 64 + NEW_TOKENS).tolist()
        found, seen = measured(LARGE, sides, ids, 64, max(6, options.rounds // 2))
        rows += found
        ceilings[f"{LARGE}, 64"] = seen
        for side in sides.values():
            side.close()
    against = {
        f"{model}, {prompt}": to_llama_cpp(rows, model, prompt)
        for model, prompt in dict.fromkeys((row.model, row.prompt_tokens) for row in rows)
    }
    first = against[f"{SMOLLM2}, {options.prompts[0]}"]
    result = {
        "ratio_to_llama_cpp": first and first["ratio"],
        "against_llama_cpp": against,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": options.threads,
        "new_tokens": NEW_TOKENS,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "measured_bytes_per_s": ceilings,
        "machine": asdict(provenance(threads=options.threads)),
        "sides": names,
        "rows": [asdict(row) | {"tokens_per_s": row.tokens_per_s} for row in rows],
    }
    table = markdown(result, rows)
    print(table)
    if options.write:
        keep("decode", result, table)


def to_llama_cpp(rows: list[Row], model: str, prompt: int) -> dict[str, object] | None:
    """Return how many times as fast as llama.cpp's faster file our fastest format is, and which.

    None where llama.cpp is not installed, or every format of ours loses more than ``KL_LIMIT``.
    """
    here = [row for row in rows if (row.model, row.prompt_tokens) == (model, prompt)]
    theirs = [row for row in here if row.side.startswith("llama.cpp")]
    ours = [
        row
        for row in here
        if row.side.startswith("ours")
        and (row.side == OURS if row.kl_mean is None else row.kl_mean <= KL_LIMIT)
    ]
    if not ours or not theirs:
        return None
    best, peer = (max(some, key=lambda row: row.tokens_per_s[1]) for some in (ours, theirs))
    found = compare(best.seconds_per_token, peer.seconds_per_token)
    return {
        "ours": best.side,
        "theirs": peer.side,
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
        "cpu_ratio": best.tokens_per_cpu_s / peer.tokens_per_cpu_s,
        "our_kl": best.kl_mean,
        "their_kl": peer.kl_mean,
    }


def markdown(result: dict[str, object], rows: list[Row]) -> str:
    """Return the table, with what it takes to read it."""
    machine = result["machine"]
    assert isinstance(machine, dict)
    ceilings, names, load, against = (
        result[one]
        for one in ("measured_bytes_per_s", "sides", "load_average", "against_llama_cpp")
    )
    assert isinstance(ceilings, dict)
    assert isinstance(against, dict)
    assert isinstance(names, dict)
    assert isinstance(load, dict)
    lines = [
        f"{str(result['at'])[:10]}, {machine['cpu']}, {result['threads']} threads, "
        f"{machine['platform']}, torch {machine['torch']}, commit {machine['git_commit']}. "
        f"Greedy, {NEW_TOKENS} new tokens, one stream. Load average "
        f"{load['before'][0]:.1f} before and {load['after'][0]:.1f} after.",
        "",
    ]
    for model, prompt in dict.fromkeys((row.model, row.prompt_tokens) for row in rows):
        each = ceilings[f"{model}, {prompt}"]
        lines += [
            f"**{model}, behind {prompt:,} tokens** (measured bandwidth {max(each) / 1e9:.0f} "
            f"GB/s, median of the rounds {np.median(each) / 1e9:.0f})",
            "",
            "| side | tokens/s, median (least – greatest) | tokens per CPU second | "
            "our int8 is faster by | KL from fp32, mean (greatest) | same top | "
            "share of bandwidth |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if (row.model, row.prompt_tokens) != (model, prompt):
                continue
            least, median, greatest = row.tokens_per_s
            ratio = "" if row.side == OURS else f"{row.ratio:.2f}× ({row.low:.2f}–{row.high:.2f})"
            kl = "" if row.kl_mean is None else f"{row.kl_mean:.5f} ({row.kl_max:.4f})"
            top = "" if row.same_top_ratio is None else f"{row.same_top_ratio:.1%}"
            lines.append(
                f"| {row.side} | {median:.1f} ({least:.1f} – {greatest:.1f}) | "
                f"{row.tokens_per_cpu_s:.1f} | {ratio} | {kl} | {top} | {row.ceiling_ratio:.0%} |"
            )
        if (held := against[f"{model}, {prompt}"]) and held["ratio"]:
            lines += [
                "",
                f"{held['ours']} is {held['ratio']:.2f}× ({held['low']:.2f}–{held['high']:.2f}) as "
                f"fast as {held['theirs']}; by CPU time {held['cpu_ratio']:.2f}×.",
            ]
        lines.append("")
    lines += [f"- {name}: {said}" for name, said in names.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
