"""From a text to the sequences of a step: nothing is lost, everything has its turn."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import InvalidInput, StoreError
from gptcore.tokenizer import byte_tokenizer, load_tokenizer
from gptcore.train.texts import PIECE_BYTES, pieces, split
from gptcore.train.tokens import (
    Data,
    TokenFile,
    prepare,
    require_windows,
    sequences,
    starts,
    validation_starts,
    windows,
)
from gptcore.train.vocabulary import by_character, byte_pairs, save_tokenizer, tokenizer_id

BYTES = byte_tokenizer(256)


def data(folder: Path, train: str, validation: str = "something else " * 20) -> Data:
    return prepare(folder, "test", [train], [validation], BYTES, ended=False)


def token_file(tokens: int) -> TokenFile:
    return TokenFile(Path("none"), tokens, tokens, "uint16", "")


def test_pieces_are_the_whole_text(tmp_path: Path) -> None:
    text = "".join(f"Zeile {n} — naïve café\n" for n in range(80_000)) + "the last without an end"
    assert len(text.encode()) > 2 * PIECE_BYTES
    file = tmp_path / "text"
    file.write_text(text)
    found = list(pieces(file))
    assert len(found) > 2
    assert "".join(found) == text
    assert all(piece.endswith("\n") for piece in found[:-1])


def test_a_text_larger_than_memory_is_read_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "text"
    with file.open("w") as out:
        for _ in range(32):
            out.write("one long line after another\n" * (PIECE_BYTES // 28))
    tracemalloc.start()
    total = sum(len(piece) for piece in pieces(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == file.stat().st_size > 30 * PIECE_BYTES
    assert peak < 8 * PIECE_BYTES


def test_a_text_of_one_endless_line_is_read_in_pieces_too(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("word " * (PIECE_BYTES // 2))
    found = list(pieces(file))
    assert len(found) >= 2
    assert "".join(found) == file.read_text()


@given(st.text(min_size=1, max_size=60).filter(lambda text: "\0" not in text))
def test_a_split_is_between_characters(text: str) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        file.write_bytes(text.encode())
        at = split(file)
        parts = "".join(pieces(file, 0, at)), "".join(pieces(file, at))
        assert "".join(parts) == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"text and then \0 binary", "byte 14 is no part"),
        (b"\x89PNG\r\n\x1a\n" * 50, "byte 0 is no part"),
        ("Grüße".encode("latin-1") * 20, "is no text in UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_with_its_byte(
    tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "text"
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match=said):
        "".join(pieces(file, 0, split(file)))


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        split(tmp_path / "none")
    with pytest.raises(InvalidInput, match="is no file"):
        split(tmp_path)


def test_a_text_of_one_line_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"training text has 9 tokens.*at least 33"):
        require_windows(data(tmp_path / "data", "one line."), 16)
    with pytest.raises(InvalidInput, match=r"validation text has 5 tokens.*at least 17"):
        require_windows(data(tmp_path / "other", "enough " * 20, "short"), 16)


def test_token_files_hold_the_ids_and_are_taken_as_they_are(tmp_path: Path) -> None:
    first = data(tmp_path / "data", "the text")
    assert first.train.read().tolist() == list(b"the text")
    assert data(tmp_path / "data", "another text") == first
    assert data(tmp_path / "more", "another text").id != first.id


def test_texts_of_their_own_have_an_end_each(tmp_path: Path) -> None:
    save_tokenizer(by_character(["ab"]), tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    found = prepare(tmp_path / "data", "", ["ab", "b"], ["a"], tokenizer, ended=True)
    (end,) = tokenizer.eos_ids
    a, b = tokenizer.encode("ab")
    assert found.train.read().tolist() == [a, b, end, b, end]
    assert found.train.text_bytes == 3


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "text"
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"):
        prepare(tmp_path / "data", "", broken(), ["x"], BYTES, ended=False)
    assert list(tmp_path.iterdir()) == []


@given(
    tokens=st.integers(50, 400),
    context=st.integers(2, 16),
    seed=st.integers(0, 5),
    batch=st.integers(1, 7),
)
def test_an_epoch_takes_every_window_once(tokens: int, context: int, seed: int, batch: int) -> None:
    file = token_file(tokens)
    count = windows(file, context)
    taken = [
        begin
        for step in range(-(-count // batch) + 1)
        for begin in starts(file, context, seed, step, batch)
    ][:count]
    assert len(set(taken)) == count
    assert len({begin % context for begin in taken}) == 1
    assert min(taken) >= 0
    assert max(taken) + context + 1 <= tokens


def test_epochs_and_seeds_differ_in_order_and_offset() -> None:
    file = token_file(5000)
    count = windows(file, 16)
    first, second = (starts(file, 16, 1, epoch, count) for epoch in (0, 1))
    assert first != second
    assert first[0] % 16 != second[0] % 16
    assert starts(file, 16, 2, 0, count) != first
    assert starts(file, 16, 1, 0, count) == first


def test_what_is_to_follow_stands_one_further() -> None:
    found = sequences(np.arange(100, dtype=np.uint16), [0, 40], 4)
    assert found.tolist() == [[0, 1, 2, 3, 4], [40, 41, 42, 43, 44]]


def test_validation_is_spread_over_the_text() -> None:
    file = token_file(1001)
    assert validation_starts(file, 10, 0) == list(range(0, 1000, 10))
    some = validation_starts(file, 10, 4)
    assert some == [0, 250, 500, 750]
    assert validation_starts(file, 10, 500) == validation_starts(file, 10, 0)


@given(st.text(alphabet="abc é\n\t€", max_size=40))
def test_a_tokenizer_by_character_gives_a_text_back(text: str) -> None:
    made = by_character(["abc é\n\t€"])
    ids = made.encode(text).ids
    assert len(ids) == len(text)
    assert made.decode(ids) == text


@given(st.text(max_size=40))
def test_byte_pairs_give_any_text_back(text: str) -> None:
    made = byte_pairs(["the small fox ran over the hill"], 270)
    assert made.decode(made.encode(text).ids) == text


def test_byte_pairs_hold_to_the_vocabulary_and_shorten_what_they_learned() -> None:
    text = "the small fox ran over the hill and the small fox ran back"
    made = byte_pairs([text], 280)
    assert made.get_vocab_size() <= 280
    assert len(made.encode(text).ids) < 0.7 * len(text)
    with pytest.raises(InvalidInput, match="257"):
        byte_pairs([text], 200)


def test_what_was_made_is_loaded_with_its_end_of_text(tmp_path: Path) -> None:
    for made in (by_character(["some text\n"]), byte_pairs(["some text\n"], 300)):
        save_tokenizer(made, tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert len(tokenizer.eos_ids) == 1
        counted = Counter(tokenizer.encode("some text\n"))
        assert not counted.keys() & tokenizer.eos_ids
        assert tokenizer.decode(tokenizer.encode("some text\n")) == "some text\n"


def test_a_tokenizer_is_known_again_however_its_file_is_written(tmp_path: Path) -> None:
    made = by_character(["a tale"])
    one, other, another = (tmp_path / name for name in ("one", "other", "another"))
    for folder in (one, other):
        save_tokenizer(made, folder)
    save_tokenizer(by_character(["another"]), another)
    file = other / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    assert file.read_bytes() != (one / "tokenizer.json").read_bytes()
    assert tokenizer_id(one) == tokenizer_id(other) != tokenizer_id(another)
