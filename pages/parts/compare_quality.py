"""Quality of the sides of a comparison: perplexity, tasks, texts held against references."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import Lab, Snapshot
from gptcore.records import RunKind, RunState
from pages.parts import errors, settings
from pages.parts import format as shown
from pages.parts.compare_charts import BAD, GOOD, figure
from pages.parts.compare_state import LETTERS, Wanted, change, current
from pages.parts.plan_charts import GREY, colors, ink
from pages.parts.services import lab as shared_lab
from pages.parts.settings import ID_CHARS, bound
from pages.parts.shown_run import progress, tell_end

if TYPE_CHECKING:
    import plotly.graph_objects as go

KEY = "compare_quality"
ADDRESS = "quality"
"""The name in the address of the runs that are shown."""
TICK_S = 0.5
KINDS = (RunKind.EVALUATE, RunKind.TASKS, RunKind.TEXTS)
ABOUT = {
    "Perplexity": "How well each side foretells a text, token by token, and how far its "
    "expectations are from A's. The same tokens for all, so that small differences show.",
    "Tasks": "Multiple-choice items: right where the right choice is the likeliest of all.",
    "Texts": "What each side writes after your prompts, held against your references: BLEU, chrF, "
    "ROUGE and METEOR.",
}
EXAMPLES = {
    "items": '{"context": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}',
    "pairs": '{"prompt": "Translate to French: good morning", "reference": "bonjour"}',
}
FACTOR = 1.96
"""Standard errors on each side of a 95 % interval."""


# What a click does


def take(name: str) -> None:
    """Take a value from its widget."""
    value = st.session_state[f"quality_{name}"]
    if value is not None:
        change(**{name: tuple(value) if isinstance(value, list) else value})


def take_file(name: str, keep: Callable[[str, bytes], str]) -> None:
    """Keep an uploaded file under its own name, and choose it."""
    file = st.session_state[f"quality_{name}_file"]
    if file is None:
        return
    plain = "".join(c if c.isalnum() else "-" for c in file.name.rpartition(".")[0])[:60]
    try:
        change(**{name: keep(plain.strip("-") or "mine", file.getvalue())})
    except GptcoreError as error:
        settings.say(errors.sentence(error))


def measure() -> None:
    """Queue what was chosen: all sides together, or A alone."""
    lab = shared_lab()
    try:
        run_id = lab.start(current().quality_work(lab))
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
        return
    st.session_state[KEY] = (run_id,)


# What the page draws


def quality(lab: Lab, wanted: Wanted) -> None:
    """Draw what is measured, and what was found."""
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.segmented_control(
                "Measure of quality",
                list(ABOUT),
                key=bound("quality_quality", wanted.quality),
                required=True,
                label_visibility="collapsed",
                on_change=take,
                args=("quality",),
            )
            st.caption(ABOUT[wanted.quality])
        forms = {"Perplexity": perplexity_form, "Tasks": tasks_form, "Texts": texts_form}
        forms[wanted.quality](lab, wanted)
        runs = shown_runs()
        found = [one for run_id in runs if (one := lab.snapshot(run_id))]
        busy = any(not one.run.state.final for one in found)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.button(
                "Measure quality",
                icon=":material/fact_check:",
                type="primary",
                on_click=measure,
                disabled=busy or (wanted.quality == "Texts" and not wanted.pairs),
            )
            st.toggle(
                "A alone",
                key=bound("quality_alone", wanted.alone),
                on_change=take,
                args=("alone",),
                help="Without it all sides are measured together, each once.",
            )
    if not runs:
        st.caption(":material/info: Nothing is measured yet. Press Measure quality.")
        return
    if len(found) < len(runs):
        st.warning(
            "A measurement of this link is not in this database; it was deleted, or belongs to "
            "another one.",
            icon=":material/search_off:",
        )
    if st.query_params.get(ADDRESS) != ",".join(runs):
        st.query_params[ADDRESS] = ",".join(runs)
    if found:
        st.fragment(errors.guarded(outcome), run_every=TICK_S if busy else None)(lab, runs, busy)


def shown_runs() -> tuple[str, ...]:
    """Return the runs of this session, or those of the link."""
    linked = st.query_params.get(ADDRESS) or ""
    if KEY not in st.session_state or (linked and settings.entered()):
        given = linked.split(",")[: len(LETTERS) - 1]
        lab = shared_lab()
        st.session_state[KEY] = tuple(
            one[:ID_CHARS]
            for one in given
            if one and ((found := lab.snapshot(one[:ID_CHARS])) is None or found.run.kind in KINDS)
        )
    kept: tuple[str, ...] = st.session_state[KEY]
    return kept


def number(name: str, label: str, wanted: Wanted) -> None:
    """Draw a whole number with the range and help of its field."""
    field = Wanted.model_fields[name]
    limits = {
        key: getattr(rule, key)
        for rule in field.metadata
        for key in ("ge", "le")
        if hasattr(rule, key)
    }
    st.number_input(
        label,
        min_value=limits["ge"],
        max_value=limits["le"],
        key=bound(f"quality_{name}", getattr(wanted, name), typed=True),
        on_change=take,
        args=(name,),
        help=field.description,
        width=150,
    )


def picked(name: str, label: str, names: Sequence[str], value: str, first: str = "") -> None:
    """Draw the choice of a text or set by name."""
    known = names if value in names or not value else [value, *names]
    st.selectbox(
        label,
        known,
        index=0 if value else None,
        key=bound(f"quality_{name}", value or None),
        format_func=lambda one: first if first and one == names[0] else one,
        placeholder="Add one",
        on_change=take,
        args=(name,),
        width=240,
    )


def upload(name: str, label: str, ending: str, keep: Callable[[str, bytes], str]) -> None:
    """Draw what brings a file of one's own."""
    with st.popover("Of my own", icon=":material/upload_file:"):
        st.file_uploader(
            label, type=[ending], key=f"quality_{name}_file", on_change=take_file, args=(name, keep)
        )
        if name in EXAMPLES:
            st.code(EXAMPLES[name], language="json")


def perplexity_form(lab: Lab, wanted: Wanted) -> None:
    """Draw text and windows."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        picked("text", "Text", lab.texts(), wanted.text, "The text that ships")
        number("max_tokens", "Tokens", wanted)
        number("window", "Window", wanted)
        number("stride", "Stride", wanted)
        upload("text", "A UTF-8 text to evaluate on", "txt", lab.add_text)


def tasks_form(lab: Lab, wanted: Wanted) -> None:
    """Draw items, kinds and examples."""
    sets = lab.item_sets()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        picked("items", "Items", sets, wanted.items, "The items that ship")
        kinds = lab.item_kinds(wanted.items) if wanted.items in sets else ()
        st.multiselect(
            "Kinds",
            sorted({*kinds, *wanted.kinds}),
            key=bound("quality_kinds", list(wanted.kinds)),
            on_change=take,
            args=("kinds",),
            placeholder="Every kind",
            width=260,
        )
        number("examples", "Examples (few-shot)", wanted)
        upload("items", "JSONL, one item a line", "jsonl", lab.add_items)


def texts_form(lab: Lab, wanted: Wanted) -> None:
    """Draw pairs and how the answers are written."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        picked("pairs", "Prompts and references", lab.pair_sets(), wanted.pairs)
        number("answer_tokens", "New tokens", wanted)
        st.toggle(
            "As a chat", key=bound("quality_chat", wanted.chat), on_change=take, args=("chat",)
        )
        upload("pairs", "JSONL, one pair a line", "jsonl", lab.add_pairs)


def outcome(lab: Lab, runs: Sequence[str], was_active: bool) -> None:
    """Draw how far the runs are and what they found."""
    found = [one for run_id in runs if (one := lab.snapshot(run_id))]
    if was_active and all(one.run.state.final for one in found):
        st.rerun()
    for one in found:
        if not one.run.state.final:
            progress(lab, one)
        elif one.run.state is not RunState.DONE:
            tell_end(one.run)
    with_results = [one for one in found if one.run.result]
    if not with_results:
        return
    kind = with_results[0].run.kind
    views = {RunKind.EVALUATE: perplexities, RunKind.TASKS: accuracies, RunKind.TEXTS: scores}
    views[kind]([one for one in with_results if one.run.kind is kind])
    st.caption(
        "The address of this page leads back to these results: "
        + ", ".join(shown.escaped(one.run.id) for one in with_results)
    )


def sides_of(found: Sequence[Snapshot]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Return (letter, what a side found, what holds it against A) for A and the others."""
    results = [one.run.result for one in found if one.run.result]
    against = [
        part
        for result in results
        for part in (result, *result.get("further", ()))
        if part.get("against")
    ]
    others = zip(LETTERS[1:], against, strict=False)
    return [("A", results[0], results[0]), *((at, one["against"], one) for at, one in others)]


def named(letter: str, one: Mapping[str, Any]) -> str:
    """Return how a side is called in tables and charts."""
    recipe = one["recipe"] if one["recipe"] not in ("baseline", one["precision"]) else ""
    return f"{letter} · {one['model']} {one['precision']}{f' {recipe}' if recipe else ''}"


def perplexities(found: Sequence[Snapshot]) -> None:
    """Draw perplexity with its interval, and each side against A."""
    sides = sides_of(found)
    base = sides[0][1]
    rows = []
    for letter, one, whole in sides:
        error = one["nll_se"]
        low, high = (
            (one["perplexity"] * math.exp(sign * FACTOR * error) for sign in (-1, 1))
            if error is not None
            else (None, None)
        )
        row = {
            "Side": named(letter, one),
            "Perplexity": f"{one['perplexity']:.4f}",
            "95 % interval": "—" if low is None else f"{low:.3f} to {high:.3f}",
            "Bits per byte": f"{one['bits_per_byte']:.4f}" if one["bits_per_byte"] else "—",
        }
        if letter != "A":
            mean, spread = whole["log_ppl_ratio_mean"], whole["log_ppl_ratio_se"] or 0.0
            row |= {
                "Against A": f"× {math.exp(mean):.4f}",
                "95 % of it": f"{math.exp(mean - FACTOR * spread):.4f} to "
                f"{math.exp(mean + FACTOR * spread):.4f}",
                "KL mean": f"{whole['kl_mean']:.3g}",
                "KL 99 %": f"{whole['kl_p99']:.3g}",
                "Same likeliest": f"{whole['same_top_ratio']:.2%}",
                "Δp RMS": f"{whole['delta_p_rms']:.3%}",
                "Greedy agreement": f"{whole['greedy']['agreement_ratio']:.0%}"
                if whole["greedy"]
                else "—",
            }
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    st.dataframe(
        {name: [row.get(name) for row in rows] for name in columns},
        hide_index=True,
        placeholder="",
    )
    if len(sides) > 1:
        st.plotly_chart(ratios(sides[1:]), key="quality_ratios", config={"displayModeBar": False})
    identity = base["identity"]
    st.caption(
        f"{shown.whole(base['scored_tokens'])} tokens of {shown.escaped(base['text'])} "
        f"({identity['text'][:19]}…), windows of {identity['window']}, stride "
        f"{identity['stride']}. Perplexity = exp(Σ nats / scored tokens); intervals from blocks of "
        "windows; against A paired on the same tokens. KL in nats, from A to the other."
    )


def ratios(sides: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> go.Figure:
    """Return each side's perplexity over A's, with its interval."""
    made = figure(
        70 + 40 * len(sides),
        xaxis={"title": "Perplexity, ratio to A"},
        yaxis={"autorange": "reversed", "type": "category"},
    )
    made.add_vline(x=1, line={"color": ink(), "width": 1, "dash": "dot"})
    for letter, one, whole in sides:
        mean, spread = whole["log_ppl_ratio_mean"], FACTOR * (whole["log_ppl_ratio_se"] or 0.0)
        low, middle, high = (math.exp(mean + add) for add in (-spread, 0.0, spread))
        color = GREY if low <= 1 <= high else (GOOD if middle < 1 else BAD)
        made.add_scatter(
            x=[middle],
            y=[named(letter, one)],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - middle],
                "arrayminus": [middle - low],
                "thickness": 2.5,
                "width": 5,
            },
            mode="markers",
            marker={"color": color, "size": 10},
            hovertemplate=f"× {middle:.4f} ({low:.4f} to {high:.4f})<extra>{named(letter, one)}"
            "</extra>",
        )
    return made


def accuracies(found: Sequence[Snapshot]) -> None:
    """Draw accuracy by kind with intervals, and what flipped against A."""
    sides = sides_of(found)
    st.plotly_chart(by_kind(sides), key="quality_kinds_chart", config={"displayModeBar": False})
    rows: dict[str, list[str]] = {"Kind": [], "Chance": []}
    for number, (letter, one, _) in enumerate(sides):
        for kind in (one["overall"], *one["kinds"]):
            if number == 0:
                rows["Kind"].append(f"{kind['kind']} ({kind['accuracy']['n']})")
                rows["Chance"].append(f"{kind['chance_ratio']:.0%}")
            rows.setdefault(named(letter, one), []).append(_accuracy(kind["accuracy"]))
            rows.setdefault(f"{letter}, by byte", []).append(_accuracy(kind["accuracy_normalised"]))
    st.dataframe(rows, hide_index=True)
    for letter, _, whole in sides[1:]:
        flips = whole["flips"]
        st.caption(
            f"**{letter} against A**: {shown.escaped(flips['verdict'])}, "
            f"{flips['difference']:+.1%}; only A right {flips['only_a']}, only {letter} right "
            f"{flips['only_b']}, of {flips['n']} (McNemar, exact p = {flips['p']:.3f})."
        )
    base = sides[0][1]
    st.caption(
        f"{shown.escaped(base['items'])} ({base['items_hash'][:19]}…), {base['examples']} examples "
        f"before each item. {shown.escaped(base['scoring'])}."
    )


def by_kind(sides: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> go.Figure:
    """Return accuracy by kind and side, with Wilson intervals and what guessing gives."""
    made = figure(340, yaxis={"title": "Right, %", "range": [0, 102]})
    made.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.12})
    count = len(sides)
    for at, ((letter, one, _), color) in enumerate(zip(sides, colors(), strict=False)):
        kinds = [one["overall"], *one["kinds"]]
        found = [kind["accuracy"] for kind in kinds]
        made.add_scatter(
            x=[place + 0.16 * (at - (count - 1) / 2) for place in range(len(kinds))],
            y=[100 * kind["ratio"] for kind in found],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [100 * (kind["high"] - kind["ratio"]) for kind in found],
                "arrayminus": [100 * (kind["ratio"] - kind["low"]) for kind in found],
                "thickness": 2,
                "width": 4,
            },
            mode="markers",
            name=named(letter, one),
            marker={"color": color, "size": 10},
            hovertemplate="%{y:.1f} %<extra>%{fullData.name}</extra>",
        )
        if at == 0:
            made.add_scatter(
                x=list(range(len(kinds))),
                y=[100 * kind["chance_ratio"] for kind in kinds],
                mode="markers",
                name="guessing",
                marker={"symbol": "line-ew-open", "size": 46, "color": GREY},
                hovertemplate="%{y:.1f} %<extra>guessing</extra>",
            )
            made.update_xaxes(
                tickvals=list(range(len(kinds))), ticktext=[kind["kind"] for kind in kinds]
            )
    return made


def scores(found: Sequence[Snapshot]) -> None:
    """Draw text scores with intervals, verdicts against A, and the texts."""
    sides = sides_of(found)
    rows: dict[str, list[str]] = {}
    for number, (letter, one, whole) in enumerate(sides):
        verdicts = {each["name"]: each for each in whole.get("differences", ())}
        for score in one["scores"]:
            if number == 0:
                rows.setdefault("Score", []).append(score["title"])
            value = f"{score['value']:.3g} of {score['scale']}"
            if score["low"] is not None:
                value += f" ({score['low']:.3g} to {score['high']:.3g})"
            rows.setdefault(named(letter, one), []).append(value)
            if number:
                each = verdicts[score["name"]]
                rows.setdefault(f"{letter} against A", []).append(
                    f"{each['difference']:+.3g}: {each['verdict']}"
                )
    st.dataframe(rows, hide_index=True)
    base = sides[0][1]
    for note in base["notes"]:
        st.caption(f":material/info: {shown.escaped(note)}")
    st.caption(
        f"{base['n']} pairs of {shown.escaped(base['pairs'])}; 95 % intervals from "
        f"{shown.whole(base['resamples'])} bootstrap draws of pairs; {base['cut_off']} of A's "
        "texts were cut off at the limit."
    )
    with st.expander("How each was computed", icon=":material/science:"):
        for score in base["scores"]:
            st.text(f"{score['title']}: {score['signature']}")
    written = dict(zip(LETTERS[1:], others_texts(found), strict=False))
    with st.expander("The texts", icon=":material/notes:"):
        for at, text in enumerate(base["texts"]):
            st.caption(f"Prompt {at + 1}")
            st.text(text["prompt"])
            for reference in text["references"]:
                st.text(f"Reference: {reference}")
            st.text(f"A: {text['outputs'][0]}")
            for letter, texts in written.items():
                st.text(f"{letter}: {texts[at]}")


def others_texts(found: Sequence[Snapshot]) -> list[list[str]]:
    """Return the texts of each side but A, in the order of the sides."""
    results = [one.run.result for one in found if one.run.result]
    return [
        [text["outputs"][number] for text in result["texts"]]
        for result in results
        for number in range(1, len(result["texts"][0]["outputs"]))
    ]


def _accuracy(one: Mapping[str, Any]) -> str:
    return f"{one['ratio']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
