"""How the frozen values become rows, and rows the same values again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import RowMapping

from gptcore.records import (
    Alternative,
    Numbers,
    Provenance,
    Run,
    RunKind,
    RunState,
    Token,
)

NUMBERS = tuple(field.name for field in fields(Numbers))
PROVENANCE = tuple(field.name for field in fields(Provenance))
PROMPT_START_CHARS = 2000
"""As much of a prompt as a search looks at."""


def seconds_of(moment: datetime | None) -> float | None:
    """Return ``moment`` as seconds since 1970; a moment without a zone is refused."""
    if moment is None:
        return None
    assert moment.tzinfo is not None, f"{moment} has no time zone"
    return moment.timestamp()


def moment_of(seconds: float | None) -> datetime | None:
    """Undo ``seconds_of``, in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def run_to_row(run: Run, machine: str) -> dict[str, Any]:
    """Return the columns of ``run``."""
    return changes_to_row({field.name: getattr(run, field.name) for field in fields(Run)}) | {
        "machine": machine
    }


def changes_to_row(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that belong to some fields of a Run."""
    row: dict[str, Any] = {}
    for name, value in changes.items():
        if name == "numbers":
            row |= {column: getattr(value, column, None) for column in NUMBERS}
        elif name == "settings":
            row["settings"] = json.dumps(dict(value))
            row["prompt_start"] = _prompt_start(value)
        elif name == "result":
            row["result"] = None if value is None else json.dumps(dict(value), allow_nan=False)
        elif name.endswith("_at"):
            row[name] = seconds_of(value)
        elif name in ("kind", "state"):
            row[name] = str(value)
        else:
            row[name] = value
    return row


def run_of_row(row: RowMapping) -> Run:
    """Return the Run that a row of ``runs`` holds."""
    created_at = moment_of(row["created_at"])
    assert created_at is not None
    # e2e_s is never missing from Numbers, so it tells whether there were any.
    numbers = None if row["e2e_s"] is None else Numbers(**{name: row[name] for name in NUMBERS})
    return Run(
        id=row["id"],
        kind=RunKind(row["kind"]),
        state=RunState(row["state"]),
        created_at=created_at,
        model=row["model"],
        precision=row["precision"],
        device=row["device"],
        variant_hash=row["variant_hash"],
        settings=json.loads(row["settings"]),
        owner=row["owner"],
        started_at=moment_of(row["started_at"]),
        ended_at=moment_of(row["ended_at"]),
        text=row["text"],
        error_kind=row["error_kind"],
        error=row["error"],
        numbers=numbers,
        parent_id=row["parent_id"],
        result=None if row["result"] is None else json.loads(row["result"]),
    )


def _prompt_start(settings: Mapping[str, Any]) -> str:
    prompt = settings.get("prompt") or ""
    for message in settings.get("messages") or ():
        if message.get("role") == "user":
            prompt = message.get("content", "")  # the last thing the user said
    return str(prompt)[:PROMPT_START_CHARS]


def tokens_to_row(run_id: str, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return one row for a whole stream: a column of JSON arrays for each field.

    Alternatives are most of the bytes and repeat a lot, so they are compressed.
    """
    alternatives = [
        [[other.id, other.text, list(other.probabilities)] for other in token.alternatives]
        for token in tokens
    ]
    return {
        "run_id": run_id,
        "count": len(tokens),
        "ids": json.dumps([token.id for token in tokens]),
        "seconds": json.dumps([token.seconds for token in tokens]),
        "logprobs": json.dumps([token.logprob for token in tokens]),
        "probabilities": json.dumps([token.probability for token in tokens]),
        "texts": json.dumps([token.text for token in tokens]),
        "forced": json.dumps([int(token.forced) for token in tokens]),
        "alternatives": zlib.compress(json.dumps(alternatives).encode(), 6),
    }


def tokens_of_row(row: RowMapping) -> tuple[Token, ...]:
    """Undo ``tokens_to_row``."""
    columns = [
        json.loads(row[name])
        for name in ("ids", "texts", "logprobs", "probabilities", "seconds", "forced")
    ]
    alternatives = json.loads(zlib.decompress(row["alternatives"]))
    return tuple(
        Token(
            index=index,
            id=id,
            text=text,
            logprob=logprob,
            probability=probability,
            seconds=seconds,
            forced=bool(forced),
            alternatives=tuple(Alternative(i, t, tuple(p)) for i, t, p in others),
        )
        for index, (id, text, logprob, probability, seconds, forced, others) in enumerate(
            zip(*columns, alternatives, strict=True)
        )
    )
