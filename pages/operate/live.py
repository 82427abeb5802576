"""Live: what the machine and the requests do now, and what they did in the last 30 days."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import streamlit as st

from pages.parts import charts, errors
from pages.parts import format as shown
from pages.parts.charts import Picture
from pages.parts.links import PLAYGROUND
from pages.parts.live_chart import Line, live_chart
from pages.parts.requests_table import requests_table
from pages.parts.services import lab as shared_lab

lab = shared_lab()
zone_name = st.context.timezone
zone = shown.zone_of(zone_name)

NO_REQUEST = "No request ended in this time: write something in the playground."
NO_READING = "No reading in this time: the program was not running."
WHY_BOTH = (
    "Utilization is the share of time in which the processor had work: on a GPU, in which at least "
    "one kernel ran. MBU is the share of this machine's measured memory bandwidth that decoding "
    "really used. A device can be busy all the time and still do little, so both stand here."
)


def header() -> tuple[int, bool]:
    """Draw title, range and pause switch; return the seconds to show, and whether to go on."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Live", width="stretch")
        chosen = st.segmented_control(
            "Range",
            list(charts.RANGES_S),
            default="5 min",
            required=True,
            key="range",
            bind="query-params",
            label_visibility="collapsed",
            wrap=True,
        )
        going = st.toggle("Live", value=True, key="going", help="Off: the page stands still.")
    return charts.RANGES_S.get(chosen or "", 300), going


def metrics(picture: Picture, readings: charts.Series, at: float, label: str) -> None:
    """Draw the row of numbers: what is true now, and over the range."""
    absence = lab.gpu_absence()
    with st.grid(5, min_column_width=170, gap="small"):
        metric(
            "Output, tokens/s",
            shown.number(charts.latest(readings, charts.OUTPUT_TOKENS, at)),
            charts.sparkline(readings, charts.OUTPUT_TOKENS),
            "last minute",
            "Tokens written in the last second, over all requests.",
            color="primary",
        )
        n = charts.requests_measured(picture, "ttft_s")
        metric(
            "TTFT p95",
            shown.duration(picture.whole.ttft_s.p95[0] if picture.whole else None),
            known(picture.latencies.ttft_s.p95 if picture.latencies else ()),
            f"n = {shown.whole(n)} in {label}",
            "Time to first token: 95 % of the requests that succeeded got theirs sooner "
            "(linear interpolation).",
        )
        ratio = charts.error_ratio(picture)
        metric(
            "Error rate",
            shown.share(ratio),
            charts.error_curve(picture),
            f"of {shown.whole(charts.requests_ended(picture))} in {label}",
            "Failed and interrupted requests / all that ended, the cancelled ones left out.",
            color="red" if ratio else "off",
        )
        metric(
            "CPU",
            shown.share(charts.latest(readings, charts.CPU, at)),
            charts.sparkline(readings, charts.CPU),
            "last minute",
            "The share of time in which the cores had work.",
        )
        if absence:
            with st.container(border=True, height="stretch", gap="xsmall"):
                st.metric("GPU", "No GPU")
                st.caption(shown.escaped(absence))
        else:
            metric(
                "GPU",
                shown.share(charts.latest(readings, charts.GPU, at)),
                charts.sparkline(readings, charts.GPU),
                "last minute",
                "NVML: the share of time in which at least one kernel ran.",
            )


def metric(
    label: str,
    value: str,
    curve: list[float] | None,
    below: str,
    definition: str,
    color: str = "off",
) -> None:
    """Draw one number with its small curve."""
    st.metric(
        label,
        value,
        delta=below,
        delta_color=color,  # type: ignore[arg-type]
        delta_arrow="off",
        chart_data=curve,
        chart_type="area",
        help=definition,
        border=True,
        height="stretch",
    )


def known(values: tuple[float | None, ...]) -> list[float] | None:
    """Return the known values of a curve, or None where there are too few to draw."""
    found = [value for value in values if value is not None]
    return found if len(found) > 1 else None


def requests_charts(picture: Picture) -> None:
    """Draw latency, throughput, errors and queue."""
    with st.grid(3, min_column_width=300, gap="small"):
        for title, which in (
            ("Time to first token", "ttft_s"),
            ("Time per output token", "tpot_s"),
            ("End to end", "e2e_s"),
        ):
            n = charts.requests_measured(picture, which)
            panel(
                title,
                charts.latency_lines(picture, which),
                picture,
                unit="ms",
                note=f"n = {shown.whole(n)}",
                empty=NO_REQUEST,
                key=which,
            )
        panel(
            "Output",
            charts.reading_lines(picture, charts.OUTPUT_TOKENS),
            picture,
            unit="tokens/s",
            key="output",
        )
        panel(
            "Input",
            charts.reading_lines(picture, charts.INPUT_TOKENS),
            picture,
            unit="tokens/s",
            key="input",
        )
        panel(
            "Requests",
            charts.rate_lines(picture, "requests_per_s"),
            picture,
            unit="requests/s",
            empty=NO_REQUEST,
            key="requests",
        )
        panel(
            "Error rate by kind",
            charts.error_lines(picture),
            picture,
            unit="%",
            empty="No request failed in this time."
            if charts.requests_ended(picture)
            else NO_REQUEST,
            key="errors",
        )
        panel(
            "Queue",
            charts.reading_lines(picture, charts.RUNNING, "running")
            + charts.reading_lines(picture, charts.WAITING, "waiting", color=1),
            picture,
            unit="requests",
            key="queue",
        )
        panel(
            "Decode, each request",
            charts.request_lines(picture, "decode_tokens_per_s"),
            picture,
            unit="tokens/s",
            note=charts.dots_left_out(picture),
            empty=NO_REQUEST,
            key="decode",
        )


def machine_charts(picture: Picture) -> None:
    """Draw utilization beside MBU, memory, and a row for each GPU."""
    with st.grid(3, min_column_width=300, gap="small"):
        panel(
            "CPU utilization",
            charts.reading_lines(picture, charts.CPU, scale=100),
            picture,
            unit="%",
            top=100,
            key="cpu",
        )
        panel(
            "MBU, each request",
            charts.request_lines(picture, "mbu_ratio", 100),
            picture,
            unit="%",
            note=charts.dots_left_out(picture),
            empty=NO_REQUEST,
            key="mbu",
        )
        panel(
            "Memory",
            charts.reading_lines(picture, charts.MEMORY_USED, "used", scale=2**-30)
            + charts.reading_lines(picture, charts.MEMORY_TOTAL, "in all", scale=2**-30, color=5),
            picture,
            unit="GiB",
            key="memory",
        )
    st.caption(WHY_BOTH)
    for device in charts.gpus(picture.readings):
        st.markdown(f"**{shown.escaped(device)}**")
        with st.grid(4, min_column_width=200, gap="small"):
            for title, name, unit, scale, top in (
                ("Utilization", charts.GPU, "%", 100.0, 100.0),
                ("Memory", charts.GPU_MEMORY_USED, "GiB", 2**-30, None),
                ("Power", charts.GPU_POWER, "W", 1.0, None),
                ("Temperature", charts.GPU_TEMPERATURE, "°C", 1.0, None),
            ):
                panel(
                    title,
                    charts.reading_lines(picture, name, scale=scale, subject=device),
                    picture,
                    unit=unit,
                    top=top,
                    key=f"{device} {name}",
                )
    if absence := lab.gpu_absence():
        st.caption(f":material/memory: No GPU: {shown.escaped(absence)}")


def panel(
    title: str,
    lines: list[Line],
    picture: Picture,
    *,
    unit: str,
    key: str,
    note: str = "",
    top: float | None = None,
    empty: str = NO_READING,
) -> None:
    """Draw one chart in its card."""
    with st.container(border=True):
        live_chart(
            title,
            lines,
            unit=unit,
            note=note,
            start=picture.start,
            end=picture.end,
            top=top,
            empty=empty,
            height=160,
            key=f"chart {key}",
        )


def watched(seconds: int, going: bool) -> None:
    """Draw everything that changes by itself; this alone runs again each second."""
    at = time.time()
    if going or "last_look" not in st.session_state:
        look = charts.picture(lab, seconds, at), lab.live(charts.READINGS, 60), at
        st.session_state["last_look"] = look
    picture, readings, at = st.session_state["last_look"]
    running, waiting = lab.queue()
    for problem in (*lab.problems(), *([picture.problem] if picture.problem else [])):
        st.warning(shown.escaped(problem), icon=":material/warning:")
    label = next(name for name, s in charts.RANGES_S.items() if s == seconds)
    metrics(picture, readings, at, label)
    updated = shown.clock(datetime.fromtimestamp(at, UTC), zone)
    st.caption(
        f"{'Updated' if going else 'Paused at'} {updated} · {running} running, {waiting} waiting · "
        "drag in a chart to zoom, double-click to go back"
    )
    requests_charts(picture)
    machine_charts(picture)


seconds, going = header()
st.fragment(errors.guarded(watched), run_every=1.0 if going else None)(seconds, going)
with st.container(horizontal=True, vertical_alignment="center"):
    st.subheader("Requests", width="stretch")
    st.page_link(PLAYGROUND, label="Write something", icon=":material/edit_note:")
requests_table(lab, zone_name, refresh=going)
