"""A form for any pass, drawn from its fields: range, choices and help stand there once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import streamlit as st
from pydantic.fields import FieldInfo

from gptcore.passes.base import Pass
from pages.parts.settings import bound


def draw(one: Pass, key: str, take: Callable[[str, str], None]) -> None:
    """Draw a widget for every field of a pass.

    Args:
        one: as it is now.
        key: under which the widgets keep their values, unique in the page.
        take: called with the widget's key and the field's name when a person changed it.
    """
    fields = type(one).model_fields
    if not fields:
        st.caption("It has no settings.")
        return
    with st.grid(2, min_column_width=150, gap="small"):
        for name, field in fields.items():
            widget(name, field, getattr(one, name), f"{key}_{name}", take)


def widget(
    name: str, field: FieldInfo, value: Any, key: str, take: Callable[[str, str], None]
) -> None:
    """Draw a widget for a field.

    Args:
        name: of the field.
        field: has range, choices and help.
        value: what it shows.
        key: of the widget.
        take: called with the widget's key and the field's name when a person changed it.
    """
    label, help = field.title or name, field.description
    shared: dict[str, Any] = {"on_change": take, "args": (key, name), "help": help}
    kind = field.annotation
    if get_origin(kind) is Literal:
        st.selectbox(label, get_args(kind), key=bound(key, value), **shared)
    elif kind is bool:
        st.toggle(label, key=bound(key, value), **shared)
    elif kind in (int, float):
        low, high = limits(field)
        span = high - low if low is not None and high is not None else None
        if kind is float and span is not None and span <= 1:
            st.slider(label, low, high, step=0.01, key=bound(key, float(value)), **shared)
        else:
            st.number_input(
                label,
                min_value=None if low is None else kind(low),
                max_value=None if high is None else kind(high),
                step=1 if kind is int else step_of(value),
                format=None if kind is int else "%.6g",
                key=bound(key, value, typed=True),
                **shared,
            )
    else:
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        st.text_input(label, key=bound(key, text, typed=True), **shared)


def step_of(value: float) -> float:
    """Return by how much a press on plus changes a number: a tenth of its magnitude."""
    return 10.0 ** (math.floor(math.log10(abs(value))) - 1) if value else 0.1


def limits(field: FieldInfo) -> tuple[float | None, float | None]:
    """Return the least and the most that a field takes, None where it has no limit."""
    low = high = None
    for one in field.metadata:
        low = getattr(one, "ge", getattr(one, "gt", low))
        high = getattr(one, "le", getattr(one, "lt", high))
    return low, high
