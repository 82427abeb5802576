"""A chart that stays: one Plotly drawing in the browser, fed with new numbers at every refresh.

``st.plotly_chart`` makes a new drawing each time, which costs the browser 100 ms and loses the
reader's zoom. Here the drawing is kept and ``Plotly.react`` changes only its numbers.

What goes over the wire is one block of bytes: a JSON head (title, unit, names), then the numbers as
little-endian 32-bit floats. Times are sent as seconds since the left edge, so that 32 bits resolve
them to better than 0.3 s over 30 days; lines that share their times send them once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import streamlit as st

from pages.parts.scripts import dated, stub

PLOTLY_URL = "/gptlab/plotly.min.js"
"""Served by the routes of ``app.py``."""
GAP_S = 3.0
"""A hole in readings taken once a second: longer ones are left open, not bridged by a line."""

_CSS = """
.gptlab-chart { color: var(--st-text-color); font-family: var(--st-font); font-size: 0.875rem;
  position: relative; }
.gptlab-head { display: flex; flex-wrap: wrap; gap: 0 0.75rem; align-items: baseline;
  justify-content: space-between; min-height: 1.5rem; align-content: flex-start; }
.gptlab-keys { display: flex; gap: 0 0.75rem; }
.gptlab-title { font-weight: 600; }
.gptlab-title span { font-weight: 400; opacity: 0.65; }
.gptlab-key { font-variant-numeric: tabular-nums; white-space: nowrap; font-size: 0.8125rem; }
.gptlab-key i { display: inline-block; width: 0.75rem; height: 0.1875rem; border-radius: 2px;
  margin-right: 0.35rem; vertical-align: middle; }
.gptlab-key span { opacity: 0.65; margin-right: 0.3rem; }
.gptlab-reset { font: inherit; font-size: 0.8125rem; color: var(--st-primary-color); border: 0;
  background: none; padding: 0; cursor: pointer; }
.gptlab-reset:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 2px; }
.gptlab-note { position: absolute; inset: 1.5rem 0 0 0; display: flex; align-items: center;
  justify-content: center; text-align: center; opacity: 0.65; pointer-events: none;
  padding: 0 10%; }
"""

_mount = st.components.v2.component(
    "gptlab_live_chart",
    html='<div class="gptlab-chart" data-gptlab></div>',
    css=_CSS,
    js=stub("live_chart.js"),
    # Plotly follows a drag on the whole document and finds the chart by the event's target, which
    # a shadow root would hide from it.
    isolate_styles=False,
)


@dataclass(frozen=True, slots=True)
class Line:
    """One named curve; values are in the unit that the chart shows."""

    name: str
    times: Sequence[float]
    """Seconds since 1970, ascending."""
    values: Sequence[float | None]
    """None or NaN where nothing is known."""
    color: int = 0
    """Place in the theme's categorical palette."""
    style: Literal["line", "area", "dots", "points"] = "line"
    """``dots`` marks each value on its line, ``points`` draws no line at all."""
    now: float | None = None
    """What stands beside the name; the last known value if not given."""
    gap_s: float = GAP_S
    """A longer time without a point is a hole, and stays open."""


def live_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    start: float,
    end: float,
    key: str,
    note: str = "",
    top: float | None = None,
    empty: str = "Nothing measured in this time.",
    height: int = 200,
) -> None:
    """Draw, or feed, the chart of that key.

    Args:
        title: what is shown, in a few words.
        lines: the curves; one without a name is the only one, and the title names it.
        unit: stands at the title, and on the axis where it is short.
        start: left edge, in seconds since 1970.
        end: right edge.
        key: of this chart on its page; the drawing lives as long as its key.
        note: a few words more beside the unit, such as ``n = 24``.
        top: the largest value of the axis, where it has one (100 %).
        empty: what to say while there is nothing to draw.
        height: of the drawing, in pixels.
    """
    head: dict[str, str | float | None] = {
        "title": title,
        "unit": unit,
        "note": note,
        "top": top,
        "empty": empty,
    }
    head["height"] = height
    _mount(data=dated(packed(head, lines, start, end)), key=key)


def packed(
    head: dict[str, str | float | None],
    lines: Sequence[Line],
    start: float,
    end: float,
) -> bytes:
    """Return head and lines as the block of bytes that the script reads."""
    described: list[dict[str, str | float | bool | None]] = []
    arrays: list[np.ndarray] = []
    before: np.ndarray | None = None
    for line in lines:
        times, values = opened(line.times, line.values, line.gap_s)
        shared = before is not None and np.array_equal(times, before)
        if not shared:
            arrays.append((times - start).astype("<f4"))
        arrays.append(values.astype("<f4"))
        before = times
        described.append(
            {
                "name": line.name,
                "color": line.color,
                "style": line.style,
                "count": len(values),
                "shared": shared,
                "now": line.now,
            }
        )
    whole = {**head, "start": start, "end": end, "plotly": PLOTLY_URL, "lines": described}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 4)  # the numbers then stand on a multiple of their size
    return struct.pack("<I", len(text)) + text + b"".join(a.tobytes() for a in arrays)


def opened(
    times: Sequence[float], values: Sequence[float | None], gap_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return times and values with a NaN inside every hole longer than ``gap_s``.

    Returns:
        (N,) float64 each; no line is drawn to or from a NaN.
    """
    at = np.asarray(times, dtype=np.float64)
    known = np.asarray([np.nan if v is None else v for v in values], dtype=np.float64)
    holes = np.flatnonzero(np.diff(at) > gap_s)
    middle = (at[holes] + at[holes + 1]) / 2
    return np.insert(at, holes + 1, middle), np.insert(known, holes + 1, np.nan)
