"""What a person orders: a text or the corpus, a tokenizer, a shape or a model, and the settings.

``job`` makes of it what the trainer takes: it makes the tokenizer, writes the token files, and
finds the weights to begin with.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptcore.catalogue import open_catalogue
from gptcore.corpus.shards import Part, corpus_dir, shard_files, texts
from gptcore.errors import InvalidInput, StoreError
from gptcore.paths import cache_dir
from gptcore.sentences import brief, sentence
from gptcore.spec import ModelSpec, gpt
from gptcore.tokenizer import load_tokenizer
from gptcore.train.checkpoint import steps as checkpoints
from gptcore.train.origin import Origin, origin
from gptcore.train.settings import Training
from gptcore.train.teaching import require_teacher
from gptcore.train.texts import pieces, split
from gptcore.train.tokens import Data, prepare
from gptcore.train.trainer import TOKENIZER_FILES, Job
from gptcore.train.vocabulary import by_character, byte_pairs, save_tokenizer, tokenizer_id
from gptcore.weights.save import config_of

ORDER = "order.json"
TOKENIZER = "tokenizer"
LEARNED_FROM: tuple[Part, ...] = ("train", "validation")


class Order(BaseModel):
    """A training as it is ordered; it stands in the training's folder, for a resume."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    text: str = Field(
        "", max_length=4096, title="Text", description="A file of UTF-8; empty is the corpus."
    )
    corpus: str = Field(
        "",
        max_length=4096,
        title="Corpus",
        description="The folder of the corpus; empty is the one that ships.",
    )
    share: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        title="Share of the corpus",
        description="Of its training texts; which ones follows from their hash, and a smaller "
        "share is a part of a larger one.",
    )
    tokenizer: str = Field(
        "char",
        max_length=4096,
        title="Tokenizer",
        description="char (a token a character), bpe (byte-level, made from the text), or a "
        "folder with tokenizer.json.",
    )
    vocabulary: int = Field(
        4096, ge=257, le=1_000_000, title="Vocabulary", description="Of bpe, at most."
    )
    layers: int = Field(4, ge=1, le=1000, title="Layers", description="Transformer blocks.")
    width: int = Field(128, ge=1, le=100_000, title="Width", description="Of the residual stream.")
    heads: int = Field(4, ge=1, le=1024, title="Heads", description="They share the width.")
    context: int = Field(
        128, ge=2, le=1_048_576, title="Context", description="Tokens that one sequence has."
    )
    start: str = Field(
        "",
        max_length=4096,
        title="Begin with",
        description="A model whose weights, shape and tokenizer to go on with; empty is a fresh "
        "one of the shape above.",
    )
    teacher: str = Field(
        "",
        max_length=4096,
        title="Teacher",
        description="A model with the same tokenizer that the student learns from too.",
    )
    prompt: str = Field(
        "",
        max_length=2000,
        title="Prompt",
        description="What the texts that it writes while learning begin with.",
    )
    settings: Training = Training()


def job(order: Order, folder: Path, *, resume: bool = False) -> Job:
    """Return what an order means; makes tokenizer and token files where they are not there yet.

    Args:
        order: what is wanted.
        folder: of the training; keeps the order and the tokenizer.
        resume: whether a training in ``folder`` goes on; then nothing is written there.

    Raises:
        InvalidInput: a text, tokenizer, shape or model that cannot be used.
        StoreError: the disk is full or cannot be written.
    """
    catalogue = open_catalogue()
    start = origin(catalogue, order.start) if order.start else None
    teacher = origin(catalogue, order.teacher) if order.teacher else None
    if resume:
        _require_same_tokenizer(order, folder)
    else:
        _begin(order, folder, start or teacher)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    spec = start.spec if start else _shape(order, tokenizer.vocabulary, teacher)
    config_of(spec)  # refuses a shape that could not be written at the end
    if teacher is not None:
        require_teacher(teacher, spec, tokenizer_id(folder / TOKENIZER), order.settings)
    if tokenizer.vocabulary > spec.vocabulary:
        raise InvalidInput(
            f"The tokenizer has {tokenizer.vocabulary:,} ids and the model knows "
            f"{spec.vocabulary:,}: they do not belong together."
        )
    return Job(
        spec=spec,
        settings=order.settings,
        data=_data(order, folder / TOKENIZER),
        tokenizer=folder / TOKENIZER,
        start=start,
        teacher=teacher,
        prompt=order.prompt,
    )


def read_order(folder: Path) -> Order:
    """Return the order of a training's folder.

    Raises:
        InvalidInput: there is none, or it is damaged.
    """
    try:
        return Order.model_validate_json((folder / ORDER).read_text())
    except OSError:
        raise InvalidInput(f"There is no training in {folder} to go on with.") from None
    except ValidationError as error:
        raise InvalidInput(
            f"{ORDER} in {folder} is damaged: {sentence(error, Order)} Begin anew in another "
            "folder."
        ) from None


def _begin(order: Order, folder: Path, known: Origin | None) -> None:
    """Put order and tokenizer into a folder that holds no training yet."""
    if checkpoints(folder):
        raise InvalidInput(
            f"There is a training in {folder} already: go on with it (--resume), or name another "
            "folder."
        )
    target = folder / TOKENIZER
    try:
        shutil.rmtree(target, ignore_errors=True)  # of a try that was refused
        target.mkdir(parents=True)
        if known is not None:
            _take_tokenizer(known.directory, target)
        elif order.tokenizer in ("char", "bpe"):
            _make_tokenizer(order, target)
        else:
            _take_tokenizer(Path(order.tokenizer).expanduser(), target)
        (folder / ORDER).write_text(order.model_dump_json(indent=1))
    except OSError as error:
        raise StoreError(
            f"The folder {folder} cannot be written: {error.strerror or error}. Make room, or name "
            "another."
        ) from None


def _require_same_tokenizer(order: Order, folder: Path) -> None:
    before = read_order(folder)
    if order.tokenizer == before.tokenizer and order.vocabulary == before.vocabulary:
        return
    other = Path(order.tokenizer).expanduser()
    same = (other / TOKENIZER_FILES[0]).is_file() and tokenizer_id(other) == tokenizer_id(
        folder / TOKENIZER
    )
    if not same:
        raise InvalidInput(
            f"The training in {folder} cannot go on with another tokenizer "
            f"({brief(before.tokenizer)}, not {brief(order.tokenizer)}): give what it began with, "
            "or begin a new one in another folder."
        )


def _shape(order: Order, vocabulary: int, teacher: Origin | None) -> ModelSpec:
    if order.width % order.heads:
        raise InvalidInput(
            f"{order.heads} heads do not divide a width of {order.width}: choose a multiple."
        )
    if teacher is not None:
        vocabulary = teacher.spec.vocabulary
    return gpt(order.layers, order.width, order.heads, context=order.context, vocabulary=vocabulary)


def _data(order: Order, tokenizer: Path) -> Data:
    made = load_tokenizer(tokenizer)
    key = hashlib.sha256((_stamp(order) + tokenizer_id(tokenizer)).encode()).hexdigest()[:24]
    ended = not order.text
    if ended and not made.eos_ids:
        raise InvalidInput("The corpus needs a tokenizer with an end of text; this one has none.")
    return prepare(
        cache_dir() / "tokens" / key,
        order.text or "corpus",
        _texts(order, "train"),
        _texts(order, "validation"),
        made,
        ended=ended,
    )


def _texts(order: Order, part: Part) -> Iterator[str]:
    """Yield the texts, or pieces of the text, of one part."""
    if not order.text:
        share = order.share if part == "train" else 1.0
        yield from (one.text for one in texts(_corpus(order), part) if within(one.text, share))
        return
    file = Path(order.text).expanduser()
    at = split(file)
    yield from pieces(file, 0, at) if part == "train" else pieces(file, at)


def within(text: str, share: float) -> bool:
    """Return whether a text belongs to a share of all, by its hash."""
    at = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    return at < share * 2**64


def _corpus(order: Order) -> Path:
    return Path(order.corpus).expanduser() if order.corpus else corpus_dir()


def _stamp(order: Order) -> str:
    """Return a hash of the content of what is learned from.

    Raises:
        InvalidInput: it cannot be read.
    """
    files = [Path(order.text).expanduser()] if order.text else shard_files(_corpus(order))
    digest = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise InvalidInput(
            f"{brief(order.text or file.name)} cannot be read: {error.strerror}. Give a file of "
            "UTF-8 text."
        ) from None
    return digest.hexdigest() + (f":{order.share}" if order.share < 1 else "")


def _make_tokenizer(order: Order, folder: Path) -> None:
    learned = _texts(order, "train")
    if order.tokenizer == "char":
        # Every character counts, those of the validation text too, as in Karpathy's char-rnn.
        made = by_character(text for part in LEARNED_FROM for text in _texts(order, part))
    else:
        made = byte_pairs(learned, order.vocabulary)
    save_tokenizer(made, folder)


def _take_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, after a look at whether they can be used.

    Raises:
        InvalidInput: they cannot.
    """
    if not source.is_dir():
        raise InvalidInput(
            f"{brief(str(source))} is no tokenizer: choose char, bpe, or a folder with "
            "tokenizer.json."
        )
    load_tokenizer(source)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
