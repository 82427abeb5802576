"""All passes by name, found by importing every file of this folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

import gptcore.passes
from gptcore.errors import InvalidInput
from gptcore.passes.base import Pass
from gptcore.sentences import brief, sentence


@functools.cache
def passes() -> Mapping[str, type[Pass]]:
    """Return every pass class by its name, sorted; an import error is let through."""
    for module in pkgutil.iter_modules(gptcore.passes.__path__):
        importlib.import_module(f"gptcore.passes.{module.name}")
    return by_name(_leaves(Pass))


def by_name(classes: Iterable[type[Pass]]) -> dict[str, type[Pass]]:
    """Return ``classes`` by name, refusing a second class of the same name."""
    found: dict[str, type[Pass]] = {}
    for one in classes:
        if one.name in found:
            raise TypeError(f"two passes are named {one.name!r}: {found[one.name]} and {one}")
        found[one.name] = one
    return dict(sorted(found.items()))


def pass_from_json(value: Any) -> Pass:
    """Return the pass that ``value`` (as from ``Pass.as_json``) describes.

    Raises:
        InvalidInput: not an object, an unknown pass, or an unknown or illegal field.
    """
    if not isinstance(value, dict) or not isinstance(value.get("pass"), str):
        raise InvalidInput('A pass is a JSON object such as {"pass": "int8"}.')
    name, fields = value["pass"], {key: val for key, val in value.items() if key != "pass"}
    if name not in passes():
        raise InvalidInput(f"There is no pass {brief(name)!r}; there are: {', '.join(passes())}.")
    kind = passes()[name]
    fields = {kind.also_called.get(key, key): one for key, one in fields.items()}
    if strange := [key for key in fields if key not in kind.model_fields]:
        there = f"it has: {', '.join(kind.model_fields)}" if kind.model_fields else "it has none"
        raise InvalidInput(f"Pass {name!r} has no parameter {brief(strange[0])!r}; {there}.")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise InvalidInput(f"Pass {name!r}: {sentence(error, kind)}") from None


def _leaves(root: type[Pass]) -> list[type[Pass]]:
    found = []
    for child in root.__subclasses__():
        found += [child] if "name" in vars(child) else []
        found += _leaves(child)
    return found
