"""The controls of a generation: temperature, the other samplers, limits and the seed."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import streamlit as st

from gptcore.records import Request
from pages.parts.settings import bound, change, current, taken_from

FRESH_SEED = "fresh_seed"
"""Whether every generation draws a seed of its own; how a page behaves, not what a text is made of.
"""


def draw_seed() -> int:
    """Return a fresh seed, short enough to read out."""
    return secrets.randbelow(2**31)


def temperature() -> None:
    """Draw the one slider that everybody moves, with a sentence on what it does."""
    _slider("temperature", 0.05, "%.2f")
    st.caption(str(Request.model_fields["temperature"].description))


def more_samplers() -> None:
    """Draw the other samplers, in the order in which they apply."""
    off = {name: Request.model_fields[name].default for name in ("top_k", "top_p", "min_p")}
    off["repetition_penalty"] = Request.model_fields["repetition_penalty"].default
    chosen = current()
    on = [name for name, value in off.items() if getattr(chosen, name) != value]
    label = "More samplers" + (f" · {len(on)} on" if on else "")
    with st.expander(label, icon=":material/tune:"):
        _slider("repetition_penalty", 0.05, "%.2f")
        _number("top_k")
        _slider("top_p", 0.01, "%.2f", lowest=0.01)
        _slider("min_p", 0.01, "%.2f")
        st.caption("Applied in the order: repetition penalty, temperature, top-k, top-p, min-p.")


def limits() -> None:
    """Draw how long a text may become, where it ends, and its seed."""
    with st.expander("Length and seed", icon=":material/straighten:"):
        _number("max_new_tokens")
        left, right = st.columns([3, 2], vertical_alignment="bottom")
        with left:
            _number("seed")
        with right:
            st.toggle(
                "Fresh",
                key=bound(FRESH_SEED, fresh_seed()),
                help="Draw a new seed for every text; off, the same settings write the same text.",
            )
        st.text_area(
            "Stop strings, one a line",
            key=bound("stop", lines_of(current().stop), typed=True),
            height=70,
            on_change=_take_stops,
            help=f"{_help('stop')} Write \\n for a line end.",
        )
        st.toggle(
            _title("ignore_eos"),
            key=bound("ignore_eos", current().ignore_eos),
            on_change=taken_from,
            args=("ignore_eos", "ignore_eos"),
            help=_help("ignore_eos"),
        )
        st.segmented_control(
            _title("overflow"),
            ("refuse", "cut"),
            key=bound("overflow", current().overflow),
            format_func={"refuse": "Refuse it", "cut": "Cut its beginning"}.__getitem__,
            required=True,
            on_change=taken_from,
            args=("overflow", "overflow"),
            help=_help("overflow"),
        )


def fresh_seed() -> bool:
    """Return whether the next text gets a seed of its own."""
    return bool(st.session_state.get(FRESH_SEED, True))


def lines_of(stops: Sequence[str]) -> str:
    """Return stop strings as the lines of a text field."""
    return "\n".join(stop.replace("\n", "\\n") for stop in stops)


def stops_of(lines: str) -> tuple[str, ...]:
    """Return the stop strings of a text field; empty lines are none."""
    return tuple(line.replace("\\n", "\n") for line in lines.splitlines() if line)


def _take_stops() -> None:
    change(stop=stops_of(st.session_state["stop"] or ""))


def _limits_of(name: str) -> tuple[Any, Any]:
    found: dict[str, Any] = {}
    for rule in Request.model_fields[name].metadata:
        for bound_name in ("ge", "gt", "le"):
            if hasattr(rule, bound_name):
                found[bound_name] = getattr(rule, bound_name)
    return found.get("ge", found.get("gt")), found["le"]


def _slider(name: str, step: float, format: str, lowest: float | None = None) -> None:
    least, most = _limits_of(name)
    st.slider(
        _title(name),
        min_value=least if lowest is None else lowest,
        max_value=most,
        step=step,
        format=format,
        key=bound(name, getattr(current(), name)),
        on_change=taken_from,
        args=(name, name),
        help=None if name == "temperature" else _help(name),
    )


def _number(name: str) -> None:
    least, most = _limits_of(name)
    st.number_input(
        _title(name),
        min_value=least,
        max_value=most,
        step=1,
        key=bound(name, getattr(current(), name), typed=True),
        on_change=taken_from,
        args=(name, name),
        help=_help(name),
    )


def _title(name: str) -> str:
    return str(Request.model_fields[name].title)


def _help(name: str) -> str:
    return str(Request.model_fields[name].description)
