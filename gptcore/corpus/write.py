"""Let a teacher write the corpus: rounds of prompts, sorted into batches of equal length.

A round is a fixed number of prompts; its batches are a function of the recipe alone, so a writer
that was stopped goes on with the next batch, on this machine or another.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from gptcore.corpus.duplicates import Seen
from gptcore.corpus.examples import EXAMPLES
from gptcore.corpus.filters import cleaned, refused, whole_sentences
from gptcore.corpus.prompts import Prompt, prompt, prompts_id
from gptcore.corpus.shards import Batch, Ledger, Text
from gptcore.corpus.teacher import Continuation, write_batch
from gptcore.records import Message, Sampling

if TYPE_CHECKING:
    from gptcore.model import GPT
    from gptcore.tokenizer import Tokenizer

LEAST_BATCH = 24
"""Prompts of a rarer length wait in vain: a small batch costs nearly as much as a large one."""


class Plan(BaseModel):
    """How a corpus is written; all of it stands in the head of every shard."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(1, ge=0, le=2**31, description="Of prompts and draws.")
    batch: int = Field(96, ge=1, le=4096, description="Texts written at once, at most.")
    round: int = Field(6144, ge=1, le=10**6, description="Prompts sorted by length together.")
    max_new_tokens: int = Field(
        220, ge=16, le=2000, description="A text that is longer is cut after a sentence."
    )
    end_after: int = Field(
        90, ge=0, le=2000, description="Tokens from which on an end is favoured more and more."
    )
    temperature: float = Field(0.8, gt=0.0, le=2.0, description="Of the draws.")
    min_p: float = Field(
        0.1, ge=0.0, le=1.0, description="Tokens below this share of the likeliest are not drawn."
    )
    repetition_penalty: float = Field(
        1.1, ge=1.0, le=2.0, description="Lowers what the text already holds; 1 changes nothing."
    )

    @property
    def sampling(self) -> Sampling:
        """The plan's draws."""
        return Sampling(
            temperature=self.temperature,
            min_p=self.min_p,
            top_k=64,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as the teacher reads it behind one of the examples."""

    prompt: Prompt
    example: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a writer has done since it was started."""

    batch: int
    texts: int
    kept: int
    tokens: int
    """Of the teacher's, all texts, refused ones too."""
    kept_tokens: int
    seconds: float
    refused: Mapping[str, int]
    shard: Path | None
    """The file that this batch closed."""


def recipe(plan: Plan, teacher: str, weights_id: str, precision: str) -> dict[str, Any]:
    """Return what stands in the head of a shard: all it takes to write it again."""
    return {
        "teacher": teacher,
        "weights_id": weights_id,
        "precision": precision,
        "prompts_id": prompts_id(),
        "plan": plan.model_dump(mode="json"),
    }


def asked(tokenizer: Tokenizer, one: Prompt, example: int) -> Asked:
    """Return a prompt through the teacher's chat template, its opening as begun answer."""
    question, answer = EXAMPLES[one.kind][example]
    messages = (
        Message(role="user", content=question),
        Message(role="assistant", content=answer),
        Message(role="user", content=one.text),
    )
    ids = tokenizer.encode_prompt("", messages)
    return Asked(one, example, (*ids, *(tokenizer.encode(one.opening) if one.opening else ())))


def batches(plan: Plan, round: int, tokenizer: Tokenizer) -> list[tuple[Asked, ...]]:
    """Return the batches of a round: prompts of one kind and length, in an order of its own."""
    alike: dict[tuple[str, int], list[Prompt]] = {}
    for number in range(round * plan.round, (round + 1) * plan.round):
        one = prompt(plan.seed, number)
        ids = (*tokenizer.encode(one.text), *tokenizer.encode(one.opening))
        alike.setdefault((one.kind, len(ids)), []).append(one)
    dice = random.Random(f"{plan.seed}:round:{round}")
    found = []
    for (kind, _), prompts in sorted(alike.items()):
        for begin in range(0, len(prompts), plan.batch):
            example = dice.randrange(len(EXAMPLES[kind]))
            batch = tuple(
                asked(tokenizer, one, example) for one in prompts[begin : begin + plan.batch]
            )
            assert len({len(one.ids) for one in batch}) == 1
            if len(batch) >= min(LEAST_BATCH, plan.batch):
                found.append(batch)
    dice.shuffle(found)
    return found


def all_batches(plan: Plan, tokenizer: Tokenizer, start: int) -> Iterator[tuple[Asked, ...]]:
    """Yield batch ``start`` and all after it, without end."""
    before, round = 0, 0
    while True:
        found = batches(plan, round, tokenizer)
        yield from found[max(0, start - before) :]
        before, round = before + len(found), round + 1


def write(
    model: GPT,
    tokenizer: Tokenizer,
    plan: Plan,
    ledger: Ledger,
    *,
    enough: Callable[[Progress], bool],
    breathe: Callable[[], None] = lambda: None,
    report: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Write batch after batch into the ledger until it is enough.

    Args:
        model: the teacher.
        tokenizer: the teacher's, with a chat template.
        plan: how.
        ledger: where; it says which batch is next.
        enough: asked after every batch.
        breathe: called before every step; what it raises ends the work, the batch is lost.
        report: told after every batch.
        clock: seconds.

    Raises:
        StoreError: the disk is full; all batches before are kept.
    """
    seen = Seen()
    examples = (answer for pairs in EXAMPLES.values() for _, answer in pairs)
    for text in (*examples, *ledger.seen_texts):
        seen.add(text)
    began, done = clock(), Progress(ledger.next_batch, 0, 0, 0, 0, 0.0, {}, None)
    for batch in all_batches(plan, tokenizer, ledger.next_batch):
        written = write_batch(
            model,
            [one.ids for one in batch],
            [one.prompt.seed for one in batch],
            sampling=plan.sampling,
            end_ids=tokenizer.eos_ids,
            max_new_tokens=plan.max_new_tokens,
            end_after=plan.end_after,
            breathe=breathe,
        )
        texts, reasons = sifted(batch, written, tokenizer, seen)
        shard = ledger.add(Batch(ledger.next_batch, texts, dict(reasons)))
        done = Progress(
            ledger.next_batch,
            done.texts + len(batch),
            done.kept + len(texts),
            done.tokens + sum(len(one.ids) for one in written),
            done.kept_tokens + sum(one.tokens for one in texts),
            clock() - began,
            Counter(done.refused) + reasons,
            shard,
        )
        report(done)
        if enough(done):
            break
    return done


def sifted(
    batch: tuple[Asked, ...], written: list[Continuation], tokenizer: Tokenizer, seen: Seen
) -> tuple[tuple[Text, ...], Counter[str]]:
    """Return the texts that may enter the corpus, and why how many others may not."""
    texts, reasons = [], Counter[str]()
    for one, answer in zip(batch, written, strict=True):
        text = cleaned(one.prompt.opening + tokenizer.decode(answer.ids))
        text = text if answer.ended else whole_sentences(text)
        reason = refused(text, one.prompt.kind, answer) or seen.add(text)
        if reason:
            reasons[reason] += 1
            continue
        texts.append(
            Text(
                text=text,
                kind=one.prompt.kind,
                prompt=one.prompt.text,
                opening=one.prompt.opening,
                number=one.prompt.number,
                seed=one.prompt.seed,
                example=one.example,
                whole=answer.ended,
                tokens=len(answer.ids),
                mean_logprob=round(answer.mean_logprob, 3),
            )
        )
    return tuple(texts), reasons
