"""What runs reached of what this machine can do: a roofline, and shares of the measured peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from gptcore.lab import Lab, Reached
from pages.parts import errors
from pages.parts import format as shown
from pages.parts.plan_charts import GREY, colors, ink, surface

if TYPE_CHECKING:
    import plotly.graph_objects as go

SYMBOLS = {"decode": "circle", "prefill": "diamond"}
MOST_ROOFS = 4
"""Bandwidths that are drawn, one a working set: the fastest, and the slowest."""
CLOSE = 1.15
"""Two bandwidths nearer to each other than this are one line."""
MOST_ROWS = 500
MOST_SVG = 2000
"""More marks than this are drawn by WebGL, which stays quick."""
MOST_TOLD = 5
ERROR = "#d5455a"
HOVER = (
    "%{customdata[0]}<br>%{customdata[1]}<br>MBU %{customdata[2]}, MFU %{customdata[3]}<br>"
    "%{x:.3~g} FLOP a byte, %{y:,.3~s} GFLOP/s<extra></extra>"
)


def ceilings(lab: Lab) -> None:
    """Draw every run under the roofs that were measured here."""
    found, silent = lab.reached()
    if not found:
        st.caption(
            ":material/info: No run says yet how many bytes it moved. Write something in the "
            "playground, or measure in Compare; `python -m gptcore bench` says most."
        )
        return
    devices = sorted({one.device for one in found})
    with st.container(horizontal=True, vertical_alignment="bottom"):
        device = st.selectbox("Device", devices, key="ceilings_device", width=160)
        models = st.multiselect(
            "Models",
            sorted({one.model for one in found if one.device == device}),
            key="ceilings_models",
            placeholder="Every model",
            width=320,
        )
    drawn = [one for one in found if one.device == device and (not models or one.model in models)]
    wrong = [one for one in drawn if one.problem]
    for one in wrong[:MOST_TOLD]:
        errors.show(one.problem or "")
    if len(wrong) > MOST_TOLD:
        st.caption(f"{len(wrong) - MOST_TOLD} more are above a ceiling; the table has them first.")
    st.plotly_chart(roofline(drawn), key="ceilings_chart", config={"displayModeBar": False})
    runs = len({one.run_id for one in drawn})
    left = f" {shown.whole(silent)} runs do not say how many bytes they moved." if silent else ""
    st.caption(
        f"{shown.whole(len(drawn))} stretches of {shown.whole(runs)} runs. MBU = bytes that must "
        "be read / seconds / measured peak bytes a second for a working set of that size; MFU = "
        "operations / seconds / measured peak operations a second. The best repetition of each "
        f"counts. A number above 100 % would be an error of ours.{left}"
    )
    st.dataframe(
        table(sorted(drawn, key=lambda one: one.problem is None)[:MOST_ROWS]),
        hide_index=True,
        column_config=_columns(),
        height=min(38 + 35 * len(drawn), 360),
    )


def table(found: Sequence[Reached]) -> dict[str, list[object]]:
    """Return the numbers behind the chart, column by column."""
    return {
        "": ["above its ceiling" if one.problem else "" for one in found],
        "At": [one.at for one in found],
        "Model": [one.model for one in found],
        "Precision": [one.precision for one in found],
        "What": [f"{one.what}, {one.cell}" for one in found],
        "MBU": [100 * one.mbu_ratio for one in found],
        "MFU": [None if one.mfu_ratio is None else 100 * one.mfu_ratio for one in found],
        "GB/s": [one.bytes_per_s / 1e9 for one in found],
        "GFLOP/s": [one.flop_per_s / 1e9 for one in found],
        "Bound by": [one.bound for one in found],
        "Kind": [one.kind for one in found],
        "Run": [one.run_id for one in found],
    }


def _columns() -> dict[str, Any]:
    number = st.column_config.NumberColumn
    return {
        "": st.column_config.TextColumn(width=130),
        "At": st.column_config.DatetimeColumn(
            "At", format="MMM DD, HH:mm", timezone=st.context.timezone or "UTC"
        ),
        "MBU": number("MBU, %", format="%.1f"),
        "MFU": number("MFU, %", format="%.1f"),
        "GB/s": number(format="%.2f"),
        "GFLOP/s": number(format="%.1f"),
    }


def roofline(found: Sequence[Reached]) -> go.Figure:
    """Return stretches of work by operations a byte, under the roofs that each is held against."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        height=460,
        margin={"l": 8, "r": 16, "t": 28, "b": 8},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        hoverlabel={"namelength": -1},
    )
    left = min(one.intensity for one in found) / 2
    right = max(10 * left, 2 * max(one.intensity for one in found))
    _roofs(figure, found, left, right)
    variants = list(dict.fromkeys((one.model, one.precision) for one in found))
    palette = colors()
    marks = go.Scattergl if len(found) > MOST_SVG else go.Scatter
    for at, (model, precision) in enumerate(variants):
        for what, symbol in SYMBOLS.items():
            mine = [
                one
                for one in found
                if (one.model, one.precision, one.what) == (model, precision, what)
            ]
            if mine:
                color = palette[at] if at < len(palette) else GREY
                figure.add_trace(
                    marks(
                        x=[one.intensity for one in mine],
                        y=[one.flop_per_s / 1e9 for one in mine],
                        mode="markers",
                        name=f"{model} {precision}, {what}",
                        marker={
                            "color": [ERROR if one.problem else color for one in mine],
                            "symbol": ["x" if one.problem else symbol for one in mine],
                            "size": [14 if one.problem else 10 for one in mine],
                            "opacity": 0.8,
                            "line": {"width": 1, "color": surface()},
                        },
                        customdata=[_hover(one) for one in mine],
                        hovertemplate=HOVER,
                    )
                )
    figure.update_xaxes(title_text="Intensity, FLOP a byte", type="log", dtick=1)
    figure.update_yaxes(title_text="Reached, GFLOP/s", type="log", dtick=1)
    return figure


def _hover(one: Reached) -> list[str]:
    mfu = "unknown" if one.mfu_ratio is None else shown.share(one.mfu_ratio)
    return [
        f"{one.model} {one.precision}, {one.what}",
        f"{one.cell}, {one.kind} {one.run_id}",
        shown.share(one.mbu_ratio),
        mfu,
    ]


def _roofs(figure: go.Figure, found: Sequence[Reached], left: float, right: float) -> None:
    """Draw the peaks that the work is held against: bytes a second aslant, operations level."""
    computes = {one.dtype: one.peak_flop_per_s for one in found if one.peak_flop_per_s}
    bandwidths: list[float] = []
    for one in sorted({one.peak_bytes_per_s for one in found}, reverse=True):
        if not bandwidths or one < bandwidths[-1] / CLOSE:
            bandwidths.append(one)
    if len(bandwidths) > MOST_ROOFS:
        bandwidths = [*bandwidths[: MOST_ROOFS - 1], bandwidths[-1]]
    top = max(computes.values(), default=right * bandwidths[0])
    line = {"width": 1.5, "color": GREY}
    for bandwidth in bandwidths:
        end = min(right, top / bandwidth)
        figure.add_scatter(
            x=[left, end],
            y=[left * bandwidth / 1e9, end * bandwidth / 1e9],
            mode="lines",
            line=line,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_annotation(
            x=math.log10(left),
            y=math.log10(left * bandwidth / 1e9),
            text=f"{bandwidth / 1e9:.0f} GB/s",
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            font={"color": ink(), "size": 11},
        )
    for dtype, peak in computes.items():
        start = peak / bandwidths[0]
        figure.add_scatter(
            x=[min(start, right / 3), right],
            y=[peak / 1e9] * 2,
            mode="lines",
            line=line,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_annotation(
            x=math.log10(right / 1.1),
            y=math.log10(peak / 1e9),
            text=f"{dtype} {peak / 1e9:,.0f} GFLOP/s",
            showarrow=False,
            xanchor="right",
            yanchor="bottom",
            font={"color": ink(), "size": 11},
        )
