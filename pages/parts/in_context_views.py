"""What work in context found, drawn: accuracy over examples, and texts held to a rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from gptcore.records import Run
from pages.parts import format as shown
from pages.parts.compare_charts import figure
from pages.parts.explain_charts import plain
from pages.parts.explain_looks import chart, halves
from pages.parts.plan_charts import GREY, colors

if TYPE_CHECKING:
    import plotly.graph_objects as go

Result = Mapping[str, Any]


def few_shot(result: Result, run: Run) -> None:
    """Draw accuracy over the number of examples, and the answers behind it."""
    shots = result["shots"]
    if not shots:
        return
    left, right = halves()
    with left, st.container(border=True, height="stretch"):
        st.markdown("**Accuracy over the examples in the prompt**")
        chart(accuracies(shots, result["chance_ratio"]), key=f"shots {run.id} {len(shots)}")
    with right, st.container(border=True, height="stretch"):
        st.markdown(f"**The same {result['n']} questions** with every number of examples")
        first = shots[0]["shots"]
        st.dataframe(
            {
                "Examples": [one["shots"] for one in shots],
                "Right": [f"{one['right']} of {one['n']}" for one in shots],
                "95 % interval": [
                    f"{shown.share(one['low'])} – {shown.share(one['high'])}" for one in shots
                ],
                "p": [shown.UNKNOWN if one["p"] is None else f"{one['p']:.3g}" for one in shots],
                f"Against {first}": [one["verdict"] or shown.UNKNOWN for one in shots],
            },
            hide_index=True,
            height="content",
            alt="Accuracy by the number of examples",
        )
        st.caption(
            "Interval: Wilson. Against the fewest examples: McNemar's exact test on the questions "
            "whose answer flipped. The answer is the likeliest choice; guessing gives "
            f"{shown.share(result['chance_ratio'])}."
        )
    if answers := result.get("answers"):
        raw_answers(answers, run)


def accuracies(shots: Sequence[Mapping[str, Any]], chance: float) -> go.Figure:
    """Return accuracy with its interval over the number of examples, and each kind's."""
    made = figure(330)
    names = [str(one["shots"]) for one in shots]
    for kind, color in zip(shots[0]["kinds"], colors()[1:] * 4, strict=False):
        made.add_scatter(
            x=names,
            y=[100 * one["kinds"][kind]["ratio"] for one in shots],
            name=plain(kind),
            mode="lines",
            line={"width": 1, "color": color},
            opacity=0.7,
            hovertemplate=f"{plain(kind)} %{{y:.0f}} %<extra></extra>",
        )
    made.add_scatter(
        x=names,
        y=[100 * one["ratio"] for one in shots],
        error_y={
            "array": [100 * (one["high"] - one["ratio"]) for one in shots],
            "arrayminus": [100 * (one["ratio"] - one["low"]) for one in shots],
            "thickness": 1.5,
        },
        name="all",
        mode="lines+markers",
        marker={"size": 8},
        line={"width": 2.5, "color": colors()[0]},
        hovertemplate="all %{y:.1f} %<extra></extra>",
    )
    made.add_hline(
        y=100 * chance,
        line={"width": 1, "dash": "dash", "color": GREY},
        annotation_text="guessing",
        annotation_font_size=12,
    )
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 8, "t": 46, "b": 8},
    )
    made.update_xaxes(title_text="examples before the question", type="category")
    made.update_yaxes(title_text="right, %", range=[0, 103])
    return made


def raw_answers(answers: Sequence[Mapping[str, Any]], run: Run) -> None:
    """Draw one question as the model was given it, with its answer; and all of them as a file."""
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            number = st.selectbox(
                "Question",
                range(len(answers)),
                format_func=lambda at: f"{at + 1}: {shown.one_line(answers[at]['question'], 60)}",
                key=f"question of {run.id}",
            )
            asked = answers[number]["answers"]
            shots = st.segmented_control(
                "Examples",
                list(asked),
                default=list(asked)[-1],
                required=True,
                key=f"shots of {run.id}",
            )
            st.download_button(
                "Raw answers",
                lambda: "\n".join(json.dumps(one, ensure_ascii=False) for one in answers),
                f"few-shot-{run.id}.jsonl",
                "application/jsonl",
                icon=":material/download:",
                help="Every prompt word for word, the choices with their ln p, and the answer.",
            )
        one = asked[shots]
        left, right = halves()
        with left:
            st.caption("The prompt")
            with st.container(height=260, border=True):
                st.text(one["prompt"], width="stretch")
        with right:
            st.caption("Its choices")
            best = max(one["logprobs"])
            st.dataframe(
                {
                    "": ["▶" if ln == best else "" for ln in one["logprobs"]],
                    "Choice": answers[number]["choices"],
                    "ln p": [f"{ln:.3f}" for ln in one["logprobs"]],
                    "Right": ["✓" if choice == answers[number]["right"] else ""
                              for choice in answers[number]["choices"]],
                },
                hide_index=True,
                height="content",
                alt="The choices with their log-probability",
            )  # fmt: skip
            st.caption("Right." if one["correct"] else "Wrong.")


def constraint(result: Result, run: Run) -> None:
    """Draw the texts that were held to a rule, those that were not, and what holding costs."""
    texts, free = result["texts"], result["free"]
    finished = [one for one in texts if one["finished"]]
    good = sum(one["follows"] is True for one in finished)
    with st.grid(4, min_column_width=180, gap="small"):
        cut = len(texts) - len(finished)
        for name, value, delta, said in (
            (
                "Finished texts that follow",
                f"{good} of {len(finished)}",
                f"{cut} cut at the limit" if cut else "none cut at the limit",
                "Judged by another library than the one that guides. A text that reaches the "
                "limit of tokens is no finished one.",
            ),
            (
                "Without the rule",
                f"{sum(one['follows'] is True for one in free)} of {len(free)}",
                "same prompt and seeds",
                "What the model writes by itself.",
            ),
            (
                "Compiling the rule",
                shown.duration(result["compile_s"]),
                f"tokenizer {shown.duration(result['prepare_s'])}, once"
                if result["prepare_s"] > 0.001
                else "tokenizer was ready",
                "Once a text; the tokenizer is prepared once a model.",
            ),
            (
                "Cost a token",
                shown.duration(result["mask_s"]),
                f"{shown.share(result['mask_s'] / result['step_s'])} of a step"
                if result["mask_s"] and result["step_s"]
                else shown.UNKNOWN,
                "Finding the tokens that may come next, a mean over all steps.",
            ),
        ):
            st.metric(
                name,
                value,
                delta=delta,
                delta_color="off",
                delta_arrow="off",
                border=True,
                height="stretch",
                help=said,
            )
    for title, rows in (("Held to the rule", texts), ("Without the rule", free)):
        if not rows:
            continue
        with st.container(border=True):
            st.markdown(f"**{title}**")
            st.dataframe(
                {
                    "Text": [one["text"] for one in rows],
                    "Follows": [{True: "✓", False: "✗", None: "?"}[one["follows"]] for one in rows],
                    "Ended": ["by itself" if one["finished"] else "at the limit" for one in rows],
                    "Tokens": [one["new_tokens"] for one in rows],
                    "Seed": [one["seed"] for one in rows],
                },
                hide_index=True,
                height="content" if len(rows) <= 12 else 440,
                column_config={"Text": st.column_config.TextColumn("Text", width="large")},
                alt=title,
            )
