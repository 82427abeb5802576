"""The ranked next tokens: what the model expects, and what temperature and samplers make of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import Lab, NextLogits, Ranked
from gptcore.recipe import Variant
from gptcore.records import STAGES, Request, RunState
from pages.parts import errors, settings
from pages.parts import format as shown
from pages.parts.scripts import dated, stub

ROWS = 12
KEY = "ranking"
WAITED_S = 0.4
"""A look at a loaded model is shorter; then no second run of the script is needed."""
SHOWN_STAGES = tuple(STAGES.index(name) for name in ("raw", "temperature", STAGES[-1]))

_CSS = """
.table { font-family: var(--st-font); color: var(--st-text-color); font-size: 0.8125rem; }
.row { display: grid; grid-template-columns: 1.2rem minmax(3rem, 5.5rem) 1fr 2.9rem 2.9rem 3rem;
  gap: 0.35rem; width: 100%; align-items: center; padding: 0.16rem 0; border: 0;
  border-radius: 4px; background: none; color: inherit; font: inherit; text-align: left; }
button.row:enabled { cursor: pointer; }
button.row:enabled:hover, button.row:focus-visible { outline: 1px solid var(--st-primary-color);
  background: var(--st-secondary-background-color); }
.row.out .piece, .row.out .value { opacity: 0.5; }
.titles { font-size: 0.75rem; }
.titles span:nth-child(n + 4), .value { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.rank { text-align: right; font-variant-numeric: tabular-nums; }
.piece { overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  font-family: var(--st-code-font); }
.bars { display: grid; gap: 2px; }
.bar { height: 0.3rem; border-radius: 2px;
  background: linear-gradient(var(--st-primary-color) 0 0) no-repeat 0 / var(--share) 100%; }
.bar.raw { background-image: linear-gradient(
  color-mix(in srgb, var(--st-text-color) 35%, transparent) 0 0); }
.dim { opacity: 0.65; }
"""

_mount = st.components.v2.component(
    "gptlab_ranking",
    html="<div data-gptlab></div>",
    css=_CSS,
    js=stub("ranking.js"),
)


@dataclass(frozen=True, slots=True)
class Look:
    """One forward pass that was asked for: after which text, with what."""

    run_id: str
    variant: Variant
    request: Request
    answer_ids: tuple[int, ...] = ()

    @property
    def after(self) -> str:
        """The end of the text that the tokens come after, for showing."""
        text = self.request.messages[-1].content if self.request.messages else self.request.prompt
        return f"…{shown.one_line(text[-60:], 44)}" if len(text) > 44 else shown.one_line(text)


def look(lab: Lab, variant: Variant, request: Request, answer_ids: tuple[int, ...]) -> None:
    """Queue the forward pass whose logits the table shows; a callback's work."""
    try:
        run_id = lab.next_logits(variant, request, answer_ids)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
        return
    st.session_state[KEY] = Look(run_id, variant, request, answer_ids)


def current_look() -> Look | None:
    """Return what the table shows, or waits for."""
    found: Look | None = st.session_state.get(KEY)
    return found


def picked(key: str = "ranked tokens") -> int | None:
    """Return the id of the token that was clicked, or None."""
    value: Any = (st.session_state.get(key) or {}).get("pick")
    try:
        return int(value["id"])
    except (TypeError, KeyError, ValueError):
        return None


def table(lab: Lab, on_pick: Callable[[], None] | None) -> None:
    """Draw the table, or why there is none yet; a moved slider only does arithmetic.

    Args:
        lab: has the logits.
        on_pick: called after a click on a token; None where nothing can be written now.
    """
    asked = current_look()
    if asked is None:
        st.caption(
            "Shows what the model expects next, and how temperature and samplers change it. "
            "One forward pass; from then on every slider is only arithmetic."
        )
        return
    found = _awaited(lab, asked)
    if found is None:
        return
    sampling = settings.current().sampling
    rows = lab.rank(asked.variant, found, sampling, count=ROWS)
    _mount(
        data=dated(
            {
                "look": asked.run_id,
                "temperature": f"T = {sampling.temperature:g}",
                "pick": on_pick is not None,
                "rows": [_packed(row) for row in rows],
            }
        ),
        key="ranked tokens",
        on_pick_change=on_pick or _ignored,
    )
    named = "the answer" if asked.answer_ids else f"“{asked.after}”"
    st.caption(
        f"After {shown.escaped(named)}: the {len(rows)} likeliest of "
        f"{len(found.logits):,} tokens hold {shown.share(sum(r.probabilities[0] for r in rows))} "
        f"of the raw probability. {shown.escaped(asked.variant.model)}, {asked.variant.precision}."
    )


def _ignored() -> None:
    pass


def _packed(row: Ranked) -> dict[str, object]:
    return {
        "rank": row.rank,
        "id": row.id,
        "text": row.text,
        "probabilities": [round(row.probabilities[stage], 5) for stage in SHOWN_STAGES],
    }


def _awaited(lab: Lab, asked: Look) -> NextLogits | None:
    deadline = time.monotonic() + WAITED_S
    while True:
        if found := lab.next_logits_of(asked.run_id):
            return found
        snapshot = lab.snapshot(asked.run_id)
        if snapshot is None:
            st.caption("This look is no longer in memory: press the button again.")
            return None
        if snapshot.run.state.final and snapshot.run.state is not RunState.DONE:
            errors.show(snapshot.run.error or "It ended before there was anything to show.")
            return None
        if time.monotonic() > deadline:
            st.fragment(errors.guarded(_waiting), run_every=0.3)(lab, asked)
            return None
        time.sleep(0.01)


def _waiting(lab: Lab, asked: Look) -> None:
    snapshot = lab.snapshot(asked.run_id)
    if snapshot is None or snapshot.run.state.final:
        st.rerun()
    place = f", place {snapshot.place} in the queue" if snapshot.place else ""
    st.caption(f":material/hourglass_empty: {shown.escaped(snapshot.phase)}{place}…")


def forced(asked: Look, id: int) -> Request:
    """Return the request that writes on from a look, with ``id`` as the first new token."""
    trunk = (*asked.answer_ids, id)
    return asked.request.model_copy(update={"forced_ids": trunk})
