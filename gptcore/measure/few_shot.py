"""What a model learns from examples in its prompt: accuracy over the number of them.

A prompt is built as Brown et al. 2020 (arXiv:2005.14165, section 2.1) frame it: a description of
the task, k examples with their answers, and the question. Each question is asked with every k, so
the accuracies are paired; which examples stand before it depends on the seed and the question. The
answer is the likeliest choice, see ``tasks``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import accumulate
from typing import Any, ClassVar

from pydantic import Field, field_validator

from gptcore.errors import InvalidInput
from gptcore.measure.tasks import (
    MAX_EXAMPLES,
    SHIPPED_NAME,
    Answered,
    Item,
    compare_answers,
    evaluate_tasks,
    named_tasks,
    of_kinds,
    prompts,
)
from gptcore.recipe import Variant
from gptcore.records import MAX_SEED, RunKind, checked_text
from gptcore.work import Desk, Work

SHOTS = (0, 1, 4, 8)
LEAST_ITEMS = 50
"""With fewer the intervals are so wide that hardly any k differs from another."""
MAX_ITEMS = 1000
MAX_KEPT_CHARS = 1_000_000
"""Of the prompts whose raw answers a result keeps; the questions behind them are left out."""


class FewShot(Work):
    """Ask the same items with 0, 1, 4, 8 (or other numbers of) examples before each."""

    kind: ClassVar[RunKind] = RunKind.FEW_SHOT

    variant: Variant
    items: str = Field(
        SHIPPED_NAME,
        min_length=1,
        max_length=4096,
        title="Items",
        description="The name of a set of items, or the path of a JSONL file.",
    )
    kinds: tuple[str, ...] = Field(
        (), max_length=100, title="Kinds", description="Only items of these kinds; empty is all."
    )
    description: str = Field(
        "",
        max_length=4000,
        title="Task",
        description="Stands before the examples, such as: Finish each sentence correctly.",
    )
    shots: tuple[int, ...] = Field(
        SHOTS,
        min_length=1,
        max_length=8,
        title="Examples",
        description="The numbers of examples to try.",
    )
    most_items: int = Field(
        100,
        ge=LEAST_ITEMS,
        le=MAX_ITEMS,
        title="Questions",
        description="Asked at most, spread evenly over the items.",
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, title="Seed", description="Decides the examples.")

    @field_validator("description")
    @classmethod
    def _readable(cls, text: str) -> str:
        return checked_text(text, "description")

    @field_validator("shots")
    @classmethod
    def _distinct(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        for one in shots:
            if not 0 <= one <= MAX_EXAMPLES:
                raise ValueError(f"{one} examples were asked for; 0 to {MAX_EXAMPLES} are possible")
        if len(set(shots)) < len(shots):
            raise ValueError("a number of examples stands there twice: remove one")
        return tuple(sorted(shots))

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the one that is asked."""
        return (self.variant,)

    def questions(self) -> tuple[Item, ...]:
        """Return what is asked.

        Raises:
            InvalidInput: there are fewer than 50, or a kind has too few for the most examples.
        """
        items = of_kinds(named_tasks(self.items, paths=True), self.kinds)
        if len(items) < LEAST_ITEMS:
            raise InvalidInput(
                f"There are {len(items)} items and at least {LEAST_ITEMS} are needed, or the "
                "intervals say nothing: choose more kinds, or a longer file."
            )
        step = max(1.0, len(items) / self.most_items)
        return tuple(items[int(at * step)] for at in range(min(len(items), self.most_items)))

    def prompt(self, shots: int, number: int = 0) -> str:
        """Return the whole prompt of one question, as the model is given it.

        Args:
            shots: how many examples stand before it.
            number: of the question, from 0.

        Raises:
            InvalidInput: the items cannot be used.
        """
        items = self.questions()
        number = min(number, len(items) - 1)
        before = list(prompts(items, shots, self.seed, self.description))
        return before[number] + items[number].context

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Ask, and return ``shots`` with the accuracy at each k, and the raw answers.

        Raises:
            InvalidInput: the items cannot be used.
            ContextOverflow: an item with its examples is longer than the model's context.
            NumericalError: the variant gives NaN or infinity.
        """
        items = self.questions()
        engine = desk.load(self.variant).engine
        answers: dict[int, tuple[Answered, ...]] = {}
        result: dict[str, Any] = {"n": len(items), "description": self.description, "shots": []}
        for done, shots in enumerate(self.shots):
            report, answers[shots] = evaluate_tasks(
                engine.model,
                engine.tokenizer,
                items,
                examples=shots,
                seed=self.seed,
                description=self.description,
                progress=self._progress(desk, done, shots),
                check=desk.check,
            )
            result = {
                **result,
                "items_hash": report.items_hash,
                "chance_ratio": report.overall.chance_ratio,
                "scoring": report.scoring,
                "shots": [
                    *result["shots"],
                    {
                        "shots": shots,
                        **asdict(report.overall.accuracy),
                        "kinds": {one.kind: asdict(one.accuracy) for one in report.kinds},
                        **_against(answers[self.shots[0]], answers[shots], shots == self.shots[0]),
                    },
                ],
            }
            desk.partial(result)
        return {**result, "answers": self._raw(items, answers)}

    def _progress(self, desk: Desk, done: int, shots: int) -> Callable[[float], None]:
        def tell(ratio: float) -> None:
            what = f"asking with {shots} {'example' if shots == 1 else 'examples'}"
            desk.phase(what, (done + ratio) / len(self.shots))

        return tell

    def _raw(
        self, items: tuple[Item, ...], answers: Mapping[int, tuple[Answered, ...]]
    ) -> list[dict[str, Any]]:
        """Return what was asked and answered, word for word."""
        before = {
            shots: list(prompts(items, shots, self.seed, self.description)) for shots in answers
        }
        sizes = accumulate(
            sum(len(texts[at]) + len(item.context) for texts in before.values())
            for at, item in enumerate(items)
        )
        kept = sum(size <= MAX_KEPT_CHARS for size in sizes)
        return [
            {
                "kind": item.kind,
                "question": item.context,
                "choices": list(item.choices),
                "right": item.choices[item.answer],
                "answers": {
                    str(shots): {
                        "prompt": before[shots][at] + item.context,
                        "answer": item.choices[answered[at].best],
                        "correct": answered[at].right(),
                        "logprobs": [round(one, 4) for one in answered[at].logprobs],
                    }
                    for shots, answered in answers.items()
                },
            }
            for at, item in enumerate(items[:kept])
        ]


def _against(first: tuple[Answered, ...], now: tuple[Answered, ...], same: bool) -> dict[str, Any]:
    """Return the paired test against the smallest number of examples; None for itself."""
    if same:
        return {"p": None, "verdict": None}
    flips = compare_answers(first, now)
    return {"p": flips.p, "verdict": flips.verdict}
