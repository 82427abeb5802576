"""Bring texts that were written elsewhere, by other processes or machines, into one corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptcore.corpus.duplicates import Seen
from gptcore.corpus.shards import Ledger, read_shard, shard_files
from gptcore.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Joined:
    """What came of it."""

    shards: tuple[str, ...]
    """Files that were added."""
    texts: int
    refused: Mapping[str, int]
    """Texts that were there already, or nearly, by reason."""


def join(folder: Path, others: Sequence[Path]) -> Joined:
    """Add the texts of other folders to a corpus, without those that it has, or nearly has.

    Each keeps the recipe that it was made by. What is pending in a folder becomes a shard of it
    first; no writer may be at work there.

    Raises:
        InvalidInput: a folder holds no texts, is the corpus itself, or has a damaged shard.
        StoreError: a folder cannot be written.
    """
    for other in others:
        if other.resolve() == folder.resolve():
            raise InvalidInput(f"{other} is the corpus itself: name folders to bring texts from.")
        if not other.is_dir():
            raise InvalidInput(f"{other} is no folder with texts of a corpus.")
    ledger, seen = Ledger(folder, {}), Seen()
    for text in ledger.seen_texts:
        seen.add(text)
    shards, count, refused = [], 0, Counter[str]()
    for other in others:
        pending = Ledger(other, {})
        pending.close()
        if not pending.seen_texts:
            raise InvalidInput(f"There are no texts in {other}.")
        for file in shard_files(other):
            shard = read_shard(file)
            found = {one: seen.add(one.text) for one in shard.texts}
            reasons = Counter(reason for reason in found.values() if reason)
            texts = tuple(one for one, reason in found.items() if reason is None)
            refused += reasons
            if texts:
                all_refused = dict(Counter(shard.refused) + reasons)
                added = ledger.take(replace(shard, texts=texts, refused=all_refused))
                shards.append(added.name)
                count += len(texts)
    return Joined(tuple(shards), count, dict(refused))
