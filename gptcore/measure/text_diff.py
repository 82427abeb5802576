"""What one text says otherwise than another, word by word, and the token with which it leaves it.

Two variants may cut the same words into different tokens, so words are compared and tokens only
found: the first one after which the texts so far are no longer the beginning of one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Literal

from gptcore.records import Token

Change = Literal["same", "added", "removed"]
_WORDS = re.compile(r"\s*(?:[^\W\u0e00-\U0010ffff]+|\S)|\s+")
"""A word or one other character with the space before it; space at the end of a text is one too.

From U+0E00 on stand scripts that put no space between words: each character is then a word.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of two texts laid over each other."""

    change: Change
    """Of the other text against the base: what is removed stands in the base alone."""
    text: str
    first: bool = False
    """Whether it is of the token with which the other text leaves the base."""


def first_divergent(base: Sequence[Token], other: Sequence[Token]) -> int | None:
    """Return the index of the first token of ``other`` that leaves ``base``, None if none does.

    Where ``base`` has ended, the next token leaves it. A character may take several tokens, and
    the first of them that differs counts, although the last one completes it.
    """
    whole, said = "".join(one.text for one in base), ""
    for index, token in enumerate(other):
        said += token.text
        beyond = not token.text and len(said) == len(whole) and index >= len(base)
        if beyond or not whole.startswith(said):
            return _beginning(base, other, index)
    return None


def _beginning(base: Sequence[Token], other: Sequence[Token], index: int) -> int:
    """Return the first token of the character that ``index`` completes, as far as it differs."""
    while index and not other[index - 1].text:
        before = index - 1
        if before < len(base) and base[before].id == other[before].id:
            break
        index = before
    return index


def difference(base: Sequence[Token], other: Sequence[Token]) -> tuple[Piece, ...]:
    """Return both texts laid over each other.

    What is the same or removed is ``base``, in its order; what is the same or added is ``other``.
    """
    left, right = ("".join(one.text for one in text) for text in (base, other))
    leaves = first_divergent(base, other)
    begin = end = len(right)
    if leaves is not None:
        begin = sum(len(one.text) for one in other[:leaves])
        end = begin + next((len(one.text) for one in other[leaves:] if one.text), 0)
    pieces: list[Piece] = []
    at = 0
    for change, text in _words(left, right):
        if change == "removed":
            pieces.append(Piece(change, text))
            continue
        cuts = (0, *(min(max(one - at, 0), len(text)) for one in (begin, end)), len(text))
        pieces += [
            Piece(change, text[low:high], first=number == 1)
            for number, (low, high) in enumerate(pairwise(cuts))
            if high > low
        ]
        at += len(text)
    return tuple(pieces)


def _words(base: str, other: str) -> Iterator[tuple[Change, str]]:
    """Yield what is the same, removed and added, in stretches of words."""
    left, right = _WORDS.findall(base), _WORDS.findall(other)
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    for _, a, b, c, d in matcher.get_opcodes():
        before, after = "".join(left[a:b]), "".join(right[c:d])
        if before == after:
            yield "same", after
            continue
        if before:
            yield "removed", before
        if after:
            yield "added", after
