"""How a token's cost grows with the context, with texts side by side, and with the model.

    python -m bench.growth

Decode on one thread, timed by its processor time, beside what the roofline of
``gptcore/plan/speed.py`` says from the rates that were measured just before; ``predictions.py``
tells how. Contexts and texts are SmolLM2's, sizes are GPT-3's shapes with random weights, whose
speed is real. The result is printed, and written to bench/results/ and into bench/README.md.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

import torch

from bench.predictions import measured_peaks, setups
from bench.results import conditions, keep
from gptcore.measure.timing import Cell

NEW_TOKENS = 24
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
TEXTS = (1, 2, 4, 8, 16, 32)
SIZES = ("gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1.3b")
PRECISIONS = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Growth:
    """One line of points: what grows, and what the others are meanwhile."""

    title: str
    unit: str
    points: tuple[tuple[str, str, Cell], ...]
    """(label, model, cell)."""


def growths(model: str) -> tuple[Growth, ...]:
    """Return the three lines; ``model`` is that of the first two."""

    def cell(prompt: int = 128, batch: int = 1) -> Cell:
        return Cell(prompt_tokens=prompt, new_tokens=NEW_TOKENS, batch=batch)

    return (
        Growth(
            f"{model}, one text",
            "tokens before it",
            tuple((f"{one:,}", model, cell(prompt=one)) for one in CONTEXTS),
        ),
        Growth(
            f"{model}, behind 128 tokens",
            "texts side by side",
            tuple((str(one), model, cell(batch=one)) for one in TEXTS),
        ),
        Growth(
            "one text, behind 128 tokens",
            "model",
            tuple((one, one, cell()) for one in SIZES),
        ),
    )


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    options = parser.parse_args()
    before, peaks = os.getloadavg(), measured_peaks()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for growth in growths(options.model):
        for precision in options.precisions:
            for model in dict.fromkeys(point[1] for point in growth.points):
                points = [point for point in growth.points if point[1] == model]
                found = setups(model, precision, peaks, [cell for _, _, cell in points])
                decoded = [one for one in found if one.what == "decode"]
                for (label, _, _), one in zip(points, decoded, strict=True):
                    rows.append(
                        {
                            "title": growth.title,
                            "unit": growth.unit,
                            "point": label,
                            "precision": precision,
                            "tokens_per_s": one.batch / one.measured_s,
                            "predicted_tokens_per_s": one.batch / one.predicted_s,
                        }
                    )
                    print(rows[-1], flush=True)
    result = {**conditions(1, before), "rows": rows}
    table = markdown(result)
    print(table)
    if not options.dry:
        keep("growth", result, table)


def markdown(result: dict[str, Any]) -> str:
    """Return a table for each line of points."""
    machine, load, rows = result["machine"], result["load_average"], result["rows"]
    precisions = list(dict.fromkeys(one["precision"] for one in rows))
    lines = [
        f"{result['at'][:10]}, {machine['cpu']}, one thread, torch {machine['torch']}, commit "
        f"{machine['git_commit']}; load {load['before'][0]:.1f} before and {load['after'][0]:.1f} "
        "after. Tokens a second of processor time, and in brackets what the roofline says.",
    ]
    for title, unit in dict.fromkeys((one["title"], one["unit"]) for one in rows):
        lines += [
            "",
            f"| {title}: {unit} | {' | '.join(precisions)} |",
            f"|---|{'---|' * len(precisions)}",
        ]
        here = [one for one in rows if one["title"] == title]
        for point in dict.fromkeys(one["point"] for one in here):
            cells = [
                f"{one['tokens_per_s']:.4g} ({one['predicted_tokens_per_s']:.4g})"
                for one in here
                if one["point"] == point
            ]
            lines.append(f"| {point} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
