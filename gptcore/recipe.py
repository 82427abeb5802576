"""Recipe (an ordered tuple of passes) and Variant (all it takes to rebuild a model)."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
)

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Pass, Stage
from gptcore.passes.registry import pass_from_json, passes
from gptcore.sentences import brief, sentence
from gptcore.spec import ModelSpec, Precision

RECIPE_VERSION = 1
MAX_CHARS = 100_000
"""Of a recipe as text."""
SHORTHANDS: dict[str, Precision] = {"int8": "fp32", "int4": "bf16"}
"""A ``--precision`` that is short for the pass of that name, and the placement under it."""


class Calibration(BaseModel):
    """The text that the passes of a recipe look at, and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(
        "calibration",
        min_length=1,
        max_length=4096,
        title="Calibration text",
        description="The name of a text; the command line takes a path too.",
    )
    hash: str = Field("", description="``sha256:…`` of the text; found when the variant is made.")
    sequences: int = Field(
        64, ge=1, le=4096, title="Sequences", description="Of the text at most so many are run."
    )
    tokens: int = Field(
        256, ge=16, le=4096, title="Tokens a sequence", description="Length of each of them."
    )


class Recipe(BaseModel):
    """Passes in the order in which they run; the empty recipe is the baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: tuple[Pass, ...] = ()
    calibration: Calibration | None = None
    """What the passes that look at a text are given."""

    @field_validator("passes", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(one if isinstance(one, Pass) else pass_from_json(one) for one in value)
        return value

    @field_validator("passes")
    @classmethod
    def _in_order(cls, value: tuple[Pass, ...]) -> tuple[Pass, ...]:
        for before, after in pairwise(value):
            if after.stage < before.stage:
                raise ValueError(
                    f"{after.name} ({after.stage.name}) stands after {before.name} "
                    f"({before.stage.name}); the order is SHAPE, NUMBERS, RUNTIME"
                )
        quantizers = [one.name for one in value if one.quantizes]
        if len(quantizers) > 1:
            raise ValueError(f"{' and '.join(quantizers)} both quantize; choose one")
        return value

    @field_serializer("passes")
    def _to_json(self, value: tuple[Pass, ...]) -> list[dict[str, Any]]:
        return [one.as_json() for one in value]

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a calibration that is none: hashes of variants are made of this."""
        found: dict[str, Any] = serialize(self)
        if self.calibration is None:
            found.pop("calibration", None)
        return found

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Return what was chosen, so that a recipe prints as its own source."""
        text = [("calibration", self.calibration)] if self.calibration else []
        return [("passes", self.passes), *text]

    @property
    def needs_calibration(self) -> bool:
        """Whether a pass looks at a text."""
        return any(one.needs_calibration for one in self.passes)

    @property
    def converts(self) -> bool:
        """Whether its first pass takes the weights as a file has them, see ``Pass.converts``."""
        return bool(self.passes) and self.passes[0].converts

    def begins_with(self, other: Recipe) -> bool:
        """Return whether this recipe goes on where ``other`` ends, on the same text."""
        same_text = self.calibration == other.calibration or not other.needs_calibration
        return self.passes[: len(other.passes)] == other.passes and same_text

    def as_file(self) -> str:
        """Return the recipe as a file keeps it; ``recipe_from_text`` reads it back."""
        return json.dumps({"version": RECIPE_VERSION, **self.model_dump(mode="json")}, indent=1)

    def as_text(self) -> str:
        """Return the recipe as a person writes it; ``recipe_from_text`` reads it back.

        What is the default is left out, and the hash of a text, which is found again. It is JSON
        where the calibration is one of its own.
        """
        known = self.calibration and self.calibration.model_copy(update={"hash": ""})
        if known not in (None, Calibration()):
            return json.dumps(Recipe(passes=self.passes, calibration=known).model_dump(mode="json"))
        return ", ".join(map(_as_call, self.passes))

    def then(self, one: Pass) -> Recipe:
        """Return this recipe with ``one`` added at the end of its stage."""
        before = [p for p in self.passes if p.stage <= one.stage]
        after = [p for p in self.passes if p.stage > one.stage]
        return Recipe(passes=(*before, one, *after), calibration=self.calibration)

    def __str__(self) -> str:
        return " → ".join(one.name for one in self.passes) or "baseline"


def recipe_from_json(value: Any) -> Recipe:
    """Return the recipe that a list of passes, or an object as of ``as_file``, describes.

    Raises:
        InvalidInput: it is of another version, or a pass, a field or the order is not allowed.
    """
    if isinstance(value, list):
        value = {"passes": value}
    if not isinstance(value, Mapping):
        raise InvalidInput(
            'A recipe is a list such as [{"pass": "int8"}], or an object with "passes".'
        )
    fields = dict(value)
    if (version := fields.pop("version", RECIPE_VERSION)) != RECIPE_VERSION:
        raise InvalidInput(
            f"This recipe is of version {brief(str(version))}; this program reads version "
            f"{RECIPE_VERSION}: write it anew with this program."
        )
    if not isinstance(fields.get("passes"), list):
        raise InvalidInput('The "passes" of a recipe are a list such as [{"pass": "int8"}].')
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise InvalidInput(f"This recipe cannot be used: {sentence(error, Recipe)}") from None


def recipe_from_text(text: str) -> Recipe:
    """Return the recipe that a person wrote: JSON, or ``prune(sparsity=0.5), int4(group=32)``.

    Raises:
        InvalidInput: it is neither, or not allowed.
    """
    stripped = text.strip()
    if len(stripped) > MAX_CHARS:
        raise InvalidInput(
            f"The recipe has {len(stripped):,} characters; the most is {MAX_CHARS:,}: shorten it."
        )
    if stripped[:1] in ("[", "{"):
        try:
            return recipe_from_json(json.loads(stripped))
        except (ValueError, RecursionError) as error:
            raise InvalidInput(
                f"The recipe is no JSON ({brief(str(error))}); write a list such as "
                '[{"pass": "int8"}], or int8().'
            ) from None
    return recipe_from_json(_calls(stripped))


def _as_call(one: Pass) -> str:
    changed = one.model_dump(mode="json", exclude_defaults=True)
    inside = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    return f"{one.name}({inside})" if inside else one.name


def _calls(text: str) -> list[dict[str, Any]]:
    """Return the passes that ``a(x=1), b`` names, as JSON."""
    try:
        tree = ast.parse(f"[{text.replace('→', ',').replace('->', ',')}]", mode="eval").body
        assert isinstance(tree, ast.List)
        found = []
        for one in tree.elts:
            if isinstance(one, ast.Name):
                found.append({"pass": one.id})
                continue
            if not isinstance(one, ast.Call) or not isinstance(one.func, ast.Name) or one.args:
                raise ValueError
            fields = {str(each.arg): _value(each.value) for each in one.keywords}
            found.append({**fields, "pass": one.func.id})
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError):
        raise InvalidInput(
            f"The recipe {brief(text)!r} cannot be read; write passes with their fields, such as "
            "prune(sparsity=0.5), int4(group=32)."
        ) from None
    return found


def _value(node: ast.expr) -> Any:
    """Return a field's value; a word needs no quotes, as in ``method=gptq``."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


class Variant(BaseModel):
    """Spec + weights id + placement + recipe; ``hash`` is the cache key.

    ``model`` is the name or path under which the weights are found; it is a label and no part
    of the hash, so that one thing has one hash.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    spec: ModelSpec
    weights_id: str
    """``sha256:…`` of the weights, or ``random:SEED``."""
    placement: Placement
    recipe: Recipe = Recipe()

    @property
    def hash(self) -> str:
        """16 hexadecimal digits over everything that decides the numbers."""
        decisive = {
            "spec": self.spec.model_dump(mode="json", exclude={"note"}),
            "weights": self.weights_id,
            "device": self.placement.device,
            "precision": self.placement.precision,
            "threads": self.placement.resolved_threads if self.placement.device == "cpu" else 0,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def spec_after(self) -> ModelSpec:
        """The shape that the recipe leaves, as far as it is known before it ran."""
        spec = self.spec
        for one in self.recipe.passes:
            spec = one.spec_after(spec)
        return spec

    @property
    def blocked_by(self) -> str | None:
        """Why a pass of the recipe cannot run here, in a sentence, or None."""
        spec = self.spec
        for one in self.recipe.passes:
            if said := one.blocked_by(spec, self.placement):
                return f"{one.title} cannot run here: {said}"
            spec = one.spec_after(spec)
        return None

    @property
    def weights_only(self) -> Variant:
        """This variant without the passes that leave the weights as they are."""
        kept = tuple(one for one in self.recipe.passes if one.stage is not Stage.RUNTIME)
        recipe = self.recipe.model_copy(update={"passes": kept})
        return self.model_copy(update={"recipe": recipe})

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of context keeps, as the recipe leaves them."""
        spec = self.spec_after
        found = spec.kv_bytes_per_token(self.placement.precision)
        for one in self.recipe.passes:
            found = one.kv_bytes_after(spec, self.placement, found)
        return found

    @property
    def precision(self) -> str:
        """What a person calls it: int8 or int4 where such a pass is in the recipe."""
        named = [one.name for one in self.recipe.passes if one.name in SHORTHANDS]
        return named[-1] if named else self.placement.precision


def place(precision: str, device: str, threads: int, recipe: Recipe) -> tuple[Placement, Recipe]:
    """Return placement and recipe for what a person picked; int8 and int4 become passes.

    Raises:
        InvalidInput: ``precision`` is unknown, or both it and the recipe quantize.
    """
    if precision in SHORTHANDS:
        if any(one.quantizes for one in recipe.passes):
            raise InvalidInput(
                f"Precision {precision} and the recipe ({recipe}) both quantize; choose one."
            )
        return (
            Placement(device=device, precision=SHORTHANDS[precision], threads=threads),
            recipe.then(passes()[precision]()),
        )
    if precision not in ("fp32", "bf16", "fp16"):
        raise InvalidInput(
            f"There is no precision {precision!r}; there are: fp32, bf16, fp16, int8, int4."
        )
    return Placement(device=device, precision=precision, threads=threads), recipe
