"""The pictures of a proof: ratios with intervals, damage layer by layer, weights, all variants."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptcore.lab import Point
from pages.parts import format as shown
from pages.parts.compare_charts import BAD, GOOD, cell_name, figure
from pages.parts.plan_charts import GREY, colors, ink

if TYPE_CHECKING:
    import plotly.graph_objects as go


def axis_name(one: Mapping[str, Any]) -> str:
    """Return an axis as a row is called: ``Decode · batch 1 · 128 + 32``."""
    return f"{one['title']} · {cell_name(one['cell'])}" if one["cell"] else str(one["title"])


def axes(card: Mapping[str, Any]) -> go.Figure:
    """Draw every axis as B ÷ A with its interval; left of 1 is better on all of them."""
    known = [one for one in card["axes"] if one["ratio"]]
    made = figure(
        70 + 27 * max(1, len(known)),
        xaxis={"title": "B ÷ A, logarithmic: left is less time, fewer bytes", "type": "log"},
        yaxis={"autorange": "reversed", "type": "category"},
    )
    made.update_xaxes(tickformat=".2~f")
    if floor := card.get("noise_floor"):
        made.add_vrect(x0=1 / floor, x1=floor, fillcolor=GREY, opacity=0.18, line_width=0)
    made.add_vline(x=1, line={"color": ink(), "width": 1, "dash": "dot"})
    for one in known:
        color = (GOOD if one["good"] else BAD) if one["coloured"] else GREY
        made.add_scatter(
            x=[one["ratio"]],
            y=[axis_name(one)],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [(one["high"] or one["ratio"]) - one["ratio"]],
                "arrayminus": [one["ratio"] - (one["low"] or one["ratio"])],
                "thickness": 2.5,
                "width": 5,
            },
            mode="markers",
            marker={
                "color": color,
                "size": 10,
                "symbol": "diamond" if one["p"] is None else "circle",
            },
            hovertemplate=f"{one['verdict']}<br>{one['ratio']:.3f}<extra>{axis_name(one)}</extra>",
        )
    return made


def damage(found: Mapping[str, Any]) -> go.Figure:
    """Draw signal to noise behind each block, and what each block alone adds."""
    stream = [one for one in found["stream"] if one["blocks"]]
    made = figure(
        260,
        xaxis={"title": "Behind block"},
        yaxis={"title": "Signal to noise of the stream, dB"},
        yaxis2={
            "title": "Error of the block alone",
            "overlaying": "y",
            "side": "right",
            "rangemode": "tozero",
            "showgrid": False,
            "tickformat": ".2%",
        },
    )
    blocks = [one["blocks"] for one in stream]
    first, second = colors()[:2]
    made.add_bar(
        x=blocks,
        y=[one["introduced_ratio"] for one in stream],
        yaxis="y2",
        marker={"color": second, "opacity": 0.55},
        hovertemplate="block %{x} alone: %{y:.2%}<extra></extra>",
    )
    made.add_scatter(
        x=blocks,
        y=[one["snr_db"] for one in stream],
        mode="lines+markers",
        line={"color": first, "width": 2},
        hovertemplate="behind block %{x}: %{y:.1f} dB<extra></extra>",
    )
    return made


def layers(found: Mapping[str, Any]) -> go.Figure:
    """Draw the signal-to-noise ratio of each layer's weights as a map: kinds × blocks."""
    rows: dict[str, dict[int, float | None]] = {}
    for one in found["layers"]:
        parts = one["layer"].split(".")
        block = int(parts[1]) if parts[0] == "blocks" else 0
        rows.setdefault(parts[-1], {})[block] = one["snr_db"]
    blocks = range(1 + max((at for row in rows.values() for at in row), default=0))
    import plotly.graph_objects as go

    made = figure(
        90 + 26 * len(rows),
        xaxis={"title": "Block (the head stands at 0)"},
        yaxis={"autorange": "reversed", "type": "category"},
    )
    made.add_trace(
        go.Heatmap(
            z=[[row.get(at) for at in blocks] for row in rows.values()],
            x=list(blocks),
            y=list(rows),
            colorscale="Viridis",
            colorbar={"title": {"text": "dB"}, "thickness": 12},
            hovertemplate="%{y} of block %{x}: %{z:.1f} dB<extra></extra>",
        )
    )
    return made


def weights(kind: str, found: Mapping[str, Any]) -> go.Figure:
    """Draw how the weights of a kind of layer lie before and after."""
    made = figure(220, xaxis={"title": f"Weight ({kind})"}, yaxis={"title": "Share of weights"})
    made.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.18}, bargap=0)
    count = len(found["before"])
    step = (found["high"] - found["low"]) / count
    middles = [found["low"] + step * (at + 0.5) for at in range(count)]
    for name, color in zip(("before", "after"), colors(), strict=False):
        total = sum(found[name]) or 1
        made.add_scatter(
            x=middles,
            y=[one / total for one in found[name]],
            name=name,
            mode="lines",
            line={"color": color, "width": 2, "shape": "hvh"},
            fill="tozeroy" if name == "before" else None,
            hovertemplate="%{x:.4f}: %{y:.2%}<extra>" + name + "</extra>",
        )
    return made


def pareto(points: Sequence[Point], best: Collection[str]) -> go.Figure:
    """Draw speed against KL, dots as large as the variant; those that none beats are joined."""
    made = figure(
        380,
        xaxis={"title": "Decode, times as fast as its baseline"},
        yaxis={"title": "KL to its baseline, nats a token", "type": "log"},
    )
    first, second = colors()[:2]
    joined = sorted(
        (one for one in points if one.run_id in best), key=lambda one: (one.speedup, one.kl_nats)
    )
    made.add_scatter(
        x=[one.speedup for one in joined],
        y=[max(one.kl_nats, 1e-6) for one in joined],
        mode="lines",
        line={"color": first, "width": 1, "dash": "dot"},
        hoverinfo="skip",
    )
    made.add_scatter(
        x=[one.speedup for one in points],
        y=[max(one.kl_nats, 1e-6) for one in points],
        customdata=[one.run_id for one in points],
        mode="markers",
        marker={
            "size": [10 + 26 * min(1.0, one.size_ratio) for one in points],
            "color": [first if one.run_id in best else GREY for one in points],
            "opacity": 0.75,
            "line": {
                "color": second,
                "width": [3 if one.accepted is False else 0 for one in points],
            },
        },
        text=[f"{one.model}<br>{one.recipe}<br>{one.size_ratio:.2f} × the bytes" for one in points],
        hovertemplate="%{text}<br>%{x:.2f} × as fast, KL %{y:.4g}<extra></extra>",
    )
    return made


def rows(points: Sequence[Point], best: Collection[str]) -> list[dict[str, Any]]:
    """Return the table beside the chart."""
    return [
        {
            "Variant": one.model,
            "Recipe": one.recipe,
            "Baseline": one.baseline,
            "Decode ×": one.speedup,
            "KL, nats": one.kl_nats,
            "Size ×": one.size_ratio,
            "Beaten by none": one.run_id in best,
            "Goals": {True: "met", False: "not met", None: shown.UNKNOWN}[one.accepted],
        }
        for one in points
    ]
