"""Reads what a user wrote as JSONL, one object a line, and refuses anything else in a sentence."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from gptcore.errors import InvalidInput
from gptcore.sentences import brief, detail

MAX_LINES = 10_000
MAX_LINE_BYTES = 64 * 2**10
MAX_FILE_BYTES = 64 * 2**20
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "zip"}
"""First bytes of files that people take for text."""

Value = TypeVar("Value", bound=BaseModel)


def read_jsonl(
    source: Path | bytes, owner: type[Value], *, name: str = ""
) -> tuple[tuple[int, Value], ...]:
    """Return every object of a file with its line's number; empty lines are left out.

    Args:
        source: a file, or what an upload brought.
        owner: what each line must be.
        name: what errors call it; a file's own name, if not given.

    Raises:
        InvalidInput: it cannot be read, is no JSONL, is too large, or a line is wrong. The sentence
            names the first wrong line, its field, and the way out.
    """
    name = name or (source.name if isinstance(source, Path) else "The text")
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), owner, name)
    try:
        with source.open("rb") as file:
            return _read(file, source.stat().st_size, owner, name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(
            f"{name} cannot be read: {reason}. Name a JSONL file that you may read."
        ) from None


def _read(
    file: BinaryIO, size: int, owner: type[Value], name: str
) -> tuple[tuple[int, Value], ...]:
    if size > MAX_FILE_BYTES:
        raise InvalidInput(
            f"{name} has {size / 2**20:,.0f} MiB; at most {MAX_FILE_BYTES // 2**20} are read: "
            "split it."
        )
    found: list[tuple[int, Value]] = []
    for number, line in _lines(file, name):
        try:
            found.append((number, owner.model_validate_json(line)))
        except ValidationError as error:
            raise InvalidInput(f"{name}, line {number}: {_problem(error, line, owner)}") from None
    if not found:
        raise InvalidInput(f"{name} is empty: write one object a line, {_pattern(owner)}.")
    return tuple(found)


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 2):  # with the line's end
        number += 1
        if number > MAX_LINES:
            raise InvalidInput(f"{name} has more than {MAX_LINES:,} lines: split it.")
        if number == 1:
            for mark, kind in MARKS.items():
                if line.startswith(mark):
                    raise InvalidInput(f"{name} is {kind}, not UTF-8 text: save it as UTF-8 JSONL.")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if b"\x00" in line:
            raise InvalidInput(f"{name}, line {number} holds a NUL byte: it is no text file.")
        line = line.strip()
        if len(line) > MAX_LINE_BYTES:
            raise InvalidInput(
                f"{name}, line {number} is longer than {MAX_LINE_BYTES // 2**10} KiB: write one "
                "object a line, and shorten long ones."
            )
        if line:
            yield number, line


def _problem(error: ValidationError, line: bytes, owner: type[BaseModel]) -> str:
    """Return what is wrong with one line."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            return f"byte {wrong.start + 1} is no UTF-8: save the file as UTF-8."
        reason = str(first.get("ctx", {}).get("error", "")).replace(" at line 1 column", ", column")
        return f"no JSON ({reason}): write one object a line, {_pattern(owner)}."
    if first["type"] == "model_type":
        return f"{brief(first['input'])} is no object: write {_pattern(owner)}."
    return detail(first, owner)


def _pattern(owner: type[BaseModel]) -> str:
    """Return how a line looks."""
    named = (name for name, field in owner.model_fields.items() if field.is_required())
    return "{" + ", ".join(f'"{name}": …' for name in named) + "}"
