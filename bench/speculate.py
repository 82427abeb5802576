"""Guessing ahead on against off, in turns: what prompt lookup and a draft of the weights save.

Two sets of prompts: *copying* ones ask for the passage that they hold, once more or with one word
exchanged; the *others* are the beginnings of a text that ships, which has little to repeat. Every
prompt is written with guessing and without, in an order drawn anew, greedily unless a temperature
is given; the tokens must be the same, one for one. Sides with a draft have the pass ``draft`` and
prompt lookup, the others prompt lookup alone; without guessing means with neither. What stands in
the table is the ratio of the seconds from the first token to the last, and the share of guesses
that were right. Sides that are not measured keep what was measured of them at the same settings.

The result is printed, and written to bench/results/ and into bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from bench.decode import SMOLLM2
from bench.results import RESULTS, conditions, keep
from bench.sides import ROOT, pin
from gptcore.device import cpu_name
from gptcore.records import Message, Request

PASSAGE_CHARS = 320
SIDES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "fp32": ("fp32", []),
    "bf16": ("bf16", []),
    "int8": ("int8", []),
    "fp32, draft": ("fp32", [{"pass": "draft"}]),
    "bf16, draft": ("bf16", [{"pass": "draft"}]),
}
"""Precision and recipe by name."""
COPYING = (
    "Repeat this text word for word, and nothing else:\n\n{passage}",
    "Write this text again, with the first word in capital letters:\n\n{passage}",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prompt, with guessing and without."""

    kind: str
    plain_s: float
    quick_s: float
    tokens: int
    steps: int
    guessed: int
    accepted: int
    same: bool


def requests(count: int, new_tokens: int, temperature: float) -> list[tuple[str, Request]]:
    """Return so many requests of each kind."""
    text = (ROOT / "data" / "texts" / "evaluation.txt").read_text()
    starts = np.linspace(0, len(text) - PASSAGE_CHARS - 1, count).astype(int)
    found = []
    for i, start in enumerate(starts):
        passage = text[start : start + PASSAGE_CHARS].split(" ", 1)[-1].rsplit(" ", 1)[0]
        asked = COPYING[i % len(COPYING)].format(passage=passage)
        chat = Request(
            messages=(Message(role="user", content=asked),),
            temperature=temperature,
            seed=i,
            max_new_tokens=new_tokens,
            alternatives=0,
        )
        plain = chat.model_copy(update={"messages": (), "prompt": passage})
        found += [("copying", chat), ("others", plain)]
    return found


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--prompts", type=int, default=25, help="of each kind")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    pin(options.threads)
    load_before = os.getloadavg()
    settings = {"new_tokens": options.new_tokens, "temperature": options.temperature}
    rows: dict[str, dict[str, object]] = before(settings)
    for side in options.sides:
        asked = requests(options.prompts, options.new_tokens, options.temperature)
        found = outcomes(*SIDES[side], asked, options.threads)
        rows[side] = {kind: summary(found, kind) for kind in ("copying", "others")}
        rows[side]["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        rows[side]["cpu"] = cpu_name()
        rows[side]["outcomes"] = [asdict(one) for one in found]
        print(f"{side}: done", flush=True)
    result = {
        **conditions(options.threads, load_before),
        **settings,
        "rows": {side: rows[side] for side in SIDES if side in rows},
    }
    table = markdown(result)
    print(table)
    if options.write:
        keep("speculate", result, table)


def before(settings: dict[str, Any]) -> dict[str, dict[str, object]]:
    """Return what was measured at the same settings, by side."""
    file = RESULTS / "speculate.json"
    if not file.is_file():
        return {}
    known = json.loads(file.read_text())
    if any(known[name] != value for name, value in settings.items()):
        return {}
    return {side: row for side, row in known["rows"].items() if side in SIDES}


def outcomes(
    precision: str, recipe: list[dict[str, Any]], asked: list[tuple[str, Request]], threads: int
) -> list[Outcome]:
    """Write every prompt both ways."""
    from bench.sides import Ours
    from gptcore.catalogue import Catalogue
    from gptcore.engine import Engine
    from gptcore.paths import models_dir
    from gptcore.tokenizer import load_tokenizer

    model = Ours(SMOLLM2, precision, threads, recipe).engine.model
    directory = Catalogue(models_dir()).checkpoint(SMOLLM2).directory
    engine = Engine(model, load_tokenizer(directory))
    draft, draw, found = model.draft, random.Random(0), []
    for kind, request in asked:
        done = {}
        for shortcuts in draw.sample([False, True], 2):
            engine.forget()
            model.draft = draft if shortcuts else None
            generation = engine.start(request, shortcuts=shortcuts)
            tokens = list(generation)
            done[shortcuts] = generation, tokens, tokens[-1].seconds - tokens[0].seconds
        (_, plain, plain_s), (quick, tokens, quick_s) = done[False], done[True]
        assert quick.lookup is not None, quick.decoder
        same = [one.id for one in plain] == [one.id for one in tokens]
        if len(tokens) > 1:
            guesses = quick.lookup.guessed, quick.lookup.accepted
            found.append(Outcome(kind, plain_s, quick_s, len(tokens), quick.steps, *guesses, same))
    return found


def summary(found: list[Outcome], kind: str) -> dict[str, object]:
    """Return what a kind of prompts gave: the median ratio of its prompts, and the rest in sum."""
    here = [one for one in found if one.kind == kind]
    ratios = np.array([one.plain_s / one.quick_s for one in here])
    guessed = sum(one.guessed for one in here)
    return {
        "prompts": len(here),
        "ratio": float(np.median(ratios)),
        "ratio_of_sums": sum(one.plain_s for one in here) / sum(one.quick_s for one in here),
        "quartiles": [float(one) for one in np.quantile(ratios, (0.25, 0.75))],
        "tokens_per_step": sum(one.tokens - 1 for one in here) / sum(one.steps for one in here),
        "accepted_ratio": sum(one.accepted for one in here) / guessed if guessed else None,
        "guessed_tokens": guessed,
        "identical": sum(one.same for one in here),
    }


def markdown(result: dict[str, object]) -> str:
    """Return the table, with what it takes to read it."""
    machine, load, rows = result["machine"], result["load_average"], result["rows"]
    assert isinstance(machine, dict)
    assert isinstance(load, dict)
    assert isinstance(rows, dict)
    lines = [
        f"{str(result['at'])[:10]}, {machine['cpu']}, {result['threads']} threads, "
        f"{machine['platform']}, commit {machine['git_commit']}. {SMOLLM2}, temperature "
        f"{result['temperature']:g}, at most {result['new_tokens']} new tokens. Load average "
        f"{load['before'][0]:.1f} before and {load['after'][0]:.1f} after.",
        "",
        "| side | measured | prompts | guessing is faster by, median (quartiles) | tokens a step | "
        "guesses that were right | same tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, kinds in rows.items():
        for kind in ("copying", "others"):
            one = kinds[kind]
            low, high = one["quartiles"]
            right = "–" if one["accepted_ratio"] is None else f"{one['accepted_ratio']:.0%}"
            lines.append(
                f"| {side} | {kinds['at'][:10]}, {kinds['cpu']} | {kind} | "
                f"{one['ratio']:.2f}× ({low:.2f}–{high:.2f}) | "
                f"{one['tokens_per_step']:.2f} | {right} of {one['guessed_tokens']:,} | "
                f"{one['identical']} of {one['prompts']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
