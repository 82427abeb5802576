"""Texts to learn from, read in pieces, so that a file may be larger than memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from gptcore.errors import InvalidInput

PIECE_BYTES = 2**20
VALIDATION_SHARE = 0.1
"""Of a text file, at its end."""


def pieces(file: Path, begin: int = 0, end: int | None = None) -> Iterator[str]:
    """Yield the text of a file, cut at line ends where there are any.

    Args:
        file: UTF-8.
        begin: the first byte, of a whole character.
        end: the byte behind the last, None for all.

    Raises:
        InvalidInput: it cannot be read, or is no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, at = "", begin
    try:
        with file.open("rb") as opened:
            opened.seek(begin)
            while block := opened.read(
                PIECE_BYTES if end is None else min(PIECE_BYTES, max(0, end - at))
            ):
                if b"\0" in block:
                    raise _binary(file, at + block.index(b"\0"))
                held += decoder.decode(block)
                at += len(block)
                cut = held.rfind("\n") + 1
                if cut == 0 and len(held) >= PIECE_BYTES:
                    cut = len(held)
                if cut:
                    yield held[:cut]
                    held = held[cut:]
        held += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _binary(file, at + error.start) from None
    except OSError as error:
        raise InvalidInput(f"{file.name[:80]} cannot be read: {error.strerror}.") from None
    if held:
        yield held


def split(file: Path, share: float = VALIDATION_SHARE) -> int:
    """Return the byte at which the last ``share`` of a text file begins.

    Raises:
        InvalidInput: the file is missing, a folder, or empty.
    """
    try:
        size = file.stat().st_size
        if not file.is_file() or size == 0:
            kind = "is empty" if file.is_file() else "is no file"
            raise InvalidInput(f"{file.name[:80]} {kind}: give a file of UTF-8 text.")
        at = int(size * (1 - share))
        with file.open("rb") as opened:
            opened.seek(at)
            following = opened.read(4)
    except OSError as error:
        raise InvalidInput(
            f"{str(file)[:120]} cannot be read: {error.strerror}. Give a file of UTF-8 text."
        ) from None
    for offset, byte in enumerate(following):
        if byte & 0xC0 != 0x80:  # not the inside of a character
            return at + offset
    return at + len(following)


def _binary(file: Path, at: int) -> InvalidInput:
    return InvalidInput(
        f"{file.name[:80]} is no text in UTF-8: byte {at:,} is no part of one. Convert it first, "
        "or give another file."
    )
