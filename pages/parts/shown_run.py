"""One way to show a piece of work on a page: which one, how far it is, and what it found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import streamlit as st

from gptcore.lab import Lab, Snapshot
from gptcore.records import Run, RunKind, RunState
from pages.parts import errors, settings
from pages.parts import format as shown

TICK_S = 0.4
STOP = ("Stop", ":material/stop:")
PAUSE = ("Pause", ":material/pause:")
"""What ends work that can go on later, with its icon."""

Draw = Callable[[Lab, Snapshot], None]


@dataclass(frozen=True, slots=True)
class Shown:
    """The piece of work that a page shows: its id is in the session and in the address."""

    key: str
    """Under which the session keeps the id."""
    address: str
    """The name of the id in the address."""
    what: str
    """What a sentence calls it, such as "proof"."""
    kinds: tuple[RunKind, ...]

    def run_id(self) -> str | None:
        """Return which one; on entering the page by a link it is the link's."""
        given = st.query_params.get(self.address)
        if given and (settings.entered() or self.key not in st.session_state):
            st.session_state[self.key] = given[: settings.ID_CHARS]
        found: str | None = st.session_state.get(self.key)
        return found

    def open(self, run_id: str) -> None:
        """Show this one from the next drawing of the page on."""
        st.session_state[self.key] = run_id

    def close(self) -> None:
        """Show none; a result stays in the database under its link."""
        errors.redraw()
        st.session_state[self.key] = None
        st.query_params.pop(self.address, None)

    def running(self, lab: Lab) -> bool:
        """Return whether the one that is shown has not ended."""
        found = lab.snapshot(self.run_id() or "")
        return found is not None and not found.run.state.final

    def draw(
        self,
        lab: Lab,
        body: Draw,
        *,
        empty: str,
        tick_s: float = TICK_S,
        stop: tuple[str, str] = STOP,
        ended: Callable[[Run], None] | None = None,
        otherwise: str | None = None,
    ) -> None:
        """Draw the work that is shown, and write its id into the address.

        Args:
            lab: where it is found.
            body: draws what it has found so far, or in the end.
            empty: what to say where nothing is shown.
            tick_s: how often it is drawn while it goes on.
            stop: the words and the icon of what ends it.
            ended: says how it ended where it was not done.
            otherwise: the id of what is shown where nothing was asked for.
        """
        run_id = self.run_id() or otherwise
        if not run_id:
            st.caption(f":material/info: {empty}")
            return
        if st.query_params.get(self.address) != run_id:
            st.query_params[self.address] = run_id
        found = lab.snapshot(run_id)
        if found is None or found.run.kind not in self.kinds:
            st.warning(
                f"There is no {self.what} {shown.escaped(shown.one_line(run_id, 40))}; it was "
                "deleted, or belongs to another database.",
                icon=":material/search_off:",
            )
            st.button("Close", on_click=self.close)
            return
        follow(lab, run_id, body, tick_s=tick_s, stop=stop, ended=ended)


def follow(
    lab: Lab,
    run_id: str,
    body: Draw,
    *,
    tick_s: float = TICK_S,
    stop: tuple[str, str] = STOP,
    ended: Callable[[Run], None] | None = None,
) -> bool:
    """Draw a run until it has ended, then the whole page once more; return whether it goes on.

    Args:
        lab: where it is found.
        run_id: of the run.
        body: draws what it has found so far, or in the end.
        tick_s: how often it is drawn while it goes on.
        stop: the words and the icon of what ends it.
        ended: says how it ended where it was not done; a sentence without it.
    """
    found = lab.snapshot(run_id)
    active = found is not None and not found.run.state.final
    st.fragment(errors.guarded(_followed), run_every=tick_s if active else None)(
        lab, run_id, body, stop, ended or tell_end, active
    )
    return active


def _followed(
    lab: Lab,
    run_id: str,
    body: Draw,
    stop: tuple[str, str],
    ended: Callable[[Run], None],
    was_active: bool,
) -> None:
    found = lab.snapshot(run_id)
    if found is None:
        st.caption("This run is no longer known: start it again.")
        return
    run = found.run
    if was_active and run.state.final:
        st.rerun()
    if not run.state.final:
        progress(lab, found, stop)
    elif run.state is not RunState.DONE:
        ended(run)
    if found.problem:
        st.warning(shown.escaped(found.problem), icon=":material/warning:")
    body(lab, found)


def settled(lab: Lab, run_id: str, patience_s: float) -> None:
    """Wait a moment for a run that may end at once, which spares a second drawing of the page."""
    deadline = time.monotonic() + patience_s
    while (found := lab.snapshot(run_id)) is not None and not found.run.state.final:
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def progress(lab: Lab, found: Snapshot, stop: tuple[str, str] = STOP) -> None:
    """Draw how far a run is, and what ends it."""
    label, icon = stop
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        st.progress(min(1.0, max(0.0, found.progress or 0.0)), text=phase(found))
        st.button(
            label,
            key=f"stop {found.run.id}",
            icon=icon,
            on_click=lab.cancel,
            args=(found.run.id,),
        )


def phase(found: Snapshot) -> str:
    """Return what a run does, in words."""
    if found.place is not None:
        return f"Waiting, place {found.place} in the queue"
    share = f", {shown.share(found.progress)}" if found.progress else ""
    return shown.escaped(found.phase[:1].upper() + found.phase[1:]) + share


def tell_end(run: Run) -> None:
    """Draw how a run ended that was not done."""
    if run.state is RunState.CANCELLED:
        st.info("Stopped. What was found until then is kept.", icon=":material/stop_circle:")
    else:
        errors.show(run.error or f"It ended: {run.state}.")
