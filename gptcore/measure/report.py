"""The result of a comparison as one HTML page that opens without a network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from gptcore.records import Provenance, Run

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:920px;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}
p.said{color:#6b7289;margin:.25rem 0 1rem}
table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .5rem;border-bottom:1px solid #8884;text-align:left;vertical-align:middle}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.good{color:#0f8a66;font-weight:600}td.bad{color:#c23b4e;font-weight:600}
svg{display:block;width:100%;min-width:180px;height:18px}
"""
METRICS = {"prefill_s": "Prefill", "decode_s": "Decode", "energy_j": "Energy"}
WIDEST = math.log(1.25)
"""Half the width of a drawing of intervals at least, as a logarithm of a ratio."""


def comparison_page(run: Run, made: Provenance | None) -> str:
    """Return sides, verdicts with their intervals, conditions and method of a comparison.

    Args:
        run: of the kind ``compare``, with a result.
        made: what made its numbers, None if unknown.
    """
    result = run.result or {}
    escape = html.escape
    sides = result.get("sides", ())
    named = " against ".join(f"{one['model']} {one['precision']}" for one in sides[::-1])
    pieces = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{escape(named)}</title><style>{STYLE}</style>",
        f"<h1>{escape(named)}</h1>",
        f"<p class=said>Run {escape(run.id)}, {run.created_at:%Y-%m-%d %H:%M} UTC, "
        f"{escape(run.state.value)}. {escape(result.get('residency', ''))}.</p>",
        "<h2>Sides</h2><table><tr><th><th>model<th>precision<th>recipe<th>memory",
        *(_side(one) for one in sides),
        "</table>",
    ]
    comparisons = result.get("comparisons", ())
    reach = max(
        [WIDEST]
        + [abs(math.log(one[key])) for one in comparisons for key in ("low", "high") if one[key]]
    )
    pieces.append(
        "<h2>Verdicts</h2><table><tr><th>cell<th>side<th>what<th>ratio to A<th>95 % interval"
        "<th><th>verdict"
    )
    energy = str(result.get("energy_label", "")).partition(":")[0]
    pieces += [_verdict(one, reach, energy) for one in comparisons]
    pieces.append("</table>")
    floor = result.get("noise_floor_used")
    pieces.append(
        f"<p class=said>Noise floor of this machine: {floor:.3f}, measured "
        f"{escape(str(result.get('noise_floor_used_at')))}; nothing below it is coloured.</p>"
        if floor
        else "<p class=said>The noise of this machine was not measured.</p>"
    )
    pieces.append(
        f"<h2>Method</h2><p>{escape(result.get('method', ''))}</p>"
        f"<p>Energy: {escape(str(result.get('energy_label', 'unavailable')))}</p>"
    )
    pieces.append("<h2>Blocks</h2><table><tr><th>cell<th>what<th>side<th>n<th>median<th>ended")
    pieces += [row for cell in result.get("cells", ()) for row in _blocks(cell, energy)]
    pieces.append("</table><h2>What made the numbers</h2><table>")
    conditions = asdict(made) if made else {"provenance": None}
    pieces += [
        f"<tr><td>{escape(name)}<td>{escape('unknown' if value is None else str(value))}"
        for name, value in conditions.items()
    ]
    pieces.append("</table>")
    return "\n".join(pieces)


def cell_name(cell: Mapping[str, Any]) -> str:
    """Return a cell in words: ``128 in, 32 out, batch 4``."""
    return f"{cell['prompt_tokens']:,} in, {cell['new_tokens']:,} out, batch {cell['batch']}"


def _side(one: Mapping[str, Any]) -> str:
    size = one.get("resident_bytes")
    memory = "unknown" if size is None else f"{size / 2**20:,.0f} MiB"
    problem = f" {one['problem']}" if one.get("problem") else ""
    cells = (one["side"], one["model"], one["precision"], one["recipe"] + problem)
    return "<tr>" + "".join(f"<td>{html.escape(text)}" for text in cells) + f"<td class=n>{memory}"


def _verdict(one: Mapping[str, Any], reach: float, energy: str) -> str:
    known = one["ratio"] is not None
    numbers = (
        f"<td class=n>{one['ratio']:.3f}<td class=n>{one['low']:.3f} – {one['high']:.3f}"
        if known
        else "<td class=n>—<td class=n>—"
    )
    look = ""
    if one["coloured"]:
        look = " class=good" if one["verdict"] in ("faster", "less") else " class=bad"
    drawn = _interval(one, reach) if known else ""
    return (
        f"<tr><td>{html.escape(cell_name(one['cell']))}<td>{one['side']}"
        f"<td>{html.escape(_name(one['metric'], energy))}{numbers}<td>{drawn}"
        f"<td{look} title='{html.escape(one['sentence'], quote=True)}'>"
        f"{html.escape(one['verdict'])}"
    )


def _name(metric: str, energy: str) -> str:
    label = f" ({energy})" if metric == "energy_j" and energy else ""
    return METRICS.get(metric, metric) + label


def _interval(one: Mapping[str, Any], reach: float) -> str:
    """Return an interval on a logarithmic axis whose middle is 1."""

    def at(ratio: float) -> float:
        return 100 + 96 * math.log(ratio) / reach

    low, high, middle = at(one["low"]), at(one["high"]), at(one["ratio"])
    return (
        "<svg viewBox='0 0 200 18' preserveAspectRatio='none' role=img>"
        "<line x1=100 x2=100 y1=0 y2=18 stroke='#8888'/>"
        f"<line x1={low:.2f} x2={high:.2f} y1=9 y2=9 stroke='#3350d4' stroke-width=3 />"
        f"<line x1={middle:.2f} x2={middle:.2f} y1=3 y2=15 stroke='#3350d4' stroke-width=2 /></svg>"
    )


def _blocks(cell: Mapping[str, Any], energy: str) -> Iterator[str]:
    for metric, sides in cell["blocks"].items():
        unit = "J" if metric.endswith("_j") else "s"
        for side, values in sides.items():
            middle = f"{median(values):.5g} {unit}" if values else "—"
            yield (
                f"<tr><td>{html.escape(cell_name(cell))}<td>{html.escape(_name(metric, energy))}"
                f"<td>{side}<td class=n>{len(values)}<td class=n>{middle}"
                f"<td>{html.escape(cell['ended'] or 'not yet')}"
            )
