"""The charts of the explain page; each takes what gptcore.explain found and returns a figure.

Tokens are written by models and users: they stand in charts through ``label`` alone, in which no
character is markup.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcore.explain.step import Draws, Step
from pages.parts import format as shown
from pages.parts.compare_charts import figure
from pages.parts.plan_charts import GREY, colors, ink, surface

if TYPE_CHECKING:
    import plotly.graph_objects as go

Array = NDArray[Any]
LABEL_CHARS = 12
NAMED_TOKENS = 64
"""Texts of more tokens have numbers on their axis, and the words in the hover."""
WORDS_IN_CELLS = 14
MARKS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})
TEMPERATURE_MARK = {"width": 1, "dash": "dot", "color": GREY}
METHODS = {"leave_one_out": "Leaving it out", "gradients": "Integrated gradients"}
PARTS = {"attention": "Attention", "mlp": "MLP", "block": "Whole layer"}


def label(text: str, most: int = LABEL_CHARS) -> str:
    """Return a token for a chart: short, white space seen, nothing in it markup."""
    bare = text[1:] if len(text) > 1 and text[0] == " " and text[1] != " " else text
    seen = bare[: 4 * most].translate(MARKS) or "∅"
    seen = "".join(one if one.isprintable() else "·" for one in seen)
    return plain(seen if len(seen) <= most else f"{seen[: most - 1]}…")


def plain(text: str) -> str:
    """Return text in which Plotly finds no markup; it knows no entity for quotation marks."""
    return html.escape(text, quote=False)


def labels(texts: Sequence[str]) -> list[str]:
    """Return the labels of a text's tokens."""
    return [label(one) for one in texts]


def _token_axis(axis: dict[str, Any], texts: Sequence[str]) -> None:
    """Let an axis name a text's tokens where there is room for them."""
    if len(texts) <= NAMED_TOKENS:
        axis |= {"tickvals": list(range(len(texts))), "ticktext": labels(texts)}


def _places(texts: Sequence[str]) -> list[str]:
    """Return the tokens with their positions, for axes that name each in the hover."""
    return [f"{at}: {one}" for at, one in enumerate(labels(texts))]


def _place_axis(texts: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return an axis of ``_places``: words where there is room, else some positions."""
    names = _places(texts)
    few = len(texts) <= NAMED_TOKENS
    step = 1 if few else 64
    return {
        "type": "category",
        "tickvals": names[::step],
        "ticktext": labels(texts) if few else list(range(0, len(texts), step)),
        "showgrid": False,
        **more,
    }


def _from_surface(color: str) -> list[list[Any]]:
    return [[0, surface()], [1, color]]


def _faint_seen(color: str) -> list[list[Any]]:
    """Return a scale that spends 40 % of its colour on the lowest tenth, where most heads lie."""
    low, high = (_channels(one) for one in (surface(), color))
    early = (low + 0.4 * (high - low)).round().astype(int)
    return [[0, surface()], [0.1, f"rgb({','.join(map(str, early))})"], [1, color]]


def _channels(color: str) -> Array:
    """Return red, green and blue of ``#rrggbb``, 0 to 255."""
    return np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)], dtype=np.float32)


def _both_ways() -> list[list[Any]]:
    return [[0, colors()[4]], [0.5, surface()], [1, colors()[0]]]


# One step


def probabilities(step: Step, words: Mapping[int, str]) -> go.Figure:
    """Return the tokens of a step by probability, before and after all samplers."""
    rows = step.rows
    made = figure(28 * len(rows) + 86, barmode="group", bargap=0.3, bargroupgap=0.05)
    axis = list(range(len(rows)))
    for name, stage, color in (("model", 0, GREY), ("drawn from", -1, colors()[0])):
        made.add_bar(
            y=axis,
            x=[100 * row.probabilities[stage] for row in rows],
            name=name,
            orientation="h",
            marker={"color": color},
            customdata=[label(words[row.id], 30) for row in rows],
            hovertemplate=f"%{{customdata}}, {name}<br>%{{x:.2f}} %<extra></extra>",
        )
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        margin={"l": 8, "r": 16, "t": 30, "b": 8},
    )
    made.update_yaxes(
        tickvals=axis,
        ticktext=[label(words[row.id]) for row in rows],
        autorange="reversed",
        showgrid=False,
    )
    made.update_xaxes(title_text="probability, %", rangemode="tozero")
    return made


def histogram(step: Step, draws: Draws, words: Mapping[int, str]) -> go.Figure:
    """Return how often each token was drawn, against how often its probability expects it."""
    rows = [row for row in step.rows if row.removed_by is None]
    ids = [row.id for row in rows]
    counts = [draws.counts.get(id, 0) for id in ids]
    expected = [draws.times * row.probabilities[-1] for row in rows]
    names = [label(words[id]) for id in ids]
    rest = draws.times - sum(counts)
    rest_expected = draws.times - sum(expected)
    if rest or rest_expected > 0.5:
        names.append("all others")
        counts.append(rest)
        expected.append(rest_expected)
    made = figure(28 * len(names) + 86, bargap=0.3)
    axis = list(range(len(names)))
    made.add_bar(
        y=axis,
        x=counts,
        name="drawn",
        orientation="h",
        marker={"color": colors()[0]},
        customdata=names,
        hovertemplate="%{customdata}<br>drawn %{x} times<extra></extra>",
    )
    made.add_scatter(
        y=axis,
        x=expected,
        name="expected",
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 15, "color": ink(), "line": {"width": 2}},
        customdata=names,
        hovertemplate="%{customdata}<br>expected %{x:.1f} times<extra></extra>",
    )
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        margin={"l": 8, "r": 16, "t": 30, "b": 8},
    )
    made.update_yaxes(tickvals=axis, ticktext=names, autorange="reversed", showgrid=False)
    made.update_xaxes(title_text=f"of {draws.times:,} draws", rangemode="tozero")
    return made


def over_temperature(
    temperatures: Sequence[float],
    entropies: Array,
    shares: Array,
    names: Sequence[str],
    chosen: float,
) -> go.Figure:
    """Return how entropy and the likeliest tokens move with the temperature.

    Args:
        temperatures: N of them.
        entropies: (N,), in bits.
        shares: (N, I), probabilities of some tokens.
        names: the I tokens.
        chosen: the temperature that is set.
    """
    made = figure(330)
    for at, (name, color) in enumerate(zip(names, colors(), strict=False)):
        made.add_scatter(
            x=list(temperatures),
            y=100 * shares[:, at],
            name=label(name),
            line={"width": 1.75, "color": color},
            hovertemplate=f"{label(name)} %{{y:.1f}} %<extra></extra>",
        )
    made.add_scatter(
        x=list(temperatures),
        y=entropies,
        name="entropy",
        yaxis="y2",
        line={"width": 1.5, "dash": "dash", "color": ink()},
        hovertemplate="entropy %{y:.2f} bits<extra></extra>",
    )
    made.add_vline(x=chosen, line=TEMPERATURE_MARK)
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 8, "t": 48, "b": 8},
        hovermode="x unified",
        yaxis={"title": {"text": "probability, %"}, "range": [0, 102]},
        yaxis2={
            "title": {"text": "entropy, bits"},
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "rangemode": "tozero",
            "tickmode": "auto",
            "nticks": 6,
        },
    )
    made.update_xaxes(title_text="temperature")
    return made


# Attention


def attention_map(weights: Array, texts: Sequence[str], query: int) -> go.Figure:
    """Return what each token (a row) looks at (its columns), of one head.

    Args:
        weights: (T, T).
        texts: the T tokens.
        query: the row that the numbers below are about.
    """
    size = len(texts)
    drawn = np.where(np.tri(size, dtype=bool), 100 * weights, np.nan).astype(np.float32)
    made = figure(max(320, min(560, 24 * size + 90)))
    names = _places(texts)
    made.add_heatmap(
        x=names,
        y=names,
        z=drawn,
        colorscale=_from_surface(colors()[0]),
        zmin=0,
        # Over many tokens no weight comes near 100 %: the brightest of two hundred is full colour.
        zmax=float(np.nanpercentile(drawn, 99.5)),
        showscale=False,
        hoverongaps=False,
        hovertemplate="%{y} looks at %{x}<br>%{z:.1f} %<extra></extra>",
    )
    made.add_shape(
        type="rect",
        x0=-0.5,
        x1=query + 0.5,
        y0=query - 0.5,
        y1=query + 0.5,
        line={"width": 1.5, "color": colors()[2]},
    )
    made.update_layout(
        xaxis=_place_axis(texts, title={"text": "looked at (key)"}),
        yaxis=_place_axis(texts, title={"text": "looking (query)"}, autorange="reversed"),
    )
    return made


def all_heads(
    small: Array, heads: Sequence[int], notes: Sequence[str], layer: int, head: int
) -> go.Figure:
    """Return a small picture of every head, layers across and heads down; a click picks one.

    Args:
        small: (L, H, N, N) uint8, 255 is all the attention of a row.
        heads: how many heads each layer has.
        notes: what the hover tells of each head, layer by layer.
        layer: the chosen one.
        head: the chosen one.
    """
    layers, most, size, _ = small.shape
    step = size + max(2, size // 10)
    canvas = np.full((most * step, layers * step), np.nan, dtype=np.float32)
    for at in range(layers):
        for one in range(heads[at]):
            picture = small[at, one] / 255.0
            canvas[one * step : one * step + size, at * step : at * step + size] = np.where(
                np.tri(size, dtype=bool),
                picture**0.6,
                0,  # faint attention stays to be seen
            )
    made = figure(min(620, max(150, 34 * most + 60)))
    made.add_layout_image(
        source=_png(canvas),
        xref="x",
        yref="y",
        x=-0.5,
        y=-0.5,
        sizex=layers,
        sizey=most,
        sizing="stretch",
        layer="below",
    )
    places = [(at, one) for at in range(layers) for one in range(heads[at])]
    gap = (step - size) / step
    made.add_scatter(
        x=[at - gap / 2 for at, _ in places],
        y=[one - gap / 2 for _, one in places],
        mode="markers",
        marker={"size": 22, "symbol": "square", "color": "rgba(0,0,0,0)"},
        customdata=[[at, one] for at, one in places],
        text=list(notes),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>%{text}<extra></extra>",
    )
    made.add_shape(
        type="rect",
        x0=layer - 0.5,
        x1=layer + 0.5 - gap,
        y0=head - 0.5,
        y1=head + 0.5 - gap,
        line={"width": 2, "color": colors()[2]},
    )
    every = max(1, layers // 16)
    made.update_xaxes(
        title_text="layer",
        range=[-0.5, layers - 0.5],
        tickvals=list(range(0, layers, every)),
        showgrid=False,
        zeroline=False,
    )
    made.update_yaxes(
        title_text="head",
        range=[most - 0.5, -0.5],
        tickvals=list(range(0, most, max(1, most // 12))),
        showgrid=False,
        zeroline=False,
    )
    made.update_layout(clickmode="event+select", dragmode=False)
    return made


def _png(canvas: Array) -> str:
    """Return a picture from the page's background (0) to its accent (1), gaps see-through."""
    from PIL import Image

    low, high = (_channels(one) for one in (surface(), colors()[0]))
    share = np.nan_to_num(canvas)[..., None]
    pixels = np.empty((*canvas.shape, 4), dtype=np.uint8)
    pixels[..., :3] = low + share * (high - low)
    pixels[..., 3] = np.where(np.isnan(canvas), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def vectors(named: Mapping[str, Array], texts: Sequence[str]) -> go.Figure:
    """Return Q, K and V of one head as they are: tokens down, dimensions across."""
    from plotly.subplots import make_subplots

    made = make_subplots(
        rows=1,
        cols=len(named),
        subplot_titles=list(named),
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    for column, (name, table) in enumerate(named.items(), start=1):
        most = float(np.abs(table).max()) or 1.0
        made.add_heatmap(
            y=_places(texts),
            z=table.astype(np.float32),
            colorscale=_both_ways(),
            zmin=-most,
            zmax=most,
            showscale=False,
            hovertemplate=f"{name} of %{{y}}, dimension %{{x}}<br>%{{z:.3f}}<extra></extra>",
            row=1,
            col=column,
        )
    made.update_layout(
        height=max(220, min(460, 20 * len(texts) + 90)),
        margin={"l": 8, "r": 16, "t": 28, "b": 8},
    )
    made.update_yaxes(_place_axis(texts, autorange="reversed"))
    made.update_xaxes(showgrid=False, title_text="dimension")
    made.update_annotations(font_size=13)
    return made


# Lens


def lens_map(
    values: Array,
    words: Sequence[Sequence[Sequence[tuple[str, float]]]],
    texts: Sequence[str],
    unit: str,
) -> go.Figure:
    """Return what the model would say after each layer (rows) at each token (columns).

    Args:
        values: (L + 1, T), what is coloured.
        words: by depth and position, the candidates with their probabilities.
        texts: the T tokens.
        unit: of the values.
    """
    depths, length = values.shape
    in_cells = length <= WORDS_IN_CELLS
    is_share = unit == "%"
    made = figure(max(320, 21 * depths + 90))
    made.add_heatmap(
        z=values.round(3),
        colorscale=_from_surface(colors()[0]),
        zmin=0,
        zmax=100 if is_share else None,
        showscale=not in_cells or not is_share,
        colorbar={"thickness": 10, "title": {"text": unit}},
        text=[[label(cell[0][0], 9) for cell in row] for row in words] if in_cells else None,
        texttemplate="%{text}" if in_cells else None,
        textfont={"size": 11},
        customdata=[
            ["<br>".join(f"{label(word, 24)} {100 * p:.1f} %" for word, p in cell) for cell in row]
            for row in words
        ],
        hovertemplate=f"after %{{y}} layers<br>%{{customdata}}<br>%{{z:.2f}} {unit}"
        "<extra></extra>",
    )  # fmt: skip
    across: dict[str, Any] = {"showgrid": False, "side": "top"}
    _token_axis(across, texts)
    made.update_layout(
        xaxis=across,
        yaxis={"title": {"text": "layers that have run"}, "showgrid": False, "dtick": 5},
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    return made


def decision(final: Array, following: Array) -> go.Figure:
    """Return how the last position makes up its mind, layer by layer.

    Args:
        final: (L + 1,), probability of what the model says in the end.
        following: (L + 1,), entropy in bits.
    """
    made = figure(260)
    depth = list(range(len(final)))
    made.add_scatter(
        x=depth,
        y=100 * final,
        name="probability of the final word",
        line={"width": 2, "color": colors()[0]},
        hovertemplate="after %{x} layers %{y:.1f} %<extra></extra>",
    )
    made.add_scatter(
        x=depth,
        y=following,
        name="entropy",
        yaxis="y2",
        line={"width": 1.5, "dash": "dash", "color": GREY},
        hovertemplate="entropy %{y:.1f} bits<extra></extra>",
    )
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 8, "t": 30, "b": 8},
        yaxis={"title": {"text": "probability, %"}, "range": [0, 102]},
        yaxis2={
            "title": {"text": "entropy, bits"},
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "rangemode": "tozero",
            "tickmode": "auto",
            "nticks": 6,
        },
    )
    made.update_xaxes(title_text="layers that have run")
    return made


# Attribution


def scores(methods: Mapping[str, Mapping[str, Any]], texts: Sequence[str]) -> go.Figure:
    """Return how much each token speaks for the prediction, a row a method."""
    from plotly.subplots import make_subplots

    made = make_subplots(
        rows=len(methods),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.14,
        subplot_titles=[METHODS[name] for name in methods],
    )
    for row, (name, found) in enumerate(methods.items(), start=1):
        trusted = found.get("reliable", True)
        made.add_bar(
            x=list(range(len(texts))),
            y=found["scores"],
            marker={
                "color": [colors()[0] if one >= 0 else colors()[4] for one in found["scores"]],
                "opacity": 1 if trusted else 0.4,
            },
            customdata=labels(texts),
            hovertemplate=f"%{{customdata}}<br>{METHODS[name]}: %{{y:.3f}} nats<extra></extra>",
            row=row,
            col=1,
        )
        made.update_yaxes(title_text="nats", row=row, col=1)
    axis: dict[str, Any] = {}
    _token_axis(axis, texts)
    made.update_xaxes(axis, row=len(methods), col=1)
    made.update_layout(
        height=60 + 200 * len(methods),
        showlegend=False,
        bargap=0.25,
        margin={"l": 8, "r": 16, "t": 28, "b": 8},
    )
    made.update_annotations(font_size=13)
    return made


def deletions(result: Mapping[str, Any]) -> go.Figure:
    """Return the prediction's probability while tokens are taken out, by each method's order."""
    made = figure(300)
    removed = result["removed"]
    for curve in result["random"]:
        made.add_scatter(
            x=removed,
            y=[100 * one for one in curve],
            mode="lines",
            line={"width": 1, "color": GREY},
            opacity=0.5,
            showlegend=False,
            hoverinfo="skip",
        )
    made.add_scatter(
        x=removed,
        y=[100 * float(one) for one in np.mean(result["random"], axis=0)],
        name="random orders, mean",
        mode="lines",
        line={"width": 1.75, "dash": "dash", "color": GREY},
        hovertemplate="random: %{y:.1f} %<extra></extra>",
    )
    for (name, found), color in zip(result["methods"].items(), colors(), strict=False):
        made.add_scatter(
            x=removed,
            y=[100 * one for one in found["deletion"]],
            name=METHODS[name],
            line={"width": 2.25, "color": color},
            hovertemplate=f"{METHODS[name]}: %{{y:.1f}} %<extra></extra>",
        )
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 16, "t": 46, "b": 8},
        hovermode="x unified",
    )
    made.update_xaxes(title_text="tokens taken out, the highest score first")
    made.update_yaxes(title_text="probability, %", rangemode="tozero")
    return made


# Heads and layers switched off


def worth_map(parts: Sequence[Mapping[str, Any]], layers: int, value: str) -> go.Figure:
    """Return what each head is worth, layers across and heads down."""
    heads = [one for one in parts if one["part"] == "head"]
    most = 1 + max(one["head"] for one in heads)
    table = np.full((most, layers), np.nan)
    for one in heads:
        table[one["head"], one["layer"]] = one[value]
    signed = value == "loss_change"
    far = float(np.nanmax(np.abs(table))) or 1.0
    made = figure(max(220, min(560, 26 * most + 90)))
    made.add_heatmap(
        z=table,
        colorscale=_both_ways() if signed else _faint_seen(colors()[0]),
        zmin=-far if signed else 0,
        zmax=far,
        hoverongaps=False,
        colorbar={"thickness": 10, "title": {"text": "nats"}},
        hovertemplate="layer %{x}, head %{y}<br>%{z:.4f} nats a token<extra></extra>",
    )
    made.update_xaxes(title_text="layer", showgrid=False, range=[-0.5, layers - 0.5])
    made.update_yaxes(title_text="head", showgrid=False, autorange="reversed", dtick=1)
    return made


def layer_bars(parts: Sequence[Mapping[str, Any]], layers: int) -> go.Figure:
    """Return how the loss changes without each layer, and without its parts."""
    made = figure(300)
    for (part, name), color in zip(PARTS.items(), colors(), strict=False):
        rows = [one for one in parts if one["part"] == part]
        made.add_scatter(
            x=[one["layer"] for one in rows],
            y=[one["loss_change"] for one in rows],
            error_y={"array": [one["standard_error"] for one in rows], "thickness": 1, "width": 0},
            name=name,
            mode="lines+markers",
            marker={"size": 5},
            line={"width": 1.5, "color": color},
            hovertemplate=f"layer %{{x}}, {name.lower()}<br>%{{y:+.3f}} nats a token"
            "<extra></extra>",
        )
    made.add_hline(y=0, line={"width": 1, "color": GREY})
    made.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 16, "t": 30, "b": 8},
    )
    made.update_xaxes(title_text="layer switched off", range=[-0.5, layers - 0.5])
    made.update_yaxes(title_text="change of the loss, nats a token")
    return made


# Difference


def layer_errors(layers: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Return the relative error of the stream behind each block, and what each block adds."""
    made = figure(320)
    made.add_bar(
        x=[one["blocks"] for one in layers],
        y=[None if one["introduced"] is None else 100 * one["introduced"] for one in layers],
        name="introduced by this layer alone",
        marker={"color": colors()[1]},
        hovertemplate="layer %{x} alone %{y:.3g} %<extra></extra>",
    )
    made.add_scatter(
        x=[one["blocks"] for one in layers],
        y=[100 * one["accumulated"] for one in layers],
        customdata=[one["cosine"] for one in layers],
        name="accumulated",
        line={"width": 2, "color": colors()[0]},
        hovertemplate="after %{x} layers %{y:.3g} %, cosine %{customdata:.5f}<extra></extra>",
    )
    made.update_layout(
        showlegend=True,
        legend={
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "x": 0,
            "traceorder": "reversed",
        },
        margin={"l": 8, "r": 16, "t": 30, "b": 8},
        bargap=0.3,
    )
    made.update_xaxes(title_text="layers that have run (0: embedding)")
    made.update_yaxes(title_text="error of the stream, %", rangemode="tozero")
    return made


def divergences(result: Mapping[str, Any], texts: Sequence[str]) -> go.Figure:
    """Return the divergence of the next token after every position."""
    made = figure(280)
    apart = [a != b for a, b in zip(result["a"], result["b"], strict=True)]
    made.add_bar(
        x=list(range(len(texts))),
        y=result["kl_nats"],
        marker={"color": [colors()[4] if one else colors()[0] for one in apart]},
        customdata=[
            [label(text), label(a, 24), label(b, 24)]
            for text, a, b in zip(texts, result["a"], result["b"], strict=True)
        ],
        hovertemplate="after %{customdata[0]}<br>%{y:.4f} nats<br>A says %{customdata[1]}, "
        "B says %{customdata[2]}<extra></extra>",
    )
    axis: dict[str, Any] = {}
    _token_axis(axis, texts)
    made.update_xaxes(axis)
    made.update_yaxes(title_text="KL(A ‖ B), nats", rangemode="tozero")
    return made


# Profile


def operations(rows: Sequence[Mapping[str, Any]], step_s: float, named: int) -> go.Figure:
    """Return the operations of a decode step by time, the longest first."""
    drawn = rows[: max(named, 8)]
    rest = step_s - sum(one["seconds"] for one in drawn)
    names = [one["name"] for one in drawn] + ["all others"]
    seconds = [*(one["seconds"] for one in drawn), max(0.0, rest)]
    calls = [f"{one['calls']:g} calls a step" for one in drawn] + [""]
    made = figure(28 * len(names) + 70, bargap=0.3)
    made.add_bar(
        y=list(range(len(names))),
        x=[1000 * one for one in seconds],
        orientation="h",
        marker={"color": [colors()[0]] * named + [GREY] * (len(names) - named)},
        text=[shown.share(one / step_s) for one in seconds],
        textposition="outside",
        cliponaxis=False,
        customdata=[plain(f"{name}: {call}") for name, call in zip(names, calls, strict=True)],
        hovertemplate="%{customdata}<br>%{x:.3f} ms<extra></extra>",
    )
    made.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[plain(shown.one_line(one, 44)) for one in names],
        autorange="reversed",
        showgrid=False,
    )
    made.update_xaxes(title_text="of a step, ms", rangemode="tozero")
    made.update_layout(margin={"l": 8, "r": 60, "t": 8, "b": 8})
    return made
