"""Optimize: make the model cheaper by a recipe, and see proof of what that changed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.export import formats
from gptcore.lab import Export, Goals, Lab, Optimize, Snapshot, predicted
from gptcore.optimize.pareto import card_of, front
from gptcore.optimize.ready import READY
from gptcore.passes.base import Pass
from gptcore.passes.registry import pass_from_json, passes
from gptcore.recipe import Calibration, Variant
from gptcore.records import Run, RunKind, RunState
from pages.parts import (
    errors,
    explain_state,
    links,
    pass_form,
    proof_card,
    proof_charts,
    settings,
)
from pages.parts import format as shown
from pages.parts.optimize_state import (
    PROOF,
    Draft,
    change,
    change_recipe,
    current,
    estimate_of,
    free_name,
    write_address,
)
from pages.parts.services import lab as shared_lab
from pages.parts.settings import bound
from pages.parts.shown_run import follow

VIEWS = ("Proof", "All variants")
MOST_DOWNLOADED = 512 * 2**20
"""A larger file is left where it lies."""
ABOUT_S = 0.5
"""Shorter times are not worth a number."""


# What a click does


def take(name: str) -> None:
    """Take a value of the draft from its widget."""
    value = st.session_state[f"optimize_{name}"]
    if value is not None:
        change(**{name: value})


def take_goal(name: str) -> None:
    """Take a goal from its widget; an empty one is none."""
    goals = {**current().goals.model_dump(), name: st.session_state[f"goal_{name}"]}
    try:
        change(goals=Goals.model_validate(goals))
    except ValidationError as error:
        settings.say(errors.sentence(error, Goals))


def take_field(index: int, key: str, name: str) -> None:
    """Take a field of a pass from its widget."""
    chosen = list(current().recipe.passes)
    value = {**chosen[index].as_json(), name: st.session_state[key]}
    try:
        chosen[index] = pass_from_json(value)
    except GptcoreError as error:
        settings.say(str(error))
        return
    change_recipe(chosen)


def take_text() -> None:
    """Take the calibration text."""
    known = current().recipe.calibration or Calibration()
    fresh = known.model_copy(update={"text": st.session_state["calibration_text"], "hash": ""})
    change_recipe(list(current().recipe.passes), fresh)


def add_pass() -> None:
    """Put the chosen pass into the recipe, at the end of its stage."""
    name = st.session_state["new_pass"]
    if not name:
        return
    try:
        change(recipe=current().recipe.then(passes()[name]()))
    except ValidationError as error:
        settings.say(errors.sentence(error))
    st.session_state["new_pass"] = None


def remove_pass(index: int) -> None:
    """Take a pass out of the recipe."""
    chosen: list[Pass] = list(current().recipe.passes)
    del chosen[index]
    change_recipe(chosen)


def take_ready() -> None:
    """Take a ready recipe with its goals."""
    wanted = st.session_state["ready"]
    for one in READY:
        if one.name == wanted:
            change(recipe=one.recipe, precision=one.precision, goals=one.goals)


def start() -> None:
    """Make the variant and prove it, or only prove it where there are no passes."""
    lab, draft = shared_lab(), current()
    try:
        work = draft.work(lab)
        run_id = lab.optimize(work) if isinstance(work, Optimize) else lab.prove(work)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
        return
    PROOF.open(run_id)


def carry(name: str) -> None:
    """Write the finished variant in the chosen form."""
    errors.redraw()
    lab = shared_lab()
    chosen = settings.current()
    try:
        work = Export(
            variant=lab.variant(name, None, chosen.device, chosen.threads),
            form=st.session_state["export_form"],
        )
        st.session_state["export_run"] = lab.start(work)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))


def use(name: str) -> None:
    """Choose the finished variant in the sidebar."""
    errors.redraw()
    settings.change(model=name)


# What the page draws


def recipe_form(lab: Lab, draft: Draft, variant: Variant | None) -> None:
    """Draw the passes of the recipe, each as a form, and what can be added."""
    for index, one in enumerate(draft.recipe.passes):
        with st.container(border=True):
            with st.container(horizontal=True, vertical_alignment="center"):
                st.markdown(f"**{one.title}**", width="stretch")
                st.button(
                    "Remove",
                    key=f"remove_pass_{index}",
                    icon=":material/close:",
                    type="tertiary",
                    on_click=remove_pass,
                    args=(index,),
                )
            st.caption(shown.escaped(one.mechanism[:1].upper() + one.mechanism[1:]) + ".")
            pass_form.draw(one, f"pass_{index}_{one.name}", partial(take_field, index))
            if variant and (caution := one.caution(variant.spec, variant.placement)):
                st.caption(f":orange[:material/warning:] {shown.escaped(caution)}")
    there = {one.name for one in draft.recipe.passes}
    blocked = blocked_passes(lab, variant) if variant else {}
    st.selectbox(
        "Add a pass",
        [name for name in passes() if name not in there],
        index=None,
        key="new_pass",
        placeholder="Choose a technique",
        format_func=lambda name: passes()[name].title + (" · blocked" if name in blocked else ""),
        on_change=add_pass,
        help="\n\n".join(
            f"**{passes()[name].title}**: {shown.escaped(why)}" for name, why in blocked.items()
        )
        or "Every technique can run here.",
    )
    if draft.recipe.needs_calibration:
        names = list(lab.calibration_texts())
        wanted = (draft.recipe.calibration or Calibration()).text
        st.selectbox(
            "Calibration text",
            names if wanted in names else [wanted, *names],
            key=bound("calibration_text", wanted),
            on_change=take_text,
            help="Some passes look at how a text runs through the model. What is evaluated on the "
            "same text would look better than it is, so that is refused.",
        )


def blocked_passes(lab: Lab, variant: Variant) -> dict[str, str]:
    """Return why passes cannot run on this model and device, on any precision."""
    found = {}
    for name, kind in passes().items():
        said = [
            kind().blocked_by(variant.spec, variant.placement.model_copy(update={"precision": one}))
            for one in ("fp32", "bf16")
        ]
        if all(said):
            found[name] = str(said[0])
    return found


def before(lab: Lab, draft: Draft, variant: Variant | None) -> None:
    """Draw what the recipe will take, its name, goals, and the button."""
    with st.container(border=True):
        if variant is not None:
            draw = errors.guarded(_prediction)
            if _is_tried(variant):
                draw = st.fragment(draw, run_every=1.0)
            draw(lab, variant)
        with st.container(horizontal=True):
            if draft.recipe.passes:
                st.text_input(
                    "Name of the result",
                    key=bound("optimize_name", draft.name, typed=True),
                    placeholder=free_name(lab, draft),
                    on_change=take,
                    args=("name",),
                )
            st.selectbox(
                "Precision under it",
                ("auto", "fp32", "bf16", "fp16"),
                key=bound("optimize_precision", draft.precision),
                on_change=take,
                args=("precision",),
                help="Auto takes the first that all passes can use.",
                width=150,
            )
            st.selectbox(
                "Proof",
                ("full", "quick"),
                key=bound("optimize_thoroughness", draft.thoroughness),
                on_change=take,
                args=("thoroughness",),
                help="Full: three cells, tasks and damage map, some minutes. Quick: one cell and "
                "fewer blocks.",
                width=120,
            )
        with st.expander("Goals", icon=":material/flag:"), st.grid(3, min_column_width=130):
            for name, field in Goals.model_fields.items():
                st.number_input(
                    str(field.title),
                    min_value=0.0,
                    value=None,
                    step=None,
                    key=bound(f"goal_{name}", getattr(draft.goals, name), typed=True),
                    on_change=take_goal,
                    args=(name,),
                    help=field.description,
                )
        stopped = variant.blocked_by if variant else "there is no variant."
        st.button(
            "Optimize" if draft.recipe.passes else "Prove",
            icon=":material/bolt:",
            type="primary",
            on_click=start,
            disabled=stopped is not None or PROOF.running(lab),
        )
        if stopped and variant is not None:
            st.error(shown.escaped(stopped), icon=":material/block:")


def _prediction(lab: Lab, variant: Variant) -> None:
    known = predicted(variant)
    with st.grid("auto", min_column_width=110, gap="small"):
        st.metric(
            "Weights after",
            shown.size(known.weights_bytes_after),
            help=f"In memory at most, from {shown.size(known.weights_bytes)}: arithmetic on the "
            "shape. The native step shares a tied embedding with the head and takes less.",
        )
        if known.parameters != known.parameters_after:
            st.metric("Parameters", shown.parameters(known.parameters_after))
        if _is_tried(variant):
            _tried(lab, variant)


def _is_tried(variant: Variant) -> bool:
    return bool(variant.recipe.passes) and not variant.blocked_by


def _tried(lab: Lab, variant: Variant) -> None:
    found = estimate_of(lab, variant)
    seconds = found["seconds"] if found else None
    value = "…" if found is None else shown.UNKNOWN
    if seconds is not None:
        value = f"≈ {shown.duration(seconds)}" if seconds >= ABOUT_S else "under 1 s"
    st.metric(
        "Making it takes",
        value,
        help="Tried on a few blocks, and scaled; the proof comes on top.",
    )
    peak = shown.size(found["peak_bytes"]) if found else "…"
    st.metric(
        "Peak memory",
        peak,
        help="While the passes run, beyond what the program holds before; tried likewise.",
    )


def proof(lab: Lab) -> None:
    """Draw the run that is shown: its progress, then its card."""
    PROOF.draw(
        lab,
        _proof,
        empty="Nothing is shown yet. Press Optimize: the variant is made, kept in the catalogue, "
        "and held against the model it came from.",
    )


def _proof(lab: Lab, found: Snapshot) -> None:
    run = found.run
    made(run)
    card = card_of(run)
    if card is not None:
        proof_card.draw(card, final=run.state.final, key=f"card_{run.id}")
    if run.state.final:
        with st.container(horizontal=True):
            st.button("Close", on_click=PROOF.close, help="It stays under its link.")
            st.page_link(links.HISTORY, label="History", icon=":material/history:")
            sides = sides_of(run)
            if sides and st.button(
                "Explain where they part",
                icon=":material/visibility:",
                help="Layer by layer and token by token, on a passage.",
            ):
                explain_state.part(lab, *sides)
                st.switch_page(links.EXPLAIN)


def sides_of(run: Run) -> tuple[Variant, Variant] | None:
    """Return baseline and variant of a proof, None where a run has none."""
    asked = run.settings.get("proof") or run.settings
    try:
        first, second = (Variant.model_validate(asked[name]) for name in ("baseline", "variant"))
    except (KeyError, ValidationError):
        return None
    return first, second


def made(run: Run) -> None:
    """Draw what was made and kept."""
    result = run.result
    if run.kind is not RunKind.OPTIMIZE or not result:
        return
    name = result["name"]
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        bits = f"{result['effective_bits']:.2f} bits a parameter"
        st.markdown(
            f":material/check_circle: **{shown.escaped(name or 'Not kept')}** made in "
            f"{shown.duration(result['seconds'])}: {shown.size(result['stored_bytes'])} on disk, "
            f"{shown.size(result['resident_bytes'])} in memory, {bits}",
            width="stretch",
        )
        if name and result["artifact"]:
            st.button(
                "Use it",
                icon=":material/check:",
                on_click=use,
                args=(name,),
                help="Choose it in the sidebar, for the playground and every other page.",
            )
            with st.popover("Export", icon=":material/output:"):
                _export_form(name)
    if result["weights_sha256"]:
        st.caption(f"Weights {result['weights_sha256'][:23]}…; the recipe makes the same again.")


def _export_form(name: str) -> None:
    choices = {one.form.name: one for one in formats()}
    st.selectbox(
        "Format",
        list(choices),
        key="export_form",
        format_func=lambda one: (
            choices[one].form.title + (" · not here" if choices[one].blocked else "")
        ),
    )
    chosen = choices[st.session_state["export_form"]]
    st.caption(shown.escaped(chosen.form.description))
    if chosen.blocked:
        st.caption(f":orange[:material/block:] {shown.escaped(chosen.blocked)}")
    st.button(
        "Write it",
        icon=":material/output:",
        on_click=carry,
        args=(name,),
        disabled=chosen.blocked is not None,
    )


def exported(lab: Lab, found: Snapshot) -> None:
    """Draw what an export wrote."""
    run = found.run
    if not run.result or run.state is not RunState.DONE:
        return
    path = Path(run.result["path"])
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        st.markdown(
            f":material/output: {shown.escaped(path.name)}, {shown.size(run.result['bytes'])}, "
            "in `data/exports`",
            width="stretch",
        )
        if path.is_file() and run.result["bytes"] <= MOST_DOWNLOADED:
            st.download_button("Download", path.read_bytes, path.name, icon=":material/download:")
    if run.result["note"]:
        st.caption(shown.escaped(run.result["note"]))


def everything(lab: Lab) -> None:
    """Draw all proven variants, and those that none beats."""
    points = lab.proofs()
    if not points:
        st.caption(":material/info: No variant is proven yet; each proof becomes a point here.")
        return
    best = front(points)
    picked: Any = st.plotly_chart(
        proof_charts.pareto(points, best),
        key="pareto",
        on_select="rerun",
        selection_mode="points",
        config={"displayModeBar": False},
    )
    chosen = [one.get("customdata") for one in picked["selection"]["points"]]
    st.caption(
        "Right is faster, low is nearer to the baseline, small dots are small files; ringed ones "
        "missed a goal. The dotted line joins what no other beats on all three. Click a dot for "
        "its card."
    )
    table: Any = st.dataframe(
        proof_charts.rows(points, best),
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="pareto_rows",
    )
    wanted = [points[at].run_id for at in table["selection"]["rows"]] or [
        one[0] if isinstance(one, list) else one for one in chosen if one
    ]
    if wanted and (found := lab.snapshot(str(wanted[0]))) and (card := card_of(found.run)):
        proof_card.draw(card, final=True, key=f"picked_{wanted[0]}")


lab = shared_lab()
draft = current()
st.title("Optimize")
st.caption(
    "Make the model cheaper, then see proof: speed, memory, size, energy and quality of the "
    "variant against the model it came from, measured in turn."
)
for problem in settings.said():
    errors.show(problem)
variant: Variant | None
try:
    variant = draft.variant(lab)
except GptcoreError as error:
    variant = None
    errors.show(error)
st.pills(
    "Ready recipes",
    [one.name for one in READY],
    key="ready",
    on_change=take_ready,
    help="\n\n".join(f"**{one.name}**: {one.about}" for one in READY),
)
left, right = st.columns([5, 6])
with left:
    recipe_form(lab, draft, variant)
with right:
    before(lab, draft, variant)
if export := st.session_state.get("export_run"):
    follow(lab, export, exported)
view = st.segmented_control("View", VIEWS, default=VIEWS[0], label_visibility="collapsed")
if view == VIEWS[1]:
    everything(lab)
else:
    proof(lab)
write_address()
