"""Everything that decides a generation, as one frozen value, and how a session keeps it.

The value lives in ``st.session_state["settings"]`` across pages. Widgets only show it and change it
through ``change``, which validates again what a browser sent.
"""

from __future__ import annotations

import time
from copy import copy
from typing import Any, Literal

import streamlit as st
from pydantic import Field, ValidationError
from streamlit.runtime.scriptrunner import get_script_run_ctx

from gptcore.catalogue import ModelEntry
from gptcore.device import PRECISIONS, Placement, cores
from gptcore.errors import InvalidInput
from gptcore.lab import Lab
from gptcore.recipe import SHORTHANDS, Variant
from gptcore.records import Message, Request, Run, RunKind, Sampling
from pages.parts import errors, permalink
from pages.parts.services import lab as shared_lab

NAMED_PRECISIONS = (*PRECISIONS, *SHORTHANDS)
ID_CHARS = 64
TOLD_AGAIN_S = 2.0


def as_in(owner: Any, name: str) -> Any:
    """Return the field of another value, so that range and help are said once."""
    return copy(owner.model_fields[name])


class Settings(Sampling):
    """What a person picked in sidebar and playground.

    The prompt may be anything that was typed, even what no request accepts, so that nothing typed
    is lost; ``request`` refuses it.
    """

    model: str = Field("smollm2-135m", max_length=100, title="Model")
    precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = Field("fp32", title="Precision")
    device: str = as_in(Placement, "device")
    threads: int = as_in(Placement, "threads")
    mode: Literal["chat", "completion"] = Field("chat", title="Mode")
    seed: int = as_in(Request, "seed")
    max_new_tokens: int = as_in(Request, "max_new_tokens")
    stop: tuple[str, ...] = as_in(Request, "stop")
    ignore_eos: bool = as_in(Request, "ignore_eos")
    overflow: Literal["refuse", "cut"] = as_in(Request, "overflow")
    prompt: str = Field("", title="Prompt")
    messages: tuple[Message, ...] = Field((), max_length=1000, title="Chat")
    """Earlier turns of the chat."""
    forced_ids: tuple[int, ...] = as_in(Request, "forced_ids")
    """The trunk of a branch that came with a link."""

    def request(self) -> Request:
        """Return what to ask of the engine.

        Raises:
            InvalidInput: the prompt is empty.
            ValidationError: it is too long, or holds what is no text.
        """
        if not self.prompt.strip():
            raise InvalidInput("The prompt is empty: type some text, or pick one of the examples.")
        if self.mode == "chat":
            said = Message(role="user", content=self.prompt)
            what: dict[str, Any] = {"messages": (*self.messages, said)}
        else:
            what = {"prompt": self.prompt}
        return Request(**what, **{name: getattr(self, name) for name in REQUEST_FIELDS})

    def variant(self, lab: Lab) -> Variant:
        """Return the variant that was picked.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """
        return lab.variant(self.model, self.precision, self.device, self.threads)


REQUEST_FIELDS = (
    *Sampling.model_fields,
    "seed",
    "max_new_tokens",
    "stop",
    "ignore_eos",
    "overflow",
    "forced_ids",
)
"""The settings that a request has too, under the same names."""


def settings_of(lab: Lab, run: Run) -> Settings:
    """Return the settings that made a generation, so that they make it again."""
    asked = run.settings
    values = {name: asked[name] for name in REQUEST_FIELDS if name in asked}
    values |= {"model": run.model, "precision": run.precision, "device": run.device}
    values["threads"] = threads_of(lab, run)
    if turns := asked.get("messages"):
        values |= {"mode": "chat", "messages": turns[:-1], "prompt": turns[-1]["content"]}
    else:
        values |= {"mode": "completion", "prompt": asked.get("prompt", "")}
    return Settings.model_validate(values)


def going_on_from(lab: Lab, run: Run) -> Settings:
    """Return what stands in the page's controls beside a generation: a chat waits for a reply."""
    made = settings_of(lab, run).model_copy(update={"forced_ids": ()})
    if made.mode == "completion":
        return made
    return made.model_copy(update={"prompt": "", "messages": ()})


def starting_settings(lab: Lab) -> Settings:
    """Return what a newcomer finds: an installed model that can chat, if there is one."""
    usable = [one for one in lab.models() if not one.problem]
    installed = [one for one in usable if one.kind == "installed"]
    ranked = sorted(installed, key=lambda one: (not one.chat, one.name != "smollm2-135m"))
    first = next(iter(ranked or usable), None)
    if first is None:
        return Settings()
    return Settings(model=first.name, mode="chat" if first.chat else "completion")


# The session's


def current() -> Settings:
    """Return this session's settings."""
    found: Settings = st.session_state["settings"]
    return found


def change(**values: Any) -> None:
    """Change some settings; what is not allowed is said in the page, and changes nothing."""
    try:
        changed = Settings.model_validate({**current().model_dump(), **values})
    except ValidationError as error:
        say(errors.sentence(error))
    else:
        st.session_state["settings"] = changed
        write_url()


def say(problem: str) -> None:
    """Keep a sentence that the next run of the script shows."""
    st.session_state.setdefault("problems", []).append(problem)


def said() -> list[str]:
    """Return the sentences that were kept, once."""
    found: list[str] = st.session_state.pop("problems", [])
    return found


def taken_from(key: str, name: str) -> None:
    """Take a setting from its widget: what an ``on_change`` calls."""
    value = st.session_state[key]
    if value is not None:
        change(**{name: value})


def bound(key: str, value: Any, *, typed: bool = False) -> str:
    """Make the widget ``key`` show ``value`` and return the key.

    Streamlit forgets a widget's value when its page is left, and what stands in the session is the
    truth, so it is told in every run: a browser that is sent two drawings at once takes only the
    second, and would show a slider at its lowest value if that one did not tell.

    Args:
        key: of the widget.
        value: what it shall show.
        typed: whether somebody types into it. What is being typed is not known here, and would be
            taken away; so a value is told again only for a moment after it has changed.
    """
    told: dict[str, float] = st.session_state.setdefault("told_at", {})
    if key not in st.session_state or st.session_state[key] != value:
        told[key] = time.monotonic()
    if not typed or time.monotonic() - told.get(key, 0.0) < TOLD_AGAIN_S:
        st.session_state[key] = value
    return key


def run_id() -> str | None:
    """Return the id of the generation on the playground's page."""
    found: str | None = st.session_state.get("run")
    return found


def show_run(found: str | None) -> None:
    """Put a generation on the playground's page; the next full run puts its id into the address."""
    st.session_state["run"] = found


def session_id() -> str:
    """Return the id of this browser session, empty outside one."""
    context = get_script_run_ctx()
    return context.session_id if context else ""


def keep_watching() -> None:
    """Tell the lab that this session looks at its run, so that a reload keeps the run alive."""
    if found := run_id():
        shared_lab().watch(found, session_id())


def restore(page: str) -> None:
    """Make the session's settings, from the address where it tells some; call it in every run.

    The address is read when a session begins (a reload, a link) and when a page is entered (a link
    between pages); afterwards the session knows better than an address that may lag behind.

    Args:
        page: the path of the page that will be drawn.
    """
    lab = shared_lab()
    st.session_state["entered"] = st.session_state.get("page") != page
    if "settings" not in st.session_state:
        st.session_state["settings"] = starting_settings(lab)
    if entered():
        _read_url(lab)
    st.session_state["page"] = page
    write_url()


def entered() -> bool:
    """Return whether this drawing of the page is its first, so that its address is a link's."""
    found: bool = st.session_state["entered"]
    return found


def _read_url(lab: Lab) -> None:
    given = {name: st.query_params.get_all(name) for name in st.query_params}
    base = current()
    wanted = given.get("run", [""])[0][:ID_CHARS]
    if wanted and wanted != run_id():
        found = lab.snapshot(wanted)
        if found is None:
            say(
                f"The run {errors.brief(wanted)} of this link is not in the database; its settings "
                "are here, so Generate can write it again."
            )
        elif found.run.kind is not RunKind.GENERATE:
            say(
                f"The run {errors.brief(wanted)} of this link is no text but a {found.run.kind}: "
                "History shows it."
            )
        else:
            st.session_state["run"] = wanted
            if not permalink.NAMES & set(given):
                base = going_on_from(lab, found.run)
    values, problems = permalink.read(given, base.model_dump(mode="json"))
    settings = Settings.model_validate(values)
    entry = entry_of(lab, settings.model)
    if entry is not None and not entry.chat and "mode" not in given:
        settings = settings.model_copy(update={"mode": "completion"})
    if entry is None:
        say(
            f"There is no model {errors.brief(settings.model)} in the catalogue; {base.model} is "
            "used instead."
        )
        settings = settings.model_copy(update={"model": base.model})
    for problem in problems:
        say(problem)
    st.session_state["settings"] = settings
    if given.get("play") == ["1"] and not wanted:
        st.session_state["play"] = True


def entry_of(lab: Lab, model: str) -> ModelEntry | None:
    """Return the catalogue's entry of that name, or None."""
    return next((one for one in lab.models() if one.name == model), None)


def write_url() -> None:
    """Make the address a link to what this session shows; other pages' names are left alone."""
    default = starting_settings(shared_lab())
    wanted = permalink.short(current().model_dump(mode="json"), default.model_dump(mode="json"))
    if found := run_id():
        wanted["run"] = [found]
    for name in (*permalink.NAMES, "run", "play"):
        if name not in wanted:
            st.query_params.pop(name, None)
        elif st.query_params.get_all(name) != wanted[name]:
            st.query_params[name] = wanted[name]


def threads_of(lab: Lab, run: Run) -> int:
    """Return the threads setting under which a run was made: 0 where it took every core."""
    made = lab.run_provenance(run)
    threads = made.threads if made else None
    return 0 if threads is None or threads == cores() else threads
