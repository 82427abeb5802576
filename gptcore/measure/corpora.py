"""Texts to evaluate on and texts to calibrate with, and the wall between the two. Imports no torch.

A pass that was calibrated with a text predicts that text better than others of its kind, so a text
of one role is refused in the other: by its hash, or because too much of it stands in the other.
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gptcore.corpus.shards import Part, corpus_dir, read_shard, shard_files
from gptcore.errors import InvalidInput, StoreError
from gptcore.paths import ROOT, data_dir
from gptcore.records import checked_text
from gptcore.sentences import brief

SHIPPED = ROOT / "data" / "texts"
EVALUATION = "evaluation"
CALIBRATION = "calibration"
"""The names of the two texts that ship."""
TALES: dict[str, Part] = {"tales-test": "test", "tales-calibration": "calibration"}
"""Parts of the corpus that ship as texts too: one to evaluate on, one to calibrate with."""
EVALUATION_TEXTS = (EVALUATION, "tales-test")
CALIBRATION_TEXTS = (CALIBRATION, "tales-calibration")
MAX_TEXT_BYTES = 4 * 2**20
JOINING = "one file as one text, lines end in \\n"
"""How pieces became the text that is hashed; part of a perplexity's identity."""
RUN_WORDS = 12
"""Words in a row that two texts hardly share unless one was copied into the other."""
MAX_OVERLAP = 0.05
"""The share of a text's runs that may stand in a text of the other role."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Text:
    """A text by name, normalised, with its hash."""

    name: str
    content: str
    hash: str
    """``sha256:…`` of the content as UTF-8."""


@dataclass(frozen=True, slots=True)
class EvaluationText(Text):
    """A text that variants are held against."""


@dataclass(frozen=True, slots=True)
class CalibrationText(Text):
    """A text that passes learn from."""


Role = TypeVar("Role", EvaluationText, CalibrationText)


def evaluation_text(source: str, *, paths: bool = False) -> EvaluationText:
    """Return the text of that name, to evaluate on.

    Args:
        source: the name of one that ships or of the user's, or a path where ``paths`` is set.
        paths: whether a path is allowed; a page's visitor names texts only.

    Raises:
        InvalidInput: there is no such text, it is no UTF-8, too large, or one for calibration.
    """
    found = _text(EvaluationText, source, paths)
    if source in EVALUATION_TEXTS:  # those that ship are apart, which a test looks at
        return found
    for name in CALIBRATION_TEXTS:
        require_apart(found, _shipped(CalibrationText, name))
    return found


def calibration_text(source: str, *, paths: bool = False) -> CalibrationText:
    """Return the text of that name, to calibrate with.

    Raises:
        InvalidInput: as ``evaluation_text``; or it is one to evaluate on.
    """
    found = _text(CalibrationText, source, paths)
    if source in CALIBRATION_TEXTS:
        return found
    for name in EVALUATION_TEXTS:
        require_apart(_shipped(EvaluationText, name), found)
    return found


def require_apart(evaluation: EvaluationText, calibration: CalibrationText) -> None:
    """Refuse a pair of which one text is the other, or holds much of it.

    Error: runs of ``RUN_WORDS`` words are compared by 64-bit hashes; a text of fewer words is
    compared as a whole only.

    Raises:
        InvalidInput: with the share that they have in common.
    """
    if evaluation.hash == calibration.hash:
        raise InvalidInput(
            f"The text {evaluation.name} is the calibration text {calibration.name}: what was "
            "calibrated with a text looks better on it than it is. Choose another for one of them."
        )
    shared = max(
        overlap(evaluation.content, calibration.content),
        overlap(calibration.content, evaluation.content),
    )
    if shared > MAX_OVERLAP:
        raise InvalidInput(
            f"The evaluation text {evaluation.name} and the calibration text {calibration.name} "
            f"share {shared:.0%} of their runs of {RUN_WORDS} words, and at most {MAX_OVERLAP:.0%} "
            "are allowed: what was calibrated with a text looks better on it than it is. Choose "
            "another for one of them."
        )


@functools.lru_cache(maxsize=32)
def overlap(text: str, other: str) -> float:
    """Return the share of the runs of ``text`` that also stand in ``other``, wherever they begin.

    The text is cut into runs without overlap; the other's runs begin at each of its words.
    """
    mine = _runs(text, RUN_WORDS)
    return float(np.isin(mine, _runs(other, 1)).mean()) if len(mine) else 0.0


def _runs(text: str, step: int) -> NDArray[np.int64]:
    words = re.findall(r"\w+", text.lower())
    starts = range(0, len(words) - RUN_WORDS + 1, step)
    return np.fromiter(
        (hash(" ".join(words[at : at + RUN_WORDS])) for at in starts), np.int64, len(starts)
    )


def texts() -> tuple[str, ...]:
    """Return the names of the texts to evaluate on: those that ship, then the user's."""
    return (*EVALUATION_TEXTS, *own_texts())


def calibration_texts() -> tuple[str, ...]:
    """Return the names of the texts to calibrate with: those that ship, then the user's."""
    return (*CALIBRATION_TEXTS, *own_texts())


def own_texts() -> list[str]:
    """Return the names of the user's texts."""
    own = _own_folder()
    named = {one.stem for one in own.glob("*.txt")} if own.is_dir() else set()
    return sorted(named.difference(EVALUATION_TEXTS, CALIBRATION_TEXTS))


def own_text_file(name: str) -> Path:
    """Return where a text of the user's lies.

    Raises:
        InvalidInput: there is none of that name.
    """
    file = _own_folder() / f"{name}.txt"
    if not NAME.fullmatch(name) or not file.is_file():
        raise InvalidInput(f"There is no text {brief(name)!r}: add it first.")
    return file


def add_text(name: str, data: bytes) -> str:
    """Keep a user's text under a name, and return the name.

    Raises:
        InvalidInput: the name or the text cannot be used, or the name is taken by another text.
        StoreError: it cannot be written.
    """
    if not NAME.fullmatch(name) or name in (*EVALUATION_TEXTS, *CALIBRATION_TEXTS):
        raise InvalidInput(
            f"A text cannot be called {brief(name)!r}: take 1 to 64 letters, digits, dots, dashes "
            "or underlines, and no name of a text that ships: "
            f"{', '.join((*EVALUATION_TEXTS, *CALIBRATION_TEXTS))}."
        )
    content = normalised(data, name)
    file = _own_folder() / f"{name}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_text(encoding="utf-8") != content:
            raise InvalidInput(f"There is another text called {name}: choose another name.")
        fresh = file.with_suffix(f".{secrets.token_hex(4)}")
        fresh.write_text(content, encoding="utf-8", newline="\n")
        fresh.replace(file)
    except OSError as error:
        raise StoreError(f"The text {name} could not be kept: {error.strerror}.") from None
    return name


def normalised(data: bytes, name: str) -> str:
    """Return a file's text, with lines that end in a line feed and without a byte-order mark.

    Raises:
        InvalidInput: it is empty, too large, no UTF-8, or holds a NUL.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise InvalidInput(
            f"The text {name} is larger than {MAX_TEXT_BYTES >> 20} MiB: cut it, a part gives the "
            "same answer."
        )
    try:
        content = checked_text(data.decode("utf-8-sig"), f"text {name}")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"The text {name} is no UTF-8: byte {error.start:,} cannot be read. Convert it first."
        ) from None
    except ValueError as error:
        said = str(error)
        raise InvalidInput(f"{said[0].upper()}{said[1:]}.") from None
    if not content.strip():
        raise InvalidInput(f"The text {name} is empty: give at least a sentence.")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _text(role: type[Role], source: str, paths: bool) -> Role:
    if source in (*EVALUATION_TEXTS, *CALIBRATION_TEXTS):
        return _shipped(role, source)
    own = _own_folder() / f"{source}.txt"
    if NAME.fullmatch(source) and own.is_file():
        return _read(role, own, source)
    if not paths:
        raise InvalidInput(
            f"There is no text {brief(source)!r}; there are: {', '.join(texts())}. Add it first."
        )
    try:
        there = Path(source).is_file()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        there = False
    if not there:
        raise InvalidInput(
            f"There is no text file {brief(source)!r}; give the path of a UTF-8 file, or one of: "
            f"{', '.join(texts())}."
        )
    return _read(role, Path(source), Path(source).name[:80])


def _own_folder() -> Path:
    return data_dir() / "texts"


def _shipped(role: type[Role], name: str) -> Role:
    if name in TALES:
        files = tuple((file, file.stat().st_mtime_ns) for file in shard_files(corpus_dir()))
        return _named(role, name, _tales(files)[name])
    return _read(role, SHIPPED / f"{name}.txt", name)


def _read(role: type[Role], file: Path, name: str) -> Role:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"The text {name} cannot be read: {error.strerror}.") from None
    return _named(role, name, normalised(data, name))


@functools.lru_cache(maxsize=1)
def _tales(files: tuple[tuple[Path, int], ...]) -> dict[str, str]:
    """Return the texts of ``TALES``, an empty line between two tales; read once a corpus."""
    parts: dict[Part, list[str]] = {part: [] for part in TALES.values()}
    for file, _ in files:
        for one in read_shard(file).texts:
            if one.part in parts:
                parts[one.part].append(one.text)
    return {name: "\n\n".join(parts[part]) for name, part in TALES.items()}


def _named(role: type[Role], name: str, content: str) -> Role:
    digest = hashlib.sha256(content.encode()).hexdigest()
    return role(name, content, f"sha256:{digest}")
