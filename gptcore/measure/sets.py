"""What users keep under a name as JSONL: sets of items, sets of pairs.

A name is all that a page's visitor gives; a path is for the command line.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcore.errors import InvalidInput, StoreError
from gptcore.measure.corpora import NAME
from gptcore.measure.jsonl import MAX_FILE_BYTES
from gptcore.paths import data_dir
from gptcore.sentences import brief


@dataclass(frozen=True, slots=True)
class Sets:
    """A folder of a user's JSONL files of one kind."""

    what: str
    """In a sentence: ``set of items``."""
    folder: str
    """In the data folder."""
    require: Callable[[bytes, str], Any]
    """Raises InvalidInput where content, under a name, is not of this kind."""
    taken: tuple[str, ...] = ()
    """Names that mean something else."""

    @property
    def path(self) -> Path:
        """Where they lie; it may not be there yet."""
        return data_dir() / self.folder

    def names(self) -> tuple[str, ...]:
        """Return the names of all sets, those taken first."""
        kept = {file.stem for file in self.path.glob("*.jsonl") if NAME.fullmatch(file.stem)}
        return (*self.taken, *sorted(kept - set(self.taken)))

    def add(self, name: str, content: bytes) -> str:
        """Keep a set under a name, and return the name.

        Raises:
            InvalidInput: the name or the content cannot be used, or the name is another set's.
            StoreError: it cannot be written.
        """
        if not NAME.fullmatch(name) or name in self.taken:
            but = f", and not {' or '.join(self.taken)}" if self.taken else ""
            raise InvalidInput(
                f"A {self.what} cannot be called {brief(name)!r}: take 1 to 64 letters, digits, "
                f"dots, dashes or underlines{but}."
            )
        self.require(content, name)
        file = self.path / f"{name}.jsonl"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists() and file.read_bytes() != content:
                raise InvalidInput(
                    f"There is another {self.what} called {name}: choose another name."
                )
            fresh = file.with_suffix(f".{secrets.token_hex(4)}")
            fresh.write_bytes(content)
            fresh.replace(file)
        except OSError as error:
            raise StoreError(
                f"The {self.what} {name} could not be kept: {error.strerror}."
            ) from None
        return name

    def find(self, source: str, *, paths: bool) -> Path:
        """Return the file of that name, or at that path where ``paths`` is set.

        Raises:
            InvalidInput: there is none.
        """
        kept = self.path / f"{source}.jsonl"
        if NAME.fullmatch(source) and kept.is_file():
            return kept
        known = ", ".join(self.names()) or "none"
        if not paths:
            raise InvalidInput(
                f"There is no {self.what} {brief(source)!r}; there are: {known}. Add it first."
            )
        try:
            there = Path(source).exists()
        except (OSError, ValueError):  # too long a name, or one with a NUL
            there = False
        if not there:
            raise InvalidInput(
                f"There is no {self.what} at {brief(source)!r}; give the path of a JSONL file of "
                f"at most {MAX_FILE_BYTES >> 20} MiB, or one of: {known}."
            )
        return Path(source)
