r"""Runs as a table for spreadsheets: UTF-8 with a byte order mark, commas, lines ending in CR LF.

A run has a row for each measurement, or one row without; what is told once of a run (settings, text
and so on) stands in its first row. Numbers are plain, lists and mappings are JSON.

A spreadsheet takes a cell that begins with ``= + - @``, a tab or a line break for a formula. Text
that begins so, after spaces too, gets an apostrophe in front, and so does text that begins with an
apostrophe; reading takes one away. Text with a character that a table cannot hold (NUL, half of a
surrogate pair) is written as ``'json:`` and a JSON string. Columns of numbers hold only numbers, so
-3.2 stays a number.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from gptcore.errors import InvalidInput
from gptcore.exchange.json_runs import dumped
from gptcore.exchange.parcel import Arrived, Parcel, Source, parcel_of, record_of
from gptcore.records import Numbers, Provenance

EACH = ("id", "kind", "state", "created_at", "model", "precision", "device")
"""Columns that every row of a run has."""
MEASURED = ("measurement", "n", "median", "p05", "p95", "observations")
ONCE = ("started_at", "ended_at", "variant_hash", "parent_id", "error_kind", "error")
NUMBERS = tuple(one.name for one in fields(Numbers))
PROVENANCE = tuple(f"provenance.{one.name}" for one in fields(Provenance))
JSON = ("tags", "settings", "result", "variant", "origin")
COLUMNS = (
    *EACH,
    *MEASURED,
    *ONCE,
    *NUMBERS,
    "note",
    *PROVENANCE,
    *JSON,
    "text",
)
NUMERIC = {"n", "median", "p05", "p95", *NUMBERS} - {"finish_reason"} | {
    "provenance.cores",
    "provenance.memory_bytes",
    "provenance.threads",
}
DANGEROUS = "=+-@\t\r\n＝＋－＠"
AS_JSON = "'json:"
TOLERANCE = 1e-6
"""A spreadsheet may round a number to 15 digits when it saves the table."""


def write(parcels: Sequence[Parcel]) -> bytes:
    """Return the file."""
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\r\n")
    table.writeheader()
    for parcel in parcels:
        record = record_of(parcel)
        each = {name: _cell(name, record[name]) for name in EACH}
        once = _once(record)
        for measured in record["measurements"] or [None]:
            table.writerow(each | once | _measured(measured))
            once = {}
    return out.getvalue().encode("utf-8-sig")


def safe(text: str) -> str:
    """Return text as a cell that no spreadsheet takes for a formula."""
    if re.search("[\x00\ud800-\udfff]", text):
        return AS_JSON + json.dumps(text)
    return f"'{text}" if text.lstrip(" ")[:1] in (*DANGEROUS, "'") else text


def unsafe(cell: str) -> str:
    """Undo ``safe``."""
    if cell.startswith(AS_JSON):
        return str(json.loads(cell.removeprefix(AS_JSON)))
    return cell[1:] if cell.startswith("'") else cell


def _once(record: Mapping[str, Any]) -> dict[str, str]:
    told = {name: record[name] for name in (*ONCE, "note", *JSON, "text")}
    told |= record["numbers"] or {}
    told |= {f"provenance.{name}": one for name, one in (record["provenance"] or {}).items()}
    return {name: _cell(name, value) for name, value in told.items()}


def _measured(measured: Mapping[str, Any] | None) -> dict[str, str]:
    if measured is None:
        return {}
    return {
        "measurement": safe(measured["name"]),
        **{name: _cell(name, one) for name, one in _summary(measured["observations"]).items()},
        "observations": dumped(measured["observations"]),
    }


def _summary(observations: Sequence[Any]) -> dict[str, float]:
    values = np.array([float(one) for one in observations])
    if not np.isfinite(values).all():
        return {"n": len(values)}
    p05, median, p95 = (float(one) for one in np.percentile(values, [5, 50, 95]))
    return {"n": len(values), "median": median, "p05": p05, "p95": p95}


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in JSON:
        return dumped(value)
    return str(value) if column in NUMERIC else safe(str(value))


def is_ours(header: Sequence[str]) -> bool:
    """Return whether this is the first row of a table of runs."""
    return {"id", "kind", "state", "created_at", "settings"} <= set(header)


def read(text: str) -> Arrived:
    """Return the runs of a table; rows may have been sorted, and columns moved or left out."""
    csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise InvalidInput(f"The table cannot be read: {error}.") from None
    header = rows[0]
    if unknown := [name for name in header if name not in COLUMNS]:
        raise InvalidInput(f"The table has a column {unknown[0][:40]!r}, which runs have not.")
    if len(set(header)) < len(header):
        raise InvalidInput("The table has a column twice.")
    runs: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for number, cells in enumerate(rows[1:], start=2):
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise InvalidInput(
                f"Row {number} has {len(cells)} cells where the header has {len(header)}."
            )
        row = dict(zip(header, cells, strict=True))
        runs.setdefault(row["id"], []).append((number, row))
    return Arrived(
        Source.CSV,
        tuple(
            parcel_of(_record(found), Source.CSV, f"The run in row {found[0][0]}")
            for found in runs.values()
        ),
    )


def _record(rows: Sequence[tuple[int, Mapping[str, str]]]) -> dict[str, Any]:
    """Return the record of a run's rows."""
    told = [(number, row) for number, row in rows if row["settings"]]
    first = rows[0][1]
    if len(told) != 1:
        raise InvalidInput(
            f"Row {(told or rows)[-1][0]}: the settings of run {first['id'][:64]!r} must stand in "
            f"one of its rows, and stand in {len(told)}."
        )
    number, whole = told[0]
    for other, row in rows:
        if differing := [name for name in EACH if row.get(name) != whole.get(name)]:
            raise InvalidInput(
                f"Rows {number} and {other} are of the same run and differ in {differing[0]}."
            )
    values = {
        name: _value(name, cell, number)
        for name, cell in whole.items()
        if name not in MEASURED and cell
    }
    numbers = {name: values.pop(name) for name in NUMBERS if name in values}
    made = {
        name.removeprefix("provenance."): values.pop(name) for name in PROVENANCE if name in values
    }
    # An empty cell is an empty text or nothing at all; what may not be nothing gets the text.
    if numbers:
        numbers = {"finish_reason": "", **dict.fromkeys(_optional(Numbers)), **numbers}
    if made:
        made = (
            {"app_version": "", "python": "", "platform": ""}
            | {name: made.get(name) for name in _optional(Provenance)}
            | made
        )
    measurements = [
        {
            "name": unsafe(row["measurement"]),
            "observations": _observations(row, at),
        }
        for at, row in rows
        if row.get("measurement")
    ]
    return values | {
        "numbers": numbers or None,
        "provenance": made or None,
        "measurements": measurements,
    }


def _optional(kind: type[Numbers] | type[Provenance]) -> list[str]:
    return [one.name for one in fields(kind) if "None" in str(one.type)]


def _value(column: str, cell: str, row: int) -> Any:
    try:
        if column in JSON:
            return json.loads(cell)
        if column in NUMERIC:
            return int(cell) if re.fullmatch(r"-?\d{1,20}", cell) else float(cell)
        return unsafe(cell)
    except (ValueError, RecursionError):
        what = "JSON" if column in JSON else "a number" if column in NUMERIC else "text"
        raise InvalidInput(f"Row {row}: {column} is {cell[:40]!r}, which is not {what}.") from None


def _observations(row: Mapping[str, str], number: int) -> list[Any]:
    """Return the observations of a row, which must be what its summary is of."""
    try:
        found = json.loads(row.get("observations", ""))
        summary = _summary(found)
    except (ValueError, TypeError, RecursionError):
        raise InvalidInput(
            f"Row {number}: observations is {row.get('observations', '')[:40]!r}, which is no list "
            "of numbers."
        ) from None
    for name, value in summary.items():
        shown = _value(name, row[name], number) if row.get(name) else value
        if not math.isclose(shown, value, rel_tol=TOLERANCE, abs_tol=1e-300):
            raise InvalidInput(
                f"Row {number}: {name} is {shown:g} and the observations give {value:g}; one of "
                "them was changed."
            )
    kept: list[Any] = found
    return kept
