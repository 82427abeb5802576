"""Values as JSON lines, between the server and its hosts. No pickle, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from gptcore.errors import KINDS, GptcoreError
from gptcore.records import Alternative, Numbers, Run, RunKind, RunState, Token

READING = "reading the prompt"
"""The phase of a generation from which on others of its variant may join it."""


def encode(message: Mapping[str, Any]) -> bytes:
    """Return one line, newline included; NaN is refused, so that every reader agrees."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def token_to_json(token: Token) -> dict[str, Any]:
    """Return a token as JSON-able values."""
    return asdict(token)


def token_from_json(value: Mapping[str, Any]) -> Token:
    """Return the token that ``token_to_json`` wrote."""
    alternatives = tuple(
        Alternative(one["id"], one["text"], tuple(one["probabilities"]))
        for one in value["alternatives"]
    )
    return Token(**{**value, "alternatives": alternatives})


def run_to_json(run: Run) -> dict[str, Any]:
    """Return a run as JSON-able values."""
    value = asdict(run)
    for name in ("created_at", "started_at", "ended_at"):
        value[name] = value[name].isoformat() if value[name] else None
    return value


def run_from_json(value: Mapping[str, Any]) -> Run:
    """Return the run that ``run_to_json`` wrote."""
    times = {
        name: datetime.fromisoformat(value[name]) if value[name] else None
        for name in ("started_at", "ended_at")
    }
    return Run(
        **{
            **value,
            **times,
            "created_at": datetime.fromisoformat(value["created_at"]),
            "kind": RunKind(value["kind"]),
            "state": RunState(value["state"]),
            "numbers": Numbers(**value["numbers"]) if value["numbers"] else None,
        }
    )


def error_from_json(kind: str, sentence: str) -> GptcoreError:
    """Return the error of that kind."""
    return KINDS.get(kind, GptcoreError)(sentence)
