"""``python -m gptcore plan``: the same plan as the page's, as text or as one JSON object."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, get_args

from gptcore.catalogue import open_catalogue
from gptcore.plan.assumptions import Assumptions, make, on_card, source
from gptcore.plan.outcome import Outcome, outcome
from gptcore.plan.peaks import measure_peaks
from gptcore.spec import ModelSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every assumption; what was not given keeps the default."""
    for name, field in Assumptions.model_fields.items():
        said = field.description or field.title or name
        origin = f"; {source(name)}" if source(name) else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            help=f"{said} (default {field.default}{origin})".replace("%", "%%"),
            choices=get_args(field.annotation) or None,
            metavar=None if get_args(field.annotation) else name.upper(),
        )
    parser.add_argument(
        "--measure", action="store_true", help="measure this machine's peaks first (30 s)"
    )


def plan(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the plan; print it with ``say`` where no JSON is asked for.

    Raises:
        InvalidInput: an assumption is not allowed.
    """
    given = {
        name: value
        for name in Assumptions.model_fields
        if (value := getattr(options, name)) is not None
    }
    assumptions = make(given)
    if "card" in given:
        assumptions = make({**on_card(assumptions, assumptions.card).model_dump(), **given})
    if options.measure:
        measure_peaks()
    found = outcome(assumptions, known_specs(), paths=True)
    if not options.json:
        for line in lines(found):
            say(line)
    return found.as_json()


def known_specs() -> dict[str, ModelSpec]:
    """Return the shapes of the installed models by name."""
    entries = open_catalogue().entries()
    return {one.name: one.spec for one in entries if one.spec is not None}


def lines(found: Outcome) -> list[str]:
    """Return the plan as text for a terminal."""
    return [
        text
        for title, rows in found.tables()
        for text in (title, *(f"  {name:<34}{value}" for name, value in rows), "")
    ]
