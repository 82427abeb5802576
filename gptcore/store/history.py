"""What a person looks for among many runs: narrow rows, notes on them, and questions in SQL."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    Text,
    func,
    select,
    text,
    type_coerce,
)
from sqlalchemy.exc import SQLAlchemyError

from gptcore.errors import InvalidInput
from gptcore.records import Annotation
from gptcore.sentences import one_line
from gptcore.store import rows, tables
from gptcore.store.tables import escaped

MAX_ROWS = 1000
"""Of an answer to a question in SQL."""
MAX_SECONDS = 10.0
MAX_CELL_CHARS = 2000
STEPS_BETWEEN_LOOKS = 10_000
"""Of SQLite's machine, between two looks at the clock."""
SORTABLE = (
    "created_at",
    "model",
    "precision",
    "kind",
    "state",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
)
_RUNS, _NOTES = tables.runs, tables.run_annotations
_NUMBERS = (
    "prompt_tokens",
    "new_tokens",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
)


@dataclass(frozen=True, slots=True)
class Found:
    """One run as a line of a list."""

    id: str
    kind: str
    state: str
    created_at: datetime
    model: str
    precision: str
    device: str
    variant_hash: str | None
    parent_id: str | None
    prompt: str
    """The beginning of the prompt."""
    error: str | None
    numbers: Mapping[str, float | None]
    annotation: Annotation


@dataclass(frozen=True, slots=True)
class Filter:
    """Which runs; a field that is empty leaves everything in."""

    search: str = ""
    """In prompt, text, model, error, id, tags and note; case is the same for a to z."""
    kinds: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    """All of them."""
    archived: bool = False
    """Whether the archived ones are shown too."""
    baseline: bool = False
    """Only those that others are held against."""
    order: str = "created_at"
    """One of ``SORTABLE``; pinned runs come first in any order."""
    descending: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What a question in SQL found."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    cut: bool
    """Whether there are more than ``MAX_ROWS``."""
    seconds: float


def found(connection: Connection, wanted: Filter, limit: int, offset: int) -> tuple[Found, ...]:
    """Return one page of runs, pinned ones first.

    Raises:
        InvalidInput: the order is by no column that can be sorted.
    """
    if wanted.order not in SORTABLE:
        raise InvalidInput(
            f"Runs cannot be sorted by {wanted.order!r}; there are: {', '.join(SORTABLE)}."
        )
    columns = [_RUNS.c[name] for name in (*_PLAIN, *_NUMBERS)]
    column = _RUNS.c[wanted.order]
    key = (column.desc() if wanted.descending else column.asc()).nulls_last()
    query = (
        _filtered(select(*columns, *(_NOTES.c[name] for name in _NOTED)), wanted)
        .order_by(func.coalesce(_NOTES.c.pinned, False).desc(), key, _RUNS.c.id)
        .limit(limit)
        .offset(offset)
    )
    return tuple(_found_of_row(row._mapping) for row in connection.execute(query))


def count(connection: Connection, wanted: Filter) -> int:
    """Return how many runs there are in all pages."""
    query = _filtered(select(func.count(_RUNS.c.id)), wanted)
    return int(connection.execute(query).scalar_one())


def said_about(connection: Connection, ids: Sequence[str]) -> dict[str, Annotation]:
    """Return what was said about runs; those about which nothing was said are not in it."""
    query = select(_NOTES).where(_NOTES.c.run_id.in_(list(ids)))
    return {row.run_id: _annotation(row._mapping) for row in connection.execute(query)}


def tags(connection: Connection) -> tuple[str, ...]:
    """Return every tag in use, sorted."""
    kept = connection.execute(select(_NOTES.c.tags).distinct()).scalars()
    return tuple(sorted({tag for one in kept for tag in json.loads(one)}))


def annotation_row(run_id: str, one: Annotation) -> dict[str, Any]:
    """Return the columns of an annotation."""
    return {
        "run_id": run_id,
        "tags": json.dumps(sorted(set(one.tags)), ensure_ascii=True),
        "note": one.note,
        "pinned": one.pinned,
        "archived": one.archived,
        "baseline": one.baseline,
    }


def ask_sqlite(path: Path, question: str) -> Answer:
    """Answer a question over a connection that cannot do anything but SELECT.

    Raises:
        InvalidInput: it is no SELECT, is wrong, or takes longer than ``MAX_SECONDS``.
    """
    began = time.monotonic()
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    refused: list[str] = []

    def allowed(action: int, first: str | None, second: str | None, *_: Any) -> int:
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and second != "load_extension":
            return sqlite3.SQLITE_OK
        refused.append(first or "")
        return sqlite3.SQLITE_DENY

    connection.set_authorizer(allowed)
    connection.set_progress_handler(
        lambda: time.monotonic() - began > MAX_SECONDS, STEPS_BETWEEN_LOOKS
    )
    try:
        cursor = connection.execute(question)
        if cursor.description is None:
            raise InvalidInput("There is no question: write one that begins with SELECT.")
        kept = cursor.fetchmany(MAX_ROWS + 1)
        names = tuple(one[0] for one in cursor.description)
    except (sqlite3.Error, sqlite3.Warning) as error:
        if refused:
            raise InvalidInput(
                "Only SELECT can be asked here; this connection can change nothing."
            ) from None
        if "interrupted" in str(error):
            raise InvalidInput(_slow()) from None
        raise InvalidInput(f"The database says: {one_line(str(error), 300)}.") from None
    finally:
        connection.close()
    return _answer(names, kept, began)


def ask_server(connection: Connection, question: str) -> Answer:
    """Answer a question in a transaction that the server holds to reading.

    It stands inside another SELECT, so that it can be nothing else.

    Raises:
        InvalidInput: as ``ask_sqlite``.
    """
    began = time.monotonic()
    plain = question.strip().rstrip(";")
    if not plain:
        raise InvalidInput("There is no question: write one that begins with SELECT.")
    try:
        connection.execute(text("SET TRANSACTION READ ONLY"))
        connection.execute(text(f"SET LOCAL statement_timeout = {int(MAX_SECONDS * 1000)}"))
        # With a parameter the server takes one statement only; nothing can follow the SELECT.
        result = connection.exec_driver_sql(
            f"SELECT * FROM (\n{plain.replace('%', '%%')}\n) AS question LIMIT %s",
            (MAX_ROWS + 1,),
        )
        kept = [tuple(row) for row in result]
        names = tuple(result.keys())
    except SQLAlchemyError as error:
        said = one_line(str(getattr(error, "orig", error)), 300)
        if "statement timeout" in said:
            raise InvalidInput(_slow()) from None
        raise InvalidInput(f"The database says: {said}.") from None
    return _answer(names, kept, began)


_PLAIN = (
    "id",
    "kind",
    "state",
    "created_at",
    "model",
    "precision",
    "device",
    "variant_hash",
    "parent_id",
    "prompt_start",
    "error",
)
_NOTED = ("tags", "note", "pinned", "archived", "baseline")


def _filtered(query: Select[Any], wanted: Filter) -> Select[Any]:
    query = query.select_from(_RUNS.outerjoin(_NOTES, _NOTES.c.run_id == _RUNS.c.id))
    for column, values in (
        (_RUNS.c.kind, wanted.kinds),
        (_RUNS.c.state, wanted.states),
        (_RUNS.c.model, wanted.models),
    ):
        if values:
            query = query.where(column.in_(list(values)))
    if not wanted.archived:
        query = query.where(func.coalesce(_NOTES.c.archived, False).is_(False))
    if wanted.baseline:
        query = query.where(_NOTES.c.baseline)
    for tag in wanted.tags:
        query = query.where(_holds(_NOTES.c.tags, json.dumps(tag)))
    if wanted.search:
        places = (
            _RUNS.c.prompt_start,
            _RUNS.c.text,
            _RUNS.c.model,
            _RUNS.c.error,
            _RUNS.c.id,
            _NOTES.c.note,
        )
        sought = escaped(wanted.search)
        condition = _holds(_NOTES.c.tags, json.dumps(wanted.search)[1:-1])
        for column in places:
            condition = condition | _holds(column, sought)
        query = query.where(condition)
    return query


def _holds(column: ColumnElement[Any], sought: str) -> ColumnElement[bool]:
    return type_coerce(column, Text).icontains(sought, autoescape=True)


def _found_of_row(row: RowMapping) -> Found:
    created_at = rows.moment_of(row["created_at"])
    assert created_at is not None
    return Found(
        id=row["id"],
        kind=row["kind"],
        state=row["state"],
        created_at=created_at,
        model=row["model"],
        precision=row["precision"],
        device=row["device"],
        variant_hash=row["variant_hash"],
        parent_id=row["parent_id"],
        prompt=row["prompt_start"],
        error=row["error"],
        numbers={name: row[name] for name in _NUMBERS},
        annotation=_annotation(row),
    )


def _annotation(row: RowMapping) -> Annotation:
    if row["tags"] is None:
        return Annotation()
    return Annotation(
        tags=tuple(json.loads(row["tags"])),
        note=row["note"],
        pinned=row["pinned"],
        archived=row["archived"],
        baseline=row["baseline"],
    )


def _answer(names: tuple[str, ...], kept: Sequence[tuple[Any, ...]], began: float) -> Answer:
    return Answer(
        columns=names,
        rows=tuple(tuple(map(_shown, row)) for row in kept[:MAX_ROWS]),
        cut=len(kept) > MAX_ROWS,
        seconds=time.monotonic() - began,
    )


def _shown(value: Any) -> Any:
    if isinstance(value, bytes | memoryview):
        return f"{len(bytes(value)):,} bytes"
    if isinstance(value, str) and len(value) > MAX_CELL_CHARS:
        return value[:MAX_CELL_CHARS] + "…"
    return value


def _slow() -> str:
    return f"The question took longer than {MAX_SECONDS:g} s and was ended: narrow it down."
