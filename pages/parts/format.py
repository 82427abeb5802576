"""Numbers as a person reads them: base units go in, ms and GiB come out, unknown is a dash.

Inside the program every value keeps its base unit (seconds, bytes, ratios); this file is the only
place of the pages where one becomes text.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, tzinfo
from typing import TypeGuard
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from gptcore.sentences import one_line as one_line

UNKNOWN = "—"
"""What stands where a number is not known; never a 0."""


def duration(seconds: float | None) -> str:
    """Return a length of time with three digits: ``17.2 ms``, ``1.24 s``, ``2 min 05 s``."""
    if not _known(seconds):
        return UNKNOWN
    if abs(seconds) < 0.9995:
        return f"{three_digits(seconds * 1000)} ms"
    if abs(seconds) < 59.95:
        return f"{three_digits(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def size(count: float | None) -> str:
    """Return bytes in binary units: ``812 MiB``, ``1.3 GiB``."""
    if not _known(count):
        return UNKNOWN
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return (
                f"{count / scale:,.1f} {unit}" if unit == "GiB" else f"{count / scale:,.0f} {unit}"
            )
    return f"{count:,.0f} B"


def gigabytes(count: float | None) -> str:
    """Return bytes in units of 10⁹, as models are quoted: ``698 GB``, ``0.54 GB``."""
    return UNKNOWN if not _known(count) else f"{three_digits(count / 1e9)} GB"


def number(value: float | None) -> str:
    """Return a bare number with three digits, for where its unit stands beside it."""
    return UNKNOWN if not _known(value) else three_digits(value)


def rate(per_second: float | None, what: str = "tokens") -> str:
    """Return how many a second: ``158 tokens/s``."""
    return UNKNOWN if not _known(per_second) else f"{three_digits(per_second)} {what}/s"


def share(ratio: float | None) -> str:
    """Return a ratio as a percentage: ``54 %``, ``0.3 %``; a tiny one is not rounded to 0."""
    if not _known(ratio):
        return UNKNOWN
    percent = 100 * ratio
    if 0 < abs(percent) < 0.05:
        return "< 0.1 %"
    return f"{percent:.1f} %" if 0 < abs(percent) < 9.95 else f"{percent:.0f} %"


def whole(count: float | None) -> str:
    """Return a count with thousands apart: ``12,288``."""
    return UNKNOWN if not _known(count) else f"{count:,.0f}"


def parameters(count: float | None) -> str:
    """Return a number of parameters, rounded: ``135 M``, ``6.66 B``, ``175 B``."""
    if not _known(count):
        return UNKNOWN
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= 0.9995 * scale:
            return f"{three_digits(count / scale)} {unit}"
    return f"{count:.0f}"


def watts(power: float | None) -> str:
    """Return a power: ``212 W``."""
    return UNKNOWN if not _known(power) else f"{power:,.0f} W"


def celsius(temperature: float | None) -> str:
    """Return a temperature: ``61 °C``."""
    return UNKNOWN if not _known(temperature) else f"{temperature:.0f} °C"


def three_digits(value: float) -> str:
    """Return a number with three significant digits and no exponent: ``0.054``, ``1,230``."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else UNKNOWN
    digits = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    if rounded:  # 9.996 becomes 10.0, which has a digit more before the point
        digits = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits)}f}"


def zone_of(name: str | None) -> tzinfo:
    """Return the time zone of the browser, or UTC where it does not tell."""
    if not name:
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return UTC


def clock(moment: datetime | None, zone: tzinfo = UTC) -> str:
    """Return the time of day: ``09:12:04``."""
    return UNKNOWN if moment is None else moment.astimezone(zone).strftime("%H:%M:%S")


def moment(at: datetime | None, zone: tzinfo = UTC) -> str:
    """Return date and time: ``2026-11-21 09:12:04``."""
    return UNKNOWN if at is None else at.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")


def ago(at: datetime | None, now: datetime) -> str:
    """Return how long ago: ``just now``, ``12 s ago``, ``3 h ago``, ``5 d ago``."""
    if at is None:
        return UNKNOWN
    seconds = (now - at).total_seconds()
    if seconds < 2:
        return "just now"
    for unit, scale in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds // scale:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def escaped(text: str) -> str:
    """Return text so that Markdown shows it as it is: for labels that hold a name or a message.

    Model output and prompts go to ``st.text`` instead.
    """
    return "".join(
        f"\\{c}" if c in r"\`*_{}[]()<>#+-.!|~$:^=&@/" else c for c in one_line(text, 400)
    )


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
