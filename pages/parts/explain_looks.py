"""What the views of the explain page share: cards, waiting, and texts coloured token by token."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from gptcore.lab import Lab
from pages.parts.plan_charts import colors
from pages.parts.shown_run import Draw, follow, settled

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from streamlit.delta_generator import DeltaGenerator

WAITED_S = 0.5
"""A look with a loaded model is often shorter; then no second run of the script is needed."""
TICK_S = 0.3


def chart(figure: go.Figure, key: str, **more: Any) -> Any:
    """Draw a figure in its card."""
    return st.plotly_chart(figure, key=key, config={"displayModeBar": False}, **more)


def halves() -> tuple[DeltaGenerator, DeltaGenerator]:
    """Return two places side by side, one under the other where there is no room."""
    grid = st.grid(2, min_column_width=380, gap="small")
    return grid.container(height="stretch"), grid.container(height="stretch")


def looked(lab: Lab, run_id: str, body: Draw) -> bool:
    """Draw a look, waiting a moment for one that is short; return whether it goes on."""
    settled(lab, run_id, WAITED_S)
    return follow(lab, run_id, body, tick_s=TICK_S)


def coloured(texts: Sequence[str], scores: Sequence[float], tips: Sequence[str]) -> None:
    """Draw a text whose tokens are coloured by a score: above 0 in the accent, below in red.

    Every piece goes through ``html.escape``: nothing in it is markup.
    """
    far = max(map(abs, scores), default=0.0) or 1.0
    more, less = colors()[0], colors()[4]
    pieces = []
    for text, score, tip in zip(texts, scores, tips, strict=True):
        color = more if score >= 0 else less
        depth = round(60 * abs(score) / far)
        seen = html.escape(text).replace("\n", "↵<br>")
        pieces.append(
            f'<span title="{html.escape(tip, quote=True)}" style="border-radius:3px;'
            f'background:color-mix(in srgb,{color} {depth}%,transparent)">{seen}</span>'
        )
    st.html(
        '<div style="line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere">'
        f"{''.join(pieces)}</div>"
    )
