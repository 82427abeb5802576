"""Quality of one to four variants by what they answer: multiple-choice items, and whole texts.

The works of a host; the thinking is in ``tasks`` and ``text_scores``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from gptcore.errors import InvalidInput
from gptcore.measure.evaluate import described
from gptcore.measure.tasks import (
    MAX_EXAMPLES,
    SHIPPED_NAME,
    Answered,
    Item,
    compare_answers,
    evaluate_tasks,
    named_tasks,
    of_kinds,
)
from gptcore.measure.text_scores import Pair, compare_pairs, named_pairs, score_pairs
from gptcore.recipe import Variant
from gptcore.records import (
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOPS,
    FinishReason,
    Message,
    Request,
    RunKind,
    checked_text,
)
from gptcore.work import Desk, Work

LETTERS = "ABCD"
MAX_SHOWN = 100
"""Flipped items, and texts, that a result keeps."""


class _OfVariants(Work):
    """One variant, or up to four on the same device; the others are held against the first."""

    variants: tuple[Variant, ...] = Field(min_length=1, max_length=len(LETTERS))
    seed: int = Field(0, ge=0, le=MAX_SEED, title="Seed", description="Equal seeds, equal results.")

    @model_validator(mode="after")
    def _on_one_device(self) -> _OfVariants:
        devices = {one.placement.device for one in self.variants}
        if len(devices) > 1:
            raise ValueError(
                f"the variants are on {' and '.join(sorted(devices))}, and one run has one device: "
                "put all on the same"
            )
        return self

    def variants_used(self) -> tuple[Variant, ...]:
        """Return A, and those that are held against it."""
        return self.variants

    def _progress(self, desk: Desk, what: str, side: int) -> Callable[[float], None]:
        """Return what tells the share done of one variant's part as one of the whole."""
        name = self.variants[side].model

        def tell(ratio: float) -> None:
            desk.phase(f"{what} with {name}", (side + ratio) / len(self.variants))

        return tell


class Tasks(_OfVariants):
    """Ask one to four variants the same multiple-choice items."""

    kind: ClassVar[RunKind] = RunKind.TASKS

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
    examples: int = Field(
        0,
        ge=0,
        le=MAX_EXAMPLES,
        title="Examples",
        description="Others of the same kind, rightly answered, that stand before each item.",
    )

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Ask, and return the report of A, and of each other one what flipped.

        Raises:
            InvalidInput: the items cannot be used.
            ContextOverflow, NumericalError: as ``tasks.answer``.
        """
        desk.phase("reading the items")
        items = of_kinds(named_tasks(self.items, paths=True), self.kinds)
        found: dict[str, Any] = {}
        answers: list[tuple[Answered, ...]] = []
        for side, variant in enumerate(self.variants):
            engine = desk.load(variant).engine
            report, answered = evaluate_tasks(
                engine.model,
                engine.tokenizer,
                items,
                examples=self.examples,
                seed=self.seed,
                progress=self._progress(desk, "asking", side),
                check=desk.check,
            )
            del engine  # so that it can be let go of
            answers.append(answered)
            about = {**described(variant), **asdict(report)}
            if side == 0:
                found = {"items": self.items, **about, "against": None, "further": []}
            else:
                _add(found, {"against": about, **_flips(items, answers[0], answered)})
            desk.partial(found)
            name = f"{_prefix(side)}right_logprob_nats"
            desk.measured(name, [one.right_logprob for one in answered])
        return found


def _add(found: dict[str, Any], other: dict[str, Any]) -> None:
    """Put another variant's part into A's report: that of B beside it, others as a list."""
    if found["against"] is None:
        found |= other
    else:
        found["further"] = [*found["further"], other]


def _prefix(side: int) -> str:
    """Return what stands before the names of a variant's measurements."""
    return ("", "against_", "c_", "d_")[side]


def _flips(items: Sequence[Item], a: Sequence[Answered], b: Sequence[Answered]) -> dict[str, Any]:
    """Return how many answers flipped, by sum and per byte, and the first of the flipped items."""
    found: dict[str, Any] = {}
    for name, normalised in (("flips", False), ("flips_normalised", True)):
        flips = compare_answers(a, b, normalised=normalised)
        found[name] = {**asdict(flips), "verdict": flips.verdict}
    found["flipped"] = [
        {
            "kind": item.kind,
            "context": item.context,
            "right": item.choices[item.answer],
            "a": item.choices[one.best],
            "b": item.choices[other.best],
            "better": other.right(),
        }
        for item, one, other in zip(items, a, b, strict=True)
        if one.right() != other.right()
    ][:MAX_SHOWN]
    return found


class Texts(_OfVariants):
    """Let one to four variants answer prompts, and hold the texts against references."""

    kind: ClassVar[RunKind] = RunKind.TEXTS

    pairs: str = Field(
        min_length=1,
        max_length=4096,
        title="Pairs",
        description="The name of a set of pairs, or the path of a JSONL file.",
    )
    max_new_tokens: int = Field(
        128, ge=1, le=4096, title="New tokens", description="The most tokens of an answer."
    )
    stop: tuple[str, ...] = Field(
        (),
        max_length=MAX_STOPS,
        title="Stop strings",
        description="An answer ends before the first.",
    )
    chat: bool = Field(
        False, title="Chat", description="Ask through the model's chat template, not as plain text."
    )

    @field_validator("stop")
    @classmethod
    def _usable(cls, stops: tuple[str, ...]) -> tuple[str, ...]:
        for stop in stops:
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise ValueError(
                    f"a stop string has {len(stop)} characters; 1 to {MAX_STOP_CHARS} are allowed"
                )
            checked_text(stop, "stop string")
        return stops

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Write greedily, and return the scores of A, and of each other one the differences.

        Raises:
            InvalidInput: the pairs cannot be used, or a prompt is refused.
            ContextOverflow: a prompt is longer than the context.
            NumericalError: a variant produced NaN or infinity.
        """
        desk.phase("reading the pairs")
        pairs = named_pairs(self.pairs, paths=True)
        references = [one.all_references for one in pairs]
        found: dict[str, Any] = {}
        outputs: list[list[str]] = []
        for side, variant in enumerate(self.variants):
            texts, reasons = self._written(desk, pairs, side)
            outputs.append(texts)
            desk.phase(f"scoring the texts of {variant.model}")
            scores = score_pairs(texts, references, seed=self.seed, check=desk.check)
            about = {
                **described(variant),
                **asdict(scores),
                "cut_off": reasons.count(FinishReason.LENGTH),
            }
            if side == 0:
                found = {"pairs": self.pairs, **about, "against": None, "further": []}
            else:
                differences = [
                    {**asdict(one), "verdict": one.verdict}
                    for one in compare_pairs(
                        outputs[0], texts, references, seed=self.seed, check=desk.check
                    )
                ]
                _add(found, {"against": about, "differences": differences})
            found["texts"] = [
                {"prompt": pair.prompt, "references": pair.all_references, "outputs": list(written)}
                for pair, *written in zip(pairs, *outputs, strict=True)
            ][:MAX_SHOWN]
            desk.partial(found)
        return found

    def _written(
        self, desk: Desk, pairs: Sequence[Pair], side: int
    ) -> tuple[list[str], list[FinishReason | None]]:
        """Return the text for each prompt, and why it ended."""
        engine = desk.load(self.variants[side]).engine
        tell = self._progress(desk, "writing", side)
        texts, reasons = [], []

        def stopped() -> bool:
            desk.check()  # what it raises ends the generation, and is raised again behind it
            return False

        for number, pair in enumerate(pairs):
            tell(number / len(pairs))
            try:
                generation = engine.start(self._request(pair), cancelled=stopped)
            except InvalidInput as error:
                raise type(error)(f"Pair {number + 1}: {error}") from None
            text = "".join(token.text for token in generation)
            desk.check()
            texts.append(text.strip())
            reasons.append(generation.finish_reason)
        return texts, reasons

    def _request(self, pair: Pair) -> Request:
        messages = (Message(role="user", content=pair.prompt),) if self.chat else ()
        return Request(
            prompt="" if self.chat else pair.prompt,
            messages=messages,
            temperature=0.0,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            seed=self.seed,
            alternatives=0,
        )
