"""Recipe (an ordered tuple of passes) and Variant (all it takes to rebuild a model)."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, field_serializer, field_validator

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Pass
from gptcore.passes.registry import pass_from_json, passes
from gptcore.spec import ModelSpec, Precision

RECIPE_VERSION = 1
SHORTHANDS: dict[str, Precision] = {"int8": "fp32", "int4": "bf16"}
"""A ``--precision`` that is short for the pass of that name, and the placement under it."""


class Recipe(BaseModel):
    """Passes in the order in which they run; the empty recipe is the baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: tuple[Pass, ...] = ()

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

    def then(self, one: Pass) -> Recipe:
        """Return this recipe with ``one`` added at the end of its stage."""
        before = [p for p in self.passes if p.stage <= one.stage]
        after = [p for p in self.passes if p.stage > one.stage]
        return Recipe(passes=(*before, one, *after))

    def __str__(self) -> str:
        return " → ".join(one.name for one in self.passes) or "baseline"


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
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of context keeps, as the recipe leaves them."""
        spec = self.spec
        for one in self.recipe.passes:
            spec = one.spec_after(spec)
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
