"""What a host does beyond generating: a Work is a frozen value that performs itself at a Desk.

The host (or the command line, in its own process) holds the device's lock, gives the Work a Desk
with the loaded variants, and keeps what it returns as the run's result. Adding one is adding a file
and a line in ``host/works.py``. A Work is read by the server too, so its file imports no torch; it
does so inside ``perform``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from gptcore.passes.base import Coverage
from gptcore.recipe import Variant
from gptcore.records import RunKind

if TYPE_CHECKING:
    from gptcore.engine import Engine


@dataclass(slots=True)
class Loaded:
    """A variant in memory."""

    variant: Variant
    engine: Engine
    resident_bytes: int
    step_bytes: int
    """Weight bytes that one decode step reads."""
    coverage: dict[str, Coverage]
    load_s: float
    """Seconds from the weights on disk to a model that can be asked, passes included."""
    passes_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each pass took."""
    passes_peak_bytes: int | None = None
    """The most memory that this process had while passes ran."""
    source: Path | None = None
    """The folder that the weights came from, with the tokenizer's files; None for random ones."""
    source_precision: str = "random"
    """In which the weights were before any pass, where they come from."""


class Desk(Protocol):
    """What a Work is given; the device is locked for as long as it works."""

    device: str

    def load(self, variant: Variant) -> Loaded:
        """Return the variant in memory, loading it if it is not there.

        What was loaded before stays while there is room, else it is let go: ask ``holds``, and do
        not keep the model of a variant that is to be let go.

        Raises:
            DoesNotFit, InvalidWeights, InvalidInput, Cancelled: as ``Worker.load``.
        """

    def holds(self, variant: Variant) -> bool:
        """Return whether the variant is in memory now."""

    def unload(self, variant: Variant) -> None:
        """Free the variant's memory; one that is not loaded does no harm."""

    def phase(self, text: str, progress: float | None = None) -> None:
        """Say what is being done, and the share done (0 to 1) where known."""

    def check(self) -> None:
        """Return at once, or raise Cancelled where the user stopped the work."""

    def partial(self, result: Mapping[str, Any]) -> None:
        """Show what is known so far; it is kept if the work does not reach its end."""

    def measured(self, name: str, observations: Sequence[float]) -> None:
        """Keep every observation of one measured number; ``name`` ends in its unit."""


class Work(BaseModel):
    """One piece of work; ``model_dump(mode="json")`` is what a run keeps as its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[RunKind]

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the variants in the order of the work; the first one labels the run."""
        raise AssertionError(f"{type(self).__name__} does not name its variants")

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Do it, and return the result as JSON-able values.

        Raises:
            GptcoreError: what a user can cause; the run then keeps the last partial result.
        """
        raise AssertionError(f"{type(self).__name__} does not say how to do it")
