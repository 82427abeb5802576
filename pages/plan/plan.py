"""Plan: what a GPT of any size needs, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import streamlit as st

from gptcore.errors import GptcoreError
from gptcore.plan import fits, memory, report, shapes, speed, training
from gptcore.plan.assumptions import FREE, MACHINE, OWN
from gptcore.plan.capacity import replica_at
from gptcore.plan.cards import CARDS
from gptcore.plan.outcome import Outcome, needed, outcome
from gptcore.plan.peaks import known_peaks, measure_peaks
from gptcore.records import Run, RunKind, RunState
from gptcore.spec import GPT2, GPT3, PRESETS
from pages.parts import errors, plan_charts, plan_state, settings
from pages.parts import format as shown
from pages.parts.plan_state import ask
from pages.parts.services import lab as shared_lab

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from streamlit.delta_generator import DeltaGenerator

lab = shared_lab()
VIEWS = ("Size", "Memory", "Fit", "Training", "Speed", "Capacity")
COMPARED_RUNS = 2000


def chart(figure: go.Figure, key: str) -> None:
    """Draw a figure in its card."""
    st.plotly_chart(figure, key=key, config={"displayModeBar": False})


def halves() -> tuple[DeltaGenerator, DeltaGenerator]:
    """Return two places side by side, one under the other where there is no room."""
    grid = st.grid(2, min_column_width=380, gap="small")
    return grid.container(height="stretch"), grid.container(height="stretch")


def header() -> str:
    """Draw the title and the choice of what to look at; return it."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Plan", width="stretch")
        view = st.segmented_control(
            "View",
            VIEWS,
            default="Size",
            required=True,
            key="view",
            bind="query-params",
            label_visibility="collapsed",
            wrap=True,
        )
    return view if view in VIEWS else "Size"


def choices() -> None:
    """Draw what every view starts from: the size, the precision, the card."""
    chosen = plan_state.current()
    with st.grid(3, min_column_width=220, gap="small"):
        ask("model", options=[*known, FREE], shown=model_label)
        ask("precision")
        ask("card", options=[*CARDS, MACHINE, OWN], shown=card_label)
    if chosen.model == FREE:
        with st.grid(5, min_column_width=130, gap="small"):
            for name in ("layers", "width", "heads", "window", "vocabulary"):
                ask(name)
    if chosen.card == OWN:
        with st.grid(3, min_column_width=180, gap="small"):
            for name in ("own_memory_gb", "own_gb_per_s", "own_tflop_per_s"):
                ask(name)


def model_label(name: str) -> str:
    """Return how a size is offered."""
    if name == FREE:
        return "Custom: sizes of my own"
    spec = known.get(name)
    return f"{name} · {shown.parameters(spec.parameters)}" if spec else name


def card_label(name: str) -> str:
    """Return how a card is offered."""
    if name in CARDS:
        one = CARDS[name]
        return (
            f"{one.title} · {one.memory_bytes / 1e9:g} GB" if "GB" not in one.title else one.title
        )
    return "This machine" if name == MACHINE else "Own numbers"


def numbers(found: Outcome) -> None:
    """Draw the four numbers that everything follows from."""
    total = found.memory.total if found.memory else None
    with st.grid(4, min_column_width=180, gap="small"):
        st.metric(
            "Parameters",
            shown.parameters(found.spec.parameters),
            delta=shown.whole(found.spec.parameters),
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help=shown.escaped(shapes.formula(found.spec)),
        )
        st.metric(
            "All weights",
            shown.gigabytes(found.weights_bytes),
            delta=f"in {found.assumptions.precision}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="Parameters × bytes each; packed ones with their scales. 175 B in fp32 is 698 GB "
            "by the exact count; the often quoted 700 GB is 175e9 × 4.",
        )
        st.metric(
            "KV cache, a token",
            f"{shown.three_digits(found.kv_bytes_per_token / 1e6)} MB"
            if found.kv_bytes_per_token >= 1e6
            else f"{shown.three_digits(found.kv_bytes_per_token / 1e3)} kB",
            delta=f"{shown.whole(found.kv_bytes_per_token)} bytes",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="2 × layers × width of the key heads × bytes of a number.",
        )
        st.metric(
            f"Needed for {found.assumptions.work}",
            shown.gigabytes(total),
            delta=f"{'fits' if found.fits else 'does not fit'} in "
            f"{shown.gigabytes(found.usable_bytes)}",
            delta_color="green" if found.fits else "red",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="On the fullest device, against what a model may take of the card: 95 % of its "
            "memory, less what CUDA keeps for itself.",
        )


def draw_size(found: Outcome) -> None:
    """Draw parameters by part."""
    st.caption(shown.escaped(shapes.formula(found.spec)))
    left, right = halves()
    with left, st.container(border=True, height="stretch"):
        st.markdown("**By part**")
        st.dataframe(
            {
                "Part": list(found.parts),
                "Parameters": [f"{count:,}" for count in found.parts.values()],
                "Share": [
                    shown.share(count / found.spec.parameters) for count in found.parts.values()
                ],
            },
            hide_index=True,
            column_config={
                name: st.column_config.TextColumn(name, alignment="right")
                for name in ("Parameters", "Share")
            },
            alt="Parameters by part",
        )
        spec = found.spec
        st.caption(
            f"{spec.layers} layers · width {spec.width:,} · {spec.heads} heads of "
            f"{spec.head_width}, {spec.kv_heads} for keys and values · MLP {spec.hidden:,} · "
            f"context {spec.context:,} · vocabulary {spec.vocabulary:,}"
        )
        if found.assumptions.model in shapes.PUBLISHED:
            published()
    with right, st.container(border=True, height="stretch"):
        st.markdown("**The larger the model, the smaller the share of its embeddings**")
        drawn = {**GPT2, **GPT3}
        if found.assumptions.model not in drawn:
            drawn = {**drawn, found.assumptions.model: found.spec}
        chart(plan_charts.part_shares(drawn), key="parts")


def published() -> None:
    """Draw what the papers say of each size beside what it really has."""
    st.markdown("**As published, and exactly**")
    odd = {name for name in shapes.PUBLISHED if any("heads of" in q for q in shapes.quirks(name))}
    st.dataframe(
        {
            "Size": [f"{name} *" if name in odd else name for name in shapes.PUBLISHED],
            "Published": [shown.parameters(one.parameters) for one in shapes.PUBLISHED.values()],
            "Exact": [f"{PRESETS[name].parameters:,}" for name in shapes.PUBLISHED],
        },
        hide_index=True,
        height=260,
        column_config={
            name: st.column_config.TextColumn(name, alignment="right")
            for name in ("Published", "Exact")
        },
        alt="Published and exact numbers of parameters",
    )
    st.caption("\\* Heads × width of a head is not the width; choose the size to read more.")


def draw_memory(found: Outcome) -> None:
    """Draw what a device holds, how that grows, and how the model lies on devices."""
    with st.grid(4, min_column_width=160, gap="small"):
        ask("work", shown=str.capitalize)
        ask("batch")
        ask("context")
        if found.assumptions.work == "training":
            ask("optimizer", shown=str.capitalize)
            ask("recompute", shown=lambda one: {"none": "Nothing", "blocks": "Each block"}[one])
            ask("zero")
        ask("tensor")
        ask("pipeline")
        ask("data")
    one = found.assumptions
    if found.memory is None:
        errors.show(found.memory_problem or "")
        return
    with st.container(border=True):
        st.markdown(
            f"**The fullest of {one.split.devices:,} "
            f"{'device' if one.split.devices == 1 else 'devices'}**"
        )
        chart(plan_charts.memory_bar(found.memory, found.usable_bytes), key="bar")
    left, right = halves()
    with left, st.container(border=True, height="stretch"):
        st.markdown("**As the context grows**")
        longest = found.spec.context
        contexts = sorted({max(1, round(longest * 2 ** (-step / 2))) for step in range(15)})
        memories = [needed(one, found.spec, n, one.card == MACHINE) for n in contexts]
        chart(
            plan_charts.memory_curve(
                contexts,
                memories,
                found.usable_bytes,
                min(one.context, longest),
                slices=one.tensor,
            ),
            key="growth",
        )
    with right, st.container(border=True, height="stretch"):
        st.markdown("**Which device holds what**")
        held = memory.stages(found.spec, one.precision, one.split)
        chart(plan_charts.split_picture(held, one.tensor, one.data), key="split")
        st.caption(
            "Across: stages of the pipeline by their layers, which pass activations on. Down: "
            "slices of every layer (tensor parallel), which talk twice a layer. GB of weights."
        )


def draw_fit(found: Outcome) -> None:
    """Draw what fits on the card, and the limits of the chosen size."""
    card, one = found.card, found.assumptions
    rows = {
        precision: fits.limits(card, found.spec, precision, one.context)
        for precision in memory.PRECISIONS
    }
    best = [name for name, limit in rows.items() if limit.fits]
    limit = rows[one.precision]
    said = (
        f"{one.model} in {one.precision} fits on {card.title}: one text of up to "
        f"{limit.longest_context:,} tokens, or {limit.most_batch:,} texts of "
        f"{min(one.context, found.spec.context):,}."
        if limit.fits
        else f"{one.model} in {one.precision} does not fit on {card.title}"
        + (
            f"; it would in {' or '.join(best)}."
            if best
            else ", nor in any other precision: split it over devices."
        )
    )
    (st.success if limit.fits else st.warning)(
        shown.escaped(said), icon=":material/check_circle:" if limit.fits else ":material/info:"
    )
    with st.container(border=True):
        st.markdown(f"**What fits on {shown.escaped(card.title)}**, GB needed for one text")
        contexts = (256, 1024, 2048)
        drawn = {**PRESETS}
        if one.model not in drawn:
            drawn[one.model] = found.spec
        cells = fits.matrix(card, drawn, contexts)
        chart(plan_charts.fit_matrix(cells, contexts, one.model), key="fits")
        st.caption(
            "Coloured cells fit. An empty cell is a context longer than the model reads. "
            f"Card: {shown.escaped(card.source)} {card.dated}."
        )
    with st.container(border=True):
        st.markdown(f"**How many texts at once**, {shown.escaped(one.model)}")
        longest = found.spec.context
        contexts_drawn = sorted({max(1, longest >> step) for step in range(8)})
        most = {
            precision: [
                fits.limits(card, found.spec, precision, n).most_batch for n in contexts_drawn
            ]
            for precision in memory.PRECISIONS
        }
        if any(map(any, most.values())):
            chart(plan_charts.frontier(contexts_drawn, most, one.precision), key="front")
        else:
            st.caption("Not even one text fits in any precision.")


def draw_training(found: Outcome) -> None:
    """Draw what training costs, and the claims that people quote."""
    one, made = found.assumptions, found.training
    with st.container(horizontal=True, vertical_alignment="bottom"):
        for index, claim in enumerate(training.CLAIMS):
            st.button(
                f"{claim.text}: {claim.years:.0f} years",
                key=f"claim {index}",
                on_click=plan_state.put,
                kwargs={
                    "model": "gpt3-175b",
                    "tokens": training.GPT3_TOKENS,
                    "count": "published",
                    "tflop_per_s": claim.flop_per_s / 1e12,
                },
                help=shown.escaped(f"Source: {claim.source}."),
            )
    ask("tflop_per_s", most=100.0, step=0.5)
    with st.grid(5, min_column_width=150, gap="small"):
        st.metric(
            "Operations",
            f"{made.flop:.3g} FLOP",
            border=True,
            height="stretch",
            help="As published (GPT-3's sizes), 6 × parameters × tokens, or the exact form.",
        )
        st.metric(
            "One device", f"{shown.number(made.device_years)} years", border=True, height="stretch"
        )
        st.metric(
            f"{one.devices:,} devices", shown.duration(made.seconds), border=True, height="stretch"
        )
        st.metric(
            "Cost",
            f"${shown.whole(made.cost_usd)}",
            border=True,
            height="stretch",
            help="Device-hours × price; nothing else is counted.",
        )
        st.metric(
            "Energy · carbon",
            f"{shown.number(made.energy_kwh / 1000)} MWh",
            delta=f"{shown.number(made.carbon_kg / 1000)} t CO2e",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="An estimate: device-hours × power × PUE × carbon.",
        )
    with (
        st.expander("Assumptions", icon=":material/tune:"),
        st.grid(4, min_column_width=190, gap="small"),
    ):
        ask("tokens", step=1e9)
        ask("count", shown=lambda name: {"6nd": "6 N D"}.get(name, name.capitalize()))
        for name in ("devices", "usd_per_hour", "watts", "pue", "carbon_g_per_kwh"):
            ask(name)
    left, right = halves()
    with left, st.container(border=True, height="stretch"):
        st.markdown("**From one claim to the other**")
        chart(
            plan_charts.years_curve(made.flop, one.tflop_per_s, one.model, one.tokens), key="years"
        )
    with right, st.container(border=True, height="stretch"):
        st.markdown("**Tokens for a size**")
        chart(plan_charts.token_budgets(PRESETS, found.spec, one.tokens), key="budgets")
    best_size, best_tokens = training.optimal_size(made.flop)
    st.caption(
        f"6 N D = {found.flop.six_nd:.4g} FLOP; linear layers {found.flop.linears:.4g} + attention "
        f"{found.flop.attention:.4g} = {found.flop.exact:.4g} FLOP. Compute-optimal for this size: "
        f"{found.optimal_tokens:.3g} tokens (20 a parameter, Hoffmann et al. 2022); the same "
        f"operations are best spent on {shown.parameters(best_size)} parameters and "
        f"{best_tokens:.3g} tokens."
    )


def draw_speed(found: Outcome) -> None:
    """Draw the roofline, then predictions against what was measured here."""
    with st.grid(4, min_column_width=170, gap="small"):
        ask("prompt_tokens")
        ask("new_tokens")
        if found.card.kind != "machine":
            ask("compute_ratio")
            ask("memory_ratio")
    one = found.assumptions
    if found.device is None or found.decode is None or found.prefill_s is None:
        st.info(
            f"This machine's rates in {one.precision} are not known: measure them.",
            icon=":material/speed:",
        )
    else:
        first = speed.step(
            found.spec,
            one.precision,
            found.device,
            tokens=min(one.prompt_tokens, memory.PREFILL_TOKENS),
            known=0,
        )
        with st.grid(4, min_column_width=170, gap="small"):
            st.metric(
                "Decode",
                shown.rate(1 / found.decode.seconds),
                border=True,
                height="stretch",
                delta=f"{shown.duration(found.decode.seconds)} a token",
                delta_color="off",
                delta_arrow="off",
            )
            st.metric(
                "Prefill",
                shown.rate(one.prompt_tokens / found.prefill_s),
                border=True,
                height="stretch",
                delta=f"{shown.duration(found.prefill_s)} in all",
                delta_color="off",
                delta_arrow="off",
            )
            st.metric(
                "Decode is bound by",
                found.decode.bound,
                border=True,
                height="stretch",
                help="What takes most of a step: arithmetic, reading, or launching.",
            )
            st.metric("Prefill is bound by", first.bound, border=True, height="stretch")
        left, right = halves()
        with left, st.container(border=True, height="stretch"):
            st.markdown("**Roofline**, one mark an operation")
            chart(plan_charts.roofline(found.device.rates, first, found.decode), key="roof")
        with right, st.container(border=True, height="stretch"):
            st.markdown("**Where the time goes**")
            chart(plan_charts.step_times(first, found.decode), key="times")
        with st.expander("Every operation", icon=":material/table_rows:"):
            table(first, found.decode)
    machine()


def table(prefill: speed.Step, decode: speed.Step) -> None:
    """Draw the operations of both kinds of step."""
    rows = [(name, one) for name, step in (("decode", decode), ("prefill", prefill))
            for one in step.operations]  # fmt: skip
    st.dataframe(
        {
            "Step": [name for name, _ in rows],
            "Operation": [one.name for _, one in rows],
            "Launches": [one.launches for _, one in rows],
            "GFLOP": [one.flop / 1e9 for _, one in rows],
            "MB": [one.bytes / 1e6 for _, one in rows],
            "FLOP a byte": [one.intensity for _, one in rows],
            "ms": [1000 * one.seconds for _, one in rows],
            "Bound by": [one.bound for _, one in rows],
        },
        hide_index=True,
        column_config={
            name: st.column_config.NumberColumn(name, format="%.4g")
            for name in ("GFLOP", "MB", "FLOP a byte", "ms")
        },
        alt="Operations of a step",
    )


def machine() -> None:
    """Draw predictions for this machine beside every run in the database."""
    peaks = known_peaks()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Predicted against measured here", width="stretch")
        if st.button("Measure this machine", icon=":material/speed:", help=(
            "Times linear layers and attention in each precision, about half a minute; nothing "
            "else runs on the device meanwhile."
        )):  # fmt: skip
            with st.spinner("Measuring; this takes about half a minute…"):
                try:
                    peaks = measure_peaks(wait=False)
                except GptcoreError as error:
                    errors.show(error)
    runs = [
        run
        for kind in (RunKind.GENERATE, RunKind.BENCH)
        for run in lab.runs(kind=kind, state=RunState.DONE, limit=COMPARED_RUNS)
    ]
    found = speed.compare(runs, known, peaks, made_with())
    if peaks is not None:
        st.caption(
            f"{shown.escaped(peaks.device_name)}, {peaks.threads} threads, torch {peaks.torch}, "
            f"measured {peaks.measured_at}: "
            + " · ".join(
                f"{name} {one.flop_per_s / 1e9:.3g} GFLOP/s, {one.bytes_per_s / 1e9:.3g} GB/s"
                for name, one in peaks.rates.items()
            )
        )
    left_out = ", ".join(f"{count} of {reason}" for reason, count in found.left_out.items())
    if not found.setups or peaks is None:
        st.caption(
            "Nothing to compare yet: measure this machine, and write something in the playground "
            "or run `python -m gptcore bench`."
            + (f" Runs left out: {left_out}." if left_out else "")
        )
        return
    left, right = halves()
    with left, st.container(border=True, height="stretch"):
        chart(plan_charts.against_measured(found), key="measured")
        wrong = shown.share(found.median_error)
        held = (
            f" Corrected by all other set-ups: {shown.share(found.corrected_error)}; of those left "
            f"out, 8 of 10 lie within {found.low:.2f} and {found.high:.2f} × the prediction."
            if found.corrected_error is not None
            else f" {speed.LEAST_SETUPS} set-ups are needed for an error band."
        )
        st.caption(
            f"Median error {wrong} over {len(found.setups)} set-ups.{held}"
            + (f" Runs left out: {left_out}." if left_out else "")
        )
    with right, st.container(border=True, height="stretch"):
        st.dataframe(
            {
                "Set-up": [f"{one.model} {one.precision}" for one in found.setups],
                "Step": [f"{one.what} {one.tokens:,} × {one.batch:,}" for one in found.setups],
                "Runs": [one.runs for one in found.setups],
                "Predicted, ms": [1000 * one.predicted_s for one in found.setups],
                "Measured, ms": [1000 * one.measured_s for one in found.setups],
                "Residual": [f"{100 * one.residual:+.0f} %" for one in found.setups],
            },
            hide_index=True,
            column_config={
                **{
                    name: st.column_config.NumberColumn(name, format="%.3g")
                    for name in ("Predicted, ms", "Measured, ms")
                },
                "Residual": st.column_config.TextColumn("Residual", alignment="right"),
            },
            alt="Predicted and measured times of a step",
        )
        st.caption(
            "A decode step writes one token of each text behind so many positions; a prefill "
            "reads so many positions of each text."
        )
    extrapolated(found)


def made_with() -> Callable[[Run], speed.Made]:
    """Return what tells threads, passes and machine of a run; variants are looked up once."""
    variants: dict[str | None, tuple[int | None, tuple[str, ...]]] = {}

    def made(run: Run) -> speed.Made:
        told = lab.run_provenance(run)
        if run.variant_hash not in variants:
            try:
                _, variant = lab.measured_variant(run.id)
            except GptcoreError:
                variants[run.variant_hash] = told.threads if told else None, ()
            else:
                passes = tuple(one.name for one in variant.recipe.passes)
                variants[run.variant_hash] = variant.placement.resolved_threads, passes
        machine = None
        if told is not None:
            machine = told.gpu if run.device.startswith("cuda") else told.cpu
        return speed.Made(*variants[run.variant_hash], machine)

    return made


def extrapolated(found: speed.Accuracy) -> None:
    """Draw what this machine would do with every size, with the band of the error."""
    peaks, one = known_peaks(), plan_state.current()
    device = speed.machine_device(peaks, one.precision) if peaks else None
    if device is None:
        return
    factor = found.factors.get(one.precision) or 1.0
    rows = []
    for name, spec in PRESETS.items():
        context = min(one.prompt_tokens + one.new_tokens // 2, spec.context - 1)
        seconds = factor * speed.decode(spec, one.precision, device, context).seconds
        rows.append((name, seconds))
    with st.container(border=True):
        st.markdown(f"**Every size on this machine, in {one.precision}**")
        banded = found.corrected_error is not None
        st.dataframe(
            {
                "Size": [name for name, _ in rows],
                "tokens/s": [1 / seconds for _, seconds in rows],
                "from": [1 / (seconds * found.high) if banded else None for _, seconds in rows],
                "to": [1 / (seconds * found.low) if banded else None for _, seconds in rows],
            },
            hide_index=True,
            column_config={
                name: st.column_config.NumberColumn(name, format="%.3g")
                for name in ("tokens/s", "from", "to")
            },
            alt="Predicted tokens a second of every size",
        )
        st.caption("As if the memory were there. The band is from leaving one set-up out.")


def draw_capacity(found: Outcome) -> None:
    """Draw how many replicas a load needs and what a million tokens cost."""
    with st.grid(4, min_column_width=170, gap="small"):
        for name in ("requests_per_s", "prompt_tokens", "new_tokens", "ttft_s", "tpot_s"):
            ask(name)
        ask("tensor")
        ask("pipeline")
    with (
        st.expander("Assumptions", icon=":material/tune:"),
        st.grid(4, min_column_width=190, gap="small"),
    ):
        for name in ("headroom", "usd_per_hour", "watts", "pue", "carbon_g_per_kwh"):
            ask(name)
        if found.card.kind != "machine":
            ask("compute_ratio")
            ask("memory_ratio")
    one, made = found.assumptions, found.capacity
    if made is None or found.device is None:
        errors.show(found.memory_problem or "This machine is not measured yet: see Speed.")
        return
    if made.replica is None:
        errors.show(made.problem or "", icon=":material/info:")
        return
    with st.grid(4, min_column_width=180, gap="small"):
        st.metric(
            "Replicas",
            shown.whole(made.replicas),
            border=True,
            height="stretch",
            delta=f"{shown.whole(made.devices)} device{'s' if made.devices > 1 else ''}",
            delta_color="off",
            delta_arrow="off",
        )
        st.metric(
            "Texts at once, each",
            shown.whole(made.replica.batch),
            border=True,
            height="stretch",
            delta=f"TTFT {shown.duration(made.replica.ttft_s)}, "
            f"TPOT {shown.duration(made.replica.tpot_s)}",
            delta_color="off",
            delta_arrow="off",
        )
        st.metric(
            "A million tokens",
            f"${shown.number(made.usd_per_million_tokens)}",
            border=True,
            height="stretch",
            delta=f"${shown.number(made.usd_per_hour)} an hour",
            delta_color="off",
            delta_arrow="off",
            help="Tokens of answers; their prompts come with them.",
        )
        st.metric(
            "Energy · carbon, a million",
            f"{shown.number(made.kwh_per_million_tokens)} kWh",
            border=True,
            height="stretch",
            delta=f"{shown.number(made.carbon_kg_per_million_tokens)} kg CO2e",
            delta_color="off",
            delta_arrow="off",
            help="An estimate from power, PUE and the electricity's carbon.",
        )
    sizes = sorted({2**power for power in range(11)} | {made.replica.batch})
    replicas = [
        replica_at(
            found.spec, one.precision, found.device, batch, prompt_tokens=one.prompt_tokens,
            new_tokens=one.new_tokens, split=one.split, headroom=one.headroom,
        )
        for batch in sizes
    ]  # fmt: skip
    with st.container(border=True):
        st.markdown("**More texts at once: more requests, slower tokens**")
        chart(
            plan_charts.batches(replicas, one.tpot_s, found.usable_bytes, made.replica.batch),
            key="batches",
        )
        st.caption("Drawn as far as the memory goes.")


def take_away(found: Outcome, view: str) -> None:
    """Draw the downloads and the link."""
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in found.assumptions.model)[-60:]
    base = (st.context.url or "").split("?")[0]
    link = plan_state.link(base, found.assumptions, view)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "CSV",
            lambda: report.as_csv(found),
            file_name=f"plan-{name}.csv",
            mime="text/csv",
            icon=":material/table:",
            on_click="ignore",
        )
        st.download_button(
            "Report",
            lambda: report.as_html(found, datetime.now(UTC), link),
            file_name=f"plan-{name}.html",
            mime="text/html",
            icon=":material/description:",
            on_click="ignore",
            help="One HTML page with every number and assumption; prints well.",
        )
        with st.popover("Link", icon=":material/link:"):
            st.caption("Restores every assumption, whatever the defaults will be.")
            st.code(link, language=None, wrap_lines=True)
        with st.popover("From a config.json", icon=":material/upload_file:"):
            given = st.text_area(
                "Paste a Hugging Face config.json", height=200, key="config", max_chars=100_000
            )
            if given:
                take_config(given)


def take_config(given: str) -> None:
    """Add the shape of a pasted config to this session's sizes and choose it."""
    try:
        spec = shapes.from_config(given)
    except GptcoreError as error:
        errors.show(error)
        return
    name = f"config-{shown.parameters(spec.parameters).replace(' ', '')}"
    pasted = st.session_state.setdefault("plan_configs", {})
    if pasted.get(name) != spec:
        pasted[name] = spec
        plan_state.put(model=name)
        st.rerun()
    st.caption(f"Chosen as {name}. A link cannot carry it; the report does.")


known = {
    **PRESETS,
    **{one.name: one.spec for one in lab.models() if one.spec is not None and not one.problem},
    **st.session_state.get("plan_configs", {}),
}
view = header()
choices()
for problem in settings.said():
    errors.show(problem)
try:
    result = outcome(plan_state.current(), known)
except GptcoreError as error:
    errors.show(error)
else:
    numbers(result)
    for note in result.notes:
        st.caption(f":material/info: {shown.escaped(note)}")
    {
        "Size": draw_size,
        "Memory": draw_memory,
        "Fit": draw_fit,
        "Training": draw_training,
        "Speed": draw_speed,
        "Capacity": draw_capacity,
    }[view](result)
    take_away(result, view)
plan_state.write_address(plan_state.current())
