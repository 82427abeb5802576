"""How well a plan foretells this machine: ``python -m bench.predictions``.

Measures the machine's rates as the plan's page does, then decode and prefill of models of several
sizes in every precision as the program's bench does, and keeps the table in docs/predictions.md.
All of it runs on one thread and is timed by its processor time, rates and models alike, so that
other work on the machine hardly moves it. The page *Plan* sets the same prediction beside the wall
clock of the runs in the database.

The models are GPT shapes with random weights, whose speed is real, and SmolLM2 where it is
installed. Each cell is timed three times; the median counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.sides import ROOT
from gptcore.catalogue import Catalogue
from gptcore.measure.machine import measure
from gptcore.measure.timing import Cell, once
from gptcore.passes.base import PassContext
from gptcore.paths import models_dir
from gptcore.plan import speed
from gptcore.plan.command import known_specs
from gptcore.plan.peaks import MachinePeaks, Rates
from gptcore.recipe import Recipe, place
from gptcore.spec import PRESETS

if TYPE_CHECKING:
    from gptcore.model import GPT

MODELS = ("smollm2-135m", "gpt2", "gpt2-medium")
PRECISIONS = ("fp32", "bf16", "int8", "int4")
CELLS = (Cell(prompt_tokens=128, new_tokens=24), Cell(prompt_tokens=512, new_tokens=24))
EXTRAPOLATED = ("gpt2-xl", "gpt3-1.3b", "gpt3-2.7b", "gpt3-6.7b", "gpt3-13b", "gpt3-175b")
REPETITIONS = 3
TABLE = ROOT / "docs" / "predictions.md"


def built(model: str, precision: str) -> GPT:
    """Return a model as the program decodes with it, on one thread."""
    from gptcore import weights
    from gptcore.kernels.step import adopt

    placement, recipe = place(precision, "cpu", 1, Recipe())
    if model in PRESETS:
        made = weights.build_random(PRESETS[model], placement)
    else:
        made = weights.build(Catalogue(models_dir()).checkpoint(model), placement)
    for one in recipe.passes:
        made = one.apply(made, PassContext(placement=placement))
    adopt(made)
    return made.eval()


def measured_peaks() -> MachinePeaks:
    """Return what one thread of this machine reaches, by its processor time."""
    told = measure("cpu", 1, time.thread_time)
    rates = told.pop("rates")
    assert isinstance(rates, dict)
    return MachinePeaks(rates={name: Rates(**one) for name, one in rates.items()}, **told)


def setups(
    model: str, precision: str, peaks: MachinePeaks, cells: Sequence[Cell] = CELLS
) -> list[speed.Setup]:
    """Return what was measured and predicted of one model in one precision."""
    device = speed.machine_device(peaks, precision)
    assert device is not None
    made = built(model, precision)
    found = []
    for cell in cells:
        once(made, cell)
        times = [once(made, cell, clock=time.thread_time) for _ in range(REPETITIONS)]
        reading = median(one.prefill_s for one in times)
        writing = median(one.decode_s for one in times) / (cell.new_tokens - 1)
        known = cell.prompt_tokens + cell.new_tokens // 2
        for one in (
            speed.Observed("decode", known, cell.batch, writing, drawn=False),
            speed.Observed("prefill", cell.prompt_tokens, cell.batch, reading, drawn=False),
        ):
            found.append(
                speed.Setup(
                    model=model,
                    precision=precision,
                    threads=1,
                    what=one.what,
                    tokens=one.tokens,
                    batch=one.batch,
                    runs=REPETITIONS,
                    measured_s=one.seconds,
                    predicted_s=speed.predicted_s(made.spec, precision, device, one),
                )
            )
    return found


def table(found: speed.Accuracy, peaks: MachinePeaks) -> str:
    """Return the page: what was measured, the errors, and what they say of larger sizes."""
    lines = [
        "# Predicted against measured",
        "",
        "`python -m bench.predictions` measures this machine's rates, predicts decode and prefill "
        "from them by the roofline of `gptcore/plan/speed.py`, and measures both. The page *Plan* "
        "draws the same for the runs in your database.",
        "",
        f"{peaks.device_name}, one thread, processor time, torch {peaks.torch}, "
        f"{peaks.measured_at[:10]}; other work went on beside it. "
        f"{len(found.setups)} set-ups, median error {found.median_error:.0%}.",
    ]
    for what in ("decode", "prefill"):
        own = speed.accuracy(tuple(one for one in found.setups if one.what == what), {})
        if own.median_error is not None and own.corrected_error is not None:
            lines.append(
                f"Of {what} alone {own.median_error:.0%} over {len(own.setups)}; where each is "
                f"corrected by all others {own.corrected_error:.0%}, and 8 of 10 of those left out "
                f"lie within {own.low:.2f} and {own.high:.2f} × the prediction."
            )
    lines += [
        "",
        "| precision | linear, GFLOP/s | weights, GB/s | cache, GB/s | a block alone, µs "
        "| a block with others, µs |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in peaks.rates.items():
        together = one.together_block_s or one.block_s
        lines.append(
            f"| {name} | {one.flop_per_s / 1e9:.0f} | {one.bytes_per_s / 1e9:.1f} | "
            f"{one.attention_bytes_per_s / 1e9:.1f} | {1e6 * one.block_s:.0f} | "
            f"{1e6 * together:.0f} |"
        )
    lines += [
        "",
        "| model | precision | step | predicted, ms | measured, ms | residual |",
        "|---|---|---|---|---|---|",
    ]
    for each in found.setups:
        lines.append(
            f"| {each.model} | {each.precision} | {each.what}, {each.tokens} tokens | "
            f"{1000 * each.predicted_s:.4g} | {1000 * each.measured_s:.4g} | "
            f"{each.residual:+.0%} |"
        )
    decodes = speed.accuracy(tuple(one for one in found.setups if one.what == "decode"), {})
    lines += [
        "",
        "Decode of larger sizes behind 512 tokens, as if the memory were there, tokens/s with the "
        "band that leaving one set-up out gives:",
        "",
        "| size | " + " | ".join(PRECISIONS) + " |",
        "|---|" + "---|" * len(PRECISIONS),
    ]
    for name in EXTRAPOLATED:
        cells = []
        for precision in PRECISIONS:
            device = speed.machine_device(peaks, precision)
            if device is None:
                cells.append("–")
                continue
            factor = decodes.factors.get(precision, 1.0)
            seconds = factor * speed.decode(PRESETS[name], precision, device, 512).seconds
            cells.append(
                f"{1 / seconds:.3g} ({1 / seconds / decodes.high:.3g} to "
                f"{1 / seconds / decodes.low:.3g})"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, compare, and keep the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    peaks = measured_peaks()
    torch.set_num_threads(1)
    known = {**PRESETS, **known_specs()}
    found: list[speed.Setup] = []
    for model in options.models.split(","):
        if model not in known:
            print(f"{model} is not installed and is left out.")
            continue
        for precision in options.precisions.split(","):
            for one in setups(model, precision, peaks):
                found.append(one)
                print(
                    f"{one.model:14} {one.precision:5} {one.what:8} {one.tokens:4} "
                    f"{1000 * one.predicted_s:9.2f} ms predicted "
                    f"{1000 * one.measured_s:9.2f} ms measured {one.residual:+.0%}",
                    flush=True,
                )
        accuracy = speed.accuracy(tuple(found), {})
        options.out.write_text(table(accuracy, peaks))
        print(f"median error {accuracy.median_error:.0%} over {len(found)} set-ups so far")


if __name__ == "__main__":
    main()
