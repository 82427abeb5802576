"""The pictures of a training: loss, rate and gradient, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from gptcore.lab import Event, Stepped, Validated
from pages.parts.compare_charts import figure
from pages.parts.plan_charts import colors

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_POINTS = 1000
STEPS, SECONDS = "Steps", "Seconds of computing"


def thinned(events: Sequence[Stepped]) -> list[Stepped]:
    """Return at most so many steps, evenly taken, the last one always."""
    step = max(1, -(-len(events) // MOST_POINTS))
    found = list(events[::step])
    if events and found[-1] is not events[-1]:
        found.append(events[-1])
    return found


def loss(trainings: Mapping[str, Sequence[Event]], *, by: str = STEPS) -> go.Figure:
    """Draw the loss of every validation of some trainings, and of every step of the first.

    Args:
        trainings: what each told, by its name.
        by: ``STEPS``, or ``SECONDS`` of computing.
    """
    made = figure(300, xaxis={"title": by}, yaxis={"title": "Loss, nats a token"})
    made.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.12})
    unit = "step %{x:,}" if by == STEPS else "%{x:.1f} s"
    marks = [*colors(), *colors()]
    for at, (name, events) in enumerate(trainings.items()):
        place = places(events, by)
        if at == 0:
            steps = thinned([one for one in events if isinstance(one, Stepped)])
            made.add_scatter(
                x=[place[one.step] for one in steps],
                y=[one.loss for one in steps],
                name="training",
                mode="lines",
                line={"color": marks[0], "width": 1},
                opacity=0.6,
                hovertemplate=f"{unit}: %{{y:.4f}}<extra>training</extra>",
            )
        held = [one for one in events if isinstance(one, Validated) and one.step in place]
        label = "validation" if len(trainings) == 1 else name
        made.add_scatter(
            x=[place[one.step] for one in held],
            y=[one.loss for one in held],
            name=label,
            mode="lines+markers",
            line={"color": marks[1 + at % (len(marks) - 1)], "width": 2},
            hovertemplate=f"{unit}: %{{y:.4f}}<extra>{label}</extra>",
        )
    return made


def places(events: Sequence[Event], by: str) -> dict[int, float]:
    """Return where each step stands: its number, or the seconds of computing until its end."""
    steps = [one for one in events if isinstance(one, Stepped)]
    if by == STEPS:
        return {one.step: float(one.step) for one in steps}
    ends = accumulate(one.seconds for one in steps)
    return {one.step: end for one, end in zip(steps, ends, strict=True)}


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
