"""What a recipe will take, before it starts: bytes by arithmetic, the rest by trying it small.

The passes run on the model's first two and first four blocks (where an earlier pass changed its
shape: on random ones), with the text that they are calibrated on. Seconds: what one block more
takes, times the blocks that are missing. Memory: what four blocks took at most, and for each that
is missing the weights that it will have in memory of their own, which mapped ones are not. Quick
passes run several times, and the least counts: a difference of two times is easily lost in what
else the machine does.

Error: passes whose work grows faster than with the number of blocks (a sensitivity scan) take
longer than this says; times on a shared machine drift by a fifth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from gptcore.catalogue import open_catalogue
from gptcore.device import trim_heap
from gptcore.errors import GptcoreError
from gptcore.measure.calibration import named_text, rows, with_text
from gptcore.measure.memory import MappedWeights, PeakMemory, dropping
from gptcore.passes.base import Pass, PassContext
from gptcore.recipe import Variant
from gptcore.records import RunKind
from gptcore.spec import ModelSpec
from gptcore.work import Desk, Work

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

FEW, MORE = 2, 4
"""Blocks of the two models that are tried."""
TRIES, TRIES_S = 5, 1.0
"""A pass is tried so often at most, and not again after so many seconds."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """Bytes before and after a recipe, by arithmetic."""

    weights_bytes: int
    weights_bytes_after: int
    parameters: int
    parameters_after: int


def predicted(variant: Variant) -> Predicted:
    """Return what a recipe does to memory, allocating nothing.

    Error: passes that go by a text (trimming a vocabulary) leave less than is said here.
    """
    spec, placement = variant.spec, variant.placement
    before = weights = spec.weights_bytes(placement.precision)
    for one in variant.recipe.passes:
        weights = one.weights_bytes_after(spec, placement, weights)
        spec = one.spec_after(spec)
    return Predicted(before, weights, variant.spec.parameters, spec.parameters)


@dataclass(frozen=True, slots=True)
class Tried:
    """What a pass takes."""

    seconds: float
    peak_bytes: int
    """The most while it runs, beyond what the process held before the model was there."""
    own_bytes: int = 0
    """Of the weights, before or behind the pass, those that are in no mapped file."""


class Estimate(Work):
    """Try a recipe on a few blocks and tell how long all of them will take."""

    kind: ClassVar[RunKind] = RunKind.ESTIMATE

    variant: Variant

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the variant; its weights are not read."""
        return (self.variant,)

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Return ``seconds``, ``peak_bytes``, and ``passes_s`` by pass.

        What cannot be tried is None; ``peak_bytes`` is the most beyond what the process holds.
        """
        spec, found = self.variant.spec, list[tuple[str, Tried | None]]()
        for place, one in enumerate(self.variant.recipe.passes):
            desk.phase(f"trying {one.title.lower()}")
            found.append((one.name, self._scaled(one, spec, place == 0, desk.check)))
            spec = one.spec_after(spec)
        passes_s = dict[str, float | None]()
        for name, tried in found:
            passes_s[name] = None if tried is None else tried.seconds + (passes_s.get(name) or 0.0)
        known = [tried for _, tried in found if tried]
        complete = len(known) == len(found)
        return {
            "seconds": sum(one.seconds for one in known) if complete else None,
            "peak_bytes": max(one.peak_bytes for one in known) if known and complete else None,
            "passes_s": passes_s,
        }

    def _scaled(
        self, one: Pass, spec: ModelSpec, first: bool, check: Callable[[], None]
    ) -> Tried | None:
        """Return what a pass will take on all blocks of a model of this shape."""
        if spec.layers <= MORE:
            return self._tried(one, spec, spec.layers, first, check)
        few = self._tried(one, spec, FEW, first, check)
        more = self._tried(one, spec, MORE, first, check)
        if few is None or more is None:
            return None
        missing = (spec.layers - MORE) / (MORE - FEW)
        return Tried(
            more.seconds + max(0.0, more.seconds - few.seconds) * missing,
            more.peak_bytes + round((more.own_bytes - few.own_bytes) * missing),
        )

    def _tried(
        self, one: Pass, spec: ModelSpec, layers: int, first: bool, check: Callable[[], None]
    ) -> Tried | None:
        small, placement = spec.model_copy(update={"layers": layers}), self.variant.placement
        tried = one.on_few_layers(layers)
        if tried.blocked_by(small, placement):
            return None

        found: list[Tried] = []
        try:
            ids = self._ids(small) if tried.needs_calibration else None
            while len(found) < TRIES and sum(each.seconds for each in found) < TRIES_S:
                progress = _telling(check)
                context = PassContext(placement=placement, progress=progress, calibration_ids=ids)
                trim_heap()
                with PeakMemory(placement.device) as memory:
                    held = memory.peak_bytes
                    model = self._model(spec, small, as_stored=first and one.converts)
                    mapped = MappedWeights()
                    own_bytes = mapped.own_bytes(model)
                    mapped.drop()  # they are read for the first time in every try
                    began = time.perf_counter()
                    model = tried.apply(model, context)
                    seconds = time.perf_counter() - began
                own_bytes = max(own_bytes, mapped.own_bytes(model))
                found.append(Tried(seconds, memory.peak_bytes - held, own_bytes))
                del model
        except GptcoreError:
            return None
        return Tried(
            min(each.seconds for each in found),
            min(each.peak_bytes for each in found),
            found[0].own_bytes,
        )

    def _model(self, spec: ModelSpec, small: ModelSpec, *, as_stored: bool) -> GPT:
        """Return a model of the first blocks, random where the real ones are not to be had."""
        from gptcore import weights

        variant, catalogue = self.variant, open_catalogue()
        random = variant.weights_id.startswith("random:")
        if random or spec != variant.spec or catalogue.artifact(variant.model):
            return weights.build_random(small, variant.placement)
        source = replace(catalogue.checkpoint(variant.model), spec=small)
        return weights.build(source, variant.placement, as_stored=as_stored)

    def _ids(self, small: ModelSpec) -> Tensor:
        """Return the calibration text as the model reads it."""
        wanted = with_text(self.variant.recipe, paths=True).calibration
        assert wanted is not None
        tokenizer = open_catalogue().tokenizer(self.variant.model)
        return rows(named_text(wanted, paths=True).content, wanted, tokenizer, small.context)


def _telling(check: Callable[[], None]) -> Callable[[float], None]:
    """Return what a pass tells its progress: it costs what it costs in earnest."""
    drop = dropping()

    def progress(ratio: float) -> None:
        check()
        drop(ratio)

    return progress
