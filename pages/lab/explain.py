"""Explain: what happens inside a model, from one drawn token to single heads and operations."""

from __future__ import annotations

import json
from functools import partial

import streamlit as st

from gptcore.errors import GptcoreError
from gptcore.lab import Lab, Snapshot
from gptcore.records import RunState
from pages.parts import errors, explain_state, explain_step, explain_views, settings
from pages.parts import format as shown
from pages.parts.explain_looks import looked
from pages.parts.explain_state import LONG_TEXT, VIEWS, Wanted, change, current, look
from pages.parts.services import lab as shared_lab
from pages.parts.settings import NAMED_PRECISIONS, bound

ABOUT = {
    "Step": "How one token comes about: logits, temperature, masks, probabilities, and the draw.",
    "Attention": "What every head looks at, with the formula's real numbers.",
    "Lens": "What the model would say if it stopped after each layer.",
    "Attribution": "Which words of the text a prediction rests on, and whether that is so.",
    "Heads": "What each head and layer is worth: the text is read again without it.",
    "Difference": "Where in the network a second variant parts from the sidebar's.",
    "Profile": "Where the time of one decode step goes, operation by operation.",
}
SLOW = {
    "Heads": "Every head and layer is switched off once: about a minute for 135 M parameters on "
    "two cores.",
    "Attribution": "The text is read once for each of its tokens, and along the gradients' line.",
}


# What a click does


def take(name: str, key: str) -> None:
    """Take a value from its widget."""
    value = st.session_state[key]
    if value is not None:
        change(**{name: value, **({"target_id": None} if name in ("prompt", "chat") else {})})


# What the page draws


def header(wanted: Wanted) -> None:
    """Draw the title and the choice of what to look at."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Explain", width="stretch")
        st.segmented_control(
            "View",
            list(VIEWS),
            key=bound("explain_view", wanted.view),
            required=True,
            label_visibility="collapsed",
            wrap=True,
            on_change=take,
            args=("view", "explain_view"),
        )


def text_field(lab: Lab, wanted: Wanted) -> None:
    """Draw the text that is read, the second variant where there is one, and what starts a look."""
    name = "passage" if wanted.view in LONG_TEXT else "prompt"
    entry = settings.entry_of(lab, settings.current().model)
    with st.container(border=True):
        st.caption(ABOUT[wanted.view])
        st.text_area(
            "Text",
            key=bound(f"explain_{name}", wanted.text, typed=True),
            height=70 if name == "prompt" else 96,
            label_visibility="collapsed",
            placeholder="A text for the model to read",
            on_change=take,
            args=(name, f"explain_{name}"),
        )
        if wanted.view == "Difference":
            second(lab, wanted)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.button(
                "Look",
                type="primary",
                icon=":material/visibility:",
                on_click=look,
                disabled=busy(lab, wanted),
            )
            if entry is not None and entry.chat:
                st.toggle(
                    "As a chat",
                    key=bound("explain_chat", wanted.chat),
                    on_change=take,
                    args=("chat", "explain_chat"),
                    help="Read the text as what a user says; the model's template stands around "
                    "it. Off: the model continues the text.",
                )
            if wanted.view in SLOW:
                st.caption(SLOW[wanted.view], width="content")


def second(lab: Lab, wanted: Wanted) -> None:
    """Draw the choice of the variant that the sidebar's is held against."""
    entries = {one.name: one for one in lab.models() if not one.problem}
    chosen = settings.current()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.markdown(f"**A** {shown.escaped(chosen.model)}, {chosen.precision}", width="content")
        model = wanted.other_model or chosen.model
        names = list(entries) if model in entries else [model, *entries]
        st.selectbox(
            "B, model",
            names,
            key=bound("explain_other_model", model),
            format_func=lambda name: entries[name].title if name in entries else name,
            on_change=take,
            args=("other_model", "explain_other_model"),
            width=300,
        )
        st.selectbox(
            "B, precision",
            NAMED_PRECISIONS,
            key=bound("explain_other_precision", wanted.other_precision),
            on_change=take,
            args=("other_precision", "explain_other_precision"),
            width=140,
        )


def busy(lab: Lab, wanted: Wanted) -> bool:
    """Return whether this view's look goes on."""
    run_id = explain_state.run_id(wanted.view)
    found = lab.snapshot(run_id) if run_id else None
    return found is not None and not found.run.state.final


def outcome(lab: Lab, wanted: Wanted) -> None:
    """Draw what the view's look found, how far it is, or what to do to begin one."""
    if wanted.view == "Step":
        explain_step.draw(lab)
        return
    run_id = explain_state.run_id(wanted.view)
    if run_id is None:
        st.caption(":material/info: Nothing is looked at yet. Press Look.")
        return
    if looked(lab, run_id, partial(drawn, wanted.view)):
        before(lab, wanted.view)


def before(lab: Lab, view: str) -> None:
    """Draw what stood there while a look of the same kind goes on, outside of its ticks."""
    found = lab.snapshot(st.session_state.get(explain_state.BEFORE) or "")
    if (
        view not in LONG_TEXT
        and found is not None
        and found.run.state is RunState.DONE
        and found.run.result
        and found.run.settings["what"] == VIEWS[view]
    ):
        explain_views.VIEWS[view](found.run.result, found.run)


def drawn(view: str, lab: Lab, found: Snapshot) -> None:
    """Draw what a look has found."""
    run = found.run
    result = run.result
    if not result:
        return
    left_out = result["text"]["left_out"]
    if left_out:
        st.info(
            f"The text is long: the last {len(result['text']['ids']):,} tokens were read as a text "
            f"of their own, {left_out:,} before them were left out.",
            icon=":material/crop:",
        )
    explain_views.VIEWS[view](result, run)
    if run.state.final:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption(
                shown.escaped(
                    f"{run.model} · {run.precision} · {run.device} · "
                    f"{len(result['text']['ids'])} tokens"
                    + (" · as a chat" if run.settings["chat"] else "")
                    + (
                        f" · {shown.duration((run.ended_at - run.started_at).total_seconds())}"
                        if run.ended_at and run.started_at
                        else ""
                    )
                ),
                width="stretch",
            )
            st.download_button(
                "Take it away as JSON",
                lambda: json.dumps(dict(result)),
                f"{run.settings['what']}-{run.id}.json",
                "application/json",
                icon=":material/download:",
            )


lab = shared_lab()
explain_state.take_run_from_address(lab)
wanted = current()
explain_state.write_address()
header(wanted)
text_field(lab, wanted)
for problem in settings.said():
    errors.show(problem)
try:
    outcome(lab, wanted)
except GptcoreError as error:
    errors.show(error)
