"""Compare: the same prompt and work on two to four variants, and how sure the answer is."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st
from pydantic import ValidationError

from gptcore.errors import GptcoreError
from gptcore.lab import Compare, Lab, Snapshot, first_divergent, pairs_for
from gptcore.records import Choice, Run, RunKind, RunState, Vote
from pages.parts import (
    compare_apart,
    compare_charts,
    compare_sides,
    errors,
    pass_form,
    settings,
)
from pages.parts import format as shown
from pages.parts.compare_quality import ADDRESS, named, quality
from pages.parts.compare_state import (
    BATCHES,
    CONTEXTS,
    LETTERS,
    MEASURED,
    VIEWS,
    Wanted,
    change,
    current,
    is_linked,
    write_address,
)
from pages.parts.services import lab as shared_lab
from pages.parts.settings import bound
from pages.parts.shown_run import phase
from pages.parts.tokens import token_text

TICK_S = 0.25
HELP = {
    "prompt_tokens": "Several make a grid with the batches. Any length can be typed.",
    "batches": "Verdicts flip with the batch: one sequence is bound by reading the weights, many "
    "by arithmetic.",
}
MAX_TTFT_RUNS = 50
WORDS = {
    "faster": ":material/trending_up: Faster",
    "slower": ":material/trending_down: Slower",
    "less": ":material/trending_down: Less",
    "more": ":material/trending_up: More",
    "no detectable difference": ":material/drag_handle: No detectable difference",
    "incomplete": ":material/hourglass_empty: Incomplete",
}


# What a click does


def take(name: str) -> None:
    """Take a value from its widget."""
    value = st.session_state[f"compare_{name}"]
    if value is not None:
        change(**{name: tuple(value) if isinstance(value, list) else value})


def take_end(name: str) -> None:
    """Take what may end a comparison early; an empty field never does."""
    change(**{name: st.session_state[f"compare_{name}"]})


def take_threads() -> None:
    """Take the yes to different threads."""
    change(may_differ=("threads",) if st.session_state["compare_may_differ"] else ())


def take_metric() -> None:
    """Take what the map shows."""
    errors.redraw()
    take("metric")


def take_differences() -> None:
    """Take whether the texts are laid over A's."""
    errors.redraw()
    take("differences")


def write() -> None:
    """Let every side write on the prompt."""
    lab, wanted = shared_lab(), current()
    entries = {one.name: one for one in lab.models()}
    runs: list[str] = []
    try:
        if not wanted.prompt.strip():
            settings.say("The prompt is empty: type some text.")
            return
        names: dict[str, str] = st.session_state.setdefault("compare_names", {})
        for side, variant in zip(wanted.sides, wanted.variants(lab), strict=True):
            entry = entries.get(side.model)
            request = wanted.request(side, chat=bool(entry and entry.chat))
            runs.append(lab.generate(variant, request, session=settings.session_id()))
            names[runs[-1]] = side.name(variant)
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
    if runs:
        st.session_state["compare_texts"] = tuple(runs)


def measure(noise: bool) -> None:
    """Measure the sides in turn, or with ``noise`` the first with itself."""
    lab = shared_lab()
    try:
        run_id = lab.compare(current().work(lab, noise=noise))
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
        return
    MEASURED.open(run_id)


def vote(left: Snapshot, right: Snapshot, choice: Choice) -> None:
    """Keep a choice, and say afterwards who was who."""
    prompt = json.dumps(left.run.settings.get("messages") or left.run.settings.get("prompt"))
    try:
        shared_lab().vote(
            Vote(
                left=name_of(left.run),
                right=name_of(right.run),
                choice=choice,
                left_tokens=len(left.tokens),
                right_tokens=len(right.tokens),
                prompt_hash=hashlib.sha256(prompt.encode()).hexdigest()[:16],
            )
        )
    except (GptcoreError, ValidationError) as error:
        settings.say(errors.sentence(error))
        return
    st.session_state["voted"] = (left.run.id, right.run.id)


def name_of(run: Run) -> str:
    """Return how what wrote a text is called, in its caption and among the votes."""
    names: dict[str, str] = st.session_state.get("compare_names", {})
    return names.get(run.id) or f"{run.model} {run.precision} {run.device}"


# What the page draws


def speed(lab: Lab, wanted: Wanted) -> None:
    """Draw what is measured, and the comparison that was."""
    with st.container(border=True):
        grid = st.grid(4, min_column_width=150, gap="small")
        for name, offered in (("prompt_tokens", CONTEXTS), ("batches", BATCHES)):
            field = Wanted.model_fields[name]
            chosen = getattr(wanted, name)
            grid.cell().multiselect(
                str(field.title),
                sorted({*offered, *chosen}),
                key=bound(f"compare_{name}", list(chosen)),
                accept_new_options=True,
                on_change=take,
                args=(name,),
                help=HELP[name],
            )
        for name, label in (("new_tokens", "New tokens"), ("max_pairs", "Pairs of blocks")):
            field = Wanted.model_fields[name]
            low, high = pass_form.limits(field)
            grid.cell().number_input(
                label,
                min_value=None if low is None else int(low),
                max_value=None if high is None else int(high),
                key=bound(f"compare_{name}", getattr(wanted, name), typed=True),
                on_change=take,
                args=(name,),
                help=field.description,
            )
        threads_question(lab, wanted)
        with st.container(horizontal=True, vertical_alignment="center"):
            busy = MEASURED.running(lab)
            st.button(
                "Measure",
                icon=":material/speed:",
                type="primary",
                on_click=measure,
                args=(False,),
                disabled=busy,
                help="Interleaved blocks, A B B A, until every pair is measured.",
            )
            st.button(
                "Measure the noise",
                icon=":material/graphic_eq:",
                on_click=measure,
                args=(True,),
                disabled=busy,
                help="A against itself: what this machine makes of no difference at all.",
            )
            stop_rule(wanted)
            noise_badge(lab)
        cells = len(wanted.cells)
        numbers = len(compare_charts.METRICS) * cells * (len(wanted.sides) - 1)
        if wanted.max_pairs < (least := pairs_for(numbers)):
            st.caption(
                f":material/warning: {numbers} numbers are compared, so {wanted.max_pairs} pairs "
                f"of blocks cannot give a verdict (Holm's correction): take at least {least}."
            )
        elif cells > 1 and wanted.half_width is None and wanted.seconds is None:
            block_s = Compare.model_fields["block_s"].default
            seconds = cells * wanted.max_pairs * len(wanted.sides) * block_s
            st.caption(
                f"{cells} cells of {wanted.max_pairs} blocks a side: "
                f"{shown.duration(seconds)} at least."
            )
    MEASURED.draw(
        lab,
        comparison,
        empty="Nothing is measured yet. Press Measure: blocks of both sides are timed in turn, and "
        "a verdict is given only where it can be defended.",
    )


def stop_rule(wanted: Wanted) -> None:
    """Draw what may end a comparison before its last pair, fixed before its first."""
    ends = []
    if wanted.half_width is not None:
        ends.append(f"±{shown.share(wanted.half_width)}")
    if wanted.seconds is not None:
        ends.append(shown.duration(wanted.seconds))
    with st.popover(
        f"Ends at {' or '.join(ends)}" if ends else "Stop rule",
        icon=":material/timer:",
        help="Fixed before the first block: an end chosen while looking at the numbers would make "
        "differences out of noise.",
    ):
        for name, unit, least, step in (
            ("half_width", "share", 0.001, 0.01),
            ("seconds", "s", 1.0, 10.0),
        ):
            field = Wanted.model_fields[name]
            st.number_input(
                f"{field.title}, {unit}",
                min_value=least,
                max_value=pass_form.limits(field)[1],
                value=None,
                step=step,
                format="%.3g",
                key=bound(f"compare_{name}", getattr(wanted, name), typed=True),
                on_change=take_end,
                args=(name,),
                help=field.description,
                placeholder="never",
            )


def threads_question(lab: Lab, wanted: Wanted) -> None:
    """Ask for the yes that a comparison of sides with different threads needs."""
    try:
        threads = [one.placement.resolved_threads for one in wanted.variants(lab)]
    except GptcoreError:  # which is said where the side is chosen
        return
    if len(set(threads)) > 1 or wanted.may_differ:
        told = ", ".join(f"{letter} {n}" for letter, n in zip(LETTERS, threads, strict=False))
        st.toggle(
            f"The sides may differ in threads: {told}",
            key=bound("compare_may_differ", "threads" in wanted.may_differ),
            on_change=take_threads,
        )


def noise_badge(lab: Lab) -> None:
    """Draw this machine's noise floor with its date."""
    floor = lab.noise_floor(settings.current().device)
    if floor is None:
        st.badge("Noise not measured", icon=":material/help:", color="gray")
        return
    st.badge(
        f"Noise ±{shown.share(floor['ratio'] - 1)} · {floor['at'][:10]}",
        icon=":material/graphic_eq:",
        color="blue",
        help="From the last comparison of a variant with itself on this machine. Nothing smaller "
        "is coloured.",
    )


def comparison(lab: Lab, found: Snapshot) -> None:
    """Draw what a comparison has found so far, and its verdict."""
    run = found.run
    result = run.result
    if not result or not result["comparisons"]:
        if run.state.final and result:
            for side in result["sides"]:
                if side["problem"]:
                    errors.show(f"{side['side']}: {side['problem']}")
        return
    if result.get("baseline"):
        found_slower = (
            "Slower than the baseline" if result["regressed"] else "No slowdown was found"
        )
        st.caption(
            f":material/flag: A is the baseline, run {shown.escaped(result['baseline'])}. "
            + (f"{found_slower}. " if run.state.final else "")
            + shown.escaped(result["programs"])
        )
    if result["residency"].startswith("alternated"):
        st.caption(f":material/swap_horiz: {shown.escaped(result['residency'].capitalize())}.")
    verdicts(result, final=run.state.final)
    comparisons = result["comparisons"]
    if len(result["cells"]) > 1:
        metric = grid_map(result)
        comparisons = [one for one in comparisons if one["metric"] == metric]
    details(result, comparisons)
    if run.state.final:
        conditions(lab, run, result)


def verdicts(result: Mapping[str, Any], *, final: bool) -> None:
    """Draw a card a side: what may be said of it in the first cell."""
    first = result["comparisons"][0]["cell"]
    letters = [one["side"] for one in result["sides"][1:]]
    grid = st.grid(len(letters), min_column_width=330, gap="small")
    for letter in letters:
        told = [
            one for one in result["comparisons"] if one["side"] == letter and one["cell"] == first
        ]
        lead = next((one for one in told if one["metric"] == "decode_s"), told[0])
        side = next(one for one in result["sides"] if one["side"] == letter)
        with grid.container(border=True, height="stretch"):
            st.caption(
                f"{shown.escaped(named(letter, side))} against A, {compare_charts.cell_name(first)}"
            )
            color = ""
            if lead["coloured"]:
                color = "green" if lead["verdict"] in ("faster", "less") else "red"
            word = WORDS[lead["verdict"]] if final else ":material/hourglass_top: Measuring"
            st.subheader(f":{color}[{word}]" if color else word)
            cells = st.columns(len(told))
            for cell, one in zip(cells, told, strict=True):
                ratio = "—" if one["ratio"] is None else f"{_times(one)}"
                cell.metric(
                    compare_charts.metric_name(one["metric"], result["energy_label"]),
                    ratio,
                    help=shown.escaped(one["sentence"]),
                )
                if one["low"] is not None:
                    cell.caption(f"{one['low']:.3f} to {one['high']:.3f}")
            if final:
                st.caption(shown.escaped(lead["sentence"]))


def grid_map(result: Mapping[str, Any]) -> str:
    """Draw where each side wins and where it loses, over batch and prompt length.

    Returns:
        The number that it shows.
    """
    metrics = list(dict.fromkeys(one["metric"] for one in result["comparisons"]))
    wanted = current().metric
    shown_metric = wanted if wanted in metrics else metrics[0]
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown("**Where each side wins**", width="stretch")
            st.segmented_control(
                "Number",
                metrics,
                key=bound("compare_metric", shown_metric),
                format_func=lambda name: compare_charts.metric_name(name, result["energy_label"]),
                required=True,
                label_visibility="collapsed",
                on_change=take_metric,
            )
        letters = [one["side"] for one in result["sides"][1:]]
        grid = st.grid(len(letters), min_column_width=320, gap="small")
        for letter in letters:
            told = [
                one
                for one in result["comparisons"]
                if one["side"] == letter and one["metric"] == shown_metric
            ]
            with grid.container():
                st.caption(f"{letter} ÷ A")
                st.plotly_chart(
                    compare_charts.grid(told),
                    key=f"compare_map_{letter}",
                    config={"displayModeBar": False},
                )
        floor = result["noise_floor_used"]
        noise = f" and beyond the noise of ±{shown.share(floor - 1)}" if floor else ""
        st.caption(
            f"Below 1 the side needs less than A. Coloured where that is claimed{noise}; Holm's "
            "correction over all cells."
        )
    return shown_metric


def _times(one: Mapping[str, Any]) -> str:
    return f"{one['ratio']:.3f} ×"


def details(result: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Draw ratios with their intervals, and the blocks behind all that was measured."""
    if any(one["ratio"] is not None for one in comparisons):
        st.plotly_chart(
            compare_charts.intervals(
                comparisons, result["noise_floor_used"], result["energy_label"]
            ),
            key="compare_intervals",
            config={"displayModeBar": False},
        )
    with st.expander("Every block, in the order of measuring", icon=":material/timeline:"):
        for cell in result["cells"]:
            for metric in cell["blocks"]:
                st.caption(
                    f"{compare_charts.metric_name(metric, result['energy_label'])}, "
                    f"{compare_charts.cell_name(cell)}: "
                    f"{shown.escaped(cell['ended'] or 'not ended yet')}"
                )
                st.plotly_chart(
                    compare_charts.blocks(cell, metric),
                    key=f"blocks_{compare_charts.cell_name(cell)}_{metric}",
                    config={"displayModeBar": False},
                )


def conditions(lab: Lab, run: Run, result: Mapping[str, Any]) -> None:
    """Draw how it was measured, bytes, and what can be taken away."""
    with st.expander("How this was measured", icon=":material/science:"):
        st.text(result["method"])
        st.text(result["residency"])
        st.text(f"Energy: {result['energy_label']}")
        rows = [
            {
                "side": one["side"],
                "model": one["model"],
                "precision": one["precision"],
                "recipe": one["recipe"],
                "threads": one["threads"],
                "memory": shown.size(one.get("resident_bytes")),
                "a step reads": shown.size(one.get("step_bytes")),
                "loaded in": shown.duration(one.get("load_s")),
                "problem": one["problem"] or "",
            }
            for one in result["sides"]
        ]
        st.dataframe(rows, hide_index=True)
    with st.container(horizontal=True):
        st.download_button(
            "Take it away as HTML",
            lambda: lab.comparison_page(run),
            f"comparison-{run.id}.html",
            "text/html",
            icon=":material/download:",
            help="One file that opens without a network.",
        )
        st.button("Close", on_click=MEASURED.close, help="It stays in the database under its link.")
        st.caption(
            "The address of this page leads back to this result, which will not change.",
            width="content",
        )


def prompt_card(wanted: Wanted) -> None:
    """Draw the prompt, and what lets all sides write on it."""
    with st.container(border=True):
        st.text_area(
            "Prompt",
            key=bound("compare_prompt", wanted.prompt, typed=True),
            on_change=take,
            args=("prompt",),
            height=90,
        )
        row = st.columns([1, 1, 2], vertical_alignment="bottom")
        row[0].number_input(
            "New tokens",
            min_value=1,
            max_value=4096,
            key=bound("compare_max_new_tokens", wanted.max_new_tokens, typed=True),
            on_change=take,
            args=("max_new_tokens",),
        )
        row[1].number_input(
            "Seed",
            min_value=0,
            key=bound("compare_seed", wanted.seed, typed=True),
            on_change=take,
            args=("seed",),
            help="The same for every side.",
        )
        row[2].button(
            "Write on all sides", icon=":material/edit_note:", type="primary", on_click=write
        )


def texts(lab: Lab, wanted: Wanted) -> None:
    """Draw the prompt and what each side writes on it."""
    prompt_card(wanted)
    runs: tuple[str, ...] = st.session_state.get("compare_texts", ())
    found = [snapshot for run_id in runs if (snapshot := lab.snapshot(run_id))]
    if not found:
        st.caption(":material/info: Nothing is written yet.")
        return
    active = any(not one.run.state.final for one in found) or compare_apart.reading(lab, runs)
    st.fragment(errors.guarded(written), run_every=TICK_S if active else None)(lab, runs, active)


def written(lab: Lab, runs: Sequence[str], was_active: bool) -> None:
    """Draw text beside text, with the first token in which each leaves A's."""
    found = [snapshot for run_id in runs if (snapshot := lab.snapshot(run_id))]
    busy = any(not one.run.state.final for one in found)
    if was_active and not busy and not compare_apart.reading(lab, runs):
        st.rerun()
    for one in found:
        lab.watch(one.run.id, settings.session_id())
    base = found[0]
    laid_over = current().differences and not busy
    with st.container(horizontal=True, vertical_alignment="center"):
        st.toggle(
            "Differences from A",
            key=bound("compare_differences", current().differences),
            on_change=take_differences,
            disabled=busy,
            help="Lays each text over A's: words of A alone are struck out, words of the other "
            "alone underlined.",
        )
        compare_apart.controls(lab, runs, found)
    grid = st.grid(len(found), min_column_width=230, gap="small")
    for side, one in enumerate(found):
        letter = LETTERS[side]
        with grid.container(border=True, height="stretch"):
            run = one.run
            st.caption(f"**{letter}** · {shown.escaped(name_of(run))}")
            apart = None if one is base else first_divergent(base.tokens, one.tokens)
            if laid_over and one is not base:
                compare_apart.over(base.tokens, one.tokens)
            else:
                token_text(
                    run.id,
                    one.tokens,
                    busy=not run.state.final,
                    key=f"text_{letter}",
                    mark=apart,
                    apart=compare_apart.nats(lab, runs, side),
                )
            if run.state in (RunState.FAILED, RunState.INTERRUPTED):
                errors.show(run.error or str(run.state))
            elif not run.state.final:
                st.caption(phase(one))
            if one is not base and run.state is base.run.state is RunState.DONE:
                st.caption(divergence_in_words(apart, len(one.tokens)))
            numbers = run.numbers
            told = {
                "TTFT": shown.duration(numbers.ttft_s if numbers else None),
                "TPOT": shown.duration(numbers.tpot_s if numbers else None),
                "Decode, tokens/s": shown.number(numbers.decode_tokens_per_s if numbers else None),
            }
            for cell, (label, value) in zip(st.columns(len(told)), told.items(), strict=True):
                cell.metric(label, value)
    st.caption("One text each names no winner: Speed measures who is faster, and how sure that is.")
    if all(one.run.state.final for one in found) and all(len(one.tokens) > 2 for one in found):
        left, right = st.columns(2)
        left.plotly_chart(
            compare_charts.gaps(
                [(letter, one.run, one.tokens) for letter, one in zip(LETTERS, found, strict=False)]
            ),
            key="compare_gaps",
            config={"displayModeBar": False},
        )
        right.plotly_chart(
            compare_charts.firsts(
                [
                    (letter, earlier(lab, one.run))
                    for letter, one in zip(LETTERS, found, strict=False)
                ]
            ),
            key="compare_firsts",
            config={"displayModeBar": False},
        )


def blind(lab: Lab, wanted: Wanted) -> None:
    """Draw two answers without names, four choices, and what all votes say."""
    prompt_card(wanted)
    runs: tuple[str, ...] = st.session_state.get("compare_texts", ())
    found = [snapshot for run_id in runs if (snapshot := lab.snapshot(run_id))]
    if any(not one.run.state.final for one in found):
        st.fragment(errors.guarded(waiting_for), run_every=TICK_S)(lab, runs)
    else:
        ready = [one for one in found if one.run.state is RunState.DONE and one.tokens]
        if len({name_of(one.run) for one in ready}) < 2:
            st.caption(
                ":material/info: Write on all sides first: two different variants then stand here "
                "without their names."
            )
        else:
            ballot(*drawn_pair(ready))
    ratings(lab)


def waiting_for(lab: Lab, runs: Sequence[str]) -> None:
    """Draw how far the answers are; the page is drawn anew once all are there."""
    found = [snapshot for run_id in runs if (snapshot := lab.snapshot(run_id))]
    if all(one.run.state.final for one in found):
        st.rerun()
    done = sum(one.run.state.final for one in found)
    st.progress(done / len(found), text=f"{done} of {len(found)} answers are written")


def drawn_pair(ready: Sequence[Snapshot]) -> tuple[Snapshot, Snapshot]:
    """Return two answers of different variants in a random order, the same until they change."""
    key = tuple(one.run.id for one in ready)
    kept = st.session_state.get("ballot")
    if kept is None or kept[0] != key:
        pairs = [
            (a, b)
            for a in range(len(ready))
            for b in range(len(ready))
            if name_of(ready[a].run) != name_of(ready[b].run)
        ]
        kept = (key, random.SystemRandom().choice(pairs))
        st.session_state["ballot"] = kept
    left, right = kept[1]
    return ready[left], ready[right]


def ballot(left: Snapshot, right: Snapshot) -> None:
    """Draw two answers, and the four choices until one is made."""
    voted = st.session_state.get("voted") == (left.run.id, right.run.id)
    for column, title, one in zip(st.columns(2), ("Left", "Right"), (left, right), strict=True):
        with column.container(border=True):
            st.caption(f"**{title}**" + (f" · {shown.escaped(name_of(one.run))}" if voted else ""))
            st.text(one.run.text, width="stretch")
    if voted:
        st.caption("Your vote is kept. Write on all sides again for the next one.")
        return
    with st.container(horizontal=True):
        for label, icon, choice in (
            ("Left is better", ":material/arrow_back:", Choice.LEFT),
            ("Right is better", ":material/arrow_forward:", Choice.RIGHT),
            ("Tie", ":material/drag_handle:", Choice.TIE),
            ("Both are bad", ":material/thumb_down:", Choice.BOTH_BAD),
        ):
            st.button(label, icon=icon, on_click=vote, args=(left, right, choice))


def ratings(lab: Lab) -> None:
    """Draw what all votes say."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Ratings", width="stretch")
        equal = st.toggle(
            "At equal length",
            key="compare_equal_length",
            help="Longer answers tend to be preferred for being long; this holds the length equal.",
        )
    found = lab.ratings(equal_length=equal)
    if found is None:
        st.caption(":material/info: No vote says anything of an order yet.")
        return
    st.dataframe(
        {
            "Variant": [one.variant for one in found.rated],
            "Rating": [round(one.rating) for one in found.rated],
            "95 % interval": [f"{one.low:.0f} to {one.high:.0f}" for one in found.rated],
            "Won": [one.wins for one in found.rated],
            "Lost": [one.losses for one in found.rated],
            "Tied": [one.ties for one in found.rated],
            "Group": [one.group for one in found.rated],
        },
        hide_index=True,
    )
    split = " Variants of different groups never met." if found.groups > 1 else ""
    st.caption(
        f"Bradley and Terry's model over {found.votes} votes (a tie is half a win), and "
        f"{found.both_bad} times both were bad; 100 points more are preferred in 64 of 100 pairs; "
        f"intervals from {found.resamples:,} bootstrap draws.{split}"
    )


def earlier(lab: Lab, run: Run) -> list[Run]:
    """Return the last requests of the run's variant, itself included."""
    runs = lab.runs(kind=RunKind.GENERATE, state=RunState.DONE, model=run.model, limit=500)
    return [one for one in runs if one.variant_hash == run.variant_hash][:MAX_TTFT_RUNS]


def divergence_in_words(apart: int | None, count: int) -> str:
    """Return where a text leaves A's."""
    if apart is None:
        return f"Token for token the text of A ({count} tokens)."
    return f"Leaves A's text at token {apart + 1} of {count}."


def first_view(wanted: Wanted) -> str:
    """Return the view to begin with: that of a result to which a link leads, or the last one."""
    if wanted.view is None or (settings.entered() and not is_linked()):
        for name, view in ((ADDRESS, "Quality"), (MEASURED.address, "Speed")):
            if name in st.query_params:
                return view
    return wanted.view or VIEWS[0]


def draw() -> None:
    """Draw the page."""
    lab, wanted = shared_lab(), current()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Compare", width="stretch")
        st.segmented_control(
            "View",
            VIEWS,
            key="compare_view",
            default=first_view(wanted),
            required=True,
            label_visibility="collapsed",
        )
        st.button(
            "Add a side",
            icon=":material/add:",
            on_click=compare_sides.add,
            disabled=len(wanted.sides) >= len(LETTERS),
        )
    if (view := st.session_state["compare_view"]) != (wanted.view or VIEWS[0]):
        change(view=view)
    for problem in settings.said():
        errors.show(problem)
    compare_sides.draw(lab, wanted)
    views = {"Speed": speed, "Quality": quality, "Texts": texts, "Blind vote": blind}
    views[view](lab, wanted)
    write_address()


draw()
