"""The corpus on disk: compressed files that are only ever added, and what is not yet in one.

A shard is ``NNNN.jsonl.xz``: a first line that says how its texts were made, then one text a line.
What was written since the last shard lies in ``pending.jsonl``, one batch a line, so that a writer
that is killed loses the batch it was at and nothing else. Which part of the corpus a text belongs
to follows from its hash alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gptcore.errors import InvalidInput, StoreError
from gptcore.paths import ROOT

PENDING = "pending.jsonl"
SHARD = re.compile(r"\d{4}\.jsonl\.xz")
SHARD_CHARS = 1_000_000
"""Characters of text after which a shard is closed: about 0.35 MB on disk."""
FORMAT = 1

Part = Literal["train", "validation", "test", "calibration"]
PARTS: tuple[Part, ...] = get_args(Part)
SHARES: dict[Part, int] = {"train": 90, "validation": 4, "test": 4, "calibration": 2}
"""Percent of all texts."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text and where it comes from."""

    text: str
    kind: str
    prompt: str
    """What the teacher was asked."""
    opening: str
    """The first words, which the prompt gave; empty where the teacher chose them."""
    number: int
    """Of the prompt."""
    example: int
    """Which of the examples of its kind stood before the prompt."""
    seed: int
    """Of the draws."""
    whole: bool
    """Whether the teacher ended it; else it was cut after its last whole sentence."""
    tokens: int
    """Of the teacher's tokenizer, without the opening."""
    mean_logprob: float
    """The teacher's own, a token, without the opening."""

    @property
    def part(self) -> Part:
        """The part of the corpus, from the hash of the text."""
        return part_of(self.text)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch of the writer left."""

    batch: int
    """Its number; batches are written in this order, and none twice."""
    texts: tuple[Text, ...]
    refused: dict[str, int]
    """How many texts were refused, by reason."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: batches ``first`` to ``last`` made by one recipe."""

    recipe: Mapping[str, Any]
    """Teacher, weights id, sampling, prompts: see ``write.recipe``."""
    first: int
    last: int
    refused: Mapping[str, int]
    texts: tuple[Text, ...] = field(repr=False)


def corpus_dir() -> Path:
    """Return the folder of the corpus that ships with the program."""
    return ROOT / "data" / "corpus"


def part_of(text: str) -> Part:
    """Return the part of the corpus that a text belongs to, by its hash."""
    at = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    for part, share in SHARES.items():
        if at < share:
            return part
        at -= share
    raise AssertionError("the shares are 100 percent")


def shard_files(folder: Path) -> list[Path]:
    """Return the shards of a folder in their order."""
    if not folder.is_dir():
        return []
    return sorted(one for one in folder.iterdir() if SHARD.fullmatch(one.name))


def read_shard(file: Path) -> Shard:
    """Return a shard.

    Raises:
        InvalidInput: it is damaged, or of a later version of this program.
    """
    try:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            head = json.loads(next(lines))
            texts = tuple(Text(**json.loads(line)) for line in lines)
        if head["format"] != FORMAT or head["texts"] != len(texts):
            raise ValueError(f"format {head['format']}, {len(texts)} of {head['texts']} texts")
        return Shard(head["recipe"], head["first"], head["last"], head["refused"], texts)
    except (OSError, EOFError, ValueError, KeyError, TypeError, lzma.LZMAError, StopIteration) as e:
        raise InvalidInput(
            f"The shard {file.name} cannot be read ({e or type(e).__name__}): fetch it again from "
            "where it came, or delete it and write it anew."
        ) from None


def texts(folder: Path, part: Part | None = None) -> Iterator[Text]:
    """Yield the texts of all shards, or of one part.

    Raises:
        InvalidInput: there is no shard, or one is damaged.
    """
    files = shard_files(folder)
    if not files:
        raise InvalidInput(
            f"There is no corpus in {folder}: `python -m gptcore corpus write` makes one."
        )
    for file in files:
        for one in read_shard(file).texts:
            if part is None or one.part == part:
                yield one


class Ledger:
    """A folder to which batches are added; whole shards are closed as they fill.

    Attributes:
        next_batch: the first that is not there.
        seen_texts: every text there, in order, as it was opened.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Open the folder and drop what a killed writer left half written.

        Raises:
            StoreError: the folder cannot be written.
            InvalidInput: a shard is damaged.
        """
        self.folder = folder
        self.recipe = dict(recipe)
        self._pending: list[Batch] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shards = [read_shard(file) for file in shard_files(folder)]
            self.next_batch = max((one.last + 1 for one in shards), default=0)
            recorded = list(self._recorded())
        except OSError as error:
            raise _unwritable(folder, error) from None
        same = [one for recipe, one in recorded if recipe == self.recipe]
        if len(same) < len(recorded):  # made otherwise: its own shard, so that a head is true
            self._close_foreign(recorded)
            shards = [read_shard(file) for file in shard_files(folder)]
            self.next_batch = max((one.last + 1 for one in shards), default=0)
        else:
            self._pending = [one for one in same if one.batch >= self.next_batch]
        if self._pending:
            self.next_batch = self._pending[-1].batch + 1
        self.seen_texts = [text.text for shard in shards for text in shard.texts]
        self.seen_texts += [text.text for batch in self._pending for text in batch.texts]

    def add(self, batch: Batch) -> Path | None:
        """Keep a batch; return the shard's file where this closed one.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        assert batch.batch == self.next_batch
        line = json.dumps({"recipe": self.recipe, "batch": asdict(batch)}, ensure_ascii=False)
        try:
            with (self.folder / PENDING).open("a", encoding="utf-8") as pending:
                pending.write(line + "\n")
                pending.flush()
                os.fsync(pending.fileno())
            self._pending.append(batch)
            self.next_batch += 1
            chars = sum(len(text.text) for one in self._pending for text in one.texts)
            return self.close() if chars >= SHARD_CHARS else None
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def close(self) -> Path | None:
        """Put what is pending into a shard of its own; return its file, None without any."""
        file = self._close(self.recipe, self._pending)
        self._pending = []
        return file

    def take(self, shard: Shard) -> Path:
        """Keep a shard that was written elsewhere, as one of its own; return its file.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        self.close()
        try:
            return self._put(shard)
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def _recorded(self) -> Iterator[tuple[dict[str, Any], Batch]]:
        """Yield (recipe, batch) of the whole lines of the pending file."""
        file = self.folder / PENDING
        if not file.exists():
            return
        whole = b""
        for line in file.read_bytes().splitlines(keepends=True):
            try:
                value = json.loads(line)
                found = value["batch"]
                found["texts"] = tuple(Text(**one) for one in found["texts"])
                yield value["recipe"], Batch(**found)
            except (ValueError, KeyError, TypeError):
                break  # the batch at which the last writer was killed
            whole += line
        if len(whole) < file.stat().st_size:
            _replace(file, whole)

    def _close_foreign(self, recorded: Sequence[tuple[dict[str, Any], Batch]]) -> None:
        groups: list[tuple[dict[str, Any], list[Batch]]] = []
        for recipe, batch in recorded:
            if batch.batch < self.next_batch:
                continue
            if not groups or groups[-1][0] != recipe:
                groups.append((recipe, []))
            groups[-1][1].append(batch)
        for recipe, batches in groups:
            self._close(recipe, batches)

    def _close(self, recipe: Mapping[str, Any], batches: Sequence[Batch]) -> Path | None:
        texts = tuple(text for one in batches for text in one.texts)
        refused: dict[str, int] = {}
        for one in batches:
            for reason, count in one.refused.items():
                refused[reason] = refused.get(reason, 0) + count
        file = None
        if batches:
            file = self._put(Shard(recipe, batches[0].batch, batches[-1].batch, refused, texts))
        # A writer that is killed between the two finds batches below next_batch and drops them.
        (self.folder / PENDING).unlink(missing_ok=True)
        return file

    def _put(self, shard: Shard) -> Path:
        head = {
            "format": FORMAT,
            "recipe": shard.recipe,
            "first": shard.first,
            "last": shard.last,
            "refused": shard.refused,
            "texts": len(shard.texts),
        }
        rows = [head, *map(asdict, shard.texts)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file = self.folder / f"{self._next_number():04d}.jsonl.xz"
        _replace(file, lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        return file

    def _next_number(self) -> int:
        files = shard_files(self.folder)
        return int(files[-1].name[:4]) + 1 if files else 1


def _replace(file: Path, content: bytes) -> None:
    """Write a file wholly or not at all."""
    fresh = file.with_name(f".{file.name}.new")
    try:
        with fresh.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        fresh.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def _unwritable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"The corpus folder {folder} cannot be written: {error.strerror or error}. What was "
        "written before is kept; make room, or name another folder with --to."
    )
