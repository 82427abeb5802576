"""The pictures of a training: loss, rate and gradient, speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptcore.lab import Event, Stepped, Validated
from pages.parts.compare_charts import figure
from pages.parts.plan_charts import colors

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_POINTS = 1000


def thinned(events: Sequence[Stepped]) -> list[Stepped]:
    """Return at most so many steps, evenly taken, the last one always."""
    step = max(1, -(-len(events) // MOST_POINTS))
    found = list(events[::step])
    if events and found[-1] is not events[-1]:
        found.append(events[-1])
    return found


def loss(events: Sequence[Event]) -> go.Figure:
    """Draw the loss of every step and of every validation."""
    steps = thinned([one for one in events if isinstance(one, Stepped)])
    held = [one for one in events if isinstance(one, Validated)]
    first, second = colors()[:2]
    made = figure(300, xaxis={"title": "Step"}, yaxis={"title": "Loss, nats a token"})
    made.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.12})
    made.add_scatter(
        x=[one.step for one in steps],
        y=[one.loss for one in steps],
        name="training",
        mode="lines",
        line={"color": first, "width": 1},
        opacity=0.6,
        hovertemplate="step %{x}: %{y:.4f}<extra>training</extra>",
    )
    made.add_scatter(
        x=[one.step for one in held],
        y=[one.loss for one in held],
        name="validation",
        mode="lines+markers",
        line={"color": second, "width": 2},
        hovertemplate="step %{x}: %{y:.4f}<extra>validation</extra>",
    )
    return made


def curve(events: Sequence[Event], name: str, title: str) -> go.Figure:
    """Draw one number of every step, such as ``learning_rate``."""
    steps = thinned([one for one in events if isinstance(one, Stepped)])
    made = figure(170, xaxis={"title": "Step"}, yaxis={"title": title, "rangemode": "tozero"})
    made.add_scatter(
        x=[one.step for one in steps],
        y=[getattr(one, name) for one in steps],
        mode="lines",
        line={"color": colors()[0], "width": 1.25},
        hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
    )
    return made
