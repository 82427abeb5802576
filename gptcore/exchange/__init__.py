"""Runs as files and back: CSV, JSON, llama-bench's JSONL; results of vLLM and GuideLLM as runs.

Everything here is a function from bytes to values or back; nothing is stored. Writing what was read
gives the same bytes again. A file is read whole or not at all, with one sentence on why not.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gptcore.errors import InvalidInput
from gptcore.exchange import csv_table, json_runs, llama_bench, serving
from gptcore.exchange.parcel import Arrived, Imported, Parcel, Source, imported
from gptcore.exchange.serving import MAPPING, Mapped

__all__ = [
    "MAPPING",
    "MAX_BYTES",
    "Arrived",
    "Departed",
    "Format",
    "Imported",
    "Mapped",
    "Parcel",
    "Source",
    "export",
    "imported",
    "read",
]

MAX_BYTES = 64 * 2**20
MAX_VALUES = 8_000_000
"""Commas, colons and opening brackets: a small file can hold millions of values."""
MAX_DEPTH = 64
MAX_RUNS = 100_000
READABLE = (
    "runs of this program as CSV, JSON or llama-bench's JSONL, results of llama-bench, and the "
    "benchmark results of vLLM and GuideLLM as JSON"
)


class Format(StrEnum):
    """As what runs can be written."""

    CSV = "csv"
    JSON = "json"
    LLAMA_BENCH = "llama-bench"

    @property
    def suffix(self) -> str:
        """How such a file's name ends."""
        return {"csv": ".csv", "json": ".json", "llama-bench": ".jsonl"}[self.value]


@dataclass(frozen=True, slots=True)
class Departed:
    """A file of runs."""

    data: bytes
    runs: int
    unfinished: int
    """Runs left out because they had not ended."""
    without_tests: int
    """Runs left out because nothing in them is what llama-bench measures."""


def export(parcels: Sequence[Parcel], form: Format) -> Departed:
    """Return the runs as a file, the oldest first."""
    ended = [one for one in parcels if one.run.state.final]
    ended.sort(key=lambda one: (one.run.created_at, one.run.id))
    without = 0
    match form:
        case Format.CSV:
            data = csv_table.write(ended)
        case Format.JSON:
            data = json_runs.write(ended)
        case Format.LLAMA_BENCH:
            data, without = llama_bench.write(ended)
    return Departed(data, len(ended) - without, len(parcels) - len(ended), without)


def read(data: bytes) -> Arrived:
    """Return the runs that a file holds; its kind is seen from what is in it.

    The id of a run from another program is made from the file's content, so that reading the same
    file twice gives the same runs.

    Raises:
        InvalidInput: the file is too large, damaged, or none that is known.
    """
    if len(data) > MAX_BYTES:
        raise InvalidInput(
            f"The file has {len(data):,} bytes; the most is {MAX_BYTES:,}: export fewer runs."
        )
    values = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    if values > MAX_VALUES:
        raise InvalidInput(
            f"The file holds about {values:,} values; the most is {MAX_VALUES:,}: "
            "export fewer runs."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"The file is no text in UTF-8: byte {error.start + 1:,} is none. {_known()}"
        ) from None
    if not text.strip():
        raise InvalidInput(f"The file is empty. {_known()}")
    arrived = _of_json(text) if text.lstrip()[0] in "{[" else _of_table(text)
    ids = [one.run.id for one in arrived.parcels]
    if len(ids) > MAX_RUNS:
        raise InvalidInput(f"The file holds {len(ids):,} runs; the most is {MAX_RUNS:,}.")
    id, times = Counter(ids).most_common(1)[0] if ids else ("", 1)
    if times > 1:
        raise InvalidInput(f"The run {id} is in the file {times} times.")
    return arrived


def _of_json(text: str) -> Arrived:
    documents = _documents(text)
    kinds: tuple[tuple[Callable[[Any], bool], Callable[[list[Any]], Arrived], bool], ...] = (
        (json_runs.is_ours, lambda all_: json_runs.read(all_[0]), False),
        (llama_bench.is_one, llama_bench.read, True),
        (serving.is_guidellm, lambda all_: serving.read_guidellm(all_[0]), False),
        (serving.is_vllm, serving.read_vllm, True),
    )
    for fits, reader, several in kinds:
        if documents and all(map(fits, documents)) and (several or len(documents) == 1):
            return reader(documents)
    raise InvalidInput(f"The file is JSON of another kind. {_known()}")


def _documents(text: str) -> list[Any]:
    """Return the objects of a JSON file, of a list, or of a file with one on each line."""
    try:
        whole = json.loads(text)
        documents = whole if isinstance(whole, list) else [whole]
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        documents = _lines(text, error)
    for one in documents:
        if _deeper(one, MAX_DEPTH):
            raise _too_deep()
    return documents


def _lines(text: str, problem: ValueError) -> list[Any]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                documents.append(json.loads(line))
            except RecursionError:
                raise _too_deep() from None
            except ValueError as error:
                # With one object over many lines, no line is JSON: then the first problem counts.
                said = problem if not documents else f"line {number}: {error}"
                raise InvalidInput(f"The file is damaged JSON: {said}.") from None
    return documents


def _deeper(value: Any, most: int) -> bool:
    """Return whether lists and mappings lie in each other more than ``most`` deep."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for one in level
            if isinstance(one, Mapping | list)
            for inner in (one.values() if isinstance(one, Mapping) else one)
            if isinstance(inner, Mapping | list)
        ]
        if not level:
            return False
    return True


def _too_deep() -> InvalidInput:
    return InvalidInput(f"The file's values lie more than {MAX_DEPTH} deep in each other.")


def _of_table(text: str) -> Arrived:
    header = next(csv.reader([text.split("\n", 1)[0].rstrip("\r")]), [])
    if not csv_table.is_ours(header):
        raise InvalidInput(f"The file is neither JSON nor a table of runs. {_known()}")
    return csv_table.read(text)


def _known() -> str:
    return f"What can be read: {READABLE}."
