"""One sentence for each value that a field refuses: what it is, the limit, the way out."""

from __future__ import annotations

import unicodedata
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gptcore.errors import GptcoreError
from gptcore.records import Request

VALUE_CHARS = 40
"""Characters of a wrong value that a sentence repeats."""


def sentence(error: GptcoreError | ValidationError, owner: type[BaseModel] = Request) -> str:
    """Return one sentence for an error that a user caused.

    Args:
        error: what was raised.
        owner: the model whose fields have the titles to name.
    """
    return detail(error.errors()[0], owner) if isinstance(error, ValidationError) else str(error)


def detail(found: ErrorDetails, owner: type[BaseModel] = Request) -> str:
    """Return one sentence for one wrong field."""
    value, limits = brief(found["input"]), found.get("ctx", {})
    what = name_of(found["loc"], owner)
    match found["type"]:
        case "greater_than_equal":
            return f"{what} is {value}; the least is {number(limits['ge'])}."
        case "greater_than":
            return f"{what} is {value}; it must be above {number(limits['gt'])}."
        case "less_than_equal":
            return f"{what} is {value}; the most is {number(limits['le'])}."
        case "less_than":
            return f"{what} is {value}; it must be below {number(limits['lt'])}."
        case "finite_number" | "float_parsing" | "float_type":
            return f"{what} is {value}; it must be a number."
        case "int_parsing" | "int_from_float" | "int_type" | "int_parsing_size":
            return f"{what} is {value}; it must be a whole number."
        case "bool_parsing" | "bool_type":
            return f"{what} is {value}; it must be true or false."
        case "tuple_type" | "list_type":
            return f"{what} is {value}; it must be a list."
        case "string_unicode":
            return f"{what} holds half of a surrogate pair, which is no character: remove it."
        case "missing":
            return f"{what} is missing."
        case "extra_forbidden":
            return f"There is no {what}; there are: {', '.join(owner.model_fields) or 'none'}."
        case "string_too_long":
            return (
                f"{what} has {len(found['input']):,} characters; the most is "
                f"{limits['max_length']:,}: shorten it."
            )
        case "too_long":
            return (
                f"{what}: there are {limits['actual_length'] or len(found['input']):,}; the most "
                f"is {limits['max_length']:,}."
            )
        case "literal_error":
            return f"{what} is {value}; there are: {limits['expected']}."
        case "value_error":
            said = found["msg"].removeprefix("Value error, ")
            return f"{said[:1].upper()}{said[1:].rstrip('.')}."
        case _:
            return f"{what} is {value}: {found['msg'].rstrip('.')}."


def name_of(place: tuple[int | str, ...], owner: type[BaseModel] = Request) -> str:
    """Return a field's name as a person knows it."""
    names = [one for one in place if isinstance(one, str)]
    if not names:
        return "The request"
    if names[-1] in ("prompt", "content"):
        return "The prompt"
    field = owner.model_fields.get(names[0]) if len(names) == 1 else None
    return (field.title if field else None) or names[-1].replace("_", " ").capitalize()


def number(value: Any) -> str:
    """Return a limit without needless zeros: 2, not 2.0; 1,000,000."""
    return f"{value:,.10g}" if isinstance(value, float) else f"{value:,}"


def brief(value: Any) -> str:
    """Return a wrong value, shortened."""
    text = value if isinstance(value, str) else repr(value)
    return one_line(text, VALUE_CHARS) or "empty"


def one_line(text: str, most: int = 80) -> str:
    """Return text in one line: line ends and controls become spaces, a long one ends in an …."""
    # Four times what is shown leaves room for runs of white space; a 10 MB text is not walked.
    flat = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text[: 4 * most])
    flat = " ".join(flat.split())
    return flat if len(flat) <= most and len(text) <= 4 * most else f"{flat[: most - 1].rstrip()}…"
