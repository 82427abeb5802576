"""What a pass is: a frozen value with a name, a stage, described fields, and ``apply``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from gptcore.device import Placement
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from gptcore.model import GPT


class Stage(IntEnum):
    """When a pass runs; the order of the members is the only legal order in a recipe."""

    SHAPE = 1
    NUMBERS = 2
    RUNTIME = 3


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a model a pass converted, in matrix-multiply weights."""

    converted_weights: int
    total_weights: int
    skipped: tuple[tuple[str, str], ...] = ()
    """(module, reason) of each module left as it was."""

    @property
    def ratio(self) -> float:
        """Converted weights ÷ all of them; 0 is an error state, not a success."""
        return self.converted_weights / self.total_weights if self.total_weights else 0.0


@dataclass(slots=True)
class PassContext:
    """What a pass may use while it runs, and where it reports what it did."""

    placement: Placement
    seed: int = 0
    progress: Callable[[float], None] = lambda ratio: None
    """Told the share done, 0 to 1; raises Cancelled where the user stopped the work."""
    coverage: dict[str, Coverage] = field(default_factory=dict)
    """By pass name; every pass adds its own."""


class Pass(BaseModel):
    """A technique, as a value; subclasses are found by the registry when their file exists."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    stage: ClassVar[Stage]
    title: ClassVar[str]
    mechanism: ClassVar[str]
    """Why it should be faster or smaller, in words."""

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return the sentence that says why this pass cannot run here, or None if it can."""
        return None

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the resident bytes of the weights after this pass, given those before it."""
        return before

    def weights_peak_bytes(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the most bytes that the weights take while this pass runs."""
        return max(before, self.weights_bytes_after(spec, placement, before))

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Return the converted model; ``model`` itself is the pass's to reuse.

        The caller hands over a model that nobody else holds, so that no second copy is needed.
        Its tensors may be the mapped file: they are replaced, never written to.
        """
        raise AssertionError(f"{type(self).__name__} does not say how to apply itself")

    def as_json(self) -> dict[str, Any]:
        """Return the pass as a JSON object that ``registry.pass_from_json`` reads back."""
        return {"pass": self.name, **self.model_dump(mode="json")}
