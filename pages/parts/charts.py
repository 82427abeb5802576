"""What the live page draws: one look at the lab, turned into curves; and one request's timeline.

Everything is computed from a ``Picture``, so that all charts of a refresh show the same moment, and
so that ten open pages ask the database once.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import streamlit as st

from gptcore.errors import GptcoreError
from gptcore.records import Numbers, Run, RunKind, RunState, Token
from pages.parts import format as shown
from pages.parts.live_chart import GAP_S, Line

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from gptcore.lab import Lab

RANGES_S: dict[str, int] = {
    "1 min": 60,
    "5 min": 300,
    "15 min": 900,
    "1 h": 3600,
    "6 h": 6 * 3600,
    "1 d": 86_400,
    "7 d": 7 * 86_400,
    "30 d": 30 * 86_400,
}
BUCKETS = 30
"""Rates are taken over so many parts of the range."""
LINE_POINTS = 600
"""What a line of readings is thinned to."""
SLOWEST_STEP_S = 2.0
DOT_RUNS = 200
"""The most requests that are drawn as a dot each."""
STALE_S = 5.0
"""A reading older than this is not "now"."""

CPU = "cpu_utilization_ratio"
MEMORY_USED = "memory_used_bytes"
MEMORY_TOTAL = "memory_total_bytes"
GPU = "gpu_utilization_ratio"
GPU_MEMORY_USED = "gpu_memory_used_bytes"
GPU_MEMORY_TOTAL = "gpu_memory_total_bytes"
GPU_POWER = "gpu_power_watts"
GPU_TEMPERATURE = "gpu_temperature_celsius"
OUTPUT_TOKENS = "output_tokens_per_s"
INPUT_TOKENS = "input_tokens_per_s"
RUNNING = "requests_running_count"
WAITING = "requests_waiting_count"
READINGS = (
    CPU,
    MEMORY_USED,
    MEMORY_TOTAL,
    GPU,
    GPU_MEMORY_USED,
    GPU_MEMORY_TOTAL,
    GPU_POWER,
    GPU_TEMPERATURE,
    OUTPUT_TOKENS,
    INPUT_TOKENS,
    RUNNING,
    WAITING,
)

Series = Mapping[tuple[str, str], tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Picture:
    """One look at everything that the live page shows."""

    start: float
    end: float
    readings: Series
    latencies: Any
    """The store's ``Latencies`` by time; None where the database could not be read."""
    whole: Any
    """The same over the whole range as one bucket."""
    rates: Any
    whole_rates: Any
    runs: tuple[Run, ...]
    """The last generations that ended in the range, newest first."""
    problem: str | None = None

    @property
    def gap_s(self) -> float:
        """The longest time between two points that is no hole: 3 s, or what thinning explains."""
        return max(GAP_S, 3 * (self.end - self.start) / LINE_POINTS)


def step_s(seconds: float) -> float:
    """Return how often the charts of a range change: each second, or when a point can move."""
    return min(SLOWEST_STEP_S, max(1.0, seconds / LINE_POINTS))


def picture(lab: Lab, seconds: float, now: float) -> Picture:
    """Return the picture of the last ``seconds``, shared by all sessions of this moment."""
    step = step_s(seconds)
    return _picture(lab, id(lab), seconds, math.ceil(now / step) * step)


@st.cache_resource(max_entries=32, show_spinner=False)
def _picture(_lab: Lab, lab_id: int, seconds: float, end: float) -> Picture:
    start = end - seconds
    latencies = whole = rates = whole_rates = problem = None
    readings: Series = {}
    runs: tuple[Run, ...] = ()
    try:
        readings = _lab.live(READINGS, seconds)
        whole = _lab.latencies(seconds, 1)
        latencies = _lab.latencies(seconds, percentile_buckets(whole.e2e_s.n[0]))
        rates, whole_rates = _lab.rates(seconds, BUCKETS), _lab.rates(seconds, 1)
        runs = _lab.runs(
            kind=RunKind.GENERATE,
            since=datetime.fromtimestamp(start, UTC),
            limit=DOT_RUNS,
        )
    except GptcoreError as error:
        problem = str(error)
    return Picture(start, end, readings, latencies, whole, rates, whole_rates, runs, problem)


def percentile_buckets(requests: int) -> int:
    """Return into how many parts a range is cut for percentiles: few requests, few parts."""
    return next(
        (buckets for most, buckets in ((40, 8), (150, 15), (600, 30)) if requests < most), 60
    )


# Curves


def latency_lines(picture: Picture, which: str) -> list[Line]:
    """Return p50, p95 and p99 of ``ttft_s``, ``tpot_s`` or ``e2e_s``, in ms.

    The number beside each name is the percentile of all requests of the range, not of the last
    bucket.
    """
    if picture.latencies is None:
        return []
    by_time = getattr(picture.latencies, which)
    over_all = getattr(picture.whole, which)
    return [
        Line(
            name,
            picture.latencies.times,
            scaled(getattr(by_time, name), 1000),
            color,
            "dots",
            now=scaled(getattr(over_all, name), 1000)[0],
            gap_s=math.inf,
        )
        for color, name in enumerate(("p50", "p95", "p99"))
    ]


def requests_measured(picture: Picture, which: str) -> int:
    """Return how many requests the percentiles of a latency are taken from."""
    if picture.whole is None:
        return 0
    n: int = getattr(picture.whole, which).n[0]
    return n


def reading_lines(
    picture: Picture,
    name: str,
    title: str = "",
    *,
    scale: float = 1.0,
    color: int = 0,
    subject: str | None = None,
) -> list[Line]:
    """Return the curves of a reading in the unit that ``scale`` makes of it, one a subject."""
    found = sorted((s, line) for (n, s), line in picture.readings.items() if n == name)
    wanted = [(s, line) for s, line in found if subject in (None, s)]
    style: Literal["area", "line"] = "line" if title else "area"
    return [
        Line(title, times, scaled(values, scale), color + i, style, gap_s=picture.gap_s)
        for i, (s, (times, values)) in enumerate(wanted)
    ]


def rate_lines(picture: Picture, which: str) -> list[Line]:
    """Return a rate of the store, such as ``requests_per_s``; its number is the range's mean."""
    if picture.rates is None:
        return []
    over_all = getattr(picture.whole_rates, which)[0]
    values = getattr(picture.rates, which)
    times = picture.rates.times
    return [Line("", times, values, 0, "area", now=over_all, gap_s=math.inf)]


def error_lines(picture: Picture) -> list[Line]:
    """Return the share of requests that failed, by kind, in percent."""
    if picture.rates is None:
        return []
    over_all = picture.whole_rates.error_ratio
    return [
        Line(
            kind.replace("_", " "),
            picture.rates.times,
            scaled(values, 100),
            color,
            "dots",
            now=scaled(over_all.get(kind, (None,)), 100)[0],
            gap_s=math.inf,
        )
        for color, (kind, values) in enumerate(sorted(picture.rates.error_ratio.items()))
    ]


def error_ratio(picture: Picture) -> float | None:
    """Return the share of requests that failed in the range; None where none ended."""
    if picture.whole_rates is None:
        return None
    parts = [values[0] for values in picture.whole_rates.error_ratio.values()]
    if any(part is not None for part in parts):
        return sum(part or 0.0 for part in parts)
    return 0.0 if requests_ended(picture) else None


def error_curve(picture: Picture) -> list[float] | None:
    """Return the share of failed requests over time for a metric; buckets without any left out."""
    if picture.rates is None:
        return None
    buckets = zip(*picture.rates.error_ratio.values(), strict=True)
    found = [
        sum(part for part in parts if part is not None)
        for parts in buckets
        if any(part is not None for part in parts)
    ]
    return found if len(found) > 1 else None


def requests_ended(picture: Picture) -> int:
    """Return how many requests ended in the range, however they did."""
    if picture.whole_rates is None:
        return 0
    rates = picture.whole_rates
    ended: int = round(rates.requests_per_s[0] * rates.bucket_s)
    return ended


def request_lines(picture: Picture, which: str, scale: float = 1.0) -> list[Line]:
    """Return one dot for every request that ended: a number of it, such as ``mbu_ratio``."""
    ended = sorted(
        (run.ended_at.timestamp(), scale * value)
        for run in picture.runs
        if run.ended_at and run.numbers and (value := getattr(run.numbers, which)) is not None
    )
    if not ended:
        return []
    return [Line("", [at for at, _ in ended], [value for _, value in ended], 0, "points")]


def dots_left_out(picture: Picture) -> str:
    """Return what stands beside the dots: nothing, or that only the newest are drawn."""
    return f"the last {DOT_RUNS}" if len(picture.runs) == DOT_RUNS else ""


def latest(readings: Series, name: str, at: float, subject: str | None = None) -> float | None:
    """Return the newest value of a reading, or None where there is none of the last 5 s."""
    found = [
        (times[-1], values[-1])
        for (n, s), (times, values) in readings.items()
        if n == name and subject in (None, s) and len(times)
    ]
    if not found:
        return None
    seen_at, value = max(found)
    return value if at - seen_at <= STALE_S else None


def sparkline(readings: Series, name: str, scale: float = 1.0) -> list[float] | None:
    """Return a reading's values for a metric's small curve, or None where there are too few."""
    for (n, _), (_, values) in sorted(readings.items()):
        if n == name and len(values) > 1:
            return [scale * value for value in values]
    return None


def gpus(readings: Series) -> list[str]:
    """Return the GPUs that there are readings of, such as ``cuda:0``."""
    return sorted({s for n, s in readings if n.startswith("gpu_") and s})


def scaled(values: Sequence[float | None], scale: float) -> list[float | None]:
    """Return values in another unit; what is unknown stays unknown."""
    return [None if value is None else value * scale for value in values]


# One request


def accent() -> str:
    """Return the theme's accent in the browser's mode, for a figure that has one kind of thing."""
    mode = st.context.theme.type or "light"
    for option in (f"theme.{mode}.primaryColor", "theme.primaryColor"):
        if color := st.get_option(option):
            return str(color)
    return "#4a67e0"


def token_timeline(
    tokens: Sequence[Token], numbers: Numbers | None, color: str = "#4a67e0"
) -> go.Figure:
    """Return when each token came, and the time between one and the next (ITL).

    Both parts share the token's number as their x axis; the shaded part is the time until the
    first token: queue, loading and prefill.
    """
    # Half a second of imports, which only an opened request is worth.
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    written = [token for token in tokens if not token.forced]
    index = [token.index for token in written]
    at_s = [token.seconds for token in written]
    itl_ms = [1000 * (b - a) for a, b in pairwise(at_s)]
    labels = [plain_for_plotly(token.text) for token in written]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    figure.add_trace(
        go.Scatter(
            x=index,
            y=at_s,
            mode="lines+markers",
            marker={"size": 4},
            line={"width": 1.5, "color": color},
            customdata=labels,
            hovertemplate="token %{x} %{customdata}<br>%{y:.3f} s<extra></extra>",
            name="arrival",
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Bar(
            x=index[1:],
            y=itl_ms,
            marker={"color": color, "opacity": 0.75},
            customdata=labels[1:],
            hovertemplate="token %{x} %{customdata}<br>%{y:.1f} ms<extra></extra>",
            name="ITL",
        ),
        row=2,
        col=1,
    )
    first_s = at_s[0] if at_s else None
    if first_s is not None:
        figure.add_hrect(
            y0=0,
            y1=first_s,
            row=1,
            col=1,
            fillcolor="gray",
            opacity=0.18,
            line_width=0,
            annotation_text=f"until the first token: {shown.duration(first_s)}",
            annotation_position="bottom right",
            annotation_font_size=12,
        )
    if numbers and numbers.tpot_s is not None:
        figure.add_hline(
            y=1000 * numbers.tpot_s,
            row=2,
            col=1,
            line={"dash": "dot", "width": 1.25, "color": "gray"},
            annotation_text=f"mean (TPOT) {shown.duration(numbers.tpot_s)}",
            annotation_position="top right",
            annotation_font_size=12,
        )
    figure.update_layout(
        showlegend=False,
        height=380,
        margin={"l": 8, "r": 8, "t": 16, "b": 8},
        bargap=0.15,
        dragmode="zoom",
    )
    figure.update_yaxes(title_text="since the request, s", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="between tokens, ms", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="token", row=2, col=1)
    return figure


def plain_for_plotly(text: str) -> str:
    """Return a token's text for a hover: quoted, short, and with no character that is markup."""
    return html.escape(f"“{shown.one_line(text, 24)}”" if text.strip() else repr(text[:12]))


STATE_LOOKS: dict[RunState, tuple[str, str, str]] = {
    RunState.QUEUED: ("Queued", ":material/hourglass_empty:", "gray"),
    RunState.RUNNING: ("Running", ":material/play_circle:", "blue"),
    RunState.DONE: ("Done", ":material/check_circle:", "green"),
    RunState.FAILED: ("Failed", ":material/error:", "red"),
    RunState.CANCELLED: ("Cancelled", ":material/cancel:", "gray"),
    RunState.INTERRUPTED: ("Interrupted", ":material/power_off:", "orange"),
}
"""How a state is named, its icon and its badge's colour."""
