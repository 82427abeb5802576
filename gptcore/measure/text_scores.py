r"""How near generated texts are to references: BLEU, chrF, ROUGE-1/2/L and METEOR.

BLEU and chrF are those of sacreBLEU over the whole corpus, with its signature, 0 to 100. ROUGE is
that of rouge-score, F with Porter stemming, and METEOR our own with exact and Porter-stem matches
only (WordNet's synonyms cannot be assumed to be there), both 0 to 1 and means over the pairs. With
several references a pair counts the best one; BLEU takes their n-grams together, as it is defined.

Every score has a 95 % percentile bootstrap interval over the pairs (Koehn 2004, EMNLP): pairs are
drawn with replacement, and the statistics of the drawn ones are summed, so no text is read again.

Error: the interval speaks of other pairs of this kind, not of other texts that the model could
have drawn for the same prompts; with fewer than 20 pairs it is too narrow, and is said to be.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gptcore.errors import InvalidInput
from gptcore.measure.jsonl import MAX_LINES, read_jsonl
from gptcore.measure.sets import Sets
from gptcore.records import checked_text

MAX_CHARS = 20_000
"""Of one text: ROUGE-L compares every word with every other, here in about two seconds."""
MAX_REFERENCES = 20
LEAST_PAIRS = 20
"""Below it the bootstrap's intervals are too narrow, so no difference is claimed."""
RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK = 100
"""Resamples at once: 100 × 10,000 pairs × 8 bytes are 8 MB."""
WORDS = re.compile(r"\w+|[^\w\s]+")
"""METEOR's words: letters and digits, or punctuation."""
ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
"""METEOR's weight of precision against recall, and shape and weight of its penalty."""
MOST_FOREIGN = 0.05
"""From this share of letters on that ROUGE does not read, it is said."""

Floats = NDArray[np.float64]
Stem = Callable[[str], str]


class Pair(BaseModel):
    """A prompt, what a good answer is, and perhaps what a model answered."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = Field(max_length=MAX_CHARS, title="Prompt")
    reference: str | None = Field(None, max_length=MAX_CHARS, title="Reference")
    references: tuple[str, ...] = Field((), max_length=MAX_REFERENCES, title="References")
    output: str | None = Field(None, max_length=MAX_CHARS, title="Output")

    @field_validator("prompt", "reference", "output")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        return text if text is None else checked_text(text, "text")

    @field_validator("prompt")
    @classmethod
    def _some(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty: write what is asked, or leave the line out")
        return prompt

    @model_validator(mode="after")
    def _one_of_both(self) -> Pair:
        if (self.reference is None) == (not self.references):
            raise ValueError('give either "reference", a text, or "references", a list of texts')
        for reference in self.all_references:
            if not reference.strip():
                raise ValueError("a reference is empty: write one, or leave the pair out")
            if len(reference) > MAX_CHARS:
                raise ValueError(
                    f"a reference has {len(reference):,} characters; the most is {MAX_CHARS:,}"
                )
            checked_text(reference, "reference")
        return self

    @property
    def all_references(self) -> tuple[str, ...]:
        """The references, one or several."""
        return self.references if self.reference is None else (self.reference,)


@dataclass(frozen=True, slots=True)
class TextScore:
    """One score of a corpus of pairs."""

    name: str
    title: str
    value: float
    low: float | None
    """95 % interval, with ``high``; None for a single pair."""
    high: float | None
    scale: int
    """What a perfect text gets: 100 or 1."""
    signature: str
    """Version and settings: scores of different signatures are not comparable."""


@dataclass(frozen=True, slots=True)
class TextScores:
    """All scores of a corpus of pairs."""

    n: int
    scores: tuple[TextScore, ...]
    resamples: int
    seed: int
    notes: tuple[str, ...] = ()
    """What to know before the numbers are believed, in sentences."""

    def __getitem__(self, name: str) -> TextScore:
        return next(one for one in self.scores if one.name == name)


@dataclass(frozen=True, slots=True)
class TextDifference:
    """How far B's texts score above A's on the same references."""

    name: str
    title: str
    a: float
    b: float
    difference: float
    low: float | None
    """95 % interval of the difference, both drawn together; None for a single pair."""
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        """B against A: ``better``, ``worse``, ``no detectable difference``, or that n is small."""
        if self.n < LEAST_PAIRS:
            return f"no verdict from fewer than {LEAST_PAIRS} pairs"
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "no detectable difference"
        return "better" if self.low > 0 else "worse"


def read_pairs(source: Path | bytes, *, name: str = "") -> tuple[Pair, ...]:
    """Return the pairs of a JSONL file.

    Raises:
        InvalidInput: it is no such file; the sentence names the line and the field.
    """
    return tuple(pair for _, pair in read_jsonl(source, Pair, name=name))


def _require_pairs(content: bytes, name: str) -> None:
    read_pairs(content, name=name)


PAIR_SETS = Sets("set of pairs", "pair-sets", _require_pairs)
"""The sets that users keep."""


def named_pairs(source: str, *, paths: bool = False) -> tuple[Pair, ...]:
    """Return the pairs of that name, or at that path where ``paths`` is set.

    Raises:
        InvalidInput: there is no such set, or it cannot be read.
    """
    return read_pairs(PAIR_SETS.find(source, paths=paths))


def score_pairs(
    hypotheses: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[float], None] = lambda ratio: None,
    check: Callable[[], None] = lambda: None,
) -> TextScores:
    """Return BLEU, chrF, ROUGE-1/2/L and METEOR with their intervals.

    Args:
        hypotheses: texts to judge; an empty one scores 0.
        references: for each, a text or several.
        seed: of the bootstrap.
        resamples: how often the pairs are drawn anew.
        progress: told the share done, 0 to 1.
        check: called between two pairs; raises Cancelled where the user stopped the work.

    Raises:
        InvalidInput: no pair, unequal numbers, something that is no text, an empty reference, or
            one that is too long.
    """
    texts = _checked(hypotheses, references)
    n = len(texts[0])
    metrics = _metrics(*texts, progress, check)
    drawn = _resampled(metrics, seed, resamples, check)
    return TextScores(
        n=n,
        scores=tuple(
            TextScore(
                one.name, one.title, one.whole, *_interval(scores, n), one.scale, one.signature
            )
            for one, scores in zip(metrics, drawn, strict=True)
        ),
        resamples=resamples,
        seed=seed,
        notes=tuple(_notes(*texts)),
    )


def compare_pairs(
    a: Sequence[str],
    b: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[float], None] = lambda ratio: None,
    check: Callable[[], None] = lambda: None,
) -> tuple[TextDifference, ...]:
    """Return how the texts of B differ from those of A, by the paired bootstrap.

    The same pairs are drawn for both, so what is hard for both cancels.

    Raises:
        InvalidInput: as ``score_pairs``.
    """
    of_a, of_b = (
        _metrics(*_checked(texts, references), _half(progress, at), check)
        for at, texts in enumerate((a, b))
    )
    drawn_a, drawn_b = (_resampled(one, seed, resamples, check) for one in (of_a, of_b))
    return tuple(
        TextDifference(
            one.name,
            one.title,
            one.whole,
            two.whole,
            two.whole - one.whole,
            *_interval(scores_b - scores_a, len(a)),
            len(a),
        )
        for one, two, scores_a, scores_b in zip(of_a, of_b, drawn_a, drawn_b, strict=True)
    )


def _half(progress: Callable[[float], None], at: int) -> Callable[[float], None]:
    return lambda ratio: progress((at + ratio) / 2)


def _checked(
    hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return the texts, each with a list of references."""
    if len(hypotheses) != len(references):
        raise InvalidInput(
            f"There are {len(hypotheses):,} texts and {len(references):,} references: give one "
            "reference, or a list of them, for each text."
        )
    if not 1 <= len(hypotheses) <= MAX_LINES:
        raise InvalidInput(f"There are {len(hypotheses):,} pairs; 1 to {MAX_LINES:,} are scored.")
    lists = []
    for at, (hypothesis, given) in enumerate(zip(hypotheses, references, strict=True), 1):
        several: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        if not several:
            raise InvalidInput(f"Pair {at} has no reference: give it one, or leave it out.")
        _require_text(hypothesis, f"The text of pair {at}")
        for reference in several:
            _require_text(reference, f"A reference of pair {at}")
            if not reference.strip():
                raise InvalidInput(
                    f"A reference of pair {at} is empty: write one, or leave the pair out."
                )
        lists.append(several)
    return list(hypotheses), lists


def _require_text(text: Any, what: str) -> None:
    """Refuse what is no text, or too long.

    Raises:
        InvalidInput: in a sentence.
    """
    if not isinstance(text, str):
        raise InvalidInput(f"{what} is {type(text).__name__}; it must be text.")
    if len(text) > MAX_CHARS:
        raise InvalidInput(
            f"{what} has {len(text):,} characters; the most is {MAX_CHARS:,}: shorten it."
        )


@dataclass(frozen=True, slots=True)
class _Metric:
    """A score as a function of summed statistics of N pairs."""

    name: str
    title: str
    scale: int
    signature: str
    statistics: Floats
    """(N, K): what each pair adds."""
    score: Callable[[Floats, int], float]
    """Of sums (K) over some number of pairs."""

    @property
    def whole(self) -> float:
        return self.score(self.statistics.sum(0), len(self.statistics))


def _metrics(
    hypotheses: list[str],
    references: list[list[str]],
    progress: Callable[[float], None],
    check: Callable[[], None],
) -> list[_Metric]:
    check()
    found = _sacrebleu(hypotheses, references)
    progress(0.1)
    stem = _stemmer()
    score = _rouge_scorer(stem)
    rows = []
    for at, (hypothesis, several) in enumerate(zip(hypotheses, references, strict=True), 1):
        check()
        rows.append([*score(several, hypothesis), meteor(hypothesis, several, stem)])
        progress(0.1 + 0.9 * at / len(hypotheses))
    rouge = (
        f"rouge_score {metadata.version('rouge_score')}|F1|Porter stemming of words over 3 letters"
        "|a-z and 0-9 only|best reference|mean over pairs"
    )
    ours = (
        f"METEOR of Lavie and Agarwal 2007|α {ALPHA:g}, β {BETA:g}, γ {GAMMA:g}|exact and Porter-"
        f"stem matches, no synonyms|nltk {metadata.version('nltk')}'s stemmer|words {WORDS.pattern}"
        "|lower case|best reference|mean over pairs"
    )
    means = (
        ("rouge1", "ROUGE-1", rouge),
        ("rouge2", "ROUGE-2", rouge),
        ("rougeL", "ROUGE-L", rouge),
        ("meteor", "METEOR (exact and stem)", ours),
    )
    for column, (name, title, signature) in zip(np.array(rows).T, means, strict=True):
        found.append(_Metric(name, title, 1, signature, column[:, None], _mean))
    return found


def _mean(sums: Floats, n: int) -> float:
    return float(sums[0]) / n


def _sacrebleu(hypotheses: list[str], references: list[list[str]]) -> list[_Metric]:
    """Return corpus BLEU and chrF in sacreBLEU's own statistics, as its bootstrap uses them."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    most = max(map(len, references))
    columns: list[Any] = [  # None where a text has fewer references, which sacreBLEU knows
        [several[at] if at < len(several) else None for several in references] for at in range(most)
    ]
    found = []
    for name, title, metric in (("bleu", "BLEU", BLEU(force=True)), ("chrf", "chrF", CHRF())):
        statistics = np.array(
            metric._extract_corpus_statistics(hypotheses, columns), dtype=np.float64
        )
        signature = str(metric.get_signature())

        def score(sums: Floats, n: int, metric: Any = metric) -> float:
            return float(metric._compute_score_from_stats(sums.tolist()).score)

        found.append(_Metric(name, title, 100, f"sacrebleu|{signature}", statistics, score))
    return found


def _rouge_scorer(stem: Stem) -> Callable[[list[str], str], list[float]]:
    """Return what gives ROUGE-1, 2 and L (F) of a text against several references."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenize import tokenize
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):  # type: ignore[misc]
        """The package's own words, with the stems remembered."""

        def stem(self, word: str) -> str:
            return stem(word)

        def tokenize(self, text: str) -> list[str]:
            words: list[str] = tokenize(text, self)
            return words

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=Words())

    def score(references: list[str], hypothesis: str) -> list[float]:
        found = scorer.score_multi(references, hypothesis)
        return [float(found[name].fmeasure) for name in names]

    return score


def _stemmer() -> Stem:
    from nltk.stem.porter import PorterStemmer

    return functools.lru_cache(maxsize=100_000)(PorterStemmer().stem)


def meteor(hypothesis: str, references: Sequence[str], stem: Stem) -> float:
    """Return METEOR with exact and stem matches, against the best of several references.

    Source: Lavie and Agarwal 2007, "METEOR: An Automatic Metric for MT Evaluation with High Levels
    of Correlation with Human Judgments". As in nltk, each word takes the last free one that equals
    it, from the end of the text to its beginning, first by form and then by stem.

    Error: the synonyms of the full metric are left out, so texts that say the same in other words
    score lower; that greedy choice does not always leave the fewest crossings.

    Args:
        hypothesis: a text.
        references: at least one.
        stem: Porter's.
    """
    words = WORDS.findall(hypothesis.lower())
    return max(_meteor(words, WORDS.findall(one.lower()), stem) for one in references)


def _meteor(words: list[str], reference: list[str], stem: Stem) -> float:
    pairs = _alignment(words, reference, stem)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(words), len(pairs) / len(reference)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    chunks = 1 + sum(after != (at + 1, to + 1) for (at, to), after in pairwise(pairs))
    penalty = GAMMA * math.pow(chunks / len(pairs), BETA)
    return mean * (1 - penalty)


def _alignment(words: list[str], reference: list[str], stem: Stem) -> list[tuple[int, int]]:
    """Return pairs of places that match, in the order of ``words``; no place occurs twice."""
    found: dict[int, int] = {}
    taken: set[int] = set()
    for form in (str, stem):
        free: dict[str, list[int]] = defaultdict(list)
        for at, word in enumerate(reference):
            if at not in taken:
                free[form(word)].append(at)
        for at in reversed(range(len(words))):
            if at not in found and (places := free.get(form(words[at]))):
                found[at] = places.pop()
        taken = set(found.values())
    return sorted(found.items())


def _resampled(
    metrics: Sequence[_Metric], seed: int, resamples: int, check: Callable[[], None]
) -> list[Floats]:
    """Return the scores of ``resamples`` draws of as many pairs; equal seeds draw equal pairs."""
    n = len(metrics[0].statistics)
    random = np.random.default_rng(seed)
    scores: list[list[float]] = [[] for _ in metrics]
    for begin in range(0, resamples, CHUNK):
        check()
        size = min(CHUNK, resamples - begin)
        times = random.multinomial(n, np.full(n, 1 / n), size=size)  # (size, N): how often each
        for metric, found in zip(metrics, scores, strict=True):
            found += [metric.score(sums, n) for sums in times @ metric.statistics]
    return [np.array(found) for found in scores]


def _interval(scores: Floats, n: int) -> tuple[float | None, float | None]:
    """Return the middle 95 %; none where all draws are the same single pair."""
    if n == 1:
        return None, None
    low, high = np.quantile(scores, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _notes(hypotheses: list[str], references: list[list[str]]) -> Iterator[str]:
    if len(hypotheses) == 1:
        yield f"One pair has no interval: give {LEAST_PAIRS} or more."
    elif len(hypotheses) < LEAST_PAIRS:
        yield (
            f"{len(hypotheses)} pairs are few: the true intervals are wider than these. Give "
            f"{LEAST_PAIRS} or more."
        )
    empty = sum(not one.strip() for one in hypotheses)
    if empty:
        yield f"{empty:,} of {len(hypotheses):,} texts are empty and score 0."
    texts = chain(hypotheses, chain.from_iterable(references))
    letters = [c for text in texts for c in text.lower() if c.isalpha()]
    foreign = sum(not c.isascii() for c in letters) / max(1, len(letters))
    if foreign > MOST_FOREIGN:
        yield (
            f"ROUGE reads the letters a to z and digits only, and leaves out {foreign:.0%} of the "
            "letters here: do not use it for these texts."
        )
