"""The charts of the plan's page; each takes what gptcore.plan computed and returns a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from gptcore.plan.capacity import Replica
from gptcore.plan.fits import Cell
from gptcore.plan.memory import Memory, Stage
from gptcore.plan.peaks import Rates
from gptcore.plan.shapes import size
from gptcore.plan.speed import Accuracy, Step
from gptcore.plan.training import CLAIMS, GPT3_FLOP, SECONDS_PER_YEAR, optimal_tokens
from gptcore.spec import ModelSpec
from pages.parts import format as shown

if TYPE_CHECKING:
    import plotly.graph_objects as go

PARTS = ("token embedding", "position embedding", "attention", "mlp", "norms", "head")
DRAWN_DEVICES = 8
"""Tensor-parallel devices of a stage that are drawn; more are counted."""
DRAWN_STAGES = 12
GREY = "#8a90a3"


def colors() -> list[str]:
    """Return the theme's colours of categories in the browser's mode."""
    mode = st.context.theme.type or "light"
    found = st.get_option(f"theme.{mode}.chartCategoricalColors")
    return list(found) if found else ["#3350d4", "#12a17c", "#d98a1f", "#8a5bd1", "#d5455a", GREY]


def surface() -> str:
    """Return the page's background: the gap between neighbouring marks."""
    mode = st.context.theme.type or "light"
    return str(st.get_option(f"theme.{mode}.backgroundColor") or "#ffffff")


def ink() -> str:
    """Return the colour of the page's text, where Plotly would choose one of its own."""
    mode = st.context.theme.type or "light"
    return str(st.get_option(f"theme.{mode}.textColor") or "#171b2c")


def _figure(height: int, **layout: Any) -> go.Figure:
    # Half a second of imports, which only a page with a chart is worth.
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 16, "t": 28, "b": 8},
        legend={
            "orientation": "h",
            "yanchor": "bottom",
            "y": 1.0,
            "x": 0,
            "title": None,
            "traceorder": "normal",
        },
        hoverlabel={"namelength": -1},
        **layout,
    )
    return figure


def part_shares(specs: Mapping[str, ModelSpec]) -> go.Figure:
    """Return how the parameters of each size are shared between its parts."""
    figure = _figure(36 * len(specs) + 90, barmode="stack", bargap=0.35)
    names = list(specs)
    for color, part in zip(colors(), PARTS, strict=False):
        counts = [size(spec).get(part, 0) for spec in specs.values()]
        if not any(counts):
            continue
        figure.add_bar(
            y=names,
            x=[
                100 * one / spec.parameters
                for one, spec in zip(counts, specs.values(), strict=True)
            ],
            name=part,
            orientation="h",
            marker={"color": color, "line": {"width": 1, "color": surface()}},
            customdata=[[f"{one:,}"] for one in counts],
            hovertemplate=f"%{{y}}, {part}<br>%{{customdata[0]}} parameters, %{{x:.1f}} %"
            "<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", ticks="", showgrid=False)
    figure.update_xaxes(title_text="share of the parameters, %", range=[0, 100])
    return figure


def memory_bar(memory: Memory, usable: int) -> go.Figure:
    """Return what the fullest device holds, against what it can give."""
    figure = _figure(190, barmode="stack", bargap=0.3)
    figure.update_layout(legend={"y": 1.2})
    for color, (name, count) in zip(colors(), memory.by_part.items(), strict=False):
        if count:
            figure.add_bar(
                x=[count / 1e9],
                y=[""],
                name=name,
                orientation="h",
                marker={"color": color, "line": {"width": 1, "color": surface()}},
                hovertemplate=f"{name}<br>{shown.gigabytes(count)}<extra></extra>",
            )
    figure.add_vline(
        x=usable / 1e9,
        line={"width": 1.5, "dash": "dash", "color": GREY},
        annotation_text=f"usable {shown.gigabytes(usable)}",
        annotation_position="top right" if 2 * usable < memory.total else "top left",
        annotation_yanchor="bottom",
        annotation_font_size=12,
    )
    figure.update_xaxes(title_text="on one device, GB", rangemode="tozero")
    figure.update_yaxes(showticklabels=False, showgrid=False)
    return figure


def memory_curve(
    contexts: Sequence[int],
    memories: Sequence[Memory],
    usable: int,
    chosen: int,
    *,
    slices: int = 1,
) -> go.Figure:
    """Return how the memory of one device grows with the context.

    Args:
        contexts: drawn.
        memories: one for each.
        usable: bytes that a model may take.
        chosen: the context that is planned for.
        slices: of every layer; as high as the picture of them that stands beside it.
    """
    figure = _figure(max(300, 150 + 46 * min(slices, DRAWN_DEVICES)))
    for color, name in zip(colors(), memories[0].by_part, strict=False):
        values = [one.by_part[name] / 1e9 for one in memories]
        if any(values):
            figure.add_scatter(
                x=list(contexts),
                y=values,
                name=name,
                stackgroup="all",
                mode="lines",
                line={"width": 0.75, "color": color},
                hovertemplate=f"{name} %{{y:.3~f}} GB<extra></extra>",
            )
    figure.add_hline(
        y=usable / 1e9,
        line={"width": 1.5, "dash": "dash", "color": GREY},
        annotation_text="usable",
        annotation_font_size=12,
    )
    figure.add_vline(x=chosen, line={"width": 1, "dash": "dot", "color": GREY})
    figure.update_layout(hovermode="x unified")
    _doublings(figure, contexts)
    figure.update_xaxes(title_text="context, tokens")
    figure.update_yaxes(title_text="on one device, GB", rangemode="tozero")
    return figure


def split_picture(stages: Sequence[Stage], tensor: int, data: int) -> go.Figure:
    """Return how a model lies on devices: stages of the pipeline across, slices of layers down."""
    columns = (
        list(stages) if len(stages) <= DRAWN_STAGES else [*stages[: DRAWN_STAGES - 1], stages[-1]]
    )
    rows = min(tensor, DRAWN_DEVICES)
    figure = _figure(90 + 46 * rows)
    accent, second = colors()[0], colors()[1]
    for column, stage in enumerate(columns):
        gap = len(stages) > len(columns) and column == len(columns) - 1
        at = column + (0.4 if gap else 0.0)
        for row in range(rows):
            edge = stage.embeds or stage.heads
            figure.add_shape(
                type="rect",
                x0=at + 0.04,
                x1=at + 0.96,
                y0=row + 0.06,
                y1=row + 0.94,
                line={"width": 1, "color": second if edge else accent},
                fillcolor=second if edge else accent,
                opacity=0.22,
            )
        inside = [f"{stage.first + 1}–{stage.end}" if stage.end - stage.first > 1
                  else f"{stage.end}"]  # fmt: skip
        inside += ["embedding"] if stage.embeds else []
        inside += ["head"] if stage.heads else []
        figure.add_scatter(
            x=[at + 0.5] * rows,
            y=[row + 0.5 for row in range(rows)],
            mode="text",
            text=[f"{stage.weights_bytes / 1e9:,.3g} GB"] * rows,
            textfont={"size": 12 if len(columns) < 8 else 11},
            hovertext=[
                f"stage {stages.index(stage) + 1}, layers {', '.join(inside)}<br>slice {row + 1} "
                f"of {tensor}<br>{stage.parameters:,} parameters"
                for row in range(rows)
            ],
            hoverinfo="text",
            showlegend=False,
        )
        figure.add_annotation(
            x=at + 0.5,
            y=0.0,
            yanchor="bottom",
            showarrow=False,
            text="<br>".join(inside),
            font={"size": 11},
        )
    more = f", {tensor - rows} more slices below" if tensor > rows else ""
    left = f", {len(stages) - len(columns)} stages left out" if len(stages) > len(columns) else ""
    figure.update_layout(
        title={
            "text": f"{data} × this" + more + left if data > 1 or more or left else "",
            "font": {"size": 12},
            "y": 0.02,
            "yanchor": "bottom",
        },
        margin={"l": 8, "r": 8, "t": 8, "b": 26},
    )
    figure.update_xaxes(visible=False, range=[0, max(2, len(columns) + 0.4)])
    figure.update_yaxes(visible=False, range=[rows, -0.75])
    return figure


def fit_matrix(cells: Sequence[Cell], contexts: Sequence[int], chosen: str) -> go.Figure:
    """Return which sizes fit in which precision, one panel a context; each cell says its GB."""
    from plotly.subplots import make_subplots

    names = list(dict.fromkeys(one.model for one in cells))
    precisions = list(dict.fromkeys(one.precision for one in cells))
    figure = make_subplots(
        cols=len(contexts),
        shared_yaxes=True,
        horizontal_spacing=0.015,
        subplot_titles=[f"{context:,} tokens" for context in contexts],
    )
    by_place = {(one.context, one.model, one.precision): one for one in cells}
    accent = colors()[0]
    for column, context in enumerate(contexts, start=1):
        z, texts, hovers = [], [], []
        for name in names:
            row = [by_place.get((context, name, one)) for one in precisions]
            z.append([None if one is None else float(one.fits) for one in row])
            texts.append(["" if one is None else _short(one.needed_bytes / 1e9) for one in row])
            hovers.append([
                "" if one is None else f"{name} in {one.precision}, {context:,} tokens<br>"
                f"{one.needed_bytes / 1e9:,.2f} GB of {one.usable_bytes / 1e9:,.1f} GB usable: "
                f"{'fits' if one.fits else 'does not fit'}"
                for one in row
            ])  # fmt: skip
        figure.add_heatmap(
            x=precisions,
            y=names,
            z=z,
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=2,
            showscale=False,
            colorscale=[[0, "rgba(138,144,163,0.12)"], [1, _clear(accent, 0.30)]],
            text=texts,
            texttemplate="%{text}",
            textfont={"size": 11, "color": ink()},
            hovertext=hovers,
            hovertemplate="%{hovertext}<extra></extra>",
            row=1,
            col=column,
        )
    figure.update_layout(height=30 * len(names) + 80, margin={"l": 8, "r": 8, "t": 30, "b": 8})
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(showgrid=False, ticks="", side="bottom")
    figure.update_annotations(font_size=12)
    if chosen in names:
        figure.update_yaxes(
            tickvals=names,
            ticktext=[f"<b>{one}</b>" if one == chosen else one for one in names],
        )
    return figure


def frontier(
    contexts: Sequence[int], batches: Mapping[str, Sequence[int]], chosen: str
) -> go.Figure:
    """Return the most texts at once over the context, a line a precision."""
    figure = _figure(300)
    for color, (name, values) in zip(colors(), batches.items(), strict=False):
        points = [(x, y) for x, y in zip(contexts, values, strict=True) if y]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            name=name,
            mode="lines+markers",
            line={"width": 2.5 if name == chosen else 1.5, "color": color},
            marker={"size": 5},
            hovertemplate=f"{name}: %{{y:,}} texts of %{{x:,}} tokens<extra></extra>",
        )
    _doublings(figure, contexts)
    figure.update_xaxes(title_text="context of each text, tokens")
    figure.update_yaxes(title_text="most texts at once", type="log", dtick=1)
    return figure


def years_curve(flop: float, rate: float, model: str, tokens: float) -> go.Figure:
    """Return the device-years over the sustained rate, the quoted claims on it or beside it."""
    figure = _figure(340)
    lead, second, third = colors()[:3]
    rates = [10 ** (0.5 + step / 40 * 3) for step in range(41)]  # 3 to 3,000 TFLOP/s
    figure.add_scatter(
        x=rates,
        y=[flop / (one * 1e12) / SECONDS_PER_YEAR for one in rates],
        mode="lines",
        name=f"{model}, {tokens:.3g} tokens",
        line={"width": 2, "color": lead},
        hovertemplate="%{x:.3~g} TFLOP/s: %{y:,.4~g} years<extra></extra>",
    )
    figure.add_scatter(
        x=[one.flop_per_s / 1e12 for one in CLAIMS],
        y=[one.years for one in CLAIMS],
        mode="markers",
        name="quoted for GPT-3",
        marker={"size": 10, "color": second, "symbol": "diamond"},
        customdata=[
            [one.text, f"{GPT3_FLOP / one.flop_per_s / SECONDS_PER_YEAR:,.0f}"] for one in CLAIMS
        ],
        hovertemplate="%{customdata[0]}: quoted as %{y:.0f} years, %{customdata[1]} by arithmetic"
        "<extra></extra>",
    )
    figure.add_scatter(
        x=[rate],
        y=[flop / (rate * 1e12) / SECONDS_PER_YEAR],
        mode="markers",
        name="this plan",
        marker={"size": 13, "color": third, "line": {"width": 2, "color": surface()}},
        hovertemplate="%{x:.4~g} TFLOP/s: %{y:,.4~g} years<extra></extra>",
    )
    figure.update_xaxes(title_text="sustained rate of one device, TFLOP/s", type="log", dtick=1)
    figure.update_yaxes(title_text="years on one device", type="log", dtick=1)
    return figure


def token_budgets(specs: Mapping[str, ModelSpec], chosen: ModelSpec, tokens: float) -> go.Figure:
    """Return the compute-optimal tokens over the size, beside what GPT-3 was trained on."""
    figure = _figure(340)
    lead, second, third = colors()[:3]
    gpt3 = {name: one for name, one in specs.items() if name.startswith("gpt3")}
    ends = [5e7, 5e11]
    figure.add_scatter(
        x=ends,
        y=[optimal_tokens(one) for one in ends],
        mode="lines",
        name="20 a parameter",
        line={"width": 2, "color": lead},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[one.parameters for one in gpt3.values()],
        y=[300e9] * len(gpt3),
        mode="markers",
        name="GPT-3",
        marker={"size": 9, "color": second},
        customdata=[[name, f"{300e9 / one.parameters:,.3g}"] for name, one in gpt3.items()],
        hovertemplate="%{customdata[0]}: %{customdata[1]} tokens a parameter<extra></extra>",
    )
    figure.add_scatter(
        x=[chosen.parameters],
        y=[tokens],
        mode="markers",
        name="this plan",
        marker={"size": 13, "color": third, "line": {"width": 2, "color": surface()}},
        hovertemplate="%{x:.3s} parameters, %{y:.3s} tokens<extra></extra>",
    )
    figure.update_xaxes(title_text="parameters", type="log", dtick=1)
    figure.update_yaxes(title_text="training tokens", type="log", dtick=1)
    return figure


def roofline(rates: Rates, prefill: Step, decode: Step) -> go.Figure:
    """Return operations by FLOPs a byte under the roof of the device."""
    figure = _figure(380)
    lead, second = colors()[:2]
    knee = rates.flop_per_s / rates.bytes_per_s
    across = sorted([0.1, 1.0, 10.0, knee, 100.0, 1000.0, 10_000.0])
    figure.add_scatter(
        x=across,
        y=[min(rates.flop_per_s, one * rates.bytes_per_s) / 1e9 for one in across],
        mode="lines",
        name="roof",
        line={"width": 2, "color": GREY},
        hovertemplate="%{x:.3~g} FLOP a byte: %{y:,.3~s} GFLOP/s<extra></extra>",
    )
    for name, step, color, symbol in (
        ("decode", decode, lead, "circle"),
        ("prefill", prefill, second, "diamond"),
    ):
        found = [one for one in step.operations if one.flop and one.seconds]
        longest = max(one.seconds for one in found)
        figure.add_scatter(
            x=[one.intensity for one in found],
            y=[one.flop / one.seconds / 1e9 for one in found],
            mode="markers",
            name=name,
            marker={
                "color": color,
                "symbol": symbol,
                "size": [7 + 17 * (one.seconds / longest) ** 0.5 for one in found],
                "opacity": 0.75,
                "line": {"width": 1, "color": surface()},
            },
            customdata=[[one.name, shown.duration(one.seconds), one.bound] for one in found],
            hovertemplate=f"{name}, %{{customdata[0]}}<br>%{{customdata[1]}}, bound by "
            "%{customdata[2]}<br>%{x:.3~g} FLOP a byte, %{y:,.3~s} GFLOP/s<extra></extra>",
        )
    figure.update_xaxes(title_text="intensity, FLOP a byte", type="log", dtick=1)
    figure.update_yaxes(title_text="reached, GFLOP/s", type="log", dtick=1)
    return figure


def step_times(prefill: Step, decode: Step) -> go.Figure:
    """Return where the time of a prompt and of a token goes, in percent."""
    figure = _figure(380, barmode="group", bargap=0.25)
    lead, second = colors()[:2]
    for name, step, color in (("decode", decode, lead), ("prefill", prefill, second)):
        rows = [(one.name, one.seconds) for one in step.operations]
        rows.append(("overhead", step.overhead_s))
        figure.add_bar(
            y=[one for one, _ in rows],
            x=[100 * seconds / step.seconds for _, seconds in rows],
            orientation="h",
            name=f"{name}, {shown.duration(step.seconds)}",
            marker={"color": color},
            customdata=[[shown.duration(seconds)] for _, seconds in rows],
            hovertemplate="%{y}: %{customdata[0]}, %{x:.1f} %<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(title_text="share of the step, %")
    return figure


def against_measured(found: Accuracy) -> go.Figure:
    """Return the time a step really took over the time predicted; on the line they are equal."""
    figure = _figure(340)
    precisions = sorted({one.precision for one in found.setups})
    times = [t for one in found.setups for t in (one.predicted_s, one.measured_s)]
    ends = [1000 * min(times) / 1.6, 1000 * max(times) * 1.6]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="equal", line={"width": 1, "dash": "dot", "color": GREY},
        hoverinfo="skip",
    )  # fmt: skip
    for color, precision in zip(colors(), precisions, strict=False):
        for what, symbol in (("decode", "circle"), ("prefill", "diamond-open")):
            own = [one for one in found.setups
                   if (one.precision, one.what) == (precision, what)]  # fmt: skip
            if not own:
                continue
            figure.add_scatter(
                x=[1000 * one.predicted_s for one in own],
                y=[1000 * one.measured_s for one in own],
                mode="markers",
                name=f"{precision} {what}",
                marker={
                    "size": 9,
                    "symbol": symbol,
                    "color": color,
                    "line": {"width": 1 if symbol == "circle" else 2,
                             "color": surface() if symbol == "circle" else color},
                },
                customdata=[
                    [one.model, f"{one.tokens:,} × {one.batch:,}", f"{100 * one.residual:+.0f} %"]
                    for one in own
                ],
                hovertemplate=f"%{{customdata[0]}} {precision}, {what} %{{customdata[1]}}<br>"
                "%{x:.3~g} ms predicted, %{y:.3~g} ms measured, %{customdata[2]}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title_text="predicted, ms", type="log", dtick=1)
    figure.update_yaxes(title_text="measured, ms", type="log", dtick=1)
    return figure


def batches(replicas: Sequence[Replica], tpot_s: float, room: int, chosen: int | None) -> go.Figure:
    """Return what a replica gives and how long a token takes, over the texts it serves at once."""
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=2, horizontal_spacing=0.1)
    lead, second, third = colors()[:3]
    fitting = [one for one in replicas if one.memory_bytes <= room]
    panels: tuple[tuple[str, Callable[[Replica], float], str], ...] = (
        ("requests/s of a replica", lambda one: one.requests_per_s, lead),
        ("TPOT, ms (dashed: the objective)", lambda one: 1000 * one.tpot_s, second),
    )
    for column, (title, of, color) in enumerate(panels, start=1):
        figure.add_scatter(
            x=[one.batch for one in fitting],
            y=[of(one) for one in fitting],
            mode="lines+markers",
            line={"width": 2, "color": color},
            marker={"size": 5},
            hovertemplate=f"%{{x:,}} texts at once<br>%{{y:,.3~g}} {title}<extra></extra>",
            row=1,
            col=column,
        )
        planned = [one for one in fitting if one.batch == chosen]
        figure.add_scatter(
            x=[one.batch for one in planned],
            y=[of(one) for one in planned],
            mode="markers",
            marker={"size": 13, "color": third, "line": {"width": 2, "color": surface()}},
            hovertemplate=f"planned: %{{x:,}} texts at once<br>%{{y:,.3~g}} {title}<extra></extra>",
            row=1,
            col=column,
        )
        figure.update_yaxes(title_text=title, type="log", dtick=1, row=1, col=column)
        figure.update_xaxes(
            title_text="texts at once",
            type="log",
            tickvals=[4**power for power in range(7)],
            row=1,
            col=column,
        )
    figure.add_hline(
        y=1000 * tpot_s, row=1, col=2, line={"width": 1.5, "dash": "dash", "color": GREY}
    )
    figure.update_layout(height=300, showlegend=False, margin={"l": 8, "r": 16, "t": 24, "b": 8})
    return figure


def _short(gigabytes: float) -> str:
    """Return gigabytes for a narrow cell: ``0.6``, ``14``."""
    return f"{gigabytes:.0f}" if gigabytes >= 9.95 else f"{gigabytes:.1f}"


def _doublings(figure: go.Figure, values: Sequence[int]) -> None:
    """Let the x axis be logarithmic, with marks at powers of two."""
    low, high = max(1, min(values)).bit_length(), max(values).bit_length()
    marks = [2**power for power in range(low - 1, high + 1)]
    every = max(1, len(marks) // 8)
    figure.update_xaxes(
        type="log",
        tickvals=marks[::-1][::every],
        ticktext=[f"{one:,}" for one in marks[::-1][::every]],
        minor={"ticks": ""},
    )


def _clear(color: str, share: float) -> str:
    """Return ``#rrggbb`` as a colour that lets so much of what is behind it through."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"
