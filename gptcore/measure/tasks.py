"""Multiple-choice items, answered by which choice a model holds most likely.

Each choice is scored by its log-likelihood behind the context, ln p(choice | context). Context and
choice are tokenized together, as one text: that is how the model met such words in training (the
space before a word belongs to its token, and a tokenizer may merge across the seam). Scoring
begins behind the longest run of tokens that the context alone and all texts of an item share, so
every choice is scored from the same place; where a token spans the seam, it counts with the
choice. Texts join as the item says: with one space, unless white space is there already.

``accuracy`` takes the choice with the largest sum, ``accuracy_normalised`` the largest sum per
UTF-8 byte of the choice (longer choices are less likely as such). A tie is no answer: an item is
right only where the right choice is above all others, so a model that does not care scores 0.

Items with contexts of equal length are computed together, each context once; the choices follow
in the cache. Reading the weights once for many rows is what makes this fast on a CPU (three times,
with SmolLM2). Where a row's numbers depend on what stands in the other rows, as with int8 whose
activations share one scale, that would score another model than the one that is used: a few rows
are computed both ways first, and where they differ every item is computed alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gptcore.errors import ContextOverflow, InvalidInput, NumericalError
from gptcore.measure.jsonl import MAX_LINES, read_jsonl
from gptcore.measure.sets import Sets
from gptcore.paths import ROOT
from gptcore.records import checked_text
from gptcore.sentences import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT, KVCache
    from gptcore.tokenizer import Tokenizer

SHIPPED = ROOT / "data" / "tasks"
SHIPPED_NAME = "shipped"
MAX_CHOICES = 20
MAX_EXAMPLES = 32
BETWEEN_EXAMPLES = "\n\n"
SCORING = (
    "log-likelihood of each choice behind the context, tokenized together; right where the right "
    "choice is above all others; Wilson interval, 95 %"
)
CONFIDENCE = 0.95
ALPHA = 0.05

MAX_ROWS = 16
PROBES = 4
"""Rows that are computed alone and among others."""
APART_FP32, APART_16_BIT = 0.01, 0.3
"""Median difference in ln p that rounding explains. Seen with SmolLM2: none in fp32, up to 0.36 in
one row but 0.0 in most in bf16, and 2 with int8's activations in one scale."""
BATCH_TOKENS = 1024
"""Rows × positions of a batch: bounds the cache (SmolLM2 in fp32: 47 MB)."""
CONTEXT_CHUNK = 512
"""Tokens of all rows computed at once; between two chunks a cancellation is seen."""
CHOICE_CHUNK = 32
"""Positions a row whose logits are held at once: 16 × 32 × V × 4 bytes are 100 MB."""


class Item(BaseModel):
    """One question: a context, choices that may continue it, and which of them is right."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    context: str = Field(max_length=32_000, title="Context", description="Text before the choice.")
    choices: tuple[str, ...] = Field(
        max_length=MAX_CHOICES, title="Choices", description="Texts that may follow."
    )
    answer: int = Field(title="Answer", description="Place of the right choice, from 0.")
    kind: str = Field("own", title="Kind", description="Items of one kind are scored together.")
    separator: str = Field(
        " ",
        max_length=8,
        title="Separator",
        description="Put between context and choice, unless white space is there already.",
    )

    @field_validator("context", "separator")
    @classmethod
    def _readable(cls, text: str) -> str:
        return checked_text(text, "text")

    @field_validator("context")
    @classmethod
    def _some(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the context is empty: write the text that comes before the choices")
        return text

    @field_validator("choices")
    @classmethod
    def _different(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        if len(choices) < 2:
            raise ValueError(f"there is {len(choices) or 'no'} choice; give at least 2")
        for at, choice in enumerate(choices):
            if not choice.strip():
                raise ValueError(f"choice {at} is empty: write its text or remove it")
            if len(choice) > 1000:
                raise ValueError(f"choice {at} has {len(choice):,} characters; the most is 1,000")
            if choice in choices[:at]:
                raise ValueError(f"choices {choices.index(choice)} and {at} are the same")
            checked_text(choice, f"choice {at}")
        return choices

    @field_validator("kind")
    @classmethod
    def _short(cls, kind: str) -> str:
        if not (1 <= len(kind) <= 40 and kind.isprintable() and kind.strip() == kind):
            raise ValueError("the kind must be a name of 1 to 40 characters")
        return kind

    @model_validator(mode="after")
    def _answer_exists(self) -> Item:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"the answer is {self.answer}, and there are {len(self.choices)} choices: give its "
                f"place, 0 to {len(self.choices) - 1}"
            )
        return self

    def text(self, choice: str) -> str:
        """Return context and choice as one text."""
        apart = self.context[-1:].isspace() or choice[:1].isspace()
        return self.context + ("" if apart else self.separator) + choice

    @property
    def id(self) -> str:
        """16 hexadecimal digits over all that is asked."""
        asked = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


def load_tasks(source: Path | bytes, *, name: str = "") -> tuple[Item, ...]:
    """Return the items of a JSONL file, or of all ``*.jsonl`` files of a folder.

    Args:
        source: a file, a folder, or what an upload brought.
        name: what errors call it; a file's own name, if not given.

    Raises:
        InvalidInput: a line is wrong, an item stands there twice, or there are too many.
    """
    files: list[Path | bytes] = [source]
    if isinstance(source, Path) and source.is_dir():
        files = [*sorted(source.glob("*.jsonl"))]
        if not files:
            raise InvalidInput(f"{source.name} holds no .jsonl file: name a folder that does.")
    items: list[Item] = []
    places: dict[tuple[str, frozenset[str]], str] = {}
    for file in files:
        label = name or (file.name if isinstance(file, Path) else "The text")
        for number, item in read_jsonl(file, Item, name=label):
            place, key = f"{label}, line {number}", (item.context, frozenset(item.choices))
            if key in places:
                raise InvalidInput(
                    f"{place} asks the same as {places[key]}: remove one, an item counted twice "
                    "makes the interval too narrow."
                )
            places[key] = place
            items.append(item)
            if len(items) > MAX_LINES:
                raise InvalidInput(f"There are more than {MAX_LINES:,} items: leave some out.")
    return tuple(items)


def shipped_tasks() -> tuple[Item, ...]:
    """Return the items that come with the program: five kinds."""
    return load_tasks(SHIPPED)


def _require_tasks(content: bytes, name: str) -> None:
    load_tasks(content, name=name)


TASK_SETS = Sets("set of items", "task-sets", _require_tasks, taken=(SHIPPED_NAME,))
"""The sets that users keep."""


def named_tasks(source: str, *, paths: bool = False) -> tuple[Item, ...]:
    """Return the items of that name: ``shipped``, or a set of the user's.

    Args:
        source: the name, or a path where ``paths`` is set.
        paths: whether a path is allowed; a page's visitor names sets only.

    Raises:
        InvalidInput: there is no such set, or it cannot be read.
    """
    if source == SHIPPED_NAME:
        return shipped_tasks()
    return load_tasks(TASK_SETS.find(source, paths=paths))


def kinds_of(items: Iterable[Item]) -> tuple[str, ...]:
    """Return the names of the kinds, in order of the alphabet."""
    return tuple(sorted({item.kind for item in items}))


def of_kinds(items: Iterable[Item], kinds: Sequence[str]) -> tuple[Item, ...]:
    """Return the items of the named kinds; of all, where none is named.

    Raises:
        InvalidInput: there is no such kind.
    """
    items = tuple(items)
    known = kinds_of(items)
    for kind in kinds:
        if kind not in known:
            raise InvalidInput(f"There is no kind {kind!r}; there are: {', '.join(known)}.")
    return tuple(item for item in items if not kinds or item.kind in kinds)


def items_hash(items: Iterable[Item]) -> str:
    """Return ``sha256:…`` of what a set of items asks, whatever their order."""
    joined = "\n".join(sorted(item.id for item in items))
    return f"sha256:{hashlib.sha256(joined.encode()).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model made of one item."""

    item_id: str
    kind: str
    answer: int
    logprobs: tuple[float, ...]
    """ln p(choice | context) of each choice."""
    sizes_bytes: tuple[int, ...]
    """UTF-8 bytes of each choice."""

    def right(self, *, normalised: bool = False) -> bool:
        """Return whether the right choice is above all others; per byte, if ``normalised``."""
        scores = [
            logprob / (size if normalised else 1)
            for logprob, size in zip(self.logprobs, self.sizes_bytes, strict=True)
        ]
        ours = scores.pop(self.answer)
        return ours > max(scores)

    @property
    def best(self) -> int:
        """The place of the likeliest choice; of the first, if there are several."""
        return self.logprobs.index(max(self.logprobs))

    @property
    def right_logprob(self) -> float:
        """The right choice's ln p."""
        return self.logprobs[self.answer]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers with its Wilson interval."""

    right: int
    n: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class KindReport:
    """How a model did on the items of one kind."""

    kind: str
    accuracy: Accuracy
    accuracy_normalised: Accuracy
    chance_ratio: float
    """What guessing gives: the mean of 1 ÷ number of choices."""
    right_logprob_mean: float
    """Mean ln p of the right choice."""


@dataclass(frozen=True, slots=True)
class TaskReport:
    """How a model did, over all and by kind, and what was asked."""

    overall: KindReport
    kinds: tuple[KindReport, ...]
    items_hash: str
    examples: int
    """Right answers shown before each question (few-shot k)."""
    seed: int
    tokenizer: str
    scoring: str = SCORING


@dataclass(frozen=True, slots=True)
class Flips:
    """Two variants on the same items: how many answers flipped each way, and how sure that is."""

    n: int
    both_right: int
    only_a: int
    only_b: int
    both_wrong: int
    difference: float
    """Accuracy of B less that of A."""
    p: float
    """McNemar's exact test, two-sided: a binomial test of the flips; 1 where nothing flipped."""
    logprob_difference_mean: float
    """Mean of ln p_B − ln p_A of the right choice."""
    logprob_difference_se: float | None
    """Its standard error over the items; None for a single one."""
    normalised: bool

    @property
    def verdict(self) -> str:
        """B against A: ``better``, ``worse`` or ``no detectable difference``."""
        if self.p >= ALPHA:
            return "no detectable difference"
        return "better" if self.only_b > self.only_a else "worse"


def evaluate_tasks(
    model: GPT,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    examples: int = 0,
    seed: int = 0,
    description: str = "",
    progress: Callable[[float], None] = lambda ratio: None,
    check: Callable[[], None] = lambda: None,
) -> tuple[TaskReport, tuple[Answered, ...]]:
    """Return the report of a model on ``items``, and its answer to each; arguments as ``answer``.

    Raises:
        ContextOverflow, InvalidInput, NumericalError: as ``answer``.
    """
    answers = answer(
        model,
        tokenizer,
        items,
        examples=examples,
        seed=seed,
        description=description,
        progress=progress,
        check=check,
    )
    return report(answers, items, examples=examples, seed=seed, tokenizer=tokenizer), answers


def report(
    answers: Sequence[Answered],
    items: Sequence[Item],
    *,
    examples: int,
    seed: int,
    tokenizer: Tokenizer,
) -> TaskReport:
    """Return shares with intervals, over all and by kind, of answers to all ``items``."""
    assert len(answers) == len(items) > 0
    return TaskReport(
        overall=_kind_report("all", answers),
        kinds=tuple(
            _kind_report(kind, [one for one in answers if one.kind == kind])
            for kind in kinds_of(items)
        ),
        items_hash=items_hash(items),
        examples=examples,
        seed=seed,
        tokenizer=tokenizer.identity,
    )


def _kind_report(kind: str, answers: Sequence[Answered]) -> KindReport:
    return KindReport(
        kind=kind,
        accuracy=_accuracy(answers, normalised=False),
        accuracy_normalised=_accuracy(answers, normalised=True),
        chance_ratio=statistics.fmean(1 / len(one.logprobs) for one in answers),
        right_logprob_mean=statistics.fmean(one.right_logprob for one in answers),
    )


def _accuracy(answers: Sequence[Answered], *, normalised: bool) -> Accuracy:
    from scipy.stats import binomtest

    right, n = sum(one.right(normalised=normalised) for one in answers), len(answers)
    interval = binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    return Accuracy(right, n, right / n, float(interval.low), float(interval.high))


def compare_answers(
    a: Sequence[Answered], b: Sequence[Answered], *, normalised: bool = False
) -> Flips:
    """Return how B's answers differ from A's on the same items.

    Source: McNemar 1947, Psychometrika 12, in its exact form (``scipy.stats.binomtest``).

    Raises:
        InvalidInput: they answer different items.
    """
    from scipy.stats import binomtest

    if [one.item_id for one in a] != [one.item_id for one in b] or not a:
        raise InvalidInput(
            f"A answered {len(a):,} items and B {len(b):,}, and they are not the same: ask both "
            "the same items."
        )
    pairs = [
        (x.right(normalised=normalised), y.right(normalised=normalised))
        for x, y in zip(a, b, strict=True)
    ]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    gains = [y.right_logprob - x.right_logprob for x, y in zip(a, b, strict=True)]
    return Flips(
        n=len(pairs),
        both_right=pairs.count((True, True)),
        only_a=only_a,
        only_b=only_b,
        both_wrong=pairs.count((False, False)),
        difference=(only_b - only_a) / len(pairs),
        p=float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0,
        logprob_difference_mean=statistics.fmean(gains),
        logprob_difference_se=(
            statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
        ),
        normalised=normalised,
    )


def answer(
    model: GPT,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    examples: int = 0,
    seed: int = 0,
    description: str = "",
    progress: Callable[[float], None] = lambda ratio: None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Answered, ...]:
    """Return the log-likelihood of every choice of every item, in the order of ``items``.

    Args:
        model: on its device.
        tokenizer: its own.
        items: at least one.
        examples: how many other items of the same kind stand before each, answered rightly.
        seed: decides which.
        description: of the task; stands before the examples.
        progress: told the share done, 0 to 1.
        check: called between two steps; raises Cancelled where the user stopped the work.

    Raises:
        ContextOverflow: an item with its examples is longer than the model's context.
        InvalidInput: there is no item, or there are too few for that many examples.
        NumericalError: the model gives NaN or infinity.
    """
    if not items:
        raise InvalidInput("There is no item: choose a kind, or a file with items.")
    questions = []
    for index, prompt in enumerate(prompts(items, examples, seed, description)):
        check()
        questions.append(_question(index, items[index], prompt, tokenizer, model.spec.context))
    found: dict[int, list[float]] = {}
    batches = list(_batches(questions))
    if not _rows_are_independent(model, max(batches, key=len), check):
        batches = [[question] for question in questions]
    for batch in batches:
        for question, scores in zip(batch, _scores(model, batch, check), strict=True):
            if not all(map(math.isfinite, scores)):
                raise NumericalError(
                    f"The model gives NaN or infinity for {_name(items[question.index])}: its "
                    "numbers cannot be used; try another precision."
                )
            found[question.index] = scores
        progress(len(found) / len(items))
    return tuple(
        Answered(
            item_id=item.id,
            kind=item.kind,
            answer=item.answer,
            logprobs=tuple(found[index]),
            sizes_bytes=tuple(len(choice.encode()) for choice in item.choices),
        )
        for index, item in enumerate(items)
    )


def prompts(
    items: Sequence[Item], examples: int, seed: int, description: str = ""
) -> Iterator[str]:
    """Return for each item what stands before it: the task's description, and examples.

    The examples are ``examples`` others of its kind, answered.

    Which ones they are depends on the seed and the item only, not on the order of the items.

    Raises:
        InvalidInput: there are fewer others than that.
    """
    if not 0 <= examples <= MAX_EXAMPLES:
        raise InvalidInput(f"{examples} examples were asked for; 0 to {MAX_EXAMPLES} are possible.")
    kinds: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: item.id):
        kinds.setdefault(item.kind, []).append(item)
    places = {item.id: at for same in kinds.values() for at, item in enumerate(same)}
    for item in items:
        others, place = len(kinds[item.kind]) - 1, places[item.id]
        if others < examples:
            raise InvalidInput(
                f"{examples} examples were asked for, and kind {item.kind} has {others} other "
                f"items: ask for at most {others}, or leave that kind out."
            )
        drawn = random.Random(f"{seed} {item.id}").sample(range(others), examples)
        shown = [kinds[item.kind][at + (at >= place)] for at in drawn]
        before = [description] if description else []
        before += [one.text(one.choices[one.answer]) for one in shown]
        yield "".join(one + BETWEEN_EXAMPLES for one in before)


@dataclass(frozen=True, slots=True)
class _Question:
    """An item in token ids."""

    index: int
    prefix: tuple[int, ...]
    """What the context and all texts share; at least one token."""
    choices: tuple[tuple[int, ...], ...]
    """What follows it, for each choice; at least one token."""

    @property
    def positions(self) -> int:
        """How many positions the model reads for the longest choice; the last is not read."""
        return len(self.prefix) + max(map(len, self.choices)) - 1


def _question(index: int, item: Item, prompt: str, tokenizer: Tokenizer, context: int) -> _Question:
    texts = [tokenizer.encode_prompt(prompt + item.text(choice)) for choice in item.choices]
    alone = tokenizer.encode_prompt(prompt + item.context)
    shared = min(_shared([alone, *texts]), min(map(len, texts)) - 1)
    begin = texts[0][:shared] or _first_token(tokenizer, item)
    question = _Question(index, tuple(begin), tuple(tuple(ids[shared:]) for ids in texts))
    if question.positions > context:
        raise ContextOverflow(
            f"The item {_name(item)}{' with its examples' if prompt else ''} has "
            f"{question.positions:,} tokens and this model reads at most {context:,}: "
            f"{'ask for fewer examples' if prompt else 'shorten it or leave it out'}."
        )
    return question


def _shared(texts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all texts share."""
    count = 0
    for column in zip(*texts, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _first_token(tokenizer: Tokenizer, item: Item) -> list[int]:
    """Return what stands before a text that has no token of its own before the choice."""
    first = tokenizer.bos_id if tokenizer.bos_id is not None else min(tokenizer.eos_ids, default=-1)
    if first < 0:
        raise InvalidInput(
            f"The item {_name(item)} leaves no token before its choices, and this model knows "
            "none that begins a text: make the context longer."
        )
    return [first]


def _name(item: Item) -> str:
    return f"“{one_line(item.context, 40)}” ({item.kind})"


def _batches(questions: Sequence[_Question]) -> Iterator[list[_Question]]:
    """Return the questions in groups whose prefixes are equally long, so that none is padded."""
    ordered = sorted(questions, key=lambda one: (len(one.prefix), one.positions))
    for _, same in groupby(ordered, key=lambda one: len(one.prefix)):
        waiting = list(same)
        while waiting:
            # The last is the longest of those that are equal in front.
            rows = max(1, min(MAX_ROWS, BATCH_TOKENS // waiting[-1].positions))
            yield waiting[-rows:]
            del waiting[-rows:]


def _rows_are_independent(
    model: GPT, batch: Sequence[_Question], check: Callable[[], None]
) -> bool:
    """Return whether items score alone as they do among others, but for rounding."""
    if len(batch) == 1:
        return True
    import torch

    together = _scores(model, batch, check)
    gaps = []
    for row in range(0, len(batch), math.ceil(len(batch) / PROBES)):
        (alone,) = _scores(model, [batch[row]], check)
        gaps.append(max(abs(x - y) for x, y in zip(alone, together[row], strict=True)))
    exact = model.new_cache(1).k.dtype == torch.float32
    return statistics.median(gaps) <= (APART_FP32 if exact else APART_16_BIT)


def _scores(model: GPT, batch: Sequence[_Question], check: Callable[[], None]) -> list[list[float]]:
    """Return ln p of every choice behind its prefix, for B questions with equally long ones."""
    import torch

    length = len(batch[0].prefix)
    found = [[0.0] * len(one.choices) for one in batch]
    orders = [_longest_first(one.choices) for one in batch]
    with torch.inference_mode():
        cache = model.new_cache(max(one.positions for one in batch), len(batch))
        first = _read(model, [one.prefix for one in batch], cache, check)  # (B, V)
        for turn in range(max(map(len, orders))):
            check()
            rows = [
                one.choices[order[turn]] if turn < len(order) else ()
                for one, order in zip(batch, orders, strict=True)
            ]
            sums = _following(model, first, rows, cache)
            cache.truncate(length)
            for row, (order, total) in enumerate(zip(orders, sums, strict=True)):
                if turn < len(order):
                    found[row][order[turn]] = total
    return found


def _longest_first(choices: Sequence[Sequence[int]]) -> list[int]:
    """Return the places of the choices, so that in a batch the long ones are read together.

    Choices of one token need no step of their own, so they come last, together too.
    """
    return sorted(range(len(choices)), key=lambda at: -len(choices[at]))


def _read(
    model: GPT, prefixes: Sequence[tuple[int, ...]], cache: KVCache, check: Callable[[], None]
) -> Tensor:
    """Read equally long prefixes into ``cache``; return ln p of what may follow: (B, V) float32."""
    import torch

    ids = torch.tensor(prefixes, device=cache.k.device)  # (B, S)
    chunk = max(1, CONTEXT_CHUNK // len(prefixes))
    for begin in range(0, ids.shape[1], chunk):
        check()
        logits: Tensor = model(ids[:, begin : begin + chunk], cache, last_only=True)
    return logits[:, -1].float().log_softmax(-1)


def _following(
    model: GPT, first: Tensor, rows: Sequence[tuple[int, ...]], cache: KVCache
) -> list[float]:
    """Return Σ ln p of each row's tokens; shorter rows are padded behind their end.

    Args:
        model: whose ``cache`` holds the prefixes of B rows.
        first: (B, V), ln p of each row's first token.
        rows: B times up to T tokens; a row may be empty.
        cache: grows by T − 1; the caller cuts it.
    """
    import torch

    device = cache.k.device
    most = max(map(len, rows))
    ids = torch.zeros(len(rows), most, dtype=torch.long)  # (B, T)
    known = torch.zeros(len(rows), most, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        known[row, : len(tokens)] = True
    ids, known = ids.to(device), known.to(device)
    sums = first.gather(1, ids[:, :1])[:, 0].where(known[:, 0], 0.0)  # (B,)
    for begin in range(0, most - 1, CHOICE_CHUNK):
        end = min(begin + CHOICE_CHUNK, most - 1)
        logits = model(ids[:, begin:end], cache).float()  # (B, chunk, V)
        after = ids[:, begin + 1 : end + 1, None]
        logprobs = logits.gather(2, after)[..., 0] - logits.logsumexp(-1)
        sums += logprobs.where(known[:, begin + 1 : end + 1], 0.0).sum(1)
    totals: list[float] = sums.cpu().tolist()
    return totals
