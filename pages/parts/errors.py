"""What a user caused, as one sentence: the value, the limit and the way out. Nothing is swallowed.

Only ``GptcoreError`` and pydantic's ``ValidationError`` are a user's; everything else is a bug and
goes on to Streamlit.
"""

from __future__ import annotations

from typing import Any

import streamlit as st
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gptcore.errors import GptcoreError
from gptcore.records import Request
from pages.parts import format as shown

USERS_ERRORS = (GptcoreError, ValidationError)
VALUE_SHOWN = 40
"""Characters of a wrong value that a sentence repeats."""


def sentence(error: GptcoreError | ValidationError) -> str:
    """Return one sentence for an error that a user caused."""
    return detail(error.errors()[0]) if isinstance(error, ValidationError) else str(error)


def detail(found: ErrorDetails) -> str:
    """Return one sentence for one wrong field."""
    what, value, limits = name_of(found["loc"]), brief(found["input"]), found.get("ctx", {})
    match found["type"]:
        case "greater_than_equal":
            return f"{what} is {value}; the least is {number(limits['ge'])}."
        case "greater_than":
            return f"{what} is {value}; it must be above {number(limits['gt'])}."
        case "less_than_equal":
            return f"{what} is {value}; the most is {number(limits['le'])}."
        case "finite_number" | "float_parsing" | "float_type":
            return f"{what} is {value}; it must be a number."
        case "int_parsing" | "int_from_float" | "int_type" | "int_parsing_size":
            return f"{what} is {value}; it must be a whole number."
        case "bool_parsing" | "bool_type":
            return f"{what} is {value}; it must be true or false."
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


def name_of(place: tuple[int | str, ...]) -> str:
    """Return a field's name as a person knows it."""
    names = [one for one in place if isinstance(one, str)]
    if not names:
        return "The request"
    if names[-1] in ("prompt", "content"):
        return "The prompt"
    field = Request.model_fields.get(names[0])
    return (field.title if field else None) or names[0].replace("_", " ").capitalize()


def number(value: Any) -> str:
    """Return a limit without needless zeros: 2, not 2.0; 1,000,000."""
    return f"{value:,.10g}" if isinstance(value, float) else f"{value:,}"


def brief(value: Any) -> str:
    """Return a wrong value, shortened."""
    text = value if isinstance(value, str) else repr(value)
    return shown.one_line(text, VALUE_SHOWN) or "empty"


def show(error: GptcoreError | ValidationError | str, icon: str = ":material/error:") -> None:
    """Draw the sentence of an error in the page; its text is not read as Markdown."""
    text = error if isinstance(error, str) else sentence(error)
    st.error(shown.escaped(text), icon=icon)
