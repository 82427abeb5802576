"""History: find any run, note something on it, hold runs against each other, ask in SQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import Filter, Format, Found, Lab
from gptcore.records import Run, RunKind, RunState
from pages.parts import charts, errors, settings
from pages.parts import format as shown
from pages.parts.ceilings import ceilings
from pages.parts.links import COMPARE, PLAYGROUND
from pages.parts.requests_table import opened_request, provenance_of, two_columns
from pages.parts.services import lab as shared_lab

PAGE = 200
"""Runs in the table at once."""
MOST_COMPARED = 8
SETTINGS_HEIGHT = 420
"""Pixels; what is longer scrolls."""
KINDS = (
    RunKind.GENERATE,
    RunKind.BENCH,
    RunKind.COMPARE,
    RunKind.REGRESS,
    RunKind.EVALUATE,
    RunKind.TASKS,
    RunKind.TEXTS,
    RunKind.FEW_SHOT,
    RunKind.EXPLAIN,
    RunKind.OPTIMIZE,
    RunKind.PROVE,
    RunKind.TRAIN,
    RunKind.TUNE,
    RunKind.PULL,
)
RESULTS = {
    RunKind.COMPARE: "result",
    RunKind.REGRESS: "result",
    RunKind.EVALUATE: "quality",
    RunKind.TASKS: "quality",
    RunKind.TEXTS: "quality",
}
"""Under which name in its address the Compare page shows the result of a run."""
ORDERS = {
    "created_at": "Time",
    "model": "Model",
    "kind": "Kind",
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2e_s": "End to end",
    "decode_tokens_per_s": "Decode rate",
    "peak_memory_bytes": "Peak memory",
}
HELP_BASELINE = (
    "Later measurements are held against this run: here, and by python -m gptcore regress."
)
QUESTIONS = {
    "Runs of the last week by model": "SELECT model, precision, count(*) AS runs,\n"
    "       round(avg(decode_tokens_per_s), 1) AS tokens_per_s\nFROM runs\n"
    "WHERE kind = 'generate' AND state = 'done'\n"
    "GROUP BY model, precision ORDER BY runs DESC",
    "What failed, and why": "SELECT error_kind, count(*) AS runs, max(error) AS example\n"
    "FROM runs WHERE state = 'failed' GROUP BY error_kind ORDER BY runs DESC",
    "The slowest first tokens": "SELECT id, model, precision, prompt_tokens, ttft_s\nFROM runs\n"
    "WHERE ttft_s IS NOT NULL ORDER BY ttft_s DESC LIMIT 20",
    "Comparisons, newest first": "SELECT id, model, precision, state,\n"
    "       ended_at - started_at AS seconds\n"
    "FROM runs WHERE kind = 'compare' ORDER BY created_at DESC LIMIT 50",
}


# What a click does


def annotate(run_id: str, name: str, key: str) -> None:
    """Keep what was said about a run."""
    value = st.session_state[key]
    try:
        shared_lab().annotate(run_id, **{name: tuple(value) if name == "tags" else value})
    except GptcoreError as error:
        settings.say(errors.sentence(error))


def again(run_id: str) -> None:
    """Do a run once more."""
    try:
        new = shared_lab().again(run_id)
    except GptcoreError as error:
        settings.say(errors.sentence(error))
        return
    st.session_state["history_said_well"] = f"Run {new} was queued; it is linked to {run_id}."


def regress(run_id: str, accepted: Sequence[str]) -> None:
    """Measure the sidebar's variant beside a baseline; the result opens in Compare."""
    lab, chosen = shared_lab(), settings.current()
    try:
        variant = lab.variant(chosen.model, chosen.precision, chosen.device, chosen.threads)
        work = lab.regression(run_id, variant, tuple(accepted))
        new = lab.start(work)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
        return
    st.session_state["history_measuring"] = new


def use_question() -> None:
    """Put a saved question into the field."""
    name = st.session_state["history_saved"]
    if name:
        st.session_state["history_question"] = QUESTIONS[name]


# What the page draws


def filters(lab: Lab) -> Filter:
    """Draw the filters and return what they say."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        search = st.text_input(
            "Search",
            key="history_search",
            placeholder="Prompt, text, model, error, id, tag or note",
            icon=":material/search:",
            max_chars=200,
            width=300,
        )
        kinds = st.multiselect(
            "Kind",
            [str(one) for one in KINDS],
            key="history_kinds",
            format_func=str.capitalize,
            placeholder="Every kind",
            width=190,
        )
        states = st.multiselect(
            "State",
            [str(one) for one in RunState],
            key="history_states",
            format_func=lambda one: charts.STATE_LOOKS[RunState(one)][0],
            placeholder="Every state",
            width=170,
        )
        tags = st.multiselect(
            "Tags", lab.tags(), key="history_tags", placeholder="Any tag", width=170
        )
        order = st.selectbox(
            "Sorted by",
            list(ORDERS),
            key="history_order",
            format_func=ORDERS.__getitem__,
            width=150,
        )
        upward = st.toggle("Smallest first", key="history_upward")
        archived = st.toggle("Archived too", key="history_archived")
        baseline = st.toggle("Baselines", key="history_baseline")
    return Filter(
        search=search.strip(),
        kinds=tuple(kinds),
        states=tuple(states),
        tags=tuple(tags),
        archived=archived,
        baseline=baseline,
        order=order,
        descending=not upward,
    )


def listed(lab: Lab) -> tuple[str, ...]:
    """Draw the table and return the ids of the selected runs."""
    wanted = filters(lab)
    signature = repr(wanted)
    if st.session_state.get("history_signature") != signature:
        st.session_state["history_signature"] = signature
        st.session_state["history_page"] = 1
    page = st.session_state.get("history_page") or 1
    runs, count = lab.history(wanted, limit=PAGE, offset=(page - 1) * PAGE)
    if not runs:
        st.caption(
            ":material/info: No run matches: clear a filter."
            if count or wanted != Filter()
            else ":material/info: No run yet. Write something in the playground, or measure "
            "something in Compare."
        )
        return ()
    chosen: Any = st.dataframe(
        table(runs),
        hide_index=True,
        column_config=column_config(st.context.timezone),
        key=f"history_{signature}_{page}",
        on_select="rerun",
        selection_mode="multi-row",
        placeholder=shown.UNKNOWN,
        height=min(38 + 35 * len(runs), 460),
        alt="Runs",
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        first = (page - 1) * PAGE + 1
        st.caption(
            f"{shown.whole(first)} to {shown.whole(first + len(runs) - 1)} of "
            f"{shown.whole(count)} · mark one row to open it, several to compare them",
            width="stretch",
        )
        carried(lab, selected(runs, chosen))
        if count > PAGE:
            st.number_input(
                "Page",
                min_value=1,
                max_value=-(-count // PAGE),
                key="history_page",
                width=130,
                label_visibility="collapsed",
            )
    return selected(runs, chosen)


def selected(runs: Sequence[Found], chosen: Any) -> tuple[str, ...]:
    """Return the ids of the marked rows."""
    return tuple(runs[row].id for row in chosen["selection"]["rows"] if row < len(runs))


def carried(lab: Lab, chosen: Sequence[str]) -> None:
    """Draw what takes runs away as a file, and what brings them in."""
    with st.popover("Export and import", icon=":material/import_export:"):
        forms = {"CSV": Format.CSV, "JSON": Format.JSON, "llama-bench JSONL": Format.LLAMA_BENCH}
        if not chosen:
            st.caption("Mark the runs to export in the table.")
        else:
            st.caption(f"{len(chosen)} marked runs, with every observation and what made it:")
            for label, form in forms.items():
                st.download_button(
                    label,
                    partial(exported, lab, chosen, form),
                    f"runs{form.suffix}",
                    icon=":material/download:",
                )
        file = st.file_uploader(
            "Import runs",
            type=["csv", "json", "jsonl"],
            key="history_file",
            help="What this page exports; llama-bench's JSON and JSONL; benchmark results of vLLM "
            "and GuideLLM.",
        )
        if file is not None and st.session_state.get("history_imported") != file.file_id:
            st.session_state["history_imported"] = file.file_id
            try:
                new, known = lab.import_runs(file.getvalue())
            except GptcoreError as error:
                settings.say(errors.sentence(error))
            else:
                st.session_state["history_said_well"] = (
                    f"{new} runs were brought in; {known} were here already."
                )
            st.rerun()


def exported(lab: Lab, ids: Sequence[str], form: Format) -> bytes:
    """Return runs as a file."""
    return lab.export(ids, form).data


def table(runs: Sequence[Found]) -> dict[str, list[Any]]:
    """Return the table column by column; numbers stay numbers, so that they sort as such."""

    def number(name: str, scale: float = 1.0) -> list[float | None]:
        values = [one.numbers[name] for one in runs]
        return [None if value is None else value * scale for value in values]

    return {
        "Pin": [_mark(one) for one in runs],
        "Started": [one.created_at for one in runs],
        "Kind": [one.kind for one in runs],
        "State": [charts.STATE_LOOKS[RunState(one.state)][0] for one in runs],
        "Model": [one.model for one in runs],
        "Placement": [f"{one.precision} · {one.device}" if one.device else "" for one in runs],
        "Text": [shown.one_line(one.error or one.prompt, 120) for one in runs],
        "TTFT": number("ttft_s", 1000),
        "TPOT": number("tpot_s", 1000),
        "Decode": number("decode_tokens_per_s"),
        "Memory": number("peak_memory_bytes", 2**-20),
        "Tags": [list(one.annotation.tags) for one in runs],
        "Note": [shown.one_line(one.annotation.note, 80) for one in runs],
        "Run": [one.id for one in runs],
    }


def _mark(one: Found) -> str:
    return ("●" if one.annotation.pinned else "") + ("⚑" if one.annotation.baseline else "")


def column_config(zone: str | None) -> Mapping[str, Any]:
    """Return how each column is shown, with its unit."""
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    return {
        "Pin": text("", width=30),
        "Started": st.column_config.DatetimeColumn(
            "Started", format="MMM DD, HH:mm:ss", timezone=zone or "UTC", width=130
        ),
        "Kind": text(width=80),
        "State": text(width=90),
        "Model": text(width=120),
        "Placement": text(width=100),
        "Text": text(width=210),
        "TTFT": number("TTFT, ms", format="%,.1f", width=80),
        "TPOT": number("TPOT, ms", format="%,.1f", width=80),
        "Decode": number("Tokens/s", format="%,.1f", width=80),
        "Memory": number("Memory, MiB", format="%,.0f", width=100),
        "Tags": st.column_config.ListColumn("Tags", width=120),
        "Note": text(width=160),
        "Run": text(width=110),
    }


def opened(lab: Lab, run_id: str) -> None:
    """Draw one run with what can be said about it and done with it."""
    found = lab.snapshot(run_id)
    if found is None:
        st.caption("This run is not in the database any more.")
        return
    run = found.run
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.subheader(f"{str(run.kind).capitalize()} {shown.escaped(run.id)}", width="stretch")
            if run.kind is RunKind.GENERATE:
                st.page_link(
                    PLAYGROUND,
                    label="Open in the playground",
                    icon=":material/edit_note:",
                    query_params={"run": run.id},
                )
            if name := RESULTS.get(run.kind):
                st.page_link(
                    COMPARE,
                    label="Open the result",
                    icon=":material/compare_arrows:",
                    query_params={name: run.id},
                )
            if run.kind not in (RunKind.PULL, RunKind.INSPECT):
                st.button(
                    "Run again",
                    icon=":material/replay:",
                    on_click=again,
                    args=(run.id,),
                    help="The same order once more; the new run is linked to this one.",
                )
        if run.parent_id:
            st.caption(f"Follows run {shown.escaped(run.parent_id)}")
        said_about(lab, run)
        if lab.annotation(run.id).baseline:
            held_against(lab, run)
        if run.kind is RunKind.GENERATE:
            opened_request(lab, run, shown.zone_of(st.context.timezone))
        else:
            work_details(lab, run)


def said_about(lab: Lab, run: Run) -> None:
    """Draw tags, note, pin and archive of a run, to be changed in place."""
    said = lab.annotation(run.id)
    left, right = st.columns([3, 4], vertical_alignment="bottom")
    key = f"note_{run.id}"
    left.multiselect(
        "Tags",
        sorted({*lab.tags(), *said.tags}),
        default=list(said.tags),
        key=f"{key}_tags",
        accept_new_options=True,
        max_selections=20,
        placeholder="Choose a tag, or type a new one",
        on_change=annotate,
        args=(run.id, "tags", f"{key}_tags"),
    )
    right.text_input(
        "Note",
        said.note,
        max_chars=2000,
        key=f"{key}_note",
        on_change=annotate,
        args=(run.id, "note", f"{key}_note"),
    )
    with st.container(horizontal=True):
        for name, label, help in (
            ("pinned", "Pinned", "It stands above all others."),
            ("archived", "Archived", "It is shown only where archived runs are asked for."),
            ("baseline", "Baseline", HELP_BASELINE),
        ):
            st.toggle(
                label,
                getattr(said, name),
                help=help,
                key=f"{key}_{name}",
                on_change=annotate,
                args=(run.id, name, f"{key}_{name}"),
            )


def held_against(lab: Lab, run: Run) -> None:
    """Draw what measures the sidebar's variant beside a baseline."""
    chosen = settings.current()
    accepted: list[str] = []
    if differing := lab.differing_from(run, chosen.threads):
        accepted = st.multiselect(
            "Measure all the same, although these differ from the baseline's",
            differing,
            key=f"accept_{run.id}",
            placeholder="Name each one",
        )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Is it slower now?",
            icon=":material/rule:",
            on_click=regress,
            args=(run.id, accepted),
            help="Measures the sidebar's variant and the baseline's in turn. The same on a "
            "terminal, with an exit status: python -m gptcore regress",
        )
        st.caption(
            f"{shown.escaped(chosen.model)} {chosen.precision} on {chosen.device} against this "
            "baseline, both measured again in turn"
        )


def work_details(lab: Lab, run: Run) -> None:
    """Draw what a measurement found: its numbers, settings and provenance."""
    name, icon, color = charts.STATE_LOOKS[run.state]
    st.badge(name, icon=icon, color=color)  # type: ignore[arg-type]
    if run.error:
        errors.show(run.error)
    if kept := lab.measurements(run.id):
        st.caption("Every measured number; its observations are in the export and in SQL.")
        st.dataframe(
            {
                "Measurement": [one.name for one in kept],
                "n": [len(one.observations) for one in kept],
                "Median": [_middle(one.observations) for one in kept],
                "Least": [min(one.observations) for one in kept],
                "Most": [max(one.observations) for one in kept],
            },
            hide_index=True,
        )
    left, right = st.columns(2)
    with left:
        st.caption("Settings")
        st.code(
            json.dumps(run.settings, indent=1, ensure_ascii=False)[:20_000],
            language="json",
            height=SETTINGS_HEIGHT,
        )
    with right:
        st.caption("Provenance")
        two_columns(provenance_of(lab, run), "What made the run's numbers")


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[~(len(ordered) // 2)]) / 2


def compared(lab: Lab, ids: Sequence[str]) -> None:
    """Draw only what differs between runs, then their numbers, guarded by their conditions."""
    if len(ids) > MOST_COMPARED:
        st.caption(f"{len(ids)} runs are marked; the first {MOST_COMPARED} are compared.")
        ids = ids[:MOST_COMPARED]
    asked, conditions = lab.differences(ids)
    # The shape follows from the model, which is shown.
    settings = {name: values for name, values in asked.items() if "spec." not in name}
    with st.container(border=True):
        st.subheader(f"{len(ids)} runs against each other")
        if settings:
            st.caption("What they were asked for differs in:")
            st.dataframe(_by_run(ids, settings), hide_index=True)
        else:
            st.caption("They were asked for the same in every setting.")
        if conditions:
            st.warning(
                "They differ in " + ", ".join(conditions) + ": what differs between their numbers "
                "may come from that.",
                icon=":material/warning:",
            )
            st.dataframe(_by_run(ids, conditions), hide_index=True)
            accepted = st.multiselect(
                "Compare them all the same, although these differ",
                list(conditions),
                key=f"accept_{'_'.join(ids)}",
                placeholder="Name each one",
            )
            if set(accepted) != set(conditions):
                return
        numbers_of(lab, ids)


def numbers_of(lab: Lab, ids: Sequence[str]) -> None:
    """Draw the numbers of several runs, with an interval where there are observations."""
    found = [snapshot.run for run_id in ids if (snapshot := lab.snapshot(run_id))]
    rows: dict[str, list[str | None]] = {}
    for at, run in enumerate(found):
        for one in lab.measurements(run.id):
            cells = rows.setdefault(one.name, [None] * len(found))
            cells[at] = lab.in_words(one.observations)
        if run.numbers:
            for label, value in (
                ("TTFT", shown.duration(run.numbers.ttft_s)),
                ("TPOT", shown.duration(run.numbers.tpot_s)),
                ("Decode, tokens/s", shown.number(run.numbers.decode_tokens_per_s)),
                ("Peak memory", shown.size(run.numbers.peak_memory_bytes)),
            ):
                rows.setdefault(label, [None] * len(found))[at] = value
    if not rows:
        st.caption("None of them has numbers.")
        return
    st.dataframe(
        {
            "Number": list(rows),
            **{
                f"{run.id} · {run.precision}": [cells[at] for cells in rows.values()]
                for at, run in enumerate(found)
            },
        },
        hide_index=True,
        placeholder=shown.UNKNOWN,
    )
    st.caption(
        "Median with the 95 % interval of the median, where there are at least six observations. "
        "These runs were not interleaved: Compare measures whether they really differ."
    )


def _by_run(ids: Sequence[str], differing: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    return {
        "What": list(differing),
        **{
            run_id: [
                shown.UNKNOWN if values[at] is None else shown.one_line(str(values[at]), 200)
                for values in differing.values()
            ]
            for at, run_id in enumerate(ids)
        },
    }


def questions(lab: Lab) -> None:
    """Draw the field for SQL and the answer."""
    st.selectbox(
        "Saved questions",
        list(QUESTIONS),
        index=None,
        key="history_saved",
        placeholder="Choose one to begin with",
        on_change=use_question,
        width=340,
    )
    question = st.text_area(
        "SELECT …",
        key="history_question",
        height=140,
        max_chars=20_000,
        help="The connection can read and nothing else.",
    )
    if not st.button("Ask", icon=":material/play_arrow:", type="primary"):
        return
    try:
        answer = lab.ask(question)
    except GptcoreError as error:
        errors.show(error)
        return
    st.dataframe(
        {
            f"{name}" if answer.columns.count(name) == 1 else f"{name} ({at + 1})": [
                row[at] for row in answer.rows
            ]
            for at, name in enumerate(answer.columns)
        },
        hide_index=True,
        placeholder="NULL",
    )
    cut = ", the first of more" if answer.cut else ""
    st.caption(f"{shown.whole(len(answer.rows))} rows{cut}, in {shown.duration(answer.seconds)}")


def draw() -> None:
    """Draw the page."""
    lab = shared_lab()
    if new := st.session_state.pop("history_measuring", None):
        st.switch_page(COMPARE, query_params={"result": new})
    st.title("History")
    for problem in settings.said():
        errors.show(problem)
    if well := st.session_state.pop("history_said_well", None):
        st.success(shown.escaped(well), icon=":material/check_circle:")
    runs, under, asked = st.tabs(["Runs", "Ceilings", "SQL"], key="history_tab", on_change="rerun")
    if asked.open:
        with asked:
            st.fragment(errors.guarded(questions))(lab)
    if under.open:
        with under:
            ceilings(lab)
    if not runs.open:
        return
    with runs:
        chosen = listed(lab)
        linked = st.query_params.get("id")
        if len(chosen) > 1:
            compared(lab, chosen)
        elif chosen:
            st.query_params["id"] = chosen[0]
            opened(lab, chosen[0])
        elif linked:
            opened(lab, linked[:64])


draw()
