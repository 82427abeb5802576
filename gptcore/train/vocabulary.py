"""Tokenizers made from the text itself: by character, or byte-level BPE. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from gptcore.errors import InvalidInput
from gptcore.tokenizer import load_tokenizer

END = "<|endoftext|>"
MOST_CHARACTERS = 20_000
"""Different characters that a tokenizer by character may have."""
FILES = ("tokenizer.json", "tokenizer_config.json")


def by_character(texts: Iterable[str]) -> FastTokenizer:
    """Return a tokenizer with one token for each character of ``texts``, and one for the end.

    Raises:
        InvalidInput: there are no characters, or too many different ones.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise InvalidInput("The text is empty: there is nothing to learn from.")
    if len(found) > MOST_CHARACTERS:
        raise InvalidInput(
            f"The text has {len(found):,} different characters; a tokenizer by character holds at "
            f"most {MOST_CHARACTERS:,}: choose bpe."
        )
    ids = {one: id for id, one in enumerate((END, *sorted(found)))}
    made = FastTokenizer(models.WordLevel(ids, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([END])
    return made


def byte_pairs(texts: Iterable[str], vocabulary: int) -> FastTokenizer:
    """Return a byte-level BPE tokenizer trained on ``texts``.

    Source: Radford et al. 2019, section 2.2.

    Args:
        texts: to learn the merges from.
        vocabulary: ids, at most; 257 are the bytes and the end of text.

    Raises:
        InvalidInput: fewer ids than bytes.
    """
    if vocabulary < 257:
        raise InvalidInput(
            f"A vocabulary of {vocabulary} is too small for byte-level BPE: the 256 bytes and the "
            "end of text are 257."
        )
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def save_tokenizer(made: FastTokenizer, folder: Path) -> None:
    """Write the two files that a Hugging Face directory has of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILES[0]).write_text(made.to_str(pretty=False), encoding="utf-8")
    (folder / FILES[1]).write_text(
        json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=1)
    )


def tokenizer_id(folder: Path) -> str:
    """Return ``sha256:…`` of a folder's tokenizer, the same however its file is written."""
    return load_tokenizer(folder).identity
