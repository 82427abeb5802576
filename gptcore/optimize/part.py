"""A part of a longer work, at a desk of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptcore.recipe import Variant
from gptcore.work import Desk, Loaded


class Part:
    """The desk as one part of a work sees it: progress and names are a part of the whole's.

    Args:
        desk: of the whole work.
        title: of this part; stands in front of its phases.
        begin: share of the whole that is done before this part, 0 to 1.
        end: share that is done behind it.
        show: told what the part knows so far.
    """

    def __init__(
        self,
        desk: Desk,
        title: str,
        begin: float,
        end: float,
        show: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.device = desk.device
        self._desk = desk
        self._title = title
        self._begin, self._end = begin, end
        self._show = show

    def load(self, variant: Variant) -> Loaded:
        """Return the variant in memory, as the whole work's desk does."""
        return self._desk.load(variant)

    def holds(self, variant: Variant) -> bool:
        """Return whether the variant is in memory now."""
        return self._desk.holds(variant)

    def unload(self, variant: Variant) -> None:
        """Free the variant's memory."""
        self._desk.unload(variant)

    def phase(self, text: str, progress: float | None = None) -> None:
        """Say what is being done, as a share of the whole."""
        share = None if progress is None else self._begin + progress * (self._end - self._begin)
        self._desk.phase(f"{self._title}: {text}", share)

    def check(self) -> None:
        """Raise Cancelled where the user stopped the work."""
        self._desk.check()

    def partial(self, result: Mapping[str, Any]) -> None:
        """Show what this part knows so far."""
        self._show(result)

    def measured(self, name: str, observations: Sequence[float]) -> None:
        """Keep the observations under the part's name."""
        self._desk.measured(f"{self._title} {name}", observations)
