"""Texts for evaluation and for calibration: normalised, hashed, bounded, and kept apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcore.corpus.shards import corpus_dir
from gptcore.corpus.shards import texts as corpus_texts
from gptcore.errors import GptcoreError, InvalidInput
from gptcore.measure.corpora import (
    CALIBRATION_TEXTS,
    EVALUATION_TEXTS,
    MAX_OVERLAP,
    MAX_TEXT_BYTES,
    SHIPPED,
    CalibrationText,
    EvaluationText,
    add_text,
    calibration_text,
    calibration_texts,
    evaluation_text,
    overlap,
    require_apart,
    texts,
)

pytestmark = pytest.mark.usefixtures("data_folder")


def evaluation(content: str) -> EvaluationText:
    return EvaluationText("mine", content, hashlib.sha256(content.encode()).hexdigest())


def calibration(content: str) -> CalibrationText:
    return CalibrationText("theirs", content, hashlib.sha256(content.encode()).hexdigest())


def words(start: int, count: int) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


@pytest.mark.parametrize("evaluated", EVALUATION_TEXTS)
@pytest.mark.parametrize("calibrated", CALIBRATION_TEXTS)
def test_the_texts_that_ship_are_usable_and_have_little_in_common(
    evaluated: str, calibrated: str
) -> None:
    one, other = evaluation_text(evaluated), calibration_text(calibrated)
    assert min(len(one.content.split()), len(other.content.split())) > 2000
    require_apart(one, other)
    shared = overlap(one.content, other.content), overlap(other.content, one.content)
    assert max(shared) < (0.01 if "tales" in evaluated + calibrated else 1e-9)


def test_parts_of_the_corpus_are_texts() -> None:
    assert texts() == EVALUATION_TEXTS
    assert calibration_texts() == CALIBRATION_TEXTS
    first = next(one.text for one in corpus_texts(corpus_dir(), "test"))
    assert evaluation_text("tales-test").content.startswith(f"{first}\n\n")


@pytest.mark.parametrize(
    ("read", "name"),
    [(evaluation_text, one) for one in CALIBRATION_TEXTS]
    + [(calibration_text, one) for one in EVALUATION_TEXTS],
)
def test_a_text_of_one_role_is_refused_in_the_other(
    read: Callable[[str], object], name: str
) -> None:
    with pytest.raises(InvalidInput, match=f"{name} is the calibration text {name}"):
        read(name)


@pytest.mark.parametrize("role", ["evaluation", "calibration"])
def test_a_copy_of_a_text_with_a_new_beginning_is_refused_in_the_other_role(
    role: str, tmp_path: Path
) -> None:
    other = {"evaluation": "calibration", "calibration": "evaluation"}[role]
    copied = tmp_path / "copy.txt"
    copied.write_text("A new beginning. " + (SHIPPED / f"{other}.txt").read_text().upper())
    read = evaluation_text if role == "evaluation" else calibration_text
    with pytest.raises(InvalidInput, match=r"share \d+% of their runs of 12 words, and at most 5%"):
        read(str(copied), paths=True)


def test_a_shared_quotation_is_no_overlap_and_a_shared_page_is() -> None:
    own, theirs = words(0, 12_000), words(50_000, 12_000)
    quotation = words(90_000, 240)
    require_apart(evaluation(f"{own} {quotation}"), calibration(f"{quotation} {theirs}"))
    page = words(90_000, 1200)
    assert overlap(f"{own} {page}", theirs + page) > MAX_OVERLAP
    with pytest.raises(InvalidInput, match="share 9%"):
        require_apart(evaluation(f"{own} {page}"), calibration(f"{page} {theirs}"))


def test_a_short_text_inside_a_long_one_is_found_from_either_side() -> None:
    long, short = words(0, 5000), words(1003, 60)
    for one, other in ((long, short), (short, long)):
        with pytest.raises(InvalidInput, match="share 100%"):
            require_apart(evaluation(one), calibration(other))


def test_line_ends_and_a_byte_order_mark_do_not_change_the_hash(tmp_path: Path) -> None:
    hashes = set()
    for number, data in enumerate((b"a b\nc\n", b"a b\r\nc\r\n", b"\xef\xbb\xbfa b\rc\r")):
        file = tmp_path / f"{number}.txt"
        file.write_bytes(data)
        hashes.add(evaluation_text(str(file), paths=True).hash)
    assert hashes == {
        f"sha256:{hashlib.sha256(b'a b' + bytes([10]) + b'c' + bytes([10])).hexdigest()}"
    }
    file.write_bytes(b"a b\nc")
    assert evaluation_text(str(file), paths=True).hash not in hashes


WRONG = {
    "empty": (b"", "is empty: give at least a sentence"),
    "blank": (b" \n\t ", "is empty: give at least a sentence"),
    "no UTF-8": (b"good \xff", r"is no UTF-8: byte 5 cannot be read"),
    "UTF-16": ("text".encode("utf-16-le"), "holds a NUL character at position 1: remove it"),
    "too large": (b"a" * (MAX_TEXT_BYTES + 1), "is larger than 4 MiB: cut it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_no_text_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    data, said = WRONG[case]
    file = tmp_path / "it.txt"
    file.write_bytes(data)
    for read in (evaluation_text, calibration_text):
        with pytest.raises(InvalidInput, match=said):
            read(str(file), paths=True)


@pytest.mark.parametrize("source", ["missing.txt", "", "/", "a" * 5000, "nul\x00", "/dev/zero"])
def test_a_path_without_a_file_is_refused_and_the_texts_are_named(source: str) -> None:
    with pytest.raises(InvalidInput, match=r"There is no text file .*: evaluation, tales-test\."):
        evaluation_text(source, paths=True)


def test_a_path_is_read_only_where_paths_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "it.txt"
    file.write_text("Some words.")
    assert evaluation_text(str(file), paths=True).content == "Some words."
    with pytest.raises(InvalidInput, match=r"There is no text .* Add it first"):
        evaluation_text(str(file))
    with pytest.raises(InvalidInput, match="There is no text"):
        evaluation_text("../texts/it")


def test_a_users_text_is_kept_under_its_name() -> None:
    assert add_text("own.v2", b"Some words.\r\n") == "own.v2"
    assert add_text("own.v2", b"Some words.\n") == "own.v2"  # the same text once more
    assert texts() == (*EVALUATION_TEXTS, "own.v2")
    assert evaluation_text("own.v2").content == "Some words.\n"
    with pytest.raises(InvalidInput, match="another text called own"):
        add_text("own.v2", b"Others.")


@pytest.mark.parametrize(
    "name", ["", "evaluation", "tales-test", "calibration", "../up", "a/b", ".hidden", "ä"]
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(GptcoreError, match="cannot be called"):
        add_text(name, b"Some words.")
