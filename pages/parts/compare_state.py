"""What the compare page keeps: one frozen value in the session, and its place in the address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gptcore.errors import GptcoreError, InvalidInput
from gptcore.lab import Cell, Compare, Evaluate, Lab, StopRule, Tasks, Texts, Windowing
from gptcore.passes.registry import passes
from gptcore.recipe import SHORTHANDS, Recipe, Variant, recipe_from_text
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
BATCHES = (1, 4, 8, 16)
CONTEXTS = (16, 64, 128, 256, 512, 1024)
"""Prompt lengths to choose from; any other can be typed."""
VIEWS = ("Speed", "Quality", "Texts", "Blind vote")
MAX_NAME_CHARS = 200
"""Of a variant among votes."""


class Side(Sampling):
    """One variant as a person picks it, with how it draws.

    What is empty is the sidebar's.
    """

    model: str = Field(max_length=100)
    precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "fp32"
    recipe: str = Field("", max_length=2000, title="Recipe")
    """As a person writes it, behind what the precision stands for."""
    temperature: float = Field(
        0.0,
        ge=0.0,
        le=2.0,
        title="Temperature",
        description=Sampling.model_fields["temperature"].description,
    )
    device: str = Field("", max_length=16, title="Device")
    threads: int | None = Field(None, ge=0, le=1024, title="Threads")

    @field_validator("recipe")
    @classmethod
    def _readable(cls, text: str) -> str:
        recipe_from_text(text)
        return text.strip()

    def variant(self, lab: Lab) -> Variant:
        """Return the variant.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """
        chosen = settings.current()
        return lab.variant(
            self.model,
            self.precision,
            self.device or chosen.device,
            chosen.threads if self.threads is None else self.threads,
            recipe_from_text(self.recipe),
        )

    @property
    def drawn(self) -> str:
        """How it draws, in words; a sampler that changes nothing is left out."""
        changed = Sampling(temperature=0.0).model_dump()
        names = [name for name, off in changed.items() if getattr(self, name) != off]
        if self.temperature == 0:  # then only what changes the order of tokens can matter
            names = [name for name in names if name == "repetition_penalty"]
        return ", ".join(
            f"{str(Sampling.model_fields[name].title).lower()} {getattr(self, name):g}"
            for name in names
        )

    def name(self, variant: Variant) -> str:
        """Return how its variant and draws are called in texts and votes."""
        recipe = f" {self.recipe}" if self.recipe else ""
        drawn = f" at {self.drawn}" if self.drawn else ""
        placed = variant.placement.device
        if self.threads is not None:
            placed += f", {variant.placement.resolved_threads} threads"
        found = f"{variant.model} {variant.precision}{recipe} {placed}{drawn}"
        if len(found) <= MAX_NAME_CHARS:
            return found
        return f"{variant.model} {variant.precision} {variant.hash} {placed}{drawn}"


def side_of(lab: Lab, variant: Variant) -> Side:
    """Return the side as which a person would pick a variant."""
    entry = settings.entry_of(lab, variant.model)
    recipe, precision = variant.recipe, variant.precision
    if entry is not None and entry.variant is not None:
        before = entry.variant.recipe.passes
        recipe = Recipe(passes=tuple(one for one in recipe.passes if one not in before))
    elif precision in SHORTHANDS:
        short = passes()[precision]()
        if short in recipe.passes and variant.placement.precision == SHORTHANDS[precision]:
            left = tuple(one for one in recipe.passes if one != short)
            recipe = recipe.model_copy(update={"passes": left})
        else:
            precision = variant.placement.precision
    return Side.model_validate(
        {
            "model": variant.model,
            "precision": precision,
            "recipe": recipe.as_text(),
            "device": variant.placement.device,
            "threads": variant.placement.threads,
        }
    )


def finished_recipes(lab: Lab) -> dict[str, str]:
    """Return the recipes of the finished variants as text, each with the names of those it made."""
    found: dict[str, list[str]] = {}
    for entry in lab.models():
        if entry.variant is not None and entry.variant.recipe.passes:
            found.setdefault(entry.variant.recipe.as_text(), []).append(entry.name)
    return {text: ", ".join(names) for text, names in found.items()}


class Wanted(BaseModel):
    """Everything that decides what is written, measured and shown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sides: tuple[Side, ...] = Field(min_length=2, max_length=len(LETTERS))
    view: Literal["Speed", "Quality", "Texts", "Blind vote"] | None = None
    """None: that of the result in the address."""
    prompt: str = Field("", max_length=200_000)
    seed: int = settings.as_in(Request, "seed")
    max_new_tokens: int = settings.as_in(Request, "max_new_tokens")
    differences: bool = False
    """Whether texts are laid over A's."""
    prompt_tokens: tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...] = Field(
        (128,), min_length=1, max_length=8, title="Prompt, tokens"
    )
    new_tokens: int = settings.as_in(Cell, "new_tokens")
    batches: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        (1,), min_length=1, max_length=8, title="Batch"
    )
    may_differ: tuple[Literal["threads"], ...] = ()
    """Conditions in which the sides may differ."""
    metric: Literal["decode_s", "prefill_s", "energy_j"] = "decode_s"
    """What the map of a grid shows."""
    max_pairs: int = settings.as_in(StopRule, "max_pairs")
    half_width: float | None = settings.as_in(StopRule, "half_width")
    seconds: float | None = settings.as_in(StopRule, "seconds")
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

    @field_validator("prompt_tokens", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value  # one, in older links

    @field_validator("prompt_tokens", "batches")
    @classmethod
    def _each_once(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(values)))

    def variants(self, lab: Lab) -> tuple[Variant, ...]:
        """Return the variant of each side.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
        """
        return tuple(one.variant(lab) for one in self.sides)

    def request(self, side: Side, *, chat: bool) -> Request:
        """Return what to ask of one side."""
        what: dict[str, Any] = {"prompt": self.prompt}
        if chat:
            what = {"messages": [{"role": "user", "content": self.prompt}]}
        return Request.model_validate(
            {
                **what,
                **side.sampling.model_dump(),
                "seed": self.seed,
                "max_new_tokens": self.max_new_tokens,
            }
        )

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The grid: every prompt length at every batch."""
        return tuple(
            Cell(prompt_tokens=prompt, new_tokens=self.new_tokens, batch=batch)
            for prompt in self.prompt_tokens
            for batch in self.batches
        )

    def work(self, lab: Lab, *, noise: bool = False) -> Compare:
        """Return the comparison to measure, or with ``noise`` that of A with itself.

        Raises:
            GptcoreError, ValidationError: it cannot be measured.
        """
        variants = self.variants(lab)
        if noise:
            variants = (variants[0],) * 2
        cells = self.cells[:1] if noise else self.cells
        for variant in variants:
            for cell in cells:
                cell.check(variant.spec, variant.model)
        least = StopRule.model_fields["min_pairs"].default
        return Compare(
            variants=variants,
            cells=cells,
            stop=StopRule(
                max_pairs=self.max_pairs,
                min_pairs=min(least, self.max_pairs),
                half_width=self.half_width,
                seconds=self.seconds,
            ),
            accepted=self.may_differ,
        )

    def quality_work(self, lab: Lab) -> Work:
        """Return what measures the quality of all sides, each once, or of A alone.

        Raises:
            GptcoreError, ValidationError: what was chosen is not there, or cannot be used.
        """
        first, *others = self.variants(lab)[: 1 if self.alone else None]
        match self.quality:
            case "Perplexity":
                known(self.text, lab.texts(), "text")
                return Evaluate(
                    variant=first,
                    against=others[0] if others else None,
                    further=tuple(others[1:]),
                    text=self.text,
                    windowing=Windowing(
                        window=self.window, stride=self.stride, max_tokens=self.max_tokens
                    ),
                )
            case "Tasks":
                known(self.items, lab.item_sets(), "set of items")
                return Tasks(
                    variants=(first, *others),
                    items=self.items,
                    kinds=self.kinds,
                    examples=self.examples,
                    seed=self.seed,
                )
            case "Texts":
                known(self.pairs, lab.pair_sets(), "set of pairs")
                return Texts(
                    variants=(first, *others),
                    pairs=self.pairs,
                    max_new_tokens=self.answer_tokens,
                    chat=self.chat,
                    seed=self.seed,
                )


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
        lab = shared_lab()
        return Wanted(
            sides=tuple(side_of(lab, one) for one in work.variants),
            prompt=starting().prompt,
            max_new_tokens=starting().max_new_tokens,
            prompt_tokens=tuple(one.prompt_tokens for one in work.cells),
            new_tokens=work.cells[0].new_tokens,
            batches=tuple(one.batch for one in work.cells),
            may_differ=tuple(one for one in work.accepted if one == "threads"),
            max_pairs=work.stop.max_pairs,
            half_width=work.stop.half_width,
            seconds=work.stop.seconds,
        )
    except (
        KeyError,
        ValidationError,
        GptcoreError,
    ):  # of another version, or with more than this page offers
        return None


_kept = Kept(
    Wanted,
    key="compare",
    address="c",
    what="comparison",
    start=lambda: _from_result() or starting(),
)
current, change, write_address = _kept.current, _kept.change, _kept.write_address
is_linked = _kept.is_linked


def change_side(index: int, **changes: Any) -> None:
    """Change one side."""
    sides = [one.model_dump() for one in current().sides]
    if index < len(sides):
        sides[index] |= changes
        change(sides=sides)
