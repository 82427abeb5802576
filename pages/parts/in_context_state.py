"""What the page on work in context keeps: one frozen value in the session, and its runs."""

from __future__ import annotations

from typing import Literal

import streamlit as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptcore.constraint import grammar_of
from gptcore.errors import GptcoreError, InvalidInput
from gptcore.explain.work import Explain, Held
from gptcore.lab import FewShot, Lab
from gptcore.records import MAX_PROMPT_CHARS, MAX_RULE_CHARS, Constraint, RunKind
from gptcore.work import Work
from pages.parts import errors, settings
from pages.parts.kept import Kept, tell

KEY = "in_context"
RUNS = "in_context_runs"
RESULT = "result"
VIEWS = ("Few-shot", "Constraint")
RULES = {"choices": "Choices", "regex": "Regular expression", "json_schema": "JSON schema"}
SCHEMA = """{
  "type": "object",
  "properties": {
    "name": {"type": "string", "maxLength": 24},
    "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "likes": {"type": "array", "items": {"type": "string", "maxLength": 16}, "maxItems": 3}
  },
  "required": ["name", "age", "likes"],
  "additionalProperties": false
}"""

View = Literal["Few-shot", "Constraint"]
Rule = Literal["choices", "regex", "json_schema"]


class Wanted(BaseModel):
    """Everything that decides what is asked; model, precision and device are the sidebar's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    view: View = "Few-shot"
    description: str = settings.as_in(FewShot, "description")
    items: str = Field("shipped", min_length=1, max_length=64, title="Items")
    kinds: tuple[str, ...] = settings.as_in(FewShot, "kinds")
    shots: tuple[int, ...] = settings.as_in(FewShot, "shots")
    most_items: int = settings.as_in(FewShot, "most_items")
    example_seed: int = settings.as_in(FewShot, "seed")
    prompt: str = Field(
        "Describe a person from a story as JSON.", max_length=MAX_PROMPT_CHARS, title="Prompt"
    )
    chat: bool = True
    rule: Rule = "json_schema"
    choices: str = Field("positive\nnegative\nneutral", max_length=MAX_RULE_CHARS, title="Choices")
    regex: str = Field(
        r"(1[89]|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
        max_length=MAX_RULE_CHARS,
        title="Regular expression",
    )
    json_schema: str = Field(SCHEMA, max_length=MAX_RULE_CHARS, title="JSON schema")
    temperature: float = settings.as_in(Held, "temperature")
    texts: int = settings.as_in(Held, "texts")
    max_new_tokens: int = settings.as_in(Held, "max_new_tokens")
    seed: int = settings.as_in(Held, "seed")

    @property
    def constraint(self) -> Constraint:
        """The chosen rule.

        Raises:
            ValidationError: it is empty, or cannot be read.
        """
        if self.rule == "choices":
            return Constraint(
                choices=tuple(filter(None, map(str.strip, self.choices.splitlines())))
            )
        return Constraint(**{self.rule: getattr(self, self.rule)})

    def few_shot(self, lab: Lab) -> FewShot:
        """Return the work of the view on examples.

        Raises:
            GptcoreError, ValidationError: what was picked or typed is not allowed.
        """
        if (
            self.items not in lab.item_sets()
        ):  # a visitor names sets; a path is for the command line
            raise InvalidInput(
                f"There is no set of items {errors.brief(self.items)}; there are: "
                f"{', '.join(lab.item_sets())}."
            )
        return FewShot(
            variant=settings.current().variant(lab),
            items=self.items,
            kinds=self.kinds,
            description=self.description.strip(),
            shots=self.shots,
            most_items=self.most_items,
            seed=self.example_seed,
        )

    def held(self, lab: Lab) -> Explain:
        """Return the work of the view on rules.

        Raises:
            GptcoreError, ValidationError: what was picked or typed is not allowed.
        """
        constraint = self.constraint
        grammar_of(constraint)
        if not self.prompt.strip():
            raise InvalidInput("The prompt is empty: type some text.")
        entry = settings.entry_of(lab, settings.current().model)
        return Explain(
            what="constraint",
            variant=settings.current().variant(lab),
            prompt=self.prompt,
            chat=self.chat and bool(entry and entry.chat),
            held=Held(
                constraint=constraint,
                temperature=self.temperature,
                texts=self.texts,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
            ),
        )

    def work(self, lab: Lab) -> Work:
        """Return what the view's button orders."""
        return self.few_shot(lab) if self.view == "Few-shot" else self.held(lab)


_kept = Kept(Wanted, key=KEY, address="c", what="settings")
current, change = _kept.current, _kept.change


def write_address() -> None:
    """Make the address hold what was chosen, and the run that is shown."""
    _kept.write_address()
    tell(RESULT, run_id(current().view))


def run_id(view: str) -> str | None:
    """Return the run that a view shows."""
    found: str | None = st.session_state.get(RUNS, {}).get(view)
    return found


def take_run_from_address(lab: Lab) -> None:
    """Show the run of a link in its own view."""
    given = (st.query_params.get(RESULT) or "")[: settings.ID_CHARS]
    if not given or RUNS in st.session_state:
        return
    st.session_state[RUNS] = {}
    found = lab.snapshot(given)
    asked = found.run.settings if found else {}
    if found is not None and found.run.kind is RunKind.FEW_SHOT:
        st.session_state[RUNS] = {"Few-shot": given}
        taken = {name: asked[name] for name in ("description", "items", "kinds", "shots")}
        change(view="Few-shot", **taken, example_seed=asked["seed"], most_items=asked["most_items"])
    elif found is not None and asked.get("what") == "constraint":
        st.session_state[RUNS] = {"Constraint": given}
        held = dict(asked["held"])
        rule = {name: value for name, value in held.pop("constraint").items() if value}
        (name,) = rule
        value = "\n".join(rule[name]) if name == "choices" else rule[name]
        change(view="Constraint", prompt=asked["prompt"], chat=asked["chat"], rule=name,
               **{name: value}, **held)  # fmt: skip
    else:
        settings.say(
            f"There is no such run {errors.brief(given)}; it was deleted, or belongs to another "
            "database."
        )


def start() -> None:
    """Order what the view is about; what hinders it is said, and nothing typed is lost."""
    from pages.parts.services import lab as shared_lab

    lab, wanted = shared_lab(), current()
    try:
        work = wanted.work(lab)
        started = lab.start(work)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error, FewShot if wanted.view == "Few-shot" else Held))
        return
    st.session_state[RUNS] = {**st.session_state.get(RUNS, {}), wanted.view: started}
