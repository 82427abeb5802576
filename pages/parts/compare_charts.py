"""The pictures of the compare page: gaps between tokens, and ratios with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gptcore.records import Run, Token
from pages.parts.plan_charts import GREY, colors, ink

if TYPE_CHECKING:
    import plotly.graph_objects as go

METRICS = {"prefill_s": "Prefill time", "decode_s": "Decode time", "energy_j": "Energy"}
GOOD, BAD = "#12a17c", "#d5455a"


def figure(height: int, **layout: Any) -> go.Figure:
    """Return an empty figure in the theme, with little around it."""
    import plotly.graph_objects as go

    made = go.Figure()
    made.update_layout(
        height=height,
        margin={"l": 8, "r": 16, "t": 8, "b": 8},
        showlegend=False,
        hoverlabel={"namelength": -1},
        **layout,
    )
    return made


def gaps(sides: Sequence[tuple[str, Run, Sequence[Token]]]) -> go.Figure:
    """Draw the inter-token latencies of each side as a box with its points, in milliseconds.

    Args:
        sides: letter, run, and its tokens.
    """
    made = figure(70 + 62 * len(sides), xaxis={"title": "Gap between two tokens, ms"})
    for (letter, run, tokens), color in zip(sides, colors(), strict=False):
        written = [token.seconds for token in tokens if not token.forced]
        made.add_box(
            x=[1000 * (after - before) for before, after in pairwise(written)],
            name=f"{letter} · {run.precision}",
            marker={"color": color, "size": 4},
            line={"width": 1.5},
            boxpoints="all",
            jitter=0.5,
            pointpos=0,
            hovertemplate="%{x:.1f} ms<extra>%{fullData.name}</extra>",
        )
    made.update_yaxes(autorange="reversed")
    return made


def firsts(sides: Sequence[tuple[str, Sequence[Run]]]) -> go.Figure:
    """Draw the times to first token of the last requests of each side's variant."""
    made = figure(70 + 62 * len(sides), xaxis={"title": "Time to first token, ms"})
    for (letter, runs), color in zip(sides, colors(), strict=False):
        known = [run.numbers.ttft_s for run in runs if run.numbers and run.numbers.ttft_s]
        made.add_box(
            x=[1000 * one for one in known],
            name=f"{letter} · {len(known)} requests",
            marker={"color": color, "size": 5},
            line={"width": 1.5},
            boxpoints="all",
            jitter=0.4,
            pointpos=0,
            hovertemplate="%{x:.1f} ms<extra>%{fullData.name}</extra>",
        )
    made.update_yaxes(autorange="reversed")
    return made


def cell_name(cell: Mapping[str, Any]) -> str:
    """Return a cell in a few letters: ``batch 4 · 128 + 32``."""
    return f"batch {cell['batch']} · {cell['prompt_tokens']:,} + {cell['new_tokens']:,}"


def metric_name(metric: str, energy: str) -> str:
    """Return what a number is called; an energy never stands without saying how it is known.

    Args:
        metric: its name.
        energy: the label of energies, such as ``estimated: processor seconds × 10 W a core``.
    """
    label = f" ({energy.partition(':')[0]})" if metric == "energy_j" else ""
    return METRICS.get(metric, metric) + label


def intervals(
    comparisons: Sequence[Mapping[str, Any]], floor: float | None, energy: str
) -> go.Figure:
    """Draw each cell's ratio to A with its interval; the band is this machine's noise."""

    def row(one: Mapping[str, Any]) -> str:
        return f"{one['side']} · {metric_name(one['metric'], energy)} · {cell_name(one['cell'])}"

    known = [one for one in comparisons if one["ratio"] is not None]
    rows = list(dict.fromkeys(map(row, known)))
    made = figure(
        64 + 30 * max(1, len(rows)),
        xaxis={"title": "Ratio to A (logarithmic)", "type": "log", "tickformat": ".2~f"},
        yaxis={"autorange": "reversed", "type": "category"},
    )
    if floor:
        made.add_vrect(x0=1 / floor, x1=floor, fillcolor=GREY, opacity=0.18, line_width=0)
    made.add_vline(x=1, line={"color": ink(), "width": 1, "dash": "dot"})
    for one in known:
        color = color_of(one) or GREY
        made.add_scatter(
            x=[one["ratio"]],
            y=[row(one)],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [one["high"] - one["ratio"]],
                "arrayminus": [one["ratio"] - one["low"]],
                "thickness": 2.5,
                "width": 5,
            },
            mode="markers",
            marker={"color": color, "size": 10},
            hovertemplate=f"{one['verdict']}<br>{one['ratio']:.3f} "
            f"({one['low']:.3f} to {one['high']:.3f})<extra>{row(one)}</extra>",
        )
    return made


def color_of(one: Mapping[str, Any]) -> str | None:
    """Return the colour of a verdict; None where none may be given: no claim, or only noise."""
    if not one["coloured"]:
        return None
    return GOOD if one["verdict"] in ("faster", "less") else BAD


def grid(comparisons: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw where a side wins and where it loses: batch by context, in the verdict's colour.

    Args:
        comparisons: one number of one side, one a cell.
    """
    at = {(one["cell"]["batch"], one["cell"]["prompt_tokens"]): one for one in comparisons}
    batches, contexts = (sorted(set(places)) for places in zip(*at, strict=True))
    shades = (None, GOOD, BAD)
    rows = [[at.get((batch, context)) for batch in batches] for context in contexts]
    made = figure(
        90 + 68 * len(contexts),
        xaxis={"title": "Batch", "type": "category", "showgrid": False},
        yaxis={"title": "Prompt, tokens", "type": "category", "showgrid": False},
    )
    made.add_heatmap(
        x=[f"{batch:,}" for batch in batches],
        y=[f"{context:,}" for context in contexts],
        z=[[None if one is None else shades.index(color_of(one)) for one in row] for row in rows],
        text=[["" if one is None else _in_a_cell(one) for one in row] for row in rows],
        customdata=[["" if one is None else one["sentence"] for one in row] for row in rows],
        texttemplate="%{text}",
        textfont={"color": ink(), "size": 13},
        hovertemplate="batch %{x} · %{y} tokens<br>%{customdata}<extra></extra>",
        zmin=0,
        zmax=2,
        colorscale=[
            [0, _pale(GREY, 0.14)],
            [1 / 3, _pale(GREY, 0.14)],
            [1 / 3, _pale(GOOD, 0.5)],
            [2 / 3, _pale(GOOD, 0.5)],
            [2 / 3, _pale(BAD, 0.5)],
            [1, _pale(BAD, 0.5)],
        ],
        showscale=False,
        xgap=3,
        ygap=3,
    )
    return made


def _in_a_cell(one: Mapping[str, Any]) -> str:
    ratio = "—" if one["ratio"] is None else f"{one['ratio']:.3f} ×"
    verdict = str(one["verdict"]).replace("detectable ", "detectable<br>")
    return f"<b>{ratio}</b><br>{verdict}"


def _pale(color: str, share: float) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {share})"


def blocks(cell: Mapping[str, Any], metric: str) -> go.Figure:
    """Draw every block of a cell in the order of the sides' turns, so that a drift is seen."""
    made = figure(
        220, xaxis={"title": "Block of each side"}, yaxis={"title": "ms", "rangemode": "tozero"}
    )
    made.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.15})
    scale, unit = (1.0, "J") if metric.endswith("_j") else (1000.0, "ms")
    made.update_yaxes(title=unit)
    for (side, values), color in zip(
        cell["blocks"].get(metric, {}).items(), colors(), strict=False
    ):
        made.add_scatter(
            x=list(range(1, len(values) + 1)),
            y=[scale * value for value in values],
            name=side,
            mode="lines+markers",
            line={"color": color, "width": 1.5},
            marker={"size": 5},
            hovertemplate=f"%{{y:.3g}} {unit}<extra>{side}</extra>",
        )
    return made
