"""What a pass is: a frozen value with a name, a stage, described fields, and ``apply``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from gptcore.device import Placement
from gptcore.errors import NumericalError
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT
    from gptcore.tokenizer import Tokenizer


ROWS_AT_ONCE = 512
"""Of a matrix that is looked at, or brought to another type, where it may be in a mapped file."""


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
    stored_bytes: int | None = None
    """What a file keeps of the converted modules, None where the pass does not tell."""
    resident_bytes: int | None = None
    """What the converted modules take in memory, None where the pass does not tell."""

    @property
    def ratio(self) -> float:
        """Converted weights ÷ all of them; 0 is an error state, not a success."""
        return self.converted_weights / self.total_weights if self.total_weights else 0.0

    @property
    def effective_bits(self) -> float | None:
        """Stored bits of the converted modules ÷ the weights that they stand for."""
        if self.stored_bytes is None or not self.converted_weights:
            return None
        return 8 * self.stored_bytes / self.converted_weights


@dataclass(slots=True)
class PassContext:
    """What a pass may use while it runs, and where it reports what it did."""

    placement: Placement
    seed: int = 0
    progress: Callable[[float], None] = lambda ratio: None
    """Told the share done, 0 to 1; raises Cancelled where the user stopped the work."""
    coverage: dict[str, Coverage] = field(default_factory=dict)
    """By pass name; every pass adds its own."""
    tokenizer: Tokenizer | None = None
    """The tokenizer of the model; a pass that changes the vocabulary puts a new one here."""
    calibration_ids: Tensor | None = None
    """(N, T) int64: N sequences of text that calibrated passes run through the model."""
    calibration_hash: str = ""
    """``sha256:…`` of these ids, for what is kept about the result."""


def refuse_nan(name: str, weight: Tensor, looked: Callable[[], None] = lambda: None) -> None:
    """Refuse a layer's weights unless they are all numbers.

    Args:
        name: for the message.
        weight: what is looked at.
        looked: called after some rows each, which may be let go of again.

    Raises:
        NumericalError: NaN or infinity is among them.
    """
    import torch

    for rows in torch.split(weight.detach(), ROWS_AT_ONCE):
        if not rows.sum(dtype=torch.float32).isfinite():
            raise NumericalError(
                f"{name} holds NaN or infinite weights, which no pass can work with: choose "
                "another model."
            )
        looked()


class Pass(BaseModel):
    """A technique, as a value; subclasses are found by the registry when their file exists."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    stage: ClassVar[Stage]
    title: ClassVar[str]
    mechanism: ClassVar[str]
    """Why it should be faster or smaller, in words."""
    quantizes: ClassVar[bool] = False
    """Whether it packs the linear layers, which can be done once only."""
    also_called: ClassVar[Mapping[str, str]] = {}
    """Other names of its fields, with the fields'."""

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return the sentence that says why this pass cannot run here, or None if it can."""
        return None

    @property
    def needs_calibration(self) -> bool:
        """Whether ``apply`` looks at the context's calibration text."""
        return False

    @property
    def converts(self) -> bool:
        """Whether ``apply`` brings a model that is as its file has it to the precision itself.

        It does so layer by layer, so that the model is never there as a whole in that precision.
        """
        return False

    def caution(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return what to know before this pass is chosen, in a sentence, or None."""
        return None

    def on_few_layers(self, layers: int) -> Pass:
        """Return the pass as it can be tried on a model of so few layers, to see what it takes."""
        return self

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """Return the shape that this pass leaves; only a SHAPE pass changes it."""
        return spec

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the resident bytes of the weights after this pass, given those before it."""
        return before

    def weights_peak_bytes(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the most bytes that the weights take while this pass runs."""
        return max(before, self.weights_bytes_after(spec, placement, before))

    def kv_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the bytes of keys and values a token after this pass, given those before it."""
        return before

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Return the converted model; ``model`` itself is the pass's to reuse.

        The caller hands over a model that nobody else holds, so that no second copy is needed.
        Its tensors may be the mapped file: they are replaced, never written to.
        """
        raise AssertionError(f"{type(self).__name__} does not say how to apply itself")

    def as_json(self) -> dict[str, Any]:
        """Return the pass as a JSON object that ``registry.pass_from_json`` reads back."""
        return {"pass": self.name, **self.model_dump(mode="json")}
