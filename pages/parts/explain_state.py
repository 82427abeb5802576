"""What the explain page keeps: one frozen value in the session, its place in the address, its runs.

A look is a run like any other: it goes on without the page, and its id in the address shows it
again. Only one step of generation is looked at without a run of its own, by ``Lab.next_logits``.
"""

from __future__ import annotations

from typing import Any, Literal

import streamlit as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptcore.errors import GptcoreError
from gptcore.explain.work import Explain, Method
from gptcore.lab import Lab
from gptcore.recipe import Variant
from gptcore.records import MAX_PROMPT_CHARS, Message, Request, Run, RunKind
from pages.parts import errors, settings
from pages.parts.kept import Kept, tell

KEY = "explain"
RUNS = "explain_runs"
BEFORE = "explain_before"
"""The look that the newest one follows; it stays to be seen until that one has ended."""
STEP = "explain_step"
RESULT = "look"
"""The name in the address of the look that the view shows."""
VIEWS = {
    "Step": None,
    "Attention": "attention",
    "Lens": "lens",
    "Attribution": "attribution",
    "Heads": "worth",
    "Difference": "difference",
    "Profile": "profile",
}
"""Each view, and the ``what`` of its look."""
LONG_TEXT = frozenset({"Heads", "Difference"})
"""Views that judge predictions all over a text, for which one sentence is too little."""

View = Literal["Step", "Attention", "Lens", "Attribution", "Heads", "Difference", "Profile"]


class Wanted(BaseModel):
    """Everything that decides what is looked at; model, precision and device are the sidebar's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    view: View = "Step"
    prompt: str = Field(
        "The Eiffel Tower is in the city of", max_length=MAX_PROMPT_CHARS, title="Text"
    )
    passage: str = Field(
        "Every evening the keeper climbed the stairs of the lighthouse to light the lamp. When the "
        "sea was calm he could see the ships pass far out, and he wrote their names into a book.",
        max_length=MAX_PROMPT_CHARS,
        title="Text",
    )
    chat: bool = False
    layer: int = settings.as_in(Explain, "layer")
    head: int = settings.as_in(Explain, "head")
    steps: int = settings.as_in(Explain, "steps")
    target_id: int | None = settings.as_in(Explain, "target_id")
    method: Method = "both"
    other_model: str = Field("", max_length=100)
    """Of the second variant; empty: the sidebar's."""
    other_precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "int8"

    @property
    def text(self) -> str:
        """What the chosen view reads."""
        return self.passage if self.view in LONG_TEXT else self.prompt

    def variant(self, lab: Lab) -> Variant:
        """Return the sidebar's variant.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """
        return settings.current().variant(lab)

    def other(self, lab: Lab) -> Variant | None:
        """Return the variant that the sidebar's is held against, in the view that does so."""
        if self.view != "Difference":
            return None
        chosen = settings.current()
        return lab.variant(
            self.other_model or chosen.model, self.other_precision, chosen.device, chosen.threads
        )

    def work(self, lab: Lab) -> Explain:
        """Return the look to order.

        Raises:
            GptcoreError, ValidationError: what was picked or typed is not allowed.
        """
        what = VIEWS[self.view]
        assert what is not None
        fields: dict[str, Any] = {"what": what, "prompt": self.text, "chat": self.chat}
        if self.view == "Attention":
            fields |= {"layer": self.layer, "head": self.head}
        if self.view == "Attribution":
            fields |= {"steps": self.steps, "target_id": self.target_id, "method": self.method}
        return Explain(variant=self.variant(lab), other=self.other(lab), **fields)

    def request(self) -> Request:
        """Return the request whose first token the view of one step explains."""
        what: dict[str, Any] = {"prompt": self.prompt}
        if self.chat:
            what = {"messages": [Message(role="user", content=self.prompt)]}
        return Request.model_validate(
            {**what, **settings.current().sampling.model_dump(), "seed": settings.current().seed}
        )


_kept = Kept(Wanted, key=KEY, address="e", what="look")
current, change = _kept.current, _kept.change


def write_address() -> None:
    """Make the address hold what was chosen, and the look that is shown."""
    _kept.write_address()
    tell(RESULT, run_id(current().view))


def run_id(view: str) -> str | None:
    """Return the look that a view shows."""
    found: str | None = st.session_state.get(RUNS, {}).get(view)
    return found


def take_run_from_address(lab: Lab) -> None:
    """Show the look of a link, in its own view and with its own text."""
    given = (st.query_params.get(RESULT) or "")[: settings.ID_CHARS]
    if not given or RUNS in st.session_state:
        return
    found = lab.snapshot(given)
    asked = found.run.settings.get("what") if found is not None else None
    view = next((view for view, what in VIEWS.items() if what == asked), None)
    if found is None or found.run.kind is not RunKind.EXPLAIN or view is None:
        settings.say(
            f"There is no look {errors.brief(given)}; it was deleted, or belongs to another "
            "database. Its settings are here, so Look can make it again."
        )
        st.session_state[RUNS] = {}
        return
    st.session_state[RUNS] = {view: given}
    change(view=view, **_as_asked(found.run, view))


def _as_asked(run: Run, view: str) -> dict[str, Any]:
    """Return what decided a look, as far as this page sets it."""
    asked = run.settings
    taken = {name: asked[name] for name in ("chat", "layer", "head", "steps", "method")}
    return {**taken, ("passage" if view in LONG_TEXT else "prompt"): asked["prompt"]}


def look() -> None:
    """Order the look that the view is about; what hinders it is said, and nothing is lost."""
    from pages.parts.services import lab as shared_lab

    lab, wanted = shared_lab(), current()
    try:
        if not wanted.text.strip():
            settings.say("The text is empty: type some, or take the example.")
        elif wanted.view == "Step":
            variant, request = wanted.variant(lab), wanted.request()
            st.session_state[STEP] = (lab.next_logits(variant, request), variant)
        else:
            before = st.session_state.get(RUNS, {})
            st.session_state[RUNS] = {**before, wanted.view: lab.start(wanted.work(lab))}
            st.session_state[BEFORE] = before.get(wanted.view)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error, Explain))


def part(lab: Lab, first: Variant, second: Variant) -> None:
    """Order a look at where two variants part, on the passage that stands there.

    Raises:
        GptcoreError: it cannot be ordered.
    """
    change(view="Difference")
    work = Explain(
        what="difference", variant=first, other=second, prompt=current().passage, chat=False
    )
    st.session_state[RUNS] = {
        **st.session_state.get(RUNS, {}), "Difference": lab.start(work)
    }  # fmt: skip


def stepped() -> tuple[str, Variant] | None:
    """Return run id and variant of the step that was looked at, if any was."""
    kept: tuple[str, Variant] | None = st.session_state.get(STEP)
    return kept
