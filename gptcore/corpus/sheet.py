"""What a corpus holds and how it was made, as numbers and as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from gptcore.corpus.filters import words
from gptcore.corpus.shards import PARTS, Shard, Text, read_shard, shard_files
from gptcore.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Count:
    """Sums over some texts."""

    texts: int
    characters: int
    words: int
    teacher_tokens: int


@dataclass(frozen=True, slots=True)
class Sheet:
    """Statistics of a corpus."""

    shards: int
    stored_bytes: int
    total: Count
    parts: Mapping[str, Count]
    kinds: Mapping[str, Count]
    whole_ratio: float
    """Share of the texts that the teacher ended itself."""
    refused: Mapping[str, int]
    recipes: tuple[Mapping[str, object], ...]
    logprob_quantiles: tuple[float, float, float]
    """Mean log-likelihood a token: at 5, 50 and 95 % of the texts."""
    words_quantiles: tuple[float, float, float]
    different_words: int


def count(texts: Sequence[Text]) -> Count:
    """Return the sums over ``texts``."""
    return Count(
        texts=len(texts),
        characters=sum(len(one.text) for one in texts),
        words=sum(len(one.text.split()) for one in texts),
        teacher_tokens=sum(one.tokens for one in texts),
    )


def sheet(folder: Path) -> Sheet:
    """Return the statistics of the corpus in ``folder``.

    Raises:
        InvalidInput: there is none, or a shard is damaged.
    """
    files = shard_files(folder)
    shards: list[Shard] = [read_shard(file) for file in files]
    texts = [text for shard in shards for text in shard.texts]
    if len(texts) < 2:
        raise InvalidInput(
            f"There is no corpus in {folder}: `python -m gptcore corpus write` makes one."
        )
    refused: Counter[str] = Counter()
    recipes: list[Mapping[str, object]] = []
    for shard in shards:
        refused.update(shard.refused)
        if shard.recipe not in recipes:
            recipes.append(shard.recipe)
    return Sheet(
        shards=len(files),
        stored_bytes=sum(file.stat().st_size for file in files),
        total=count(texts),
        parts={part: count([one for one in texts if one.part == part]) for part in PARTS},
        kinds={
            kind: count([one for one in texts if one.kind == kind])
            for kind in sorted({one.kind for one in texts})
        },
        whole_ratio=sum(one.whole for one in texts) / len(texts),
        refused=dict(refused.most_common()),
        recipes=tuple(recipes),
        logprob_quantiles=_spread([one.mean_logprob for one in texts]),
        words_quantiles=_spread([len(one.text.split()) for one in texts]),
        different_words=len({word for one in texts for word in words(one.text)}),
    )


def page(found: Sheet) -> str:
    """Return the sheet as Markdown."""
    tried = found.total.texts + sum(found.refused.values())
    lines = [
        "# The corpus",
        "",
        "Short tales, scenes and explanations in plain English, written by a language "
        "model from prompts that were put together from tables. Nothing in it is true, and nobody "
        "in it lives. Every text keeps its prompt, seed and the teacher's own log-likelihood; the "
        "head of every shard keeps the teacher, its weights' hash and the sampling.",
        "",
        f"{found.total.texts:,} texts, {found.total.characters:,} characters, "
        f"{found.total.words:,} words ({found.different_words:,} different), "
        f"{found.total.teacher_tokens:,} tokens of the teacher's tokenizer; {found.shards} shards, "
        f"{found.stored_bytes:,} bytes.",
        "",
        "| part | texts | words | share of texts |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {one.texts:,} | {one.words:,} | {one.texts / found.total.texts:.1%} |"
            for name, one in found.parts.items()
        ),
        "",
        "A text's part follows from the SHA-256 of its characters alone, so that a text stays in "
        "its part however the corpus grows.",
        "",
        "| kind | texts | words |",
        "|---|---:|---:|",
        *(f"| {name} | {one.texts:,} | {one.words:,} |" for name, one in found.kinds.items()),
        "",
        f"Of {tried:,} written texts {found.total.texts:,} were kept "
        f"({found.total.texts / tried:.1%}). {found.whole_ratio:.1%} of those were ended by the "
        "teacher; the rest was cut after the last whole sentence.",
        "",
        "| refused because of | texts |",
        "|---|---:|",
        *(f"| {reason} | {number:,} |" for reason, number in found.refused.items()),
        "",
        "| a text's | 5 % | median | 95 % |",
        "|---|---:|---:|---:|",
        "| words | " + " | ".join(f"{one:.0f}" for one in found.words_quantiles) + " |",
        "| mean log-likelihood of a token, teacher's own, nats | "
        + " | ".join(f"{one:.2f}" for one in found.logprob_quantiles)
        + " |",
        "",
        "## How it was made",
        "",
    ]
    for recipe in found.recipes:
        lines += [f"- {name}: {value}" for name, value in recipe.items()]
        lines.append("")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    cut = quantiles(values, n=20, method="inclusive")
    return cut[0], cut[9], cut[18]
