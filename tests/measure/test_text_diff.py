"""Two texts laid over each other: both can be read off again, and one token leaves first."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from gptcore.measure.text_diff import Piece, difference, first_divergent
from gptcore.records import Token


def tokens(*texts: str) -> tuple[Token, ...]:
    """Tokens whose id is their text's, so that equal texts are equal tokens."""
    return tuple(Token(index, hash(text), text, -0.1, 0.9, 0.1) for index, text in enumerate(texts))


def read(pieces: Sequence[Piece], change: str) -> str:
    return "".join(one.text for one in pieces if one.change in ("same", change))


def leaving(pieces: Sequence[Piece]) -> list[str]:
    return [one.text for one in pieces if one.first]


def test_a_word_in_the_middle_is_removed_and_another_added() -> None:
    base, other = tokens("The", " fox", " runs", " home"), tokens("The", " fox", " sleeps", " home")
    assert difference(base, other) == (
        Piece("same", "The fox"),
        Piece("removed", " runs"),
        Piece("added", " sleeps", first=True),
        Piece("same", " home"),
    )
    assert first_divergent(base, other) == 2


def test_the_whole_difference_is_found_and_not_only_its_beginning() -> None:
    words = tokens("a", " b", " X", " d", " e", " f", " Y", " h")
    base = tokens("a", " b", " c", " d", " e", " f", " g", " h")
    found = difference(base, words)
    assert [(one.change, one.text) for one in found] == [
        ("same", "a b"),
        ("removed", " c"),
        ("added", " X"),
        ("same", " d e f"),
        ("removed", " g"),
        ("added", " Y"),
        ("same", " h"),
    ]
    assert leaving(found) == [" X"]


@pytest.mark.parametrize(
    ("base", "other", "changed"),
    [
        ("今天天气很好。", "今天天气不好。", ["很", "不"]),
        ("f(a,b)", "f(a,c)", ["b", "c"]),
        ("été, mais", "été; mais", [",", ";"]),
    ],
)
def test_a_change_in_a_text_without_spaces_is_no_larger_than_it_is(
    base: str, other: str, changed: list[str]
) -> None:
    found = difference(tokens(base), tokens(other))
    assert [one.text for one in found if one.change != "same"] == changed


def test_only_the_token_that_leaves_is_marked_within_its_word() -> None:
    found = difference(tokens("The", " unhappy"), tokens("The", " un", "known", " fox"))
    assert [one.text for one in found if one.change == "added"] == [" un", "known", " fox"]
    assert leaving(found) == ["known"]


@pytest.mark.parametrize(
    ("base", "other", "index"),
    [
        (("a", " b"), ("a", " b"), None),
        ((), (), None),
        (("a",), ("a", " b"), 1),
        (("a", " b"), ("a",), None),
        ((), ("a",), 0),
        (("ab", "c"), ("a", "bc"), None),  # cut otherwise, but the same words
        (("ab", "c"), ("a", "bd"), 1),
    ],
)
def test_the_first_token_that_leaves(
    base: tuple[str, ...], other: tuple[str, ...], index: int | None
) -> None:
    assert first_divergent(tokens(*base), tokens(*other)) == index
    assert len(leaving(difference(tokens(*base), tokens(*other)))) == (index is not None)


def test_a_character_of_several_tokens_is_left_with_the_first_that_differs() -> None:
    """Tokens without a text are parts of the character that a later one completes."""
    base = (*tokens("x"), Token(1, 7, "", 0, 1, 0), Token(2, 8, "é", 0, 1, 0))
    same_start = (*tokens("x"), Token(1, 7, "", 0, 1, 0), Token(2, 9, "è", 0, 1, 0))
    other_start = (*tokens("x"), Token(1, 6, "", 0, 1, 0), Token(2, 9, "ü", 0, 1, 0))
    assert first_divergent(base, same_start) == 2
    assert first_divergent(base, other_start) == 1
    assert leaving(difference(base, other_start)) == ["ü"]


def test_both_texts_can_be_read_off_whatever_they_are() -> None:
    draw = random.Random(0)
    pieces = [" the", " fox", "es", "\n\n", "é", "", " a", ".", "  "]
    differing = 0
    for _ in range(300):
        base, other = (
            tokens(*draw.choices(pieces, k=draw.randrange(12))) for _ in range(2)
        )  # fmt: skip
        found = difference(base, other)
        assert read(found, "removed") == "".join(one.text for one in base)
        assert read(found, "added") == "".join(one.text for one in other)
        assert len(leaving(found)) <= 1
        differing += any(one.change != "same" for one in found)
    assert differing > 200  # so that the rest does not hold for want of differences
