"""What the plan's page keeps: one value in the session, widgets that show it, the address from it.

The names in the address begin with ``p_``, because the sidebar's stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args
from urllib.parse import urlencode

import streamlit as st

from gptcore.errors import InvalidInput
from gptcore.plan.assumptions import Assumptions, make, on_card, read, source, unit
from pages.parts import settings
from pages.parts.settings import bound

KEY = "plan"
PREFIX = "p_"
SAFE = 2**53 - 1
"""The largest whole number that a browser keeps exactly."""


def current() -> Assumptions:
    """Return the session's assumptions, from the address when the page is entered by a link."""
    given = {
        name[len(PREFIX) :]: st.query_params.get_all(name)
        for name in st.query_params
        if name.startswith(PREFIX)
    }
    if KEY not in st.session_state:
        found, problems = read(given)
        st.session_state[KEY] = found
        for problem in problems:
            settings.say(problem)
    kept: Assumptions = st.session_state[KEY]
    return kept


def write_address(assumptions: Assumptions) -> None:
    """Make the address hold every assumption that is not the default."""
    wanted = {f"{PREFIX}{name}": text(value) for name, value in assumptions.changed().items()}
    for name in Assumptions.model_fields:
        key = f"{PREFIX}{name}"
        if key not in wanted:
            st.query_params.pop(key, None)
        elif st.query_params.get(key) != wanted[key]:
            st.query_params[key] = wanted[key]


def link(base: str, assumptions: Assumptions, view: str) -> str:
    """Return the address that restores every assumption, whatever the defaults will be."""
    every = {f"{PREFIX}{name}": text(value) for name, value in assumptions.model_dump().items()}
    return f"{base}?{urlencode({**every, 'view': view})}"


def text(value: object) -> str:
    """Return a value as it stands in an address."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def put(**changes: Any) -> None:
    """Change assumptions; what is refused is said and not taken."""
    try:
        st.session_state[KEY] = make({**current().model_dump(), **changes})
    except InvalidInput as error:
        settings.say(str(error))


def put_card(name: str) -> None:
    """Choose a card, with its power and its sustained rate."""
    st.session_state[KEY] = on_card(current(), name)


def taken(name: str) -> None:
    """Take what a widget says now."""
    value = st.session_state.get(f"{PREFIX}{name}")
    if value is None:
        return
    if name == "card":
        put_card(value)
    else:
        put(**{name: value})


def ask(
    name: str,
    *,
    options: list[Any] | None = None,
    shown: Callable[[Any], str] = str,
    step: float | None = None,
    most: float | None = None,
    label: str | None = None,
) -> None:
    """Draw the widget of an assumption: a choice, or a number with the field's own range.

    Args:
        name: of the field.
        options: to choose from; a field with fixed values has its own.
        shown: how a choice is written.
        step: of a number.
        most: a nearer end than the field's, for a slider.
        label: instead of the field's title.
    """
    field = Assumptions.model_fields[name]
    value = getattr(current(), name)
    title = label or field.title or name
    of = unit(name)
    said = ". ".join(one for one in ((field.description or "").rstrip("."),
                                     f"Default from: {source(name)}" if source(name) else "")
                     if one)  # fmt: skip
    choices = options or list(get_args(field.annotation))
    if choices:
        if value not in choices:
            choices = [*choices, value]
        st.selectbox(
            title,
            choices,
            key=bound(PREFIX + name, value),
            format_func=shown,
            on_change=taken,
            args=(name,),
            help=said or None,
        )
        return
    low, high = limits(name)
    whole = field.annotation is int
    shared: dict[str, Any] = {
        "key": bound(PREFIX + name, value, typed=most is None),
        "on_change": taken,
        "args": (name,),
        "help": said or None,
    }
    label_text = f"{title}, {of}" if of else title
    if most is not None:
        st.slider(
            label_text,
            min_value=float(low or step or 1.0),
            max_value=float(max(most, value)),
            step=step,
            format="%.4g",
            **shared,
        )
        return
    st.number_input(
        label_text,
        min_value=None if low is None else int(low) if whole else float(low),
        max_value=None if high is None else int(min(high, SAFE)) if whole else float(high),
        step=int(step or 1) if whole else step,
        format=None if whole else "%.6g",
        **shared,
    )


def limits(name: str) -> tuple[float | None, float | None]:
    """Return the range of a field; the low end is None where it is open."""
    low = high = None
    for one in Assumptions.model_fields[name].metadata:
        low = getattr(one, "ge", low)
        high = getattr(one, "le", high)
    return low, high
