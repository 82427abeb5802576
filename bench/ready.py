"""What the ready recipes of the Optimize page reach here, beside the goals of their case studies.

    python -m bench.ready [--quality] [--model smollm2-135m]

Each recipe is made and proved as the page does it: against the same weights in fp32, on the
evaluation text that ships, calibrated on the calibration text that ships, in turns A B B A. Speed
wants a quiet machine; ``--quality`` leaves it out, and the lines say so.

Every line is kept in bench/results/ready.json as soon as it is there, and the table stands in
docs/optimizing.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.results import RESULTS, into_page
from bench.sides import ROOT
from gptcore.catalogue import Catalogue
from gptcore.host.worker import Watcher, Worker
from gptcore.measure.calibration import with_text
from gptcore.measure.corpora import evaluation_text
from gptcore.optimize.proof import Card, Goals, Prove
from gptcore.optimize.ready import READY, Ready
from gptcore.paths import models_dir
from gptcore.provenance import provenance
from gptcore.records import Run, RunState, new_id, now
from gptcore.work import Desk

PAGE = ROOT / "docs" / "optimizing.md"
ASKED = tuple(one for one in READY if one.goals != Goals())
"""The recipes with goals."""


class Quality(Prove):
    """A proof of bytes and quality alone, which other work on the machine does not change."""

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Count, then hold the predictions of both sides against each other."""
        card = Card(self, desk)
        card.describe()
        card.measure_quality(evaluation_text(self.text), 0.1, 1.0)
        return card.as_json(final=True)


def line(catalogue: Catalogue, one: Ready, options: argparse.Namespace) -> dict[str, Any]:
    """Make and prove a recipe, and return what is kept of it."""
    baseline = catalogue.variant(options.model, precision="fp32", threads=options.threads)
    variant = catalogue.variant(options.model, precision=one.precision, threads=options.threads)
    variant = variant.model_copy(update={"recipe": with_text(one.recipe)})
    kind = Quality if options.quality else Prove
    work = kind(baseline=baseline, variant=variant, goals=one.goals, tasks=False, damage=False)
    run = Run(id=new_id(), kind=work.kind, state=RunState.RUNNING, created_at=now())
    done = Worker("cpu", catalogue).perform(run, work, Watcher())
    if done.result is None or done.state is not RunState.DONE:
        raise SystemExit(f"{one.name}: {done.error}")
    card = done.result
    return {
        "name": one.name,
        "recipe": variant.recipe.model_dump(mode="json"),
        "precision": one.precision,
        "calibration": variant.recipe.calibration and variant.recipe.calibration.hash,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": provenance().git_commit,
        "sides": card["sides"],
        "axes": [
            {name: axis[name] for name in ("metric", "cell", "ratio", "low", "high", "verdict")}
            for axis in card["axes"]
        ],
        "quality": {
            name: card["quality"][name] for name in ("kl_mean", "perplexity_ratio", "scored_tokens")
        },
        "goals": card["goals"],
    }


def markdown(head: str, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table, lines in the order of the page."""
    rows = [
        head,
        "",
        "| recipe | on disk | in memory | response time | decode, times as fast | KL | "
        "perplexity | goals |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in ASKED:
        if (found := lines.get(one.name)) is None:
            continue
        passes = " → ".join(map(repr, one.recipe.passes))
        cells = (
            f"{one.name}: `{passes}` on {one.precision}",
            ratio(found, "stored_bytes"),
            ratio(found, "resident_bytes"),
            ratio(found, "response_s"),
            ratio(found, "decode_s", inverse=True),
            f"{found['quality']['kl_mean']:.4f}",
            f"{found['quality']['perplexity_ratio']:.3f}×",
            "; ".join(map(said, found["goals"])),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def ratio(found: Mapping[str, Any], metric: str, *, inverse: bool = False) -> str:
    """Return B ÷ A of a metric's first cell with its interval, or that it was not measured."""
    axis = next((one for one in found["axes"] if one["metric"] == metric), None)
    if axis is None or axis["ratio"] is None:
        return "not measured"
    numbers = [axis["ratio"], axis["low"], axis["high"]]
    if inverse:
        numbers = [1 / axis["ratio"], 1 / axis["high"], 1 / axis["low"]]
    if numbers[1] == numbers[2]:
        return f"{numbers[0]:.3f}×"
    return "{:.2f}× ({:.2f}–{:.2f})".format(*numbers)


def said(goal: Mapping[str, Any]) -> str:
    """Return a goal and whether it is met, in words."""
    sign = "≥" if goal["goal"].endswith("at_least") else "≤"
    asked = f"{goal['title'].removesuffix(' at most').removesuffix(' at least').lower()} {sign} "
    asked += f"{goal['limit']:g}"
    if goal["met"] is None:
        return f"{asked}: not measured"
    return f"{asked}: {'met' if goal['met'] else '**missed**'}"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quality", action="store_true", help="leave speed out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="words that a recipe's name has")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    file = options.results / "ready.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    catalogue, machine = Catalogue(models_dir()), provenance()
    head = (
        f"{options.model} against its fp32, {options.threads} thread(s) of {machine.cpu}, torch "
        f"{machine.torch}; 95 % intervals in brackets."
    )
    for one in ASKED:
        if options.only and not any(word in one.name for word in options.only):
            continue
        fresh = line(catalogue, one, options)
        kept = json.loads(file.read_text())["lines"] if file.exists() else []
        lines = {old["name"]: old for old in kept} | {one.name: fresh}
        told = {"conditions": head, "lines": list(lines.values())}
        file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        print(markdown(head, {one.name: fresh}).splitlines()[-1], flush=True)
        if options.results == RESULTS:
            into_page(PAGE, "ready", markdown(head, lines))


if __name__ == "__main__":
    main()
