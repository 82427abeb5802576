"""``python -m gptcore regress``: is it slower than a baseline; exit status 1 if it is."""

from __future__ import annotations

import argparse
from typing import Any

from gptcore.catalogue import Catalogue
from gptcore.cli.measuring import (
    add_grid_arguments,
    add_stop_arguments,
    cells_of,
    compare_lines,
    stop_of,
)
from gptcore.cli.terminal import PRECISIONS, catalogue, perform, say, variant_of
from gptcore.errors import InvalidInput
from gptcore.lab import Lab, Regress
from gptcore.recipe import Variant

SLOWER = 1
"""The exit status where something became slower."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``regress``; what is not given is as in the baseline."""
    parser.add_argument(
        "--baseline",
        help="the id of a bench, comparison or generation; without it the one that the History "
        "page holds as the baseline",
    )
    parser.add_argument("--model", help="what may be slower; default: the baseline's")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: the baseline's")
    parser.add_argument("--device", help="default: the baseline's")
    parser.add_argument("--threads", type=int, help="default: the baseline's")
    parser.add_argument("--recipe", help="a JSON list of passes; default: the baseline's")
    parser.add_argument("--wait", action="store_true", help="wait for a device that is taken")
    parser.add_argument("--no-save", action="store_true", help="keep nothing in the database")
    add_grid_arguments(parser)
    parser.set_defaults(prompt_tokens=None, new_tokens=None, batch=None)
    add_stop_arguments(parser)
    field = Regress.model_fields["tolerated"]
    parser.add_argument(
        "--tolerate", type=float, default=0.0, help=f"{field.description} (default 0)"
    )
    parser.add_argument(
        "--delay-ratio", type=float, default=0.0, help="slow the new side by this share, as a test"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses tokens and order")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        help="a condition that may differ from the baseline's, such as cpu; may be repeated",
    )


def regress(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a variant beside the baseline's; the exit status is 1 where it is slower.

    Raises:
        InvalidInput: there is no such baseline, conditions differ, or a side cannot be measured.
        GptcoreError: as ``perform``.
    """
    models = catalogue()
    with Lab.open(monitor=False) as lab:
        baseline = options.baseline or _kept(lab)
        run, variant = lab.measured_variant(baseline)
        candidate = candidate_of(options, variant, models)
        work = lab.regression(
            run.id,
            candidate,
            tuple(options.accept),
            cells=_cells(options),
            stop=stop_of(options),
            tolerated=options.tolerate,
            delay_ratio=options.delay_ratio,
            seed=options.seed,
        )
    options.device = candidate.placement.device
    done = perform(work, options)
    assert done.result is not None
    result = {**done.result, "run_id": done.id}
    problems = [f"{one['side']}: {one['problem']}" for one in result["sides"] if one["problem"]]
    if not result["complete"]:
        raise InvalidInput(f"It was not measured to its end. {' '.join(problems)}")
    if result["regressed"]:
        options.status = SLOWER
    if not options.json:
        for line in compare_lines(result):
            say(line)
        say(result["programs"])
        say("Slower than the baseline." if result["regressed"] else "No slowdown was found.")
    return result


def candidate_of(options: argparse.Namespace, baseline: Variant, models: Catalogue) -> Variant:
    """Return the variant that the options name; what they leave open is the baseline's."""
    placement = baseline.placement
    given = {
        "model": options.model or baseline.model,
        "device": options.device or placement.device,
        "threads": placement.threads if options.threads is None else options.threads,
        "precision": options.precision or placement.precision,
        "recipe": options.recipe,
    }
    if options.model is None and baseline.weights_id.startswith("random:"):
        weights = {"spec": baseline.spec, "weights_id": baseline.weights_id}
    else:
        weights = {}
    found = variant_of(argparse.Namespace(**given), models)
    if options.precision is None and options.recipe is None:
        weights["recipe"] = baseline.recipe
    return found.model_copy(update=weights)


def _cells(options: argparse.Namespace) -> Any:
    """Return the grid that was asked for; nothing where it is the baseline's."""
    axes = {"prompt_tokens": "128", "new_tokens": "32", "batch": "1"}
    if all(getattr(options, name) is None for name in axes):
        return ()
    return cells_of(
        argparse.Namespace(**{name: getattr(options, name) or axes[name] for name in axes})
    )


def _kept(lab: Lab) -> str:
    found = lab.baselines()
    if not found:
        raise InvalidInput(
            "No run is held as the baseline: name one with --baseline, or mark one on the History "
            "page."
        )
    return found[0]
