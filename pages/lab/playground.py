"""Playground: write with a model, watch it, and look at what else it could have said."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import Lab, Snapshot
from gptcore.recipe import Variant
from gptcore.records import Message, Request, RunState
from pages.parts import errors, ranking, samplers, settings
from pages.parts import format as shown
from pages.parts.charts import STATE_LOOKS
from pages.parts.copying import copy_popover
from pages.parts.numbers import costs_in_words, how_in_words, numbers_row
from pages.parts.services import lab as shared_lab
from pages.parts.settings import Settings, bound, change, current, settings_of, taken_from
from pages.parts.tokens import branched, token_text

TEXT = "text"
"""The key of the drawing of the tokens."""
TICK_S = 0.12
"""How often a text that is being written is drawn; see ``tick``."""
LONG_TOKENS = 1000
AVATARS = {"user": ":material/person:", "assistant": ":material/smart_toy:"}
EXAMPLES = {
    "chat": {
        "A short tale": "Tell a short tale about a lighthouse keeper who finds a map.",
        "Explain": "Explain in three sentences why the sky is blue.",
        "A list": "List five things to check before a long walk in the mountains.",
        "Rewrite": "Say it more politely: Send me the report today, I have waited long enough.",
    },
    "completion": {
        "A tale": "The old clock in the hall had not moved for years, until one night",
        "A fact": "The capital of France is",
        "Code": "def fibonacci(n):\n    ",
        "A pattern": "one, two, three, four, five,",
    },
}


# What a click does


def start(
    variant: Callable[[], Variant], request: Callable[[], Request], parent_id: str | None = None
) -> bool:
    """Queue a generation and show it; what hinders it is said, and nothing typed is lost."""
    lab = shared_lab()
    try:
        run_id = lab.generate(
            variant(), request(), session=settings.session_id(), parent_id=parent_id
        )
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
        return False
    settings.show_run(run_id)
    st.session_state["started"] = True
    return True


def generate() -> None:
    """Write with what stands in the controls; in a chat, after what was said."""
    if samplers.fresh_seed():
        change(seed=samplers.draw_seed())
    wanted = with_turns(shared_lab(), current()).model_copy(update={"forced_ids": ()})
    if start(lambda: wanted.variant(shared_lab()), wanted.request) and wanted.mode == "chat":
        change(prompt="", messages=())


def play() -> None:
    """Write what the link tells, token for token."""
    wanted = current()
    if start(lambda: wanted.variant(shared_lab()), wanted.request):
        change(forced_ids=(), messages=(), **({"prompt": ""} if wanted.mode == "chat" else {}))


def branch() -> None:
    """Write on from a clicked alternative of the text on the page."""
    clicked = branched(TEXT)
    found = shared_lab().snapshot(clicked[0]) if clicked else None
    if clicked is None or found is None or clicked[1] >= len(found.tokens):
        return
    run_id, index, id = clicked
    made = settings_of(shared_lab(), found.run)
    trunk = (*(token.id for token in found.tokens[:index]), id)
    start(
        lambda: made.variant(shared_lab()),
        made.model_copy(update={"forced_ids": trunk}).request,
        parent_id=run_id,
    )


def write_on() -> None:
    """Write on with a token that was clicked in the ranking."""
    id, asked = ranking.picked(), ranking.current_look()
    if id is None or asked is None:
        return
    request = ranking.forced(asked, id).model_dump() | current().sampling.model_dump()
    request |= {"seed": current().seed, "max_new_tokens": current().max_new_tokens}
    start(lambda: asked.variant, lambda: Request.model_validate(request))


def look() -> None:
    """Ask for the ranking after what is typed; where nothing is, after the text on the page."""
    lab, chosen = shared_lab(), current()
    shown_run = shown_snapshot(lab)
    answer: tuple[int, ...] = ()
    if chosen.prompt.strip() or shown_run is None:
        wanted = with_turns(lab, chosen)
    else:
        wanted = settings_of(lab, shown_run.run)
        answer = tuple(token.id for token in shown_run.tokens)
    try:
        request = wanted.model_copy(update={"forced_ids": ()}).request()
        ranking.look(lab, chosen.variant(lab), request, answer)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))


def stop() -> None:
    """End the text on the page within a token."""
    if run_id := settings.run_id():
        shared_lab().cancel(run_id)


def new_text() -> None:
    """Clear the page; the text stays in the database."""
    change(messages=(), forced_ids=())
    settings.show_run(None)


def with_turns(lab: Lab, chosen: Settings) -> Settings:
    """Return the settings with the earlier turns of the chat that is on the page."""
    found = shown_snapshot(lab)
    if chosen.mode != "chat" or found is None or not found.run.settings.get("messages"):
        return chosen
    turns = [Message.model_validate(turn) for turn in found.run.settings["messages"]]
    if found.run.text:
        turns.append(Message(role="assistant", content=found.run.text))
    else:
        turns = turns[:-1]  # it failed before its first word: the new prompt replaces the old one
    return chosen.model_copy(update={"messages": tuple(turns)})


def shown_snapshot(lab: Lab) -> Snapshot | None:
    """Return the generation on the page, if there is one."""
    run_id = settings.run_id()
    return lab.snapshot(run_id) if run_id else None


# What the page draws


def header(lab: Lab, found: Snapshot | None) -> None:
    """Draw title, mode, and what can be done with the text."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Playground", width="stretch")
        st.segmented_control(
            "Mode",
            ("chat", "completion"),
            key=bound("mode", current().mode),
            format_func=str.capitalize,
            required=True,
            label_visibility="collapsed",
            on_change=taken_from,
            args=("mode", "mode"),
        )
        st.button(
            "New",
            icon=":material/add:",
            on_click=new_text,
            disabled=found is None,
            help="Begin a new text; this one stays in the database.",
        )
        copy_popover(settings_of(lab, found.run) if found else current())


def conversation(lab: Lab, found: Snapshot | None) -> None:
    """Draw what was said, and the text that is being written."""
    with st.container(border=True, height=400, autoscroll=True):
        earlier: tuple[Message, ...]
        if found is None:
            earlier = current().messages
        else:
            earlier = tuple(map(Message.model_validate, found.run.settings.get("messages", ())))
        for turn in earlier:
            said(turn)
        if found is not None:
            active = not found.run.state.final
            st.fragment(errors.guarded(writing), run_every=tick(found) if active else None)(
                lab, found.run.id, active
            )
        elif not earlier:
            nothing_yet()


def said(turn: Message) -> None:
    """Draw an earlier turn as plain text."""
    if turn.role == "system":
        st.caption("System")
        st.text(turn.content, width="stretch")
        return
    with st.chat_message(turn.role, avatar=AVATARS[turn.role]):
        st.text(turn.content, width="stretch")


def nothing_yet() -> None:
    """Draw what to do on an empty page."""
    with st.container(
        height=340, border=False, horizontal_alignment="center", vertical_alignment="center"
    ):
        st.markdown(":material/edit_note: **Nothing is written yet**", width="content")
        st.caption(
            "Type below or pick an example, then press Generate.  \n"
            "Afterwards hover a word: it shows what else could have come, and a click goes there.",
            width="content",
            text_alignment="center",
        )


def tick(found: Snapshot) -> float:
    """Return the seconds between two drawings: a long text is drawn less often."""
    return TICK_S * (1 + len(found.tokens) // LONG_TOKENS)


def writing(lab: Lab, run_id: str, was_active: bool) -> None:
    """Draw the text of a run; a fragment that runs again until the run has ended."""
    redraw_after_click()
    found = lab.snapshot(run_id)
    if found is None:
        return
    run = found.run
    if was_active and run.state.final:
        st.rerun()
    chat = bool(run.settings.get("messages"))
    with st.chat_message("assistant", avatar=AVATARS["assistant"]) if chat else st.container():
        if found.tokens or run.state is RunState.DONE:
            token_text(
                run.id,
                found.tokens,
                busy=not run.state.final,
                key=TEXT,
                before="" if chat else run.settings.get("prompt", ""),
                on_branch=branch,
            )
        elif run.text:
            st.text(run.text, width="stretch")
        if run.state is RunState.DONE and not run.text:
            st.caption("The model ended the text at once: it wrote nothing.")
        if not found.tokens and not run.state.final:
            waiting(found)


def waiting(found: Snapshot) -> None:
    """Draw what happens before the first token."""
    phase = found.phase[:1].upper() + found.phase[1:]
    if found.place:
        phase += f", place {found.place}"
    if found.progress is None:
        st.caption(f":material/hourglass_empty: {shown.escaped(phase)}…")
    else:
        st.progress(min(1.0, found.progress), text=f"{shown.escaped(phase)}…")


def outcome(lab: Lab, found: Snapshot | None) -> None:
    """Draw the numbers of the text, while it is written and after."""
    active = found is not None and not found.run.state.final
    st.fragment(errors.guarded(costs), run_every=0.4 if active else None)(
        lab, found.run.id if found else None
    )
    if found is None:
        return
    if found.run.state is RunState.CANCELLED:
        st.info("Stopped. What was written until then is kept.", icon=":material/stop_circle:")
    elif found.run.error:
        errors.show(found.run.error)
    if found.problem:
        st.warning(shown.escaped(found.problem), icon=":material/warning:")


def costs(lab: Lab, run_id: str | None) -> None:
    """Draw the numbers so far."""
    found = lab.snapshot(run_id) if run_id else None
    numbers_row(found.run.numbers if found else None)
    if found is None:
        st.caption("Numbers stand here while a text is written, and stay with it.")
        return
    run = found.run
    name, icon, color = STATE_LOOKS[run.state]
    words = f"{run.model} · {run.precision} · {run.device} · seed {run.settings.get('seed')}"
    if run.parent_id:
        words += f" · branched from {run.parent_id}"
    if run.numbers:
        words += f" · {costs_in_words(run.numbers)}"
    st.caption(f":{color}-badge[{icon} {name}] {shown.escaped(words)}")
    if run.result and "decoder" in run.result:
        st.caption(shown.escaped(how_in_words(run.result)))


def prompt_field(found: Snapshot | None) -> None:
    """Draw where to type, what starts and what stops."""
    chat = current().mode == "chat"
    busy = found is not None and not found.run.state.final
    st.text_area(
        "Prompt",
        key=bound("prompt", current().prompt, typed=True),
        height=82,
        placeholder="Say something" if chat else "Begin a text that the model goes on with",
        label_visibility="collapsed",
        on_change=taken_from,
        args=("prompt", "prompt"),
    )
    for problem in settings.said():
        errors.show(problem)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.button(
            "Generate",
            type="primary",
            icon=":material/play_arrow:",
            on_click=generate,
            disabled=busy,
        )
        st.button("Stop", icon=":material/stop:", on_click=stop, disabled=not busy)
        for label, text in EXAMPLES[current().mode].items():
            st.button(
                label,
                type="tertiary",
                key=f"example {label}",
                help=shown.escaped(text),
                on_click=change,
                kwargs={"prompt": text},
            )


def redraw_after_click() -> None:
    """Draw the whole page where a click in a fragment began a text, or could not."""
    if st.session_state.get("problems") or st.session_state.pop("started", False):
        st.rerun()


def controls(lab: Lab) -> None:
    """Draw the samplers and the ranking, which answers to them; a fragment of its own."""
    redraw_after_click()
    with st.container(border=True):
        samplers.temperature()
        samplers.more_samplers()
        samplers.limits()
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.subheader("Next token", width="stretch")
            st.button(
                "Look",
                icon=":material/format_list_numbered:",
                on_click=look,
                help="One forward pass over the prompt, or over the text where none is typed.",
            )
        found = shown_snapshot(lab)
        busy = found is not None and not found.run.state.final
        ranking.table(lab, None if busy else write_on)


lab = shared_lab()
if st.session_state.pop("play", False):
    play()
st.session_state.pop("started", None)
snapshot = shown_snapshot(lab)
header(lab, snapshot)
grid = st.grid(5, min_column_width=150, gap=("small", "medium"))
with grid.cell(column_span=3):
    conversation(lab, snapshot)
    prompt_field(snapshot)
    outcome(lab, snapshot)
with grid.cell(column_span=2):
    st.fragment(errors.guarded(controls))(lab)
