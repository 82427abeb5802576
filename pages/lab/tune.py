"""Tune: search recipes under limits, watch it search, and make the winner a variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import (
    LEAVE,
    OBJECTIVES,
    QUICK_CELLS,
    QUICK_PAIRS,
    Knob,
    Lab,
    Limits,
    Optimize,
    Prove,
    Snapshot,
    Tune,
)
from gptcore.optimize.spaces import NAMES, SPACES, WEIGHT
from gptcore.passes.registry import passes
from gptcore.recipe import Recipe
from gptcore.records import Run
from pages.parts import errors, links, settings, tune_charts
from pages.parts import format as shown
from pages.parts.optimize_state import PROOF
from pages.parts.services import lab as shared_lab
from pages.parts.settings import bound
from pages.parts.shown_run import PAUSE
from pages.parts.tune_state import (
    STUDY,
    Draft,
    change,
    current,
    knob_of,
    searchable,
    write_address,
)

TICK_S = 1.0
ABOUT = {name: one.about for name, one in SPACES.items()} | {
    "bits": "How many bits each layer gets, 3, 4 or 8, within the same bytes: from a scan of what "
    "rounding each does."
}
UNITS = {"kl": "{:.4g}", "tokens_per_s": "{:.1f}", "joules": "{:.3g}"}


# What a click does


def take(name: str) -> None:
    """Take a value of the draft from its widget."""
    value = st.session_state[f"tune_{name}"]
    if isinstance(value, list):
        value = tuple(value)
    if name == "space":
        change(space=value or current().space, knobs=(), precision="")
    elif value is not None or name == "minutes":
        change(**{name: value})


def take_limit(name: str) -> None:
    """Take a limit from its widget; an empty one is none."""
    found = {**current().limits.model_dump(), name: st.session_state[f"limit_{name}"]}
    try:
        change(limits=Limits.model_validate(found))
    except ValidationError as error:
        settings.say(errors.sentence(error, Limits))


def take_knob(index: int, key: str) -> None:
    """Take the choices or the range of a knob from its widget."""
    lab = shared_lab()
    knobs = list(current().searched(lab))
    value, one = st.session_state[key], knobs[index]
    try:
        if one.choices:
            kept = tuple(choice for choice in offered(one) if choice in value)
            knobs[index] = Knob.model_validate({**one.model_dump(), "choices": kept})
        else:
            low, high = value
            knobs[index] = Knob.model_validate({**one.model_dump(), "low": low, "high": high})
    except ValidationError as error:
        settings.say(errors.sentence(error, Knob))
        return
    change(knobs=tuple(knobs))


def remove_knob(index: int) -> None:
    """Leave a setting out of the search."""
    knobs = list(current().searched(shared_lab()))
    if len(knobs) == 1:
        settings.say("A search needs one setting at least: add another one first.")
        return
    del knobs[index]
    change(knobs=tuple(knobs))


def add_knob() -> None:
    """Search another setting too."""
    wanted = st.session_state["new_knob"]
    if not wanted:
        return
    technique, _, field = wanted.partition(".")
    fresh = knob_of(technique, field)
    knobs = current().searched(shared_lab())
    if fresh.name not in {one.name for one in knobs}:
        change(knobs=(*knobs, fresh))
    st.session_state["new_knob"] = None


def start() -> None:
    """Search, or go on with the study of that name."""
    lab = shared_lab()
    try:
        run_id = lab.start(current().work(lab))
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error, Tune))
        return
    STUDY.open(run_id)


def go_on(run: Run) -> None:
    """Go on with the search of a run."""
    errors.redraw()
    lab = shared_lab()
    try:
        run_id = lab.again(run.id)
    except GptcoreError as error:
        settings.say(str(error))
        return
    STUDY.open(run_id)


def make(run: Run, trial: Mapping[str, Any]) -> None:
    """Make a trial a variant, with a quick proof."""
    errors.redraw()
    lab = shared_lab()
    try:
        work = Tune.model_validate(dict(run.settings))
        recipe = Recipe.model_validate(trial["recipe"])
        variant = work.variant.model_copy(update={"recipe": recipe})
        name = lab.catalogue.free_name(f"{variant.model}-tuned")
        proof = Prove(
            baseline=work.baseline,
            variant=variant,
            cells=QUICK_CELLS,
            pairs=QUICK_PAIRS,
            tasks=False,
        )
        run_id = lab.optimize(Optimize(variant=variant, name=name, proof=proof))
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
        return
    PROOF.open(run_id)
    st.session_state["tune_made"] = run_id


# What the page draws


def offered(one: Knob) -> tuple[Any, ...]:
    """Return all choices that a knob could have."""
    return (LEAVE, 3, 4, 8) if one.layers else knob_of(one.technique, one.field).choices


def search_form(lab: Lab, draft: Draft) -> None:
    """Draw what is searched."""
    st.pills(
        "What to search",
        NAMES,
        key=bound("tune_space", draft.space),
        on_change=take,
        args=("space",),
        help="\n\n".join(f"**{name}**: {about}" for name, about in ABOUT.items()),
    )
    for index, one in enumerate(draft.searched(lab)):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            label = f"{passes()[one.technique].title} · {title_of(one)}"
            key = f"knob_{index}_{one.name}"
            if one.choices:
                st.multiselect(
                    label,
                    offered(one),
                    key=bound(key, list(one.choices)),
                    format_func=choice_name,
                    on_change=take_knob,
                    args=(index, key),
                )
            elif one.field or one.weighs:
                low, high, kind = reach(one)
                st.slider(
                    label,
                    kind(low),
                    kind(high),
                    key=bound(key, (kind(one.low or 0), kind(one.high or 1))),
                    on_change=take_knob,
                    args=(index, key),
                )
            else:
                st.text(f"{label}: yes or no")
            st.button(
                "Remove",
                key=f"remove_knob_{index}_{one.name}",
                icon=":material/close:",
                type="tertiary",
                on_click=remove_knob,
                args=(index,),
            )
    st.selectbox(
        "Search another setting too",
        [f"{name}.{field}" for name in passes() for field in searchable(name)],
        index=None,
        key="new_knob",
        placeholder="Technique and setting",
        format_func=lambda name: " · ".join(
            (
                passes()[name.partition(".")[0]].title,
                str(passes()[name.partition(".")[0]].model_fields[name.partition(".")[2]].title),
            )
        ),
        on_change=add_knob,
    )


def reach(one: Knob) -> tuple[float, float, type[int] | type[float]]:
    """Return the least and greatest setting that a knob with a range could have, and their kind."""
    if one.weighs:
        return -WEIGHT, WEIGHT, float
    full = knob_of(one.technique, one.field)
    whole = passes()[one.technique].model_fields[one.field].annotation is int
    return full.low or 0, full.high or 1, int if whole else float


def choice_name(value: Any) -> str:
    """Return a choice for a person."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "as others" if value == LEAVE else str(value)


def title_of(one: Knob) -> str:
    """Return what a knob turns, for a person."""
    if one.weighs:
        return f"damage of {shown.escaped(one.layers)} counts, doublings"
    if one.layers:
        return f"bits of {shown.escaped(one.layers)}"
    if not one.field:
        return "used"
    return str(passes()[one.technique].model_fields[one.field].title)


def goals_form(lab: Lab, draft: Draft) -> None:
    """Draw objectives, limits and budget, and the button."""
    with st.container(border=True):
        st.multiselect(
            "Objectives",
            list(OBJECTIVES),
            key=bound("tune_objectives", list(draft.objectives)),
            format_func=lambda name: OBJECTIVES[name][1],
            on_change=take,
            args=("objectives",),
            max_selections=3,
        )
        with st.grid(3, min_column_width=120, gap="small"):
            for name, field in Limits.model_fields.items():
                st.number_input(
                    str(field.title),
                    min_value=0.0,
                    value=None,
                    key=bound(f"limit_{name}", getattr(draft.limits, name), typed=True),
                    on_change=take_limit,
                    args=(name,),
                    help=field.description,
                )
        with st.grid(3, min_column_width=120, gap="small"):
            st.number_input(
                "Trials",
                min_value=1,
                max_value=10_000,
                key=bound("tune_trials", draft.trials, typed=True),
                on_change=take,
                args=("trials",),
            )
            st.number_input(
                "Minutes at most",
                min_value=0.1,
                value=None,
                key=bound("tune_minutes", draft.minutes, typed=True),
                on_change=take,
                args=("minutes",),
            )
            st.text_input(
                "Study",
                key=bound("tune_study", draft.study, typed=True),
                placeholder="named by what it searches",
                on_change=take,
                args=("study",),
                help="A study of the same name goes on behind its last trial.",
            )
        st.button(
            "Search",
            icon=":material/manage_search:",
            type="primary",
            on_click=start,
            disabled=STUDY.running(lab),
        )


def search(lab: Lab) -> None:
    """Draw the search that is shown."""
    STUDY.draw(
        lab,
        _search,
        empty="Nothing is searched yet. Press Search: every trial makes a variant, measures it "
        "and lets it go, in the background; the page can be left.",
        tick_s=TICK_S,
        stop=PAUSE,
        ended=_ended,
    )


def _search(lab: Lab, found: Snapshot) -> None:
    run = found.run
    if run.result and run.result["trials"]:
        _results(run, run.result)


def _ended(run: Run) -> None:
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        st.markdown(shown.escaped(run.error or f"The search ended: {run.state}."), width="stretch")
        st.button("Go on", icon=":material/play_arrow:", on_click=go_on, args=(run,))


def _results(run: Run, result: Mapping[str, Any]) -> None:
    trials, objectives = result["trials"], result["objectives"]
    winner = result["winner"]
    if winner is None:
        st.caption(":material/info: No trial keeps to the limits so far.")
    else:
        with st.container(border=True, horizontal=True, vertical_alignment="center"):
            values = " · ".join(told(name, value) for name, value in winner["values"].items())
            st.markdown(
                f"**Best so far: trial {winner['number']}** · {shown.escaped(values)}",
                width="stretch",
            )
            st.button(
                "Make it a variant",
                icon=":material/bolt:",
                on_click=make,
                args=(run, winner),
                disabled=not run.state.final,
                help="Makes and keeps it, and measures a quick proof on the page Optimize.",
            )
    if uniform := result.get("uniform"):
        values = " · ".join(told(name, value) for name, value in uniform["values"].items())
        st.caption(f"The same bits for all layers: {shown.escaped(values)}")
    if st.session_state.get("tune_made"):
        st.page_link(links.OPTIMIZE, label="See it made and proven", icon=":material/bolt:")
    left, right = st.columns(2)
    with left:
        for one in objectives:
            st.plotly_chart(
                tune_charts.history(trials, one),
                key=f"history_{one['name']}",
                config={"displayModeBar": False},
            )
    with right:
        if len(objectives) > 1:
            st.plotly_chart(
                tune_charts.trade(trials, result["front"], objectives),
                key="trade",
                config={"displayModeBar": False},
            )
        for name, shares in result["importances"].items():
            st.caption(f"What decides {shown.escaped(name)}")
            st.plotly_chart(
                tune_charts.importances(shares),
                key=f"importances_{name}",
                config={"displayModeBar": False},
            )
    if sum(bool(one["values"]) for one in trials) > 1:
        st.plotly_chart(
            tune_charts.parallel(trials, objectives),
            key="parallel",
            config={"displayModeBar": False},
        )
    if confirmed := result["confirmed"]:
        for one in confirmed["comparisons"]:
            st.caption(
                f"Trial {confirmed['trials'][one['side']]} measured again in turn with the "
                f"baseline: {shown.escaped(one['sentence'])}"
            )
    st.dataframe(
        [
            {
                "Trial": one["number"],
                **one["values"],
                **one["settings"],
                "On the front": one["number"] in result["front"],
                "Problem": one["problem"] or "",
            }
            for one in trials
        ],
        hide_index=True,
    )
    st.caption(
        f"The study {shown.escaped(result['study'])} lies in `tune.db` of the data folder; "
        "`optuna-dashboard sqlite:///data/tune.db` opens it."
    )


def told(name: str, value: float) -> str:
    """Return one value of a trial with its unit."""
    if name == "stored_bytes":
        return shown.size(value)
    if name == "stored_ratio":
        return f"{value:.3f} × the bytes"
    unit = {"kl": "KL ", "tokens_per_s": "", "joules": ""}.get(name, "")
    after = {"tokens_per_s": " tokens/s", "joules": " J a token"}.get(name, "")
    return f"{unit}{UNITS[name].format(value)}{after}"


lab = shared_lab()
draft = current()
st.title("Tune")
st.caption(
    "Let a search choose the settings of a recipe: it tries, measures, learns what matters, and "
    "keeps to the limits you give."
)
for problem in settings.said():
    errors.show(problem)
left, right = st.columns([5, 6])
with left:
    search_form(lab, draft)
with right:
    goals_form(lab, draft)
search(lab)
write_address()
