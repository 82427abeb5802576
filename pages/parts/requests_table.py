"""The table of requests under the live charts, and one of them opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING, Any

import streamlit as st

from gptcore.records import Numbers, Run, RunKind, RunState, Token
from pages.parts import charts, errors
from pages.parts import format as shown
from pages.parts.links import PLAYGROUND
from pages.parts.numbers import DEFINITIONS, costs_in_words, numbers_row

if TYPE_CHECKING:
    from gptcore.lab import Lab

MOST = 200
"""Requests listed at once; older ones are found by the filters."""
TEXT_SHOWN = 20_000
"""Characters of a prompt or an answer that an opened request shows."""


def columns(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the table column by column; numbers stay numbers, so that they sort as such."""

    def number(name: str, scale: float = 1.0) -> list[float | None]:
        values = [getattr(run.numbers, name) if run.numbers else None for run in runs]
        return [None if value is None else value * scale for value in values]

    return {
        "Started": [run.created_at for run in runs],
        "State": [charts.STATE_LOOKS[run.state][0] for run in runs],
        "Text": [shown.one_line(run.error or run.text or prompt_of(run), 120) for run in runs],
        "Model": [run.model for run in runs],
        "Placement": [f"{run.precision} · {run.device}" for run in runs],
        "Prompt": number("prompt_tokens"),
        "New": number("new_tokens"),
        "TTFT": number("ttft_s", 1000),
        "TPOT": number("tpot_s", 1000),
        "End to end": number("e2e_s"),
        "Decode": number("decode_tokens_per_s"),
        "Request": [run.id for run in runs],
    }


def column_config(zone: str | None) -> Mapping[str, Any]:
    """Return how each column is shown: its unit, its digits, the formula one hover away."""
    number = st.column_config.NumberColumn
    return {
        "Started": st.column_config.DatetimeColumn(
            "Started", format="MMM DD, HH:mm:ss", timezone=zone or "UTC", width=130
        ),
        "State": st.column_config.TextColumn("State", width=90),
        "Model": st.column_config.TextColumn("Model", width=120),
        "Placement": st.column_config.TextColumn("Placement", width=100),
        "Prompt": number("Prompt, tokens", format="localized", width=100),
        "New": number("New, tokens", format="localized", width=90),
        "TTFT": number("TTFT, ms", format="%,.1f", help=DEFINITIONS["TTFT"], width=85),
        "TPOT": number("TPOT, ms", format="%,.1f", help=DEFINITIONS["TPOT"], width=85),
        "End to end": number(
            "End to end, s", format="%,.2f", help=DEFINITIONS["End to end"], width=100
        ),
        "Decode": number("Tokens/s", format="%,.1f", help=DEFINITIONS["Decode"], width=80),
        "Text": st.column_config.TextColumn("Text", width=210),
        "Request": st.column_config.TextColumn("Request", width=110),
    }


def prompt_of(run: Run) -> str:
    """Return what was asked: the prompt, or the last message of a chat."""
    messages = run.settings.get("messages") or ()
    if messages:
        return str(messages[-1].get("content", ""))
    return str(run.settings.get("prompt", ""))


def filtered(lab: Lab, state: str | None, model: str | None, text: str) -> tuple[Run, ...]:
    """Return the generations that match, newest first."""
    search = text.strip()[:200]
    return lab.runs(kind=RunKind.GENERATE, state=state, model=model, search=search, limit=MOST)


def opened_request(lab: Lab, run: Run, zone: tzinfo) -> None:
    """Draw one request: its state, numbers, tokens in time, text, settings and provenance."""
    name, icon, color = charts.STATE_LOOKS[run.state]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.badge(name, icon=icon, color=color)  # type: ignore[arg-type]
        st.caption(
            f"{shown.escaped(run.model)} · {shown.escaped(run.precision)} · "
            f"{shown.escaped(run.device)} · {shown.moment(run.created_at, zone)} · "
            f"request {shown.escaped(run.id)}"
        )
    if run.error:
        st.error(shown.escaped(run.error), icon=":material/error:")
    if run.numbers:
        numbers_row(run.numbers)
        st.caption(shown.escaped(costs_in_words(run.numbers)))
    tokens = lab.tokens(run.id)
    timeline, text, details = st.tabs(["Token timeline", "Text", "Settings and provenance"])
    with timeline:
        timeline_of(tokens, run.numbers)
    with text:
        texts_of(run)
    with details:
        details_of(lab, run, tokens)


def timeline_of(tokens: Sequence[Token], numbers: Numbers | None) -> None:
    """Draw when each token came, or say why there is nothing to draw."""
    if not any(not token.forced for token in tokens):
        st.caption("No token of this request was kept: it ended before its first one.")
        return
    st.plotly_chart(
        charts.token_timeline(tokens, numbers, charts.accent()),
        config={"displayModeBar": False},
        key="request_timeline",
        alt="When each token of the request came, and the time between tokens",
    )
    st.caption(
        "Shaded: the time until the first token (queue, loading, prefill). Bars: ITL, the time "
        "between one token and the next."
    )


def texts_of(run: Run) -> None:
    """Draw prompt and answer as plain text, which nothing can turn into markup."""
    messages = run.settings.get("messages") or ()
    asked = [(str(m.get("role", "")), str(m.get("content", ""))) for m in messages] or [
        ("prompt", prompt_of(run))
    ]
    for who, what in (*asked, ("answer", run.text)):
        with st.container(border=True, gap="xsmall"):
            st.caption(shown.escaped(who.capitalize()))
            st.text(what[:TEXT_SHOWN] or "(empty)", width="stretch")
            if len(what) > TEXT_SHOWN:
                st.caption(
                    f"{shown.whole(TEXT_SHOWN)} of {shown.whole(len(what))} characters are shown."
                )


def details_of(lab: Lab, run: Run, tokens: Sequence[Token]) -> None:
    """Draw settings and provenance side by side, as cells that show text as it is."""
    left, right = st.columns(2)
    with left:
        st.caption("Settings")
        hidden = {"prompt", "messages", "forced_ids"}
        settings = {
            key.replace("_", " ").capitalize(): value
            for key, value in run.settings.items()
            if key not in hidden
        }
        forced = sum(token.forced for token in tokens)
        if forced:
            settings["Tokens of the trunk"] = forced
        two_columns(settings, "Settings of the request")
    with right:
        st.caption("Provenance")
        two_columns(provenance_of(lab, run), "What made the request's numbers")


def provenance_of(lab: Lab, run: Run) -> dict[str, Any]:
    """Return what made the numbers of a run, in words."""
    made = lab.run_provenance(run)
    cells: dict[str, Any] = {"Variant": run.variant_hash}
    if made is None:
        return cells
    return cells | {
        "Weights": made.weights_hash,
        "Processor": made.cpu,
        "GPU": made.gpu,
        "Cores": made.cores,
        "Threads": made.threads,
        "Memory": shown.size(made.memory_bytes),
        "Platform": made.platform,
        "Program": made.app_version,
        "Commit": made.git_commit,
        "Python": made.python,
        "torch": made.torch,
        "Power": made.power,
    }


def two_columns(cells: Mapping[str, Any], what: str) -> None:
    """Draw names and values as a table whose cells are never read as markup."""
    st.dataframe(
        {
            "Name": list(cells),
            "Value": [
                shown.UNKNOWN if value in (None, "") else shown.one_line(str(value), 200)
                for value in cells.values()
            ],
        },
        hide_index=True,
        column_config={"Name": st.column_config.TextColumn(width="small")},
        height="content",
        alt=what,
    )


def requests_table(lab: Lab, zone_name: str | None, *, refresh: bool) -> None:
    """Draw filters, table and the opened request; a selected row is opened.

    While one is open the list stands still: a new row on top would move the selection to another
    request.
    """
    if "open_request" not in st.session_state:
        st.session_state["open_request"] = st.query_params.get("request")
    run_id = st.session_state["open_request"]
    st.fragment(errors.guarded(_listed), run_every=2.0 if refresh and not run_id else None)(
        lab, zone_name
    )
    if not run_id:
        return
    found = lab.snapshot(run_id[:64])
    if found is None:
        st.caption("The request of this link is not in the database.")
        return
    every = None if found.run.state.final else 1.0
    with st.container(border=True):
        st.fragment(errors.guarded(_opened), run_every=every)(lab, run_id, shown.zone_of(zone_name))


def _opened(lab: Lab, run_id: str, zone: tzinfo) -> None:
    found = lab.snapshot(run_id)
    if found is None:
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("One request", width="stretch")
        st.page_link(
            PLAYGROUND,
            label="Open in the playground",
            icon=":material/edit_note:",
            query_params={"run": run_id},
        )
    opened_request(lab, found.run, zone)


def _listed(lab: Lab, zone_name: str | None) -> None:
    text, state, model = _filters(lab)
    wanted = (text, state, model)
    held = st.session_state.get("held_requests")
    is_open = bool(st.session_state.get("open_request"))
    if is_open and held and held[0] == wanted:
        runs = held[1]
    else:
        runs = filtered(lab, state, model, text)
        st.session_state["held_requests"] = (wanted, runs)
    if not runs:
        st.caption(
            "No request matches: clear a filter."
            if any(wanted)
            else "No request yet: write something in the playground, and it stands here."
        )
        return
    st.dataframe(
        columns(runs),
        hide_index=True,
        column_config=column_config(zone_name),
        key=f"requests_table_{text}_{state}_{model}",
        on_select=_open_selected,
        selection_mode="single-row",
        placeholder=shown.UNKNOWN,
        alt="Requests, newest first",
        height=min(38 + 35 * len(runs), 420),
    )
    most = f" (the last {MOST})" if len(runs) == MOST else ""
    updated = shown.clock(datetime.now(UTC), shown.zone_of(zone_name))
    st.caption(
        f"{shown.whole(len(runs))} requests{most} · click a heading to sort, a row to open it · "
        + ("the list stands still while a request is open" if is_open else f"updated {updated}")
    )
    if st.session_state.pop("request_chosen", False):
        st.rerun()


def _filters(lab: Lab) -> tuple[str, str | None, str | None]:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = st.text_input(
            "Search",
            key="requests_text",
            placeholder="Text, prompt, model, error or id",
            icon=":material/search:",
            max_chars=200,
            on_change=_close,
            width=280,
        )
        state = st.selectbox(
            "State",
            [str(state) for state in RunState],
            index=None,
            format_func=lambda one: charts.STATE_LOOKS[RunState(one)][0],
            key="requests_state",
            placeholder="Every state",
            on_change=_close,
            width=170,
        )
        model = st.selectbox(
            "Model",
            sorted({run.model for run in lab.runs(kind=RunKind.GENERATE, limit=MOST)}),
            index=None,
            key="requests_model",
            placeholder="Every model",
            on_change=_close,
            width=220,
        )
    return text, state, model


def _close() -> None:
    st.session_state["open_request"] = None
    st.session_state["request_chosen"] = True
    st.query_params.pop("request", None)


def _open_selected() -> None:
    wanted, runs = st.session_state["held_requests"]
    text, state, model = wanted
    rows = st.session_state[f"requests_table_{text}_{state}_{model}"]["selection"]["rows"]
    if not rows or rows[0] >= len(runs):
        _close()
        return
    st.session_state["open_request"] = st.query_params["request"] = runs[rows[0]].id
    st.session_state["request_chosen"] = True
