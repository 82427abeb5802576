"""What fits: sizes × precisions × contexts on one device, and how far a size can go there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gptcore.device import cpu_name, devices, free_bytes
from gptcore.fit import USABLE_RATIO
from gptcore.plan.cards import Card
from gptcore.plan.memory import GPU_CONTEXT_BYTES, PRECISIONS, inference
from gptcore.plan.peaks import MachinePeaks
from gptcore.spec import ModelSpec

MOST_BATCH = 1_000_000


@dataclass(frozen=True, slots=True)
class Cell:
    """One size at one precision and context on one device."""

    model: str
    precision: str
    context: int
    needed_bytes: int
    usable_bytes: int

    @property
    def fits(self) -> bool:
        """Whether it can be loaded and run."""
        return self.needed_bytes <= self.usable_bytes

    @property
    def used_ratio(self) -> float:
        """Needed ÷ usable."""
        return self.needed_bytes / self.usable_bytes


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a size can go on a device."""

    precision: str
    longest_context: int
    """Positions with one text, at most the model's own; 0 where not even one fits."""
    most_batch: int
    """Texts at the whole context; 0 where not one fits."""
    needed_bytes: int
    """With one text of the whole context."""
    usable_bytes: int

    @property
    def fits(self) -> bool:
        """Whether it can be loaded at all."""
        return self.longest_context > 0


def machine_card(peaks: MachinePeaks | None = None, device: str = "cpu") -> Card:
    """Return this machine as a card: its free memory, and its peaks where they were measured.

    Its bytes are those that are free now; rates that nobody measured are 0.
    """
    free = free_bytes(device) or 0
    name = cpu_name() or "CPU"
    if device != "cpu":
        name = next((one.name for one in devices() if one.id == device), device)
    if peaks is None:
        return Card("machine", f"This machine: {name}", "machine", free, 0.0, {}, None,
                    "not measured yet", "")  # fmt: skip
    return Card(
        "machine",
        f"This machine: {name}",
        "machine",
        free,
        peaks.bytes_per_s,
        peaks.flop_per_s,
        None,
        "measured here",
        peaks.measured_at[:10],
        peaks.overhead_s,
    )


def usable_bytes(card: Card) -> int:
    """Return what a model may take of a card's memory."""
    kept = 0 if card.kind == "machine" else GPU_CONTEXT_BYTES
    return max(1, int((card.memory_bytes - kept) * USABLE_RATIO))


def cell(
    card: Card, model: str, spec: ModelSpec, precision: str, context: int, batch: int = 1
) -> Cell:
    """Return whether that fits on one card, for generating."""
    needed = inference(
        spec, precision, batch=batch, context=context, on_cpu=card.kind == "machine"
    ).total
    return Cell(model, precision, context, needed, usable_bytes(card))


def matrix(
    card: Card,
    specs: Mapping[str, ModelSpec],
    contexts: Iterable[int],
    precisions: Iterable[str] = PRECISIONS,
) -> tuple[Cell, ...]:
    """Return a cell for each size, precision and context that the size can read at all."""
    return tuple(
        cell(card, name, spec, precision, context)
        for name, spec in specs.items()
        for precision in precisions
        for context in contexts
        if context <= spec.context
    )


def limits(card: Card, spec: ModelSpec, precision: str, context: int | None = None) -> Limits:
    """Return the longest context with one text, and the most texts at ``context``."""
    whole = min(context or spec.context, spec.context)
    longest = _largest(
        spec.context, lambda n: cell(card, "", spec, precision, n).fits
    )  # fmt: skip
    most = _largest(MOST_BATCH, lambda n: cell(card, "", spec, precision, whole, n).fits)
    one = cell(card, "", spec, precision, whole)
    return Limits(precision, longest, most, one.needed_bytes, one.usable_bytes)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest of 1 to ``most`` that fits, 0 where none does; more never fits better."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
