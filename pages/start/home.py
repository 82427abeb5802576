"""Home: what this is, what runs now, what ran last, the machine, and what to press first."""

from __future__ import annotations

from datetime import UTC, datetime

import streamlit as st

from gptcore.errors import GptcoreError
from gptcore.records import Run, RunKind
from pages.parts import charts, errors
from pages.parts import format as shown
from pages.parts.jobs import is_busy, job_progress, start_job
from pages.parts.links import LIVE, MODELS, PLAYGROUND
from pages.parts.services import lab as shared_lab

lab = shared_lab()
zone = shown.zone_of(st.context.timezone)
LAST_RUNS = 6
WHAT_IT_IS = (
    "Pick a GPT model, a precision and a device, let it write, and watch what every token costs in "
    "time and memory. Everything runs on this machine, and every run is kept."
)


def first_step() -> None:
    """Draw the one thing to press first: write a sentence, or bring a model that can."""
    models = [one for one in lab.models() if one.kind == "installed" and not one.problem]
    with st.container(border=True, height="stretch"):
        st.subheader("Start here")
        if models:
            best = next((one for one in models if one.chat), models[0])
            st.caption(
                f"{shown.escaped(best.title)} is there: "
                f"{shown.parameters(best.spec.parameters if best.spec else None)} parameters, "
                f"{shown.size(best.stored_bytes)} on disk."
            )
            if st.button(
                f"Write a sentence with {shown.escaped(best.title)}",
                type="primary",
                icon=":material/edit_note:",
                key="write",
            ):
                st.switch_page(PLAYGROUND, query_params={"model": best.name})
        if lab.lacks_smollm2():
            st.caption(
                "SmolLM2-135M-Instruct is small enough for any machine, knows chat, and has read "
                "much more (Apache-2.0)."
            )
            st.button(
                "Bring SmolLM2-135M (93 MB)",
                type="secondary" if models else "primary",
                icon=":material/download:",
                on_click=bring,
                disabled=is_busy(lab),
                key="bring",
            )
        job_progress(lab)
        with st.container(horizontal=True):
            st.page_link(LIVE, label="Watch it live", icon=":material/monitoring:")
            st.page_link(MODELS, label="All models", icon=":material/database:")


def bring() -> None:
    """Start fetching SmolLM2."""
    try:
        start_job(lab.pull_smollm2())
    except GptcoreError as error:
        st.session_state["home_problem"] = str(error)


def machine() -> None:
    """Draw the machine as it was detected, absent devices with their reason."""
    found = lab.machine()
    with st.container(border=True, height="stretch", gap="small"):
        st.subheader("This machine")
        for device in lab.devices():
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                if device.absent:
                    st.badge(device.id, icon=":material/block:", color="gray")
                    st.caption(f"{shown.escaped(device.name)}: {shown.escaped(device.absent)}")
                else:
                    st.badge(device.id, icon=":material/check:", color="green")
                    memory = shown.size(device.total_bytes)
                    st.caption(f"{shown.escaped(device.name)} · {memory} of memory")
        versions = (
            f"{found.platform.partition('-')[0]} · Python {found.python} · "
            f"torch {found.torch or 'not installed'} · version {found.app_version}"
        )
        st.caption(shown.escaped(versions))


def now_running() -> None:
    """Draw what runs now; this part runs again every two seconds."""
    running, waiting = lab.queue()
    with st.grid(4, min_column_width=110, gap="small"):
        st.metric("Running now", shown.whole(running), border=True)
        st.metric("Waiting", shown.whole(waiting), border=True)
        held = lab.loaded()
        st.metric(
            "In memory",
            shown.whole(len(held)),
            help=", ".join(
                f"{shown.escaped(one.model)} {one.precision} on {device} "
                f"({shown.size(one.resident_bytes)})"
                for device, one in held
            )
            or "None is loaded.",
            border=True,
        )
        st.metric("Database", shown.size(lab.database_bytes()), border=True)
    last = lab.runs(kind=RunKind.GENERATE, limit=LAST_RUNS)
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.subheader("Last runs", width="stretch")
            st.page_link(LIVE, label="All requests", icon=":material/list:")
        if not last:
            st.caption("Nothing ran yet: press the button above, and what it writes stands here.")
            return
        for run in last:
            one_run(run)


def one_run(run: Run) -> None:
    """Draw a run in one line: its state, its first words, what it cost, and when."""
    name, icon, color = charts.STATE_LOOKS[run.state]
    with st.container(horizontal=True, vertical_alignment="center", gap="small", wrap=False):
        st.badge(name, icon=icon, color=color)  # type: ignore[arg-type]
        st.text(shown.one_line(run.error or run.text or "…", 90), width="stretch", wrap=False)
        speed = shown.rate(run.numbers.decode_tokens_per_s) if run.numbers else ""
        when = shown.ago(run.created_at, datetime.now(UTC))
        st.caption(
            " · ".join(part for part in (speed, when) if part),
            width="content",
        )
        st.page_link(
            PLAYGROUND,
            label="Open",
            icon=":material/open_in_new:",
            query_params={"run": run.id},
        )


st.title("A laboratory for GPT models")
st.markdown(WHAT_IT_IS)
for problem in (*lab.problems(), st.session_state.pop("home_problem", None)):
    if problem:
        st.warning(shown.escaped(problem), icon=":material/warning:")
left, right = st.columns(2, gap="small")
with left:
    first_step()
with right:
    machine()
st.fragment(errors.guarded(now_running), run_every=2.0)()
