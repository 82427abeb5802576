"""Work that goes on without the page: fetching or adding a model, drawn until it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from gptcore.records import RunKind, RunState
from pages.parts import errors
from pages.parts import format as shown

if TYPE_CHECKING:
    from gptcore.lab import Lab


def start_job(run_id: str) -> None:
    """Let this session watch a job that it just started."""
    st.session_state["job"] = run_id


def watched_job(lab: Lab) -> str | None:
    """Return the job to draw: the one started here, or one that another page or tab started."""
    mine: str | None = st.session_state.get("job")
    if mine:
        return mine
    running = lab.runs(kind=RunKind.PULL, state=RunState.RUNNING, limit=1)
    return running[0].id if running else None


def is_busy(lab: Lab) -> bool:
    """Return whether a job goes on, in any tab, so that a second one must wait."""
    return bool(lab.runs(kind=RunKind.PULL, state=RunState.RUNNING, limit=1))


def job_progress(lab: Lab) -> None:
    """Draw the job that goes on, with its progress and a way to stop it; nothing without one."""
    run_id = watched_job(lab)
    if run_id is None:
        return
    found = lab.snapshot(run_id)
    active = found is not None and not found.run.state.final
    st.fragment(errors.guarded(_drawn), run_every=0.5 if active else None)(lab, run_id, active)


def _drawn(lab: Lab, run_id: str, was_active: bool) -> None:
    found = lab.snapshot(run_id)
    if found is None:
        return
    run = found.run
    name = shown.escaped(run.model)
    if not run.state.final:
        with st.container(border=True, horizontal=True, vertical_alignment="center"):
            ratio = found.progress
            share = f", {shown.share(ratio)}" if ratio is not None else ""
            st.progress(
                min(1.0, max(0.0, ratio or 0.0)),
                text=f"Bringing {name}: {shown.escaped(found.phase)}{share}",
            )
            st.button("Stop", icon=":material/stop:", on_click=lab.cancel, args=(run_id,))
        return
    if was_active:
        # The fragment's last tick: the whole page now shows what there is. The end is told there.
        st.session_state["job"] = run_id
        st.rerun()
    if st.session_state.get("job") != run_id:
        return
    if run.state is RunState.DONE:
        if st.session_state.get("job_told") != run_id:
            st.session_state["job_told"] = run_id
            st.toast(f"{name} is ready.", icon=":material/check_circle:")
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        said = shown.escaped(run.error or f"{run.model} was not added ({run.state}).")
        if run.state is RunState.CANCELLED:
            st.warning(said, icon=":material/cancel:")
        else:
            st.error(said, icon=":material/error:")
        st.button("Close", on_click=_forget)


def _forget() -> None:
    st.session_state["job"] = None
