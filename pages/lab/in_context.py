"""In context: what a prompt alone makes of a model: examples before a question, and rules."""

from __future__ import annotations

import json
from functools import partial
from typing import Literal

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import Lab, Snapshot
from pages.parts import errors, in_context_state, in_context_views, settings
from pages.parts import format as shown
from pages.parts.explain_looks import looked
from pages.parts.in_context_state import RULES, VIEWS, Wanted, change, current, start
from pages.parts.services import lab as shared_lab
from pages.parts.settings import bound

SHOTS = (0, 1, 2, 4, 8, 16, 32)
ABOUT = {
    "Few-shot": "A description of the task, examples, and the question, as GPT-3's paper frames "
    "it: how much does the model learn from its prompt alone?",
    "Constraint": "Texts that follow a rule whatever the model would like to say: tokens that "
    "would break it cannot be drawn.",
}
PROMPTS = {
    "choices": "Is this review positive, negative or neutral? “The soup was cold, but the waiter "
    "was kind.”",
    "regex": "When did people first walk on the moon? Give the date.",
    "json_schema": "Describe a person from a story as JSON.",
}


# What a click does


def take(name: str) -> None:
    """Take a value from its widget."""
    value = st.session_state[f"in_context_{name}"]
    if value is not None:
        change(**{name: tuple(value) if isinstance(value, list) else value})


def take_rule() -> None:
    """Take the kind of rule; an untouched prompt follows it."""
    rule = st.session_state["in_context_rule"]
    untouched = current().prompt in PROMPTS.values()
    change(rule=rule, **({"prompt": PROMPTS[rule]} if untouched else {}))


def take_file() -> None:
    """Keep an uploaded file as a set of items, and choose it."""
    file = st.session_state["in_context_file"]
    if file is None:
        return
    name = "".join(c if c.isalnum() else "-" for c in file.name.rpartition(".")[0])[:60]
    try:
        change(items=shared_lab().add_items(name or "mine", file.getvalue()), kinds=())
    except GptcoreError as error:
        settings.say(str(error))


# What the page draws


def header(wanted: Wanted) -> None:
    """Draw the title and the choice of what to do."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("In context", width="stretch")
        st.segmented_control(
            "View",
            VIEWS,
            key=bound("in_context_view", wanted.view),
            required=True,
            label_visibility="collapsed",
            on_change=take,
            args=("view",),
        )


def number(
    name: str,
    label: str,
    wanted: Wanted,
    step: float | int = 1,
    width: int | Literal["stretch"] = "stretch",
) -> None:
    """Draw a field's number with its own range and help."""
    field = Wanted.model_fields[name]
    limits = {key: getattr(rule, key) for rule in field.metadata for key in ("ge", "le")
              if hasattr(rule, key)}  # fmt: skip
    st.number_input(
        label,
        min_value=limits["ge"],
        max_value=limits["le"],
        step=step,
        key=bound(f"in_context_{name}", getattr(wanted, name), typed=True),
        on_change=take,
        args=(name,),
        help=field.description,
        width=width,
    )


def builder(lab: Lab, wanted: Wanted) -> None:
    """Draw the parts of a few-shot prompt, and the prompt that they make."""
    sets = lab.item_sets()
    st.text_input(
        "Task, in words",
        key=bound("in_context_description", wanted.description, typed=True),
        on_change=take,
        args=("description",),
        placeholder="Stands before the examples, such as: Finish each sentence correctly.",
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "Items",
            sets if wanted.items in sets else [*sets, wanted.items],
            key=bound("in_context_items", wanted.items),
            format_func=lambda name: "The items that ship" if name == "shipped" else name,
            on_change=take,
            args=("items",),
            width=190,
        )
        kinds = lab.item_kinds(wanted.items) if wanted.items in sets else ()
        st.multiselect(
            "Kinds",
            sorted({*kinds, *wanted.kinds}),
            key=bound("in_context_kinds", list(wanted.kinds)),
            on_change=take,
            args=("kinds",),
            placeholder="all",
            width=150,
        )
        st.multiselect(
            "Examples",
            sorted({*SHOTS, *wanted.shots}),
            key=bound("in_context_shots", list(wanted.shots)),
            on_change=take,
            args=("shots",),
        )
        number("most_items", "Questions", wanted, width=130)
        number("example_seed", "Seed", wanted, width=120)
    left, right = st.columns(2)
    with left, st.popover("Items of my own", icon=":material/upload_file:"):
        st.file_uploader(
            "JSONL, one item a line",
            type=["jsonl"],
            key="in_context_file",
            on_change=take_file,
        )
        st.code(
            '{"context": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}',
            language="json",
        )
    with right, st.expander("The prompt as it will be", icon=":material/preview:"):
        try:
            work = wanted.few_shot(lab)
            st.text(work.prompt(work.shots[min(1, len(work.shots) - 1)]), width="stretch")
        except (GptcoreError, ValidationError) as error:
            st.caption(shown.escaped(errors.sentence(error)))


def rule(lab: Lab, wanted: Wanted) -> None:
    """Draw the prompt, the rule, and how the texts are drawn."""
    left, right = st.columns(2)
    with left:
        st.text_area(
            "Prompt",
            key=bound("in_context_prompt", wanted.prompt, typed=True),
            on_change=take,
            args=("prompt",),
            height=122,
        )
        entry = settings.entry_of(lab, settings.current().model)
        if entry is not None and entry.chat:
            st.toggle(
                "As a chat",
                key=bound("in_context_chat", wanted.chat),
                on_change=take,
                args=("chat",),
            )
        for pair in (
            (("temperature", "Temperature"), ("texts", "Texts")),
            (
                ("max_new_tokens", "New tokens"),
                ("seed", "Seed"),
            ),
        ):
            with st.container(horizontal=True):
                for name, label in pair:
                    number(name, label, wanted, 0.1 if name == "temperature" else 1)
    with right:
        st.segmented_control(
            "Rule",
            list(RULES),
            key=bound("in_context_rule", wanted.rule),
            format_func=RULES.__getitem__,
            required=True,
            on_change=take_rule,
        )
        st.text_area(
            {"choices": "Choices, one a line"}.get(wanted.rule, RULES[wanted.rule]),
            key=bound(f"in_context_{wanted.rule}", getattr(wanted, wanted.rule), typed=True),
            on_change=take,
            args=(wanted.rule,),
            height=300 if wanted.rule == "json_schema" else 122,
            help={
                "choices": "The text is one of these, a space before it allowed.",
                "regex": "The whole text matches it. Rust's syntax: no look-around.",
                "json_schema": "Draft 2020-12. A keyword that cannot be held to is named.",
            }[wanted.rule],
        )


def outcome(lab: Lab, view: str) -> None:
    """Draw what the view's run found, how far it is, or what to do to begin one."""
    run_id = in_context_state.run_id(view)
    if run_id is None:
        st.caption(":material/info: Nothing has run yet. Press Run.")
        return
    looked(lab, run_id, partial(drawn, view))


def drawn(view: str, lab: Lab, found: Snapshot) -> None:
    """Draw what a run has found."""
    run = found.run
    if not run.result:
        return
    result = run.result
    (in_context_views.few_shot if view == "Few-shot" else in_context_views.constraint)(result, run)
    if run.state.final:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption(
                shown.escaped(f"{run.model} · {run.precision} · {run.device}"), width="stretch"
            )
            st.download_button(
                "Take it away as JSON",
                lambda: json.dumps(dict(result)),
                f"{run.kind}-{run.id}.json",
                "application/json",
                icon=":material/download:",
            )


lab = shared_lab()
in_context_state.take_run_from_address(lab)
wanted = current()
in_context_state.write_address()
header(wanted)
with st.container(border=True):
    st.caption(ABOUT[wanted.view])
    errors.guarded(builder if wanted.view == "Few-shot" else rule)(lab, wanted)
    run_id = in_context_state.run_id(wanted.view)
    running = lab.snapshot(run_id) if run_id else None
    st.button(
        "Run",
        type="primary",
        icon=":material/play_arrow:",
        on_click=start,
        disabled=running is not None and not running.run.state.final,
    )
for problem in settings.said():
    errors.show(problem)
outcome(lab, wanted.view)
