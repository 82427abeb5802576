"""One step of generation on the page: sliders on the left, and what they make of the logits."""

from __future__ import annotations

import numpy as np
import streamlit as st

from gptcore.explain.step import TIMES, many_draws, one_step, over_temperatures
from gptcore.lab import Lab, NextLogits
from gptcore.recipe import Variant
from gptcore.records import STAGES
from gptcore.sentences import brief
from pages.parts import errors, explain_charts, explain_state, samplers, settings
from pages.parts import format as shown
from pages.parts.explain_looks import chart, halves, looked
from pages.parts.settings import bound, taken_from

ROWS = 12
NAMED = {
    "raw": "is too unlikely to be counted",
    "temperature": "temperature 0",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
}
TEMPERATURES = tuple(round(0.05 * step, 2) for step in range(41))


def draw(lab: Lab) -> None:
    """Draw the step that was looked at, or what to do to see one."""
    found = explain_state.stepped()
    if found is None:
        st.caption(
            ":material/info: Nothing is looked at yet. Press Look: one forward pass gives the "
            "logits; from then on every slider is only arithmetic."
        )
        return
    run_id, variant = found
    looked(lab, run_id, lambda *_: None)
    if (logits := lab.next_logits_of(run_id)) is not None:
        st.fragment(errors.guarded(_drawn))(lab, run_id, variant, logits)


def _drawn(lab: Lab, run_id: str, variant: Variant, logits: NextLogits) -> None:
    """Draw controls and numbers; a fragment, so that a slider moves nothing else."""
    for said in settings.said():
        errors.show(said)
    chosen = settings.current()
    sampling = chosen.sampling
    step = one_step(
        logits.logits, sampling, logits.prompt_ids, seed=chosen.seed, position=0, count=ROWS
    )
    draws = many_draws(step.last, seed=chosen.seed)
    ids = [row.id for row in step.rows]
    words = dict(zip(ids, lab.token_texts(variant.model, ids), strict=True))

    with st.grid(4, min_column_width=180, gap="small"):
        st.metric(
            "Tokens read",
            shown.whole(len(logits.prompt_ids)),
            delta=f"{shown.whole(len(logits.logits))} logits come out",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
        )
        st.metric(
            "Can be drawn",
            shown.whole(step.candidates[-1]),
            delta=_narrowing(step.candidates),
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="Tokens that are left after temperature, top-k, top-p and min-p, in that order.",
        )
        st.metric(
            "Entropy",
            f"{shown.number(step.entropies_bits[-1])} bits",
            delta=f"{shown.number(step.entropies_bits[0])} bits from the model",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="−Σ p log₂ p: 0 where one token is certain, 1 for a fair coin. Here after all "
            "samplers, below of the model's own probabilities.",
        )
        st.metric(
            "The draw",
            f"u = {step.random:.6f}",
            delta=f"seed {chosen.seed}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="A function of seed and position alone: the same seed draws the same number.",
        )
    grid = st.grid(7, min_column_width=110, gap="small")
    left, right = grid.cell(column_span=2), grid.cell(column_span=5)
    with left, st.container(border=True, height="stretch"):
        samplers.temperature()
        samplers.more_samplers()
        st.number_input(
            "Seed",
            min_value=0,
            key=bound("seed", chosen.seed, typed=True),
            on_change=taken_from,
            args=("seed", "seed"),
            help="Of the draw; the histogram takes this seed and the 999 after it.",
        )
        st.caption("The Playground writes with the same settings.")
    with right, st.container(border=True, height="stretch"):
        st.markdown("**From logit to draw**, each column from the one before it")
        penalised = sampling.repetition_penalty != 1.0
        columns: dict[str, list[object]] = {
            "": ["▶" if row.id == step.drawn_id else "" for row in step.rows],
            "#": [row.rank for row in step.rows],
            "Token": [words[row.id].replace("\n", "↵").replace(" ", "␣") for row in step.rows],
            "Logit": [f"{row.logit:.4f}" for row in step.rows],
            "Penalised": [f"{row.penalised:.4f}" for row in step.rows],
            "÷ T": [shown.UNKNOWN if row.scaled is None else f"{row.scaled:.4f}"
                    for row in step.rows],
            "e^(x − max)": [f"{row.weight:.5f}" for row in step.rows],
            "Probability": [f"{row.probabilities[-1]:.5f}" for row in step.rows],
            "Drawn if u is in": [
                f"{row.low:.5f} – {row.high:.5f}"
                if row.removed_by is None
                else f"out: {NAMED.get(row.removed_by, row.removed_by)}"
                for row in step.rows
            ],
        }  # fmt: skip
        if not penalised:
            del columns["Penalised"]
        st.dataframe(
            columns,
            hide_index=True,
            height="content",
            column_config={
                "": st.column_config.TextColumn("", width=30),
                "#": st.column_config.NumberColumn("#", width=44),
                **{
                    name: st.column_config.TextColumn(name, alignment="right")
                    for name in columns
                    if name not in ("", "#", "Token")
                },
            },
            alt="The likeliest tokens with logit, scaled logit, weight, probability and interval",
        )
        total = step.totals[-1]
        drawn = words[step.drawn_id]
        most = "" if step.max_scaled is None else f"max = {step.max_scaled:.4f}, "
        st.caption(
            shown.escaped(
                f"{most}Σ e^(x − max) = {total:.5f} over the {step.candidates[-1]:,} tokens that "
                f"are left; probability = e^(x − max) ÷ Σ. u = {step.random:.5f} lies in the "
                f"interval of “{brief(drawn) if drawn.strip() else repr(drawn)}”."
            )
        )
    one, two = halves()
    with one, st.container(border=True, height="stretch"):
        st.markdown("**What temperature and samplers make of it**")
        chart(explain_charts.probabilities(step, words), key="step probabilities")
    with two, st.container(border=True, height="stretch"):
        st.markdown(f"**{TIMES:,} draws** against the probabilities")
        chart(explain_charts.histogram(step, draws, words), key="step draws")
        if draws.p_value is None:
            st.caption("One token takes every draw; there is nothing to test.")
        else:
            st.caption(
                f"χ² = {draws.chi_square:.2f} with {draws.freedom} degrees of freedom, "
                f"p = {draws.p_value:.3f}: the chance of a histogram at least as far off if the "
                "draws follow the probabilities. Below 0.01 in one of a hundred by luck."
            )
    with st.container(border=True):
        st.markdown("**From temperature 0 to 2**, before top-k, top-p and min-p")
        names = [row.id for row in step.rows[:5]]
        entropies, shares = _over_temperatures(lab, run_id, tuple(names))
        chart(
            explain_charts.over_temperature(
                TEMPERATURES,
                entropies,
                shares,
                [words[id] for id in names],
                sampling.temperature,
            ),
            key="step temperatures",
        )


def _narrowing(candidates: tuple[int, ...]) -> str:
    """Return how the masks narrowed the choice: ``49,152 → 40 → 12``."""
    steps = [candidates[0]]
    for name, count in zip(STAGES, candidates, strict=True):
        if name != "raw" and count != steps[-1]:
            steps.append(count)
    return " → ".join(f"{one:,}" for one in steps) if len(steps) > 1 else "no mask is on"


@st.cache_data(max_entries=16, show_spinner=False)
def _over_temperatures(
    _lab: Lab, run_id: str, ids: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    logits = _lab.next_logits_of(run_id)
    assert logits is not None
    return over_temperatures(logits.logits, TEMPERATURES, ids)
