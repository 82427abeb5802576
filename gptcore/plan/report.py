"""What a person takes away: the plan as CSV, and as one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import html
import io
from datetime import datetime

from gptcore.plan.assumptions import Assumptions, source, unit
from gptcore.plan.outcome import Outcome, gigabytes
from gptcore.plan.shapes import formula

COLORS = ("#3350d4", "#12a17c", "#d98a1f", "#8a5bd1", "#d5455a", "#7c8399")
STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}
p.said{color:#6b7289;margin:.25rem 0 1rem}
table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .5rem;border-bottom:1px solid #8884;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{display:flex;height:1.4rem;border-radius:6px;overflow:hidden;background:#8883}
.bar i{display:block}.key{font-size:.85rem;margin:.4rem 0}
.key b{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin:0 .35rem 0 .9rem}
@media print{body{margin:0}h2{break-after:avoid}}
"""


def as_csv(found: Outcome) -> str:
    """Return every number and assumption as rows of section, name, value, unit and source."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("section", "name", "value", "unit", "source"))
    for name, count in found.parts.items():
        writer.writerow(("size", name, count, "parameters", ""))
    writer.writerow(("memory", "all weights", found.weights_bytes, "bytes", ""))
    writer.writerow(("memory", "KV cache, one token", found.kv_bytes_per_token, "bytes", ""))
    if found.memory is not None:
        for name, count in found.memory.by_part.items():
            writer.writerow(("memory", f"{name}, fullest device", count, "bytes", ""))
    writer.writerow(("memory", "usable on a device", found.usable_bytes, "bytes",
                     found.card.source))  # fmt: skip
    made = found.training
    for name, value, of in (
        ("operations", made.flop, "FLOP"),
        ("one device", made.device_years, "years"),
        ("all devices", made.seconds, "s"),
        ("cost", made.cost_usd, "$"),
        ("energy", made.energy_kwh, "kWh"),
        ("carbon", made.carbon_kg, "kg CO2e"),
        ("compute-optimal tokens", found.optimal_tokens, "tokens"),
    ):
        writer.writerow(("training", name, repr(value), of, ""))
    if found.decode is not None and found.prefill_s is not None:
        writer.writerow(("speed", "prefill", repr(found.prefill_s), "s", ""))
        writer.writerow(("speed", "TPOT", repr(found.decode.seconds), "s", ""))
        for one in found.decode.operations:
            writer.writerow(("decode step", one.name, repr(one.seconds), "s", one.bound))
    if found.capacity is not None and found.capacity.replica is not None:
        capacity = found.capacity
        for name, value, of in (
            ("replicas", float(capacity.replicas), ""),
            ("devices", float(capacity.devices), ""),
            ("a million tokens", capacity.usd_per_million_tokens, "$"),
            ("energy, a million tokens", capacity.kwh_per_million_tokens, "kWh"),
            ("carbon, a million tokens", capacity.carbon_kg_per_million_tokens, "kg CO2e"),
        ):
            writer.writerow(("capacity", name, repr(value), of, ""))
    for name, value in found.assumptions.model_dump().items():
        writer.writerow(("assumption", name, _plain(value), unit(name), source(name)))
    return text.getvalue()


def _plain(value: object) -> object:
    """Return a value that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value


def as_html(found: Outcome, made_at: datetime, link: str = "") -> str:
    """Return one page: the tables of the plan, a bar of its memory, every assumption.

    Args:
        found: the plan.
        made_at: when.
        link: the address that restores it, shown where there is one.
    """
    escape = html.escape
    one = found.assumptions
    pieces = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>Plan for {escape(one.model)}</title><style>{STYLE}</style>",
        f"<h1>{escape(one.model)} in {one.precision} on {escape(found.card.title)}</h1>",
        f"<p class=said>{escape(formula(found.spec))} parameters. Made "
        f"{made_at:%Y-%m-%d %H:%M} UTC from the assumptions at the end.</p>",
        _bar(found),
    ]
    for title, rows in found.tables():
        cells = "".join(
            f"<tr><td>{escape(name)}<td class=n>{escape(value)}"
            if name
            else f"<tr><td colspan=2>{escape(value)}"
            for name, value in rows
        )
        pieces.append(f"<h2>{escape(title)}</h2><table>{cells}</table>")
    cells = "".join(
        f"<tr><td>{escape(Assumptions.model_fields[name].title or name)}"
        f"<td class=n>{escape(str(value))} {escape(unit(name))}<td>{escape(source(name))}"
        for name, value in one.model_dump().items()
    )
    pieces.append(
        "<h2>Assumptions</h2><table><tr><th>what<th>value<th>where its default comes from"
        f"{cells}</table><p class=said>Rates of the card: {escape(found.card.source)}, "
        f"{escape(found.card.dated)}.</p>"
    )
    if link.startswith(("http://", "https://")):
        pieces.append(f"<p><a href='{escape(link)}'>Open this plan</a></p>")
    return "\n".join(pieces)


def _bar(found: Outcome) -> str:
    """Return the memory of the fullest device as one bar against what the card can give."""
    if found.memory is None:
        return ""
    parts = [(name, count) for name, count in found.memory.by_part.items() if count]
    whole = max(found.usable_bytes, found.memory.total)
    colored = list(zip(parts, COLORS, strict=False))
    filled = "".join(
        f"<i style='width:{100 * count / whole:.3f}%;background:{color}'></i>"
        for (_, count), color in colored
    )
    key = "".join(
        f"<b style='background:{color}'></b>{html.escape(name)} {gigabytes(count)}"
        for (name, count), color in colored
    )
    verdict = "fits" if found.fits else "does not fit"
    return (
        f"<div class=bar>{filled}</div><div class=key>{key}</div>"
        f"<p>{gigabytes(found.memory.total)} a device of {gigabytes(found.usable_bytes)} usable: "
        f"{verdict}.</p>"
    )
