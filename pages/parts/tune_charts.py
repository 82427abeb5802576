"""The pictures of a search: history, the front, what matters, and all settings at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pages.parts.compare_charts import figure
from pages.parts.plan_charts import GREY, colors, ink

if TYPE_CHECKING:
    import plotly.graph_objects as go

Trial = Mapping[str, Any]


def settings_text(trial: Trial) -> str:
    """Return a trial's settings as lines of a hover."""
    return "<br>".join(f"{name} = {value}" for name, value in trial["settings"].items())


def history(trials: Sequence[Trial], objective: Mapping[str, Any]) -> go.Figure:
    """Draw an objective over the trials, with the best so far as a line."""
    name, sign = objective["name"], -1 if objective["direction"] == "maximize" else 1
    known = [one for one in trials if name in one["values"]]
    first, second = colors()[:2]
    made = figure(240, xaxis={"title": "Trial"}, yaxis={"title": objective["title"]})
    made.add_scatter(
        x=[one["number"] for one in known],
        y=[one["values"][name] for one in known],
        mode="markers",
        marker={"color": [first if one["within_limits"] else GREY for one in known], "size": 8},
        text=[settings_text(one) for one in known],
        hovertemplate="trial %{x}: %{y:.4g}<br>%{text}<extra></extra>",
    )
    best: list[float] = []
    numbers: list[int] = []
    for one in known:
        if one["within_limits"]:
            value = one["values"][name]
            best.append(value if not best else sign * min(sign * value, sign * best[-1]))
            numbers.append(one["number"])
    made.add_scatter(
        x=numbers,
        y=best,
        mode="lines",
        line={"color": second, "width": 2, "shape": "hv"},
        hovertemplate="best so far %{y:.4g}<extra></extra>",
    )
    return made


def trade(
    trials: Sequence[Trial], front: Sequence[int], objectives: Sequence[Mapping[str, Any]]
) -> go.Figure:
    """Draw two objectives against each other; the front is joined."""
    a, b = objectives[:2]
    known = [one for one in trials if {a["name"], b["name"]} <= one["values"].keys()]
    first = colors()[0]
    made = figure(320, xaxis={"title": b["title"]}, yaxis={"title": a["title"]})
    joined = sorted(
        (one for one in known if one["number"] in front), key=lambda one: one["values"][b["name"]]
    )
    made.add_scatter(
        x=[one["values"][b["name"]] for one in joined],
        y=[one["values"][a["name"]] for one in joined],
        mode="lines",
        line={"color": first, "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
    )
    made.add_scatter(
        x=[one["values"][b["name"]] for one in known],
        y=[one["values"][a["name"]] for one in known],
        mode="markers",
        marker={
            "color": [first if one["number"] in front else GREY for one in known],
            "size": [11 if one["number"] in front else 7 for one in known],
        },
        text=[f"trial {one['number']}<br>{settings_text(one)}" for one in known],
        hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )
    return made


def importances(found: Mapping[str, float]) -> go.Figure:
    """Draw how much each setting decides an objective."""
    ranked = sorted(found.items(), key=lambda one: one[1])
    made = figure(
        60 + 24 * len(ranked), xaxis={"title": "Share of what decides", "tickformat": ".0%"}
    )
    made.add_bar(
        x=[share for _, share in ranked],
        y=[name for name, _ in ranked],
        orientation="h",
        marker={"color": colors()[0]},
        hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )
    return made


def parallel(trials: Sequence[Trial], objectives: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw every trial as a line through its settings and objectives, coloured by the first."""
    import plotly.graph_objects as go

    wanted = [one["name"] for one in objectives]
    known = [one for one in trials if set(wanted) <= one["values"].keys()]
    names = list(dict.fromkeys(name for one in known for name in one["settings"]))
    dimensions: list[dict[str, Any]] = []
    for name in names:
        values = [one["settings"].get(name) for one in known]
        if all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
            dimensions.append({"label": name.rpartition(".")[2] or name, "values": values})
            continue
        texts = sorted({str(one) for one in values})
        dimensions.append(
            {
                "label": name.rpartition(".")[2] or name,
                "values": [texts.index(str(one)) for one in values],
                "tickvals": list(range(len(texts))),
                "ticktext": texts,
            }
        )
    dimensions += [
        {"label": one, "values": [trial["values"][one] for trial in known]} for one in wanted
    ]
    color = [one["values"][wanted[0]] for one in known]
    made = figure(340)
    made.add_trace(
        go.Parcoords(
            line={"color": color, "colorscale": "Viridis", "reversescale": True},
            dimensions=dimensions,
            labelfont={"color": ink()},
            tickfont={"color": ink()},
            rangefont={"color": "rgba(0,0,0,0)"},
        )
    )
    made.update_layout(margin={"l": 60, "r": 60, "t": 48, "b": 24})
    return made
