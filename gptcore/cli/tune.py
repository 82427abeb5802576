"""``tune``: search recipes for a model under limits, in a study that goes on when called again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from gptcore.cli.optimizing import baseline_of
from gptcore.cli.terminal import add_variant_arguments, catalogue, perform, say, variant_of
from gptcore.errors import InvalidInput
from gptcore.fit import gib
from gptcore.optimize.bits import BitScan
from gptcore.optimize.spaces import NAMES, space
from gptcore.optimize.tune import OBJECTIVES, Limits, Tune
from gptcore.sentences import one_line

SCAN = {"effective_bits": "--effective-bits", "group": "--group", "tokens": "--scan-tokens"}
"""Options of the scan, by its field."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tune``."""
    add_variant_arguments(parser)
    parser.add_argument(
        "--space",
        default="formats",
        help=f"what is searched: {', '.join(NAMES)}, or a JSON list of knobs",
    )
    parser.add_argument(
        "--objectives", default="kl,stored_bytes", help=f"one to three of {', '.join(OBJECTIVES)}"
    )
    for name, kind in (
        ("trials", int),
        ("minutes", float),
        ("study", str),
        ("text", str),
        ("tokens", int),
        ("seed", int),
    ):
        field = Tune.model_fields[name]
        parser.add_argument(
            f"--{name}", type=kind, default=field.default, help=field.description or field.title
        )
    for name, field in Limits.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            metavar="X",
            help=f"a limit: {field.title}. {field.description}".replace("%", "%%"),
        )
    for name, field in BitScan.model_fields.items():
        parser.add_argument(
            SCAN[name],
            dest=f"scan_{name}",
            type=type(field.default),
            default=field.default,
            help=f"with --space bits: {field.title}. {field.description}",
        )


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Search, and return the study's trials and its winner.

    Raises:
        GptcoreError: as ``perform``.
    """
    models = catalogue()
    found = None
    if options.space in NAMES:
        found = space(options.space, variant_of(options, models).spec)
        options.precision = options.precision or found.precision
    variant = variant_of(options, models)
    work = Tune.model_validate(
        {
            "baseline": baseline_of(variant),
            "variant": variant,
            "knobs": found.knobs if found else _knobs(options.space),
            "start": found.start if found else (),
            "objectives": tuple(filter(None, options.objectives.split(","))),
            "scan": {name: getattr(options, f"scan_{name}") for name in BitScan.model_fields},
            "limits": {name: getattr(options, name) for name in Limits.model_fields},
            **{
                name: getattr(options, name)
                for name in ("trials", "minutes", "study", "text", "tokens", "seed")
            },
        }
    )
    run = perform(work, options)
    assert run.result is not None
    result = {**run.result, "run_id": run.id}
    if not options.json:
        for line in lines(result):
            say(line)
    return result


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the trials that no other beats, the best first, and where the study lies."""
    front = [one for one in result["trials"] if one["number"] in result["front"]]
    for one in front:
        values = ", ".join(f"{name} {value:.5g}" for name, value in one["values"].items())
        settings = ", ".join(f"{name} = {value}" for name, value in one["settings"].items())
        yield f"trial {one['number']}: {values}"
        yield f"  {settings}"
    refused = [one for one in result["trials"] if one["problem"]]
    if refused:
        yield f"{len(refused)} of {len(result['trials'])} could not run, such as: " + one_line(
            refused[0]["problem"], 200
        )
    if uniform := result["uniform"]:
        yield f"The same bits for all layers: KL {uniform['values']['kl']:.5g}, " + (
            f"{uniform['values']['stored_ratio']:.4f} of the bytes"
        )
    if winner := result["winner"]:
        yield f"Best by {result['objectives'][0]['name']}: trial {winner['number']}, " + json.dumps(
            winner["recipe"]
        )
    else:
        yield "No trial keeps to the limits."
    if confirmed := result["confirmed"]:
        for one in confirmed["comparisons"]:
            yield f"trial {confirmed['trials'][one['side']]} measured again: {one['sentence']}"
    yield f"Baseline {gib(result['baseline_stored_bytes'])}. The study is {result['study']!r} in"
    yield f"{result['storage']}; optuna-dashboard opens it."


def _knobs(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise InvalidInput(
            f"There is no space {one_line(text, 60)!r}; there are: {', '.join(NAMES)}. Or give a "
            'list such as [{"technique": "int4", "field": "group", "choices": [32, 64]}].'
        )
    return found
