"""What the views of the explain page share: cards, waiting, and texts coloured token by token."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from gptcore.lab import Lab, Snapshot
from pages.parts import errors
from pages.parts import format as shown
from pages.parts.plan_charts import colors

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


def finished(lab: Lab, run_id: str) -> Snapshot | None:
    """Return a look that has ended, waiting a moment for it; None while it goes on."""
    deadline = time.monotonic() + WAITED_S
    while True:
        found = lab.snapshot(run_id)
        if found is None or found.run.state.final:
            return found
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def waiting(lab: Lab, run_id: str) -> None:
    """Draw how far a forward pass is, until it has ended; nothing once its logits are there."""
    found = finished(lab, run_id)
    if found is None:
        if lab.snapshot(run_id) is not None:
            st.fragment(errors.guarded(_waiting), run_every=TICK_S)(lab, run_id)
        else:
            st.caption("This look is no longer in memory: press Look again.")
    elif found.run.error:
        errors.show(found.run.error)


def _waiting(lab: Lab, run_id: str) -> None:
    found = lab.snapshot(run_id)
    if found is None or found.run.state.final:
        st.rerun()
    progress(lab, found)


def progress(lab: Lab, found: Snapshot) -> None:
    """Draw how far a look is."""
    place = f", place {found.place} in the queue" if found.place else ""
    share = f", {shown.share(found.progress)}" if found.progress else ""
    phase = shown.escaped(found.phase[:1].upper() + found.phase[1:])
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        st.progress(min(1.0, max(0.0, found.progress or 0.0)), text=f"{phase}{place}{share}")
        st.button(
            "Stop",
            key=f"stop {found.run.id}",
            icon=":material/stop:",
            on_click=lab.cancel,
            args=(found.run.id,),
        )


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
