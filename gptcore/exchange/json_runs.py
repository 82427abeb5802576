"""Runs as JSON: one object, with one run a line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptcore.errors import InvalidInput
from gptcore.exchange.parcel import Arrived, Parcel, Source, parcel_of, record_of

FORMAT = "gptlab-runs"
VERSION = 1


def write(parcels: Sequence[Parcel]) -> bytes:
    """Return the file."""
    lines = ",\n".join(dumped(record_of(parcel)) for parcel in parcels)
    return f'{{"format": "{FORMAT}", "version": {VERSION}, "runs": [\n{lines}\n]}}\n'.encode()


def dumped(value: Any) -> str:
    r"""Return a cleaned value on one line, with every character as it is but lone surrogates.

    A lone half of a surrogate pair, which UTF-8 cannot hold, is written as ``\ud800``.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def is_ours(document: Any) -> bool:
    """Return whether this is the object that ``write`` writes."""
    return isinstance(document, Mapping) and document.get("format") == FORMAT


def read(document: Mapping[str, Any]) -> Arrived:
    """Return the runs of a parsed file."""
    if document.get("version") != VERSION:
        raise InvalidInput(
            f"The file has version {str(document.get('version'))[:20]} of the runs' format; this "
            f"program reads version {VERSION}."
        )
    if unknown := sorted(set(document) - {"format", "version", "runs"}):
        raise InvalidInput(f"The file holds {unknown[0][:40]!r}, which no run's file has.")
    runs = document.get("runs")
    if not isinstance(runs, list) or not all(isinstance(one, Mapping) for one in runs):
        raise InvalidInput("The file has no list of runs under 'runs'.")
    return Arrived(
        Source.JSON,
        tuple(
            parcel_of(one, Source.JSON, f"Run {at} of the file")
            for at, one in enumerate(runs, start=1)
        ),
    )
