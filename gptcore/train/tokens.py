"""Token files: ids on disk, mapped into memory, and which of them a step learns from.

An epoch cuts the text into windows of one context, at an offset of its own, and takes them in a
random order, each once. Which windows step n learns from is a function of seed and n alone: a
training can go on anywhere, and several processes share a step without a word.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptcore.errors import InvalidInput, StoreError
from gptcore.tokenizer import Tokenizer

Ids = NDArray[np.int64]
LEAST_WINDOWS = 2
"""Of training text: fewer are no choice."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Ids of a text on disk."""

    path: Path
    tokens: int
    text_bytes: int
    """UTF-8 bytes of the text that they stand for."""
    dtype: str
    sha256: str

    def read(self) -> NDArray[np.unsignedinteger]:
        """Return the ids, mapped: (tokens,)."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))


@dataclass(frozen=True, slots=True)
class Data:
    """What a training learns from, and what it is held against."""

    train: TokenFile
    validation: TokenFile
    source: str
    """Where the text came from, for a person."""

    @property
    def id(self) -> str:
        """``sha256:…`` over the ids of both."""
        both = self.train.sha256 + self.validation.sha256
        return f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"


def prepare(
    folder: Path,
    source: str,
    train: Iterable[str],
    validation: Iterable[str],
    tokenizer: Tokenizer,
    *,
    ended: bool,
) -> Data:
    """Write the token files of two texts into ``folder``, wholly or not at all.

    Args:
        folder: what is there already is taken as it is.
        source: for ``Data``.
        train: pieces of text in their order.
        validation: as ``train``.
        tokenizer: makes the ids.
        ended: whether each piece is a text of its own, with the end of text behind it.

    Raises:
        StoreError: the disk is full or cannot be written.
        InvalidInput: what ``train`` or ``validation`` raise.
    """
    if (known := _known(folder)) is not None:
        return known
    work = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        work.mkdir(parents=True)
        end_id = min(tokenizer.eos_ids) if ended else None
        parts = {
            name: _written(work / f"{name}.bin", texts, tokenizer, end_id)
            for name, texts in (("train", train), ("validation", validation))
        }
        about = {name: asdict(one) | {"path": one.path.name} for name, one in parts.items()}
        (work / "data.json").write_text(json.dumps(about | {"source": source}, indent=1))
        with contextlib.suppress(OSError):  # another process was faster
            work.rename(folder)
    except OSError as error:
        raise StoreError(
            f"The tokens could not be written to {folder.parent}: {error.strerror or error}. Make "
            "room, or name another data folder in GPTLAB_DATA."
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = _known(folder)
    assert found is not None
    return found


def require_windows(data: Data, context: int) -> None:
    """Refuse texts that are too short to learn from.

    Raises:
        InvalidInput: with the tokens there and the tokens needed.
    """
    for name, one, least in (
        ("training", data.train, LEAST_WINDOWS),
        ("validation", data.validation, 1),
    ):
        needed = least * context + 1
        if one.tokens < needed:
            raise InvalidInput(
                f"The {name} text has {one.tokens:,} tokens; with a context of {context:,} it "
                f"needs at least {needed:,}: give a longer text, or choose a shorter context."
            )


def windows(data: TokenFile, context: int) -> int:
    """Return how many windows an epoch has."""
    return (data.tokens - 1) // context - 1


def starts(
    data: TokenFile, context: int, seed: int, step: int, batch: int, *, shifted: bool = True
) -> list[int]:
    """Return where the sequences of a step begin: ``batch`` positions.

    Without ``shifted`` every epoch has the same windows, at multiples of ``context``.
    """
    count = max(1, windows(data, context))
    found = []
    for row in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(row, count)
        order, offset = _epoch(count, context, seed, epoch)
        found.append(shifted * offset + int(order[at]) * context)
    return found


def validation_starts(data: TokenFile, context: int, most: int) -> list[int]:
    """Return where at most so many windows begin, spread evenly over the text; 0 is all."""
    count = (data.tokens - 1) // context
    if most == 0 or most >= count:
        return [index * context for index in range(count)]
    return [int(index * count / most) * context for index in range(most)]


def sequences(ids: NDArray[np.unsignedinteger], begins: Iterable[int], context: int) -> Ids:
    """Return (B, context + 1) ids: what is read, and one further what shall follow."""
    return np.stack([ids[begin : begin + context + 1].astype(np.int64) for begin in begins])


@functools.lru_cache(maxsize=2)
def _epoch(count: int, context: int, seed: int, epoch: int) -> tuple[Ids, int]:
    """Return the order of an epoch's windows, and the position at which the first begins."""
    dice = np.random.Generator(np.random.Philox(key=seed, counter=epoch))
    return dice.permutation(count), int(dice.integers(context))


def _known(folder: Path) -> Data | None:
    try:
        about = json.loads((folder / "data.json").read_text())
    except (OSError, ValueError):
        return None
    return Data(
        train=TokenFile(**about["train"] | {"path": folder / about["train"]["path"]}),
        validation=TokenFile(
            **about["validation"] | {"path": folder / about["validation"]["path"]}
        ),
        source=about["source"],
    )


def _written(
    file: Path, texts: Iterable[str], tokenizer: Tokenizer, end_id: int | None
) -> TokenFile:
    dtype = "uint16" if tokenizer.vocabulary <= 2**16 else "uint32"
    digest, tokens, size = hashlib.sha256(), 0, 0
    with file.open("wb") as out:
        for ids, length in _encoded(texts, tokenizer, end_id):
            block = np.asarray(ids, dtype=dtype).tobytes()
            out.write(block)
            digest.update(block)
            tokens, size = tokens + len(ids), size + length
    return TokenFile(file, tokens, size, dtype, digest.hexdigest())


def _encoded(
    texts: Iterable[str], tokenizer: Tokenizer, end_id: int | None
) -> Iterator[tuple[list[int], int]]:
    for text in texts:
        ids = tokenizer.encode(text)
        if ids and max(ids) >= tokenizer.vocabulary:
            raise InvalidInput("The tokenizer gives ids beyond its vocabulary: choose another.")
        yield (ids if end_id is None else [*ids, end_id]), len(text.encode())
