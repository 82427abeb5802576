"""Decode on a GPU: recorded steps, formats beside bf16, many texts at once, and transformers.

    python -m bench.gpu [--device cuda:0]

All models have random weights, so that nothing has to be fetched: their speed is real, their text
is noise. 64 tokens are read and 64 written; the sides take turns, in an order drawn anew each
round. What recording a step takes is a cost of the cold start and stands apart. The share of the
bandwidth is the weights that a step reads a second, over what reading a gigabyte was measured to
reach.

Where there is no CUDA device it says so; ``--device cpu`` tries the bench itself.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bench.results import conditions, keep
from gptcore.device import Placement
from gptcore.measure.statistics import compare
from gptcore.measure.timing import Cell, once
from gptcore.passes.base import Pass, PassContext
from gptcore.passes.fp8 import Fp8
from gptcore.passes.quantize import Int4, Int8Weights
from gptcore.passes.runtime import Runtime
from gptcore.spec import PRESETS, ModelSpec

PROMPT_TOKENS, NEW_TOKENS = 64, 65
READ_BYTES = 2**30
BY_ONE = "one by one"
FORMATS: dict[str, tuple[Pass, ...]] = {
    "bf16": (),
    "int8": (Int8Weights(),),
    "int4": (Int4(),),
    "fp8": (Fp8(),),
}
PROMISED = {"bf16": "0.80 of the bandwidth", "int8": "1.6", "int4": "2.2"}


@dataclass
class Row:
    """One side, and what its rounds took: seconds of a step."""

    side: str
    step: Callable[[], float]
    step_bytes: int | None = None
    texts: int = 1
    recorded_s: float | None = None
    """What recording a step takes, which is in none of the seconds."""
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Of all texts together, the median."""
        return float(self.texts / np.median(self.seconds))


def ours(
    name: str, spec: ModelSpec, device: str, passes: tuple[Pass, ...] = (), texts: int = 1
) -> Row:
    """Return a side of this program's: a random model of a shape, in bf16 but for its passes."""
    from gptcore.captured import CapturedStep, captured_step
    from gptcore.measure.memory import weight_bytes
    from gptcore.weights import build_random

    placement = Placement(device=device, precision="bf16")
    model = build_random(spec, placement)
    for one in passes:
        model = one.apply(model, PassContext(placement=placement))
    cell = Cell(prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, batch=texts)
    found = captured_step(model, model.new_cache(PROMPT_TOKENS + NEW_TOKENS, texts))
    return Row(
        side=name,
        step=lambda: once(model, cell).decode_s / (NEW_TOKENS - 1),
        step_bytes=weight_bytes(model)[1],
        texts=texts,
        recorded_s=found.seconds if isinstance(found, CapturedStep) else None,
    )


def transformers(spec: ModelSpec, device: str) -> Row:
    """Return transformers' eager decode of a GPT-2 of that shape."""
    import time

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from gptcore.measure.peaks import synchronise

    config = GPT2Config(
        vocab_size=spec.vocabulary,
        n_positions=spec.context,
        n_embd=spec.width,
        n_layer=spec.layers,
        n_head=spec.heads,
        n_inner=spec.hidden,
    )
    model = GPT2LMHeadModel(config).to(device=device, dtype=torch.bfloat16).eval()

    def step() -> float:
        ids = torch.randint(spec.vocabulary, (1, PROMPT_TOKENS), device=device)
        with torch.inference_mode():
            out = model(ids, use_cache=True)
            latest = out.logits[:, -1].argmax(-1)
            synchronise(device)
            began = time.perf_counter()
            for _ in range(NEW_TOKENS - 1):
                out = model(latest[:, None], past_key_values=out.past_key_values, use_cache=True)
                latest = out.logits[:, -1].argmax(-1)
            synchronise(device)
        return (time.perf_counter() - began) / (NEW_TOKENS - 1)

    return Row("transformers, eager", step)


def in_turns(rows: list[Row], rounds: int) -> None:
    """Let all sides take turns; the first round warms up."""
    draw = random.Random(0)
    for turn in range(rounds + 1):
        for row in draw.sample(rows, len(rows)):
            seconds = row.step()
            if turn:
                row.seconds.append(seconds)


def faster(row: Row, other: Row) -> dict[str, Any]:
    """Return how many times the tokens/s of ``other`` a side has, with its interval."""
    mine, theirs = ([one / side.texts for one in side.seconds] for side in (row, other))
    found = compare(mine, theirs)
    return {"than": other.side, "ratio": found.ratio, "low": found.low, "high": found.high}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return all three comparisons."""
    from gptcore.measure import peaks

    device = options.device
    small, large = PRESETS[options.small], PRESETS[options.large]
    bandwidth = peaks._measure(device, READ_BYTES)[0]
    result: dict[str, Any] = {"bandwidth_bytes_per_s": bandwidth, "parts": {}}

    def part(name: str, makers: list[Callable[[], Row]], against: str) -> None:
        rows = [make() for make in makers]
        in_turns(rows, options.rounds)
        base = next(row for row in rows if row.side == against)
        result["parts"][name] = [
            {
                "side": row.side,
                "tokens_per_s": row.tokens_per_s,
                "recorded_s": row.recorded_s,
                "share_of_bandwidth": None
                if row.step_bytes is None
                else row.step_bytes / float(np.median(row.seconds)) / bandwidth,
                "faster": None if row is base else faster(row, base),
            }
            for row in rows
        ]

    one_by_one = (Runtime(decode="torch"),)
    makers = [
        partial(ours, "recorded", small, device),
        partial(ours, BY_ONE, small, device, one_by_one),
        partial(ours, f"{options.texts} texts at once", small, device, (), options.texts),
    ]
    if small.position == "learned":
        makers.append(partial(transformers, small, device))
    part(f"{options.small}, one step", makers, "recorded")
    placement = Placement(device=device, precision="bf16")
    usable = {
        name: passes
        for name, passes in FORMATS.items()
        if not any(one.blocked_by(large, placement) for one in passes)
    }
    makers = [partial(ours, name, large, device, passes) for name, passes in usable.items()]
    part(f"{options.large}, formats", makers, "bf16")
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables."""
    lines = [
        f"{result['at'][:10]}, {result['device']}, "
        f"{result['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s measured; "
        f"torch {result['machine']['torch']}.",
    ]
    for name, rows in result["parts"].items():
        lines += [
            "",
            f"**{name}**",
            "",
            "| side | tokens/s | share of the bandwidth | recorded in | times as fast (95 %) |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            share, recorded, held = row["share_of_bandwidth"], row["recorded_s"], row["faster"]
            cells = [
                row["side"],
                f"{row['tokens_per_s']:,.1f}",
                "" if share is None else f"{share:.0%}",
                "" if recorded is None else f"{recorded:.2f} s",
                ""
                if held is None
                else f"{held['ratio']:.2f} × {held['than']} ({held['low']:.2f}–{held['high']:.2f})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    promised = ", ".join(f"{name} {least}" for name, least in PROMISED.items())
    lines += [
        "",
        f"Promised on a GPU: {promised} times bf16; recorded at least 8 × transformers; 64 texts "
        "at least 30 × one.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and keep; without a device, say so."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", default="gpt3-125m", help="a shape")
    parser.add_argument("--large", default="gpt3-6.7b", help="a shape")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8, help="at least 6 for an interval")
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    options = parser.parse_args()
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the bench itself.")
    load = os.getloadavg()
    found = measured(options)
    result = {**conditions(0, load), "device": options.device, **found}
    if options.device.startswith("cuda"):
        result["device"] = torch.cuda.get_device_name(options.device)
    table = markdown(result)
    print(table)
    if not options.dry:
        keep("gpu", result, table)


if __name__ == "__main__":
    main()
