"""Train: make a GPT of one's own from a text, and watch it learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import streamlit as st
from pydantic import BaseModel, ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import Event, Lab, Noted, Order, Snapshot, Stepped, Training, Validated
from gptcore.records import Run, RunKind, RunState
from pages.parts import errors, pass_form, settings, train_charts
from pages.parts import format as shown
from pages.parts.kept import Kept
from pages.parts.services import lab as shared_lab
from pages.parts.settings import bound
from pages.parts.shown_run import PAUSE, Shown
from pages.parts.train_charts import SECONDS, STEPS

TICK_S = 1.0
TRAINING = Shown("train_run", "training", "training", (RunKind.TRAIN,))
CORPUS = "the corpus that ships"
UPLOAD_MB = 4
"""What ``add_text`` takes."""
MOST_LISTED, MOST_BESIDE = 50, 6
FIRST = ("steps", "batch", "learning_rate", "precision", "validate_every", "sample_tokens")
"""Settings that stand in sight; the others are a click away."""
TAUGHT = ("teaching_ratio", "teaching_temperature", "teaching_top", "hidden_ratio")
"""Settings that mean something where there is a teacher."""
SHAPE = ("layers", "width", "heads", "context")
STARTING = Order(
    settings=Training(steps=1000, sample_tokens=80, validate_every=100, validation_windows=50)
)


_kept = Kept(Order, key="train_order", address=None, what="order", start=lambda: STARTING)
current, change = _kept.current, _kept.change


# What a click does


def take_setting(key: str, name: str) -> None:
    """Take a setting of the training from its widget."""
    value = st.session_state[key]
    if value is None:
        return
    known = current().settings.model_dump()
    try:
        change(settings=Training.model_validate({**known, name: value}))
    except ValidationError as error:
        settings.say(errors.sentence(error, Training))


def take_field(key: str, name: str) -> None:
    """Take a field of the order from its widget."""
    if st.session_state[key] is not None:
        change(**{name: st.session_state[key]})


def take_text() -> None:
    """Take the text to learn from."""
    name = st.session_state["train_text"]
    if not name or name == CORPUS:
        change(text="", tokenizer="bpe")
        return
    try:
        change(text=str(shared_lab().text_file(name)))
    except GptcoreError as error:
        settings.say(str(error))


def upload() -> None:
    """Keep an uploaded text, and learn from it."""
    file = st.session_state["train_upload"]
    if file is None:
        return
    lab, name = shared_lab(), file.name.rpartition(".")[0][:60].replace(" ", "-") or "text"
    try:
        change(text=str(lab.text_file(lab.add_text(name, file.getvalue()))))
    except GptcoreError as error:
        settings.say(str(error))


def take_model(field: str) -> None:
    """Take the model to begin with, or the teacher."""
    change(**{field: st.session_state[f"order_{field}"] or ""})


def start() -> None:
    """Train."""
    lab, chosen = shared_lab(), settings.current()
    order = current()
    if not order.text and not lab.has_corpus():
        settings.say("There is nothing to learn from: add a text first.")
        return
    own = not (order.start or order.teacher)  # else the tokenizer is that model's
    if (
        own and not order.text and order.tokenizer == "char"
    ):  # the corpus has an end of text to learn
        order = order.model_copy(update={"tokenizer": "bpe"})
    try:
        run_id = lab.train(
            order,
            st.session_state.get("train_name") or lab.catalogue.free_name("mine"),
            device=chosen.device,
            threads=chosen.threads,
            minutes=st.session_state.get("train_minutes"),
        )
    except GptcoreError as error:
        settings.say(str(error))
        return
    TRAINING.open(run_id)


def go_on(run_id: str) -> None:
    """Go on with a training that was stopped."""
    errors.redraw()
    try:
        fresh = shared_lab().train_on(run_id)
    except GptcoreError as error:
        settings.say(str(error))
        return
    TRAINING.open(fresh)


def use(name: str) -> None:
    """Choose the model in the sidebar, to continue texts."""
    errors.redraw()
    settings.change(model=name, mode="completion", precision="fp32")


# What the page draws


def form(owner: BaseModel, names: Sequence[str], key: str, take: Any) -> None:
    """Draw widgets for some fields of a value."""
    with st.grid("auto", min_column_width=140, gap="small"):
        for name in names:
            field = type(owner).model_fields[name]
            pass_form.widget(name, field, getattr(owner, name), f"{key}_{name}", take)


def order_form(lab: Lab, order: Order) -> None:
    """Draw what to learn from, the shape, and how."""
    names = [*([CORPUS] if lab.has_corpus() else []), *lab.own_texts()]
    chosen = CORPUS if not order.text else order.text.rpartition("/")[2].removesuffix(".txt")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "Learn from",
            names if chosen in names else [None, *names],
            key=bound("train_text", chosen if chosen in names else None),
            on_change=take_text,
            format_func=lambda one: one or "add a text first",
        )
        if not (order.start or order.teacher):
            st.selectbox(
                "Tokenizer",
                ("char", "bpe"),
                key=bound("order_tokenizer", order.tokenizer),
                on_change=take_field,
                args=("order_tokenizer", "tokenizer"),
                help=Order.model_fields["tokenizer"].description,
                width=140,
            )
    st.file_uploader(
        "Add a text (UTF-8, at most 4 MiB)",
        type=["txt", "md"],
        max_upload_size=UPLOAD_MB,
        key="train_upload",
        on_change=upload,
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        model_of(lab, order, "start", "a fresh model")
        model_of(lab, order, "teacher", "no teacher")
    if order.start:
        st.caption(f"Shape and tokenizer are those of {shown.escaped(order.start)}.")
    else:
        form(order, SHAPE, "order", take_field)
    first = (*FIRST, *(TAUGHT if order.teacher else ()))
    form(order.settings, first, "training", take_setting)
    with st.expander("More settings", icon=":material/tune:"):
        rest = [name for name in Training.model_fields if name not in (*first, *TAUGHT)]
        form(order.settings, rest, "training", take_setting)


def model_of(lab: Lab, order: Order, field: str, none: str) -> None:
    """Draw the choice of a model with weights, or of none."""
    names = [one.name for one in lab.models() if one.kind != "random" and one.problem is None]
    chosen = getattr(order, field)
    st.selectbox(
        str(Order.model_fields[field].title),
        ["", *names, *([chosen] if chosen and chosen not in names else [])],
        key=bound(f"order_{field}", chosen),
        on_change=take_model,
        args=(field,),
        format_func=lambda one: one or none,
        help=Order.model_fields[field].description,
    )


def training(lab: Lab) -> None:
    """Draw the training that is shown."""
    last = lab.runs(kind=RunKind.TRAIN, limit=1)
    TRAINING.draw(
        lab,
        _training,
        empty="Nothing was trained yet. A small GPT that writes like the text takes minutes on a "
        "CPU; it goes on when this page is left, and yields to generations.",
        tick_s=TICK_S,
        stop=PAUSE,
        ended=_ended,
        otherwise=last[0].id if last else None,
    )


def _training(lab: Lab, found: Snapshot) -> None:
    run = found.run
    if run.state is RunState.DONE:
        with st.container(border=True, horizontal=True, vertical_alignment="center"):
            st.markdown(
                f":material/check_circle: **{shown.escaped(run.model)}** is in the catalogue.",
                width="stretch",
            )
            st.button("Use it", icon=":material/check:", on_click=use, args=(run.model,))
    events = lab.training_events(run)
    steps = [one for one in events if isinstance(one, Stepped)]
    if not steps:
        return
    numbers(events)
    others = beside(lab, run)
    by = STEPS
    if others:
        by = st.segmented_control(
            "Along", (STEPS, SECONDS), default=STEPS, required=True, label_visibility="collapsed"
        )
    trainings = {label_of(run): events, **{label_of(o): lab.training_events(o) for o in others}}
    st.plotly_chart(
        train_charts.loss(trainings, by=by), key="train_loss", config={"displayModeBar": False}
    )
    if others:
        against(trainings)
    curves = [
        ("learning_rate", "Learning rate"),
        ("gradient_norm", "Gradient norm"),
        ("tokens_per_s", "Tokens/s"),
    ]
    if steps[-1].teaching is not None:
        curves.append(("teaching", "KL to the teacher"))
    for column, (name, title) in zip(st.columns(len(curves)), curves, strict=True):
        column.plotly_chart(
            train_charts.curve(events, name, title),
            key=f"train_{name}",
            config={"displayModeBar": False},
        )
    for note in (one for one in events if isinstance(one, Noted)):
        st.caption(f":material/info: step {note.step:,}: {shown.escaped(note.text)}")
    written = [one for one in events if isinstance(one, Validated) and one.sample]
    if written:
        st.markdown("**What it writes**")
    for one in (written[-1:] + written[:-1][::-1])[:4]:
        st.caption(f"step {one.step:,}, validation loss {one.loss:.3f}")
        st.text(one.sample)


def beside(lab: Lab, run: Run) -> list[Run]:
    """Draw the choice of trainings to hold this one against, and return them."""
    found = {
        one.id: one
        for one in lab.runs(kind=RunKind.TRAIN, limit=MOST_LISTED)
        if one.id != run.id and lab.training_events(one)
    }
    if not found:
        return []
    chosen = st.multiselect(
        "Beside",
        list(found),
        key="train_beside",
        format_func=lambda one: label_of(found[one]) if one in found else one,
        placeholder="Other trainings, on the same chart",
        max_selections=MOST_BESIDE,
        label_visibility="collapsed",
    )
    return [found[one] for one in chosen if one in found]


def label_of(run: Run) -> str:
    """Return what a training is called beside others."""
    asked = run.settings["order"]["settings"]
    return f"{run.model} · {asked['precision']} · seed {asked['seed']} · {run.id[:4]}"


def against(trainings: Mapping[str, Sequence[Event]]) -> None:
    """Draw where trainings came, each against the first."""
    rows: list[dict[str, Any]] = []
    first_loss = first_speed = None
    for name, events in trainings.items():
        held = [one.loss for one in events if isinstance(one, Validated)]
        best = min(held, default=None)
        speed = median(one.tokens_per_s for one in events if isinstance(one, Stepped))
        first_loss, first_speed = first_loss or best, first_speed or speed
        rows.append(
            {
                "Training": name,
                "Validation": best,
                "÷ first": best / first_loss if best and first_loss else None,
                "Tokens/s": speed,
                "× speed": speed / first_speed,
            }
        )
    number = st.column_config.NumberColumn
    st.dataframe(
        rows,
        hide_index=True,
        placeholder=shown.UNKNOWN,
        column_config={
            "Validation": number(format="%.4f"),
            "÷ first": number(format="%.4f"),
            "Tokens/s": number(format="%,.0f"),
            "× speed": number(format="%.2f"),
        },
    )
    st.caption(
        "The best validation loss and the median speed of all steps, each held against the first "
        "row's. Losses are comparable where text, tokenizer and validation windows are the same."
    )


def _ended(run: Run) -> None:
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        st.markdown(
            shown.escaped(run.error or f"The training ended: {run.state}."), width="stretch"
        )
        st.button("Go on", icon=":material/play_arrow:", on_click=go_on, args=(run.id,))


def numbers(events: Sequence[Event]) -> None:
    """Draw where the training stands."""
    last = [one for one in events if isinstance(one, Stepped)][-1]
    held = [one for one in events if isinstance(one, Validated)]
    best = min(held, key=lambda one: one.loss) if held else None
    with st.grid("auto", min_column_width=120, gap="small"):
        st.metric("Step", shown.whole(last.step))
        st.metric("Loss", f"{last.loss:.3f}", help="Mean cross-entropy, nats a token.")
        st.metric("Best validation", f"{best.loss:.3f}" if best else shown.UNKNOWN)
        st.metric(
            "Bits per byte",
            f"{best.bits_per_byte:.3f}" if best else shown.UNKNOWN,
            help="Of the validation text: loss ÷ ln 2 × tokens ÷ bytes.",
        )
        st.metric("Tokens/s", shown.number(last.tokens_per_s))
        st.metric(
            "MFU",
            shown.share(last.mfu_ratio),
            help="Operations a second ÷ the peak measured on this machine.",
        )
        st.metric("Peak memory", shown.size(last.memory_bytes))
        if held:
            label = held[-1].energy_label.partition(":")[0]
            value = held[-1].energy_j
            st.metric(
                f"Energy, {label}",
                shown.UNKNOWN if value is None else f"{value:,.0f} J",
                help=held[-1].energy_label,
            )


lab = shared_lab()
order = current()
st.title("Train")
st.caption("Make a GPT of your own from a text, and watch it learn to write.")
for problem in settings.said():
    errors.show(problem)
left, right = st.columns([5, 6])
with left:
    order_form(lab, order)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Name", key="train_name", placeholder=lab.catalogue.free_name("mine"), max_chars=100
        )
        st.number_input(
            "Minutes at most", min_value=0.1, value=None, key="train_minutes", width=160
        )
    st.button(
        "Train",
        icon=":material/model_training:",
        type="primary",
        on_click=start,
        disabled=TRAINING.running(lab),
    )
with right:
    training(lab)
