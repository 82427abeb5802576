"""What the compare page keeps: one frozen value in the session, and its place in the address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptcore.errors import InvalidInput
from gptcore.lab import Cell, Compare, Evaluate, Lab, StopRule, Tasks, Texts, Windowing
from gptcore.recipe import Variant
from gptcore.records import Request, RunKind, Sampling
from gptcore.work import Work
from pages.parts import errors, settings
from pages.parts.kept import Kept
from pages.parts.services import lab as shared_lab
from pages.parts.shown_run import Shown

MEASURED = Shown("compare_run", "result", "comparison", (RunKind.COMPARE, RunKind.REGRESS))
"""A comparison, which never changes again once it is measured."""
LETTERS = "ABCD"
SHIPPED_TEXT = "evaluation"
BATCHES = (1, 2, 4, 8, 16, 32)


class Side(BaseModel):
    """One variant as a person picks it, with how it draws."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(max_length=100)
    precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "fp32"
    temperature: float = Field(0.0, ge=0.0, le=2.0)


class Wanted(BaseModel):
    """Everything that decides what is written and measured; the device is the sidebar's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sides: tuple[Side, ...] = Field(min_length=2, max_length=len(LETTERS))
    prompt: str = Field("", max_length=200_000)
    seed: int = settings.as_in(Request, "seed")
    max_new_tokens: int = settings.as_in(Request, "max_new_tokens")
    prompt_tokens: int = settings.as_in(Cell, "prompt_tokens")
    new_tokens: int = settings.as_in(Cell, "new_tokens")
    batches: tuple[int, ...] = Field((1,), min_length=1, max_length=len(BATCHES))
    max_pairs: int = settings.as_in(StopRule, "max_pairs")
    half_width: float | None = settings.as_in(StopRule, "half_width")
    quality: Literal["Perplexity", "Tasks", "Texts"] = "Perplexity"
    alone: bool = False
    text: str = Field(SHIPPED_TEXT, min_length=1, max_length=64)
    window: int = Field(
        256, ge=2, le=8192, description=Windowing.model_fields["window"].description
    )
    stride: int = Field(0, ge=0, le=8192, description=Windowing.model_fields["stride"].description)
    max_tokens: int = Field(
        2000, ge=0, le=1_000_000, description=Windowing.model_fields["max_tokens"].description
    )
    items: str = Field(Tasks.model_fields["items"].default, min_length=1, max_length=64)
    kinds: tuple[str, ...] = Field((), max_length=100)
    examples: int = settings.as_in(Tasks, "examples")
    pairs: str = Field("", max_length=64)
    answer_tokens: int = Field(
        48, ge=1, le=4096, description=Texts.model_fields["max_new_tokens"].description
    )
    chat: bool = False

    def variants(self, lab: Lab) -> tuple[Variant, ...]:
        """Return the variant of each side.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """
        chosen = settings.current()
        return tuple(
            lab.variant(one.model, one.precision, chosen.device, chosen.threads)
            for one in self.sides
        )

    def request(self, side: Side, *, chat: bool) -> Request:
        """Return what to ask of one side."""
        what: dict[str, Any] = {"prompt": self.prompt}
        if chat:
            what = {"messages": [{"role": "user", "content": self.prompt}]}
        sampling = Sampling(temperature=side.temperature).model_dump()
        return Request.model_validate(
            {**what, **sampling, "seed": self.seed, "max_new_tokens": self.max_new_tokens}
        )

    def work(self, lab: Lab, *, noise: bool = False) -> Compare:
        """Return the comparison to measure, or with ``noise`` that of A with itself."""
        variants = self.variants(lab)
        least = StopRule.model_fields["min_pairs"].default
        return Compare(
            variants=(variants[0],) * 2 if noise else variants,
            cells=tuple(
                Cell(prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens, batch=batch)
                for batch in (self.batches[:1] if noise else self.batches)
            ),
            stop=StopRule(
                max_pairs=self.max_pairs,
                min_pairs=min(least, self.max_pairs),
                half_width=self.half_width,
            ),
        )

    def quality_works(self, lab: Lab) -> tuple[Work, ...]:
        """Return what measures the quality of A with each other side, or of A alone.

        Raises:
            GptcoreError, ValidationError: what was chosen is not there, or cannot be used.
        """
        first, *others = self.variants(lab)
        against: list[Variant | None] = [None] if self.alone else list(others)
        works: list[Work] = []
        for other in against:
            both = (first,) if other is None else (first, other)
            match self.quality:
                case "Perplexity":
                    known(self.text, lab.texts(), "text")
                    windowing = Windowing(
                        window=self.window, stride=self.stride, max_tokens=self.max_tokens
                    )
                    works.append(
                        Evaluate(variant=first, against=other, text=self.text, windowing=windowing)
                    )
                case "Tasks":
                    known(self.items, lab.item_sets(), "set of items")
                    works.append(
                        Tasks(
                            variants=both,
                            items=self.items,
                            kinds=self.kinds,
                            examples=self.examples,
                            seed=self.seed,
                        )
                    )
                case "Texts":
                    known(self.pairs, lab.pair_sets(), "set of pairs")
                    works.append(
                        Texts(
                            variants=both,
                            pairs=self.pairs,
                            max_new_tokens=self.answer_tokens,
                            chat=self.chat,
                            seed=self.seed,
                        )
                    )
        return tuple(works)


def known(name: str, names: Sequence[str], what: str) -> None:
    """Refuse what is no name: a visitor names what is kept here, and gives no path.

    Raises:
        InvalidInput: with the names that there are.
    """
    if name not in names:
        raise InvalidInput(
            f"There is no {what} {errors.brief(name)}; there are: {', '.join(names) or 'none'}. "
            "Add it first."
        )


def starting() -> Wanted:
    """Return what a newcomer finds: the sidebar's model in its precision and in int8."""
    chosen = settings.current()
    other: Literal["int8", "fp32"] = "int8" if chosen.precision != "int8" else "fp32"
    return Wanted(
        sides=(
            Side(model=chosen.model, precision=chosen.precision),
            Side(model=chosen.model, precision=other),
        ),
        prompt="Explain in two sentences why the sky is blue.",
        max_new_tokens=48,
    )


def _from_result() -> Wanted | None:
    """Return what was asked of the comparison that a link shows."""
    found = shared_lab().snapshot(MEASURED.run_id() or "")
    if found is None or found.run.kind not in MEASURED.kinds:
        return None
    try:
        asked = {name: found.run.settings[name] for name in Compare.model_fields}
        work = Compare.model_validate(asked)
        return Wanted(
            sides=tuple(
                Side.model_validate({"model": one.model, "precision": one.precision})
                for one in work.variants
            ),
            prompt=starting().prompt,
            max_new_tokens=starting().max_new_tokens,
            prompt_tokens=work.cells[0].prompt_tokens,
            new_tokens=work.cells[0].new_tokens,
            batches=tuple(dict.fromkeys(one.batch for one in work.cells)),
            max_pairs=work.stop.max_pairs,
            half_width=work.stop.half_width,
        )
    except (KeyError, ValidationError):  # of another version, or with more than this page offers
        return None


_kept = Kept(
    Wanted,
    key="compare",
    address="c",
    what="comparison",
    start=lambda: _from_result() or starting(),
)
current, change, write_address = _kept.current, _kept.change, _kept.write_address


def change_side(index: int, **changes: Any) -> None:
    """Change one side."""
    sides = [one.model_dump() for one in current().sides]
    if index < len(sides):
        sides[index] |= changes
        change(sides=sides)
