"""Quality of a variant on a text: its perplexity, and what it does otherwise than another variant.

The work of a host; the thinking is in ``perplexity`` and ``divergence``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from gptcore.device import free_bytes
from gptcore.measure.calibration import require_other_text
from gptcore.measure.corpora import EVALUATION, evaluation_text
from gptcore.measure.divergence import (
    Agreement,
    Paired,
    agreement,
    alternated,
    divergence,
    greedy,
    paired,
    prompts_of,
    require_same_tokens,
)
from gptcore.measure.perplexity import (
    Logits,
    Passage,
    Scored,
    Windowing,
    call_tokens,
    model_logits,
    passage,
    require_context,
    score,
    summary,
)
from gptcore.recipe import Variant
from gptcore.records import RunKind
from gptcore.work import Desk, Work

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.tokenizer import Tokenizer

PROMPT_TOKENS = 32
"""Of the text that greedy texts begin with."""
MAX_HELD_BYTES = 512 * 2**20
"""Of logits that wait for the other variant, where both do not fit together."""
TOLD_EVERY_S = 0.5
"""How often what is known so far is told."""


class Evaluate(Work):
    """Measure a variant's perplexity on a text, and another variant against it."""

    kind: ClassVar[RunKind] = RunKind.EVALUATE

    variant: Variant
    against: Variant | None = Field(
        None, description="B; what it does otherwise than the variant, A, is reported."
    )
    further: tuple[Variant, ...] = Field(
        (), max_length=2, description="C and D; held against A likewise, which is measured once."
    )
    text: str = Field(
        EVALUATION,
        min_length=1,
        max_length=4096,
        title="Text",
        description="The name of a text, or the path of a UTF-8 file.",
    )
    windowing: Windowing = Windowing()
    prompts: int = Field(
        8,
        ge=0,
        le=1000,
        title="Greedy prompts",
        description="Places in the text from which both variants write on; 0 leaves it out.",
    )
    new_tokens: int = Field(
        32, ge=1, le=10_000, title="Greedy tokens", description="Tokens written after each prompt."
    )

    @model_validator(mode="after")
    def _on_one_device(self) -> Evaluate:
        if self.further and self.against is None:
            raise ValueError("there are further variants but no B: give the first of them as B")
        devices = dict.fromkeys(one.placement.device for one in self.variants_used())
        if len(devices) > 1:
            raise ValueError(
                f"the variants are on {' and '.join(devices)}, and one evaluation has one device: "
                "put all on the same"
            )
        return self

    def variants_used(self) -> tuple[Variant, ...]:
        """Return A, and those that are held against it."""
        return (self.variant, *(() if self.against is None else (self.against, *self.further)))

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Measure, and return the numbers of ``Perplexity`` and ``Divergence`` by name.

        Raises:
            InvalidInput: the text cannot be used, a variant was calibrated with it, or the
                variants have different tokens.
            ContextOverflow: the window is longer than a context.
            NumericalError: a variant produced NaN or infinity.
        """
        desk.phase("reading the text")
        text = evaluation_text(self.text, paths=True)
        for variant in self.variants_used():
            require_other_text(text, variant)
        tokenizer, context = _read_by(desk, self.variant)
        read = passage(text, tokenizer, self.windowing)
        require_context(read, context, self.variant.model)
        about = {
            "text": text.name,
            "text_tokens": len(read.ids),
            "call_tokens": call_tokens(self.variant.spec.vocabulary),
        }
        others = self.variants_used()[1:]
        if not others:
            return self._alone(desk, read, about)
        for one in others:
            other, shorter = _read_by(desk, one)
            require_same_tokens(tokenizer, other)
            require_context(read, shorter, one.model)
            context = min(context, shorter)
        found = self._paired(desk, read, about)
        if self.prompts:
            desk.partial(found)
            agreed = self._greedy(desk, read, context)
            for one, texts in zip((found, *found["further"]), agreed, strict=True):
                one["greedy"] = texts.as_json()
        return found

    def _alone(self, desk: Desk, read: Passage, about: dict[str, Any]) -> dict[str, Any]:
        logits = _stoppable(model_logits(desk.load(self.variant).engine.model), desk.check)
        done: list[Scored] = []

        def report() -> dict[str, Any]:
            return summary(read, done).as_json() | described(self.variant) | about

        telling = _Telling(desk, len(read.windows), report)
        for one in score(read, logits):
            done.append(one)
            telling.tell(len(done))
        desk.measured("nll_nats_per_token", [float(one.nll.mean()) for one in done])
        return report()

    def _paired(self, desk: Desk, read: Passage, about: dict[str, Any]) -> dict[str, Any]:
        variants = self.variants_used()
        resident = all(map(desk.holds, variants))
        done: list[tuple[Paired, ...]] = []

        def side(number: int, variant: Variant) -> dict[str, Any]:
            pairs = [one[number] for one in done]
            other = summary(read, [one.b for one in pairs]).as_json()
            del other["identity"]
            differences = divergence(pairs).as_json()
            del differences["tokens"]
            return {"against": other | described(variant), **differences, "greedy": None}

        def report() -> dict[str, Any]:
            first, *further = (side(number, one) for number, one in enumerate(variants[1:]))
            return {
                **summary(read, [one[0].a for one in done]).as_json(),
                **described(self.variant),
                **about,
                **first,
                "further": further,
                "alternated": not resident,
            }

        telling = _Telling(desk, len(read.windows), report)
        for one in self._pairs(desk, read, resident):
            done.append(one)
            telling.tell(len(done))
        desk.measured("nll_nats_per_token", [float(one[0].nll_a.mean()) for one in done])
        for number, name in enumerate(("", "c_", "d_")[: len(variants) - 1]):
            pairs = [one[number] for one in done]
            desk.measured(
                f"{name or 'against_'}nll_nats_per_token",
                [float(one.nll_b.mean()) for one in pairs],
            )
            desk.measured(f"{name}kl_nats_per_token", [float(one.kl.mean()) for one in pairs])
        return report()

    def _pairs(self, desk: Desk, read: Passage, resident: bool) -> Iterator[tuple[Paired, ...]]:
        def opened(variant: Variant) -> Callable[[], Logits]:
            return lambda: _stoppable(model_logits(desk.load(variant).engine.model), desk.check)

        openers = [opened(one) for one in self.variants_used()]
        if resident:
            return paired(read, *(one() for one in openers))
        free = free_bytes("cpu")
        return alternated(
            read,
            *openers,
            vocabulary=self.variant.spec.vocabulary,
            held_bytes=MAX_HELD_BYTES if free is None else min(MAX_HELD_BYTES, free // 4),
        )

    def _greedy(self, desk: Desk, read: Passage, context: int) -> list[Agreement]:
        variants = self.variants_used()
        new_tokens = min(self.new_tokens, context - 1)
        prompts = prompts_of(read, self.prompts, min(PROMPT_TOKENS, context - new_tokens))
        texts: list[list[tuple[int, ...]]] = []
        for side, variant in enumerate(variants):
            model = desk.load(variant).engine.model
            texts.append([])
            for number, prompt in enumerate(prompts):
                share = (side + number / len(prompts)) / len(variants)
                desk.phase("writing greedily", share)
                texts[-1].append(greedy(model, prompt, new_tokens, desk.check))
            del model  # so that it can be let go of
        return [agreement(texts[0], one) for one in texts[1:]]


@dataclass(slots=True)
class _Telling:
    """Tells the progress of windows, and now and then what is known so far."""

    desk: Desk
    windows: int
    report: Callable[[], Mapping[str, Any]]
    told_at: float = field(default_factory=time.monotonic)

    def tell(self, done: int) -> None:
        self.desk.phase(f"window {done:,} of {self.windows:,}", done / self.windows)
        if time.monotonic() - self.told_at >= TOLD_EVERY_S:
            self.desk.partial(self.report())
            self.told_at = time.monotonic()


def _read_by(desk: Desk, variant: Variant) -> tuple[Tokenizer, int]:
    """Return a variant's tokenizer and context, and keep nothing of its model."""
    engine = desk.load(variant).engine
    return engine.tokenizer, engine.model.spec.context


def _stoppable(logits: Logits, check: Callable[[], None]) -> Logits:
    def checked(ids: Tensor, first: int) -> Iterator[Tensor]:
        check()
        for chunk in logits(ids, first):
            yield chunk
            check()

    return checked


def described(variant: Variant) -> dict[str, Any]:
    """Return which variant a result speaks of."""
    placement = variant.placement
    return {
        "model": variant.model,
        "precision": variant.precision,
        "recipe": str(variant.recipe),
        "device": placement.device,
        "variant": variant.hash,
    }
