"""What a recipe will take, before it starts: bytes by arithmetic, seconds by trying it small.

The passes run on the model's first two and first four blocks (where an earlier pass changed its
shape: on random ones), with the text that they are calibrated on. What one block more takes, times
the blocks that are missing, is the estimate. Quick ones run several times, and the shortest counts:
a difference of two times is easily lost in what else the machine does.

Error: passes whose work grows faster than with the number of blocks (a sensitivity scan) take
longer than this says; times on a shared machine drift by a fifth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from gptcore.catalogue import open_catalogue
from gptcore.errors import GptcoreError
from gptcore.fit import needed_bytes
from gptcore.measure.calibration import named_text, rows, with_text
from gptcore.measure.memory import drop_mapped_weights, dropping
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
CONTEXT_TOKENS = 512
"""Of the cache that a peak is predicted with."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """Bytes before and after a recipe, by arithmetic."""

    weights_bytes: int
    weights_bytes_after: int
    peak_bytes: int
    """The most that weights and working space take while the passes run."""
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
    peak = needed_bytes(variant, min(CONTEXT_TOKENS, variant.spec.context))
    return Predicted(before, weights, peak, variant.spec.parameters, spec.parameters)


class Estimate(Work):
    """Try a recipe on a few blocks and tell how long all of them will take."""

    kind: ClassVar[RunKind] = RunKind.ESTIMATE

    variant: Variant

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the variant; its weights are not read."""
        return (self.variant,)

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Return ``seconds`` in all and ``passes_s`` by pass; None for one that cannot be tried."""
        spec, passes_s = self.variant.spec, dict[str, float | None]()
        for one in self.variant.recipe.passes:
            desk.phase(f"trying {one.title.lower()}")
            known = self._seconds(one, spec, desk.check)
            passes_s[one.name] = None if known is None else known + (passes_s.get(one.name) or 0.0)
            spec = one.spec_after(spec)
        known_s = [one for one in passes_s.values() if one is not None]
        complete = len(known_s) == len(passes_s)
        return {"seconds": sum(known_s) if complete else None, "passes_s": passes_s}

    def _seconds(self, one: Pass, spec: ModelSpec, check: Callable[[], None]) -> float | None:
        if spec.layers <= MORE:
            return self._tried(one, spec, spec.layers, check)
        few = self._tried(one, spec, FEW, check)
        more = self._tried(one, spec, MORE, check)
        if few is None or more is None:
            return None
        return few + max(0.0, more - few) / (MORE - FEW) * (spec.layers - FEW)

    def _tried(
        self, one: Pass, spec: ModelSpec, layers: int, check: Callable[[], None]
    ) -> float | None:
        small, placement = spec.model_copy(update={"layers": layers}), self.variant.placement
        tried = one.on_few_layers(layers)
        if tried.blocked_by(small, placement):
            return None

        took: list[float] = []
        try:
            ids = self._ids(small) if tried.needs_calibration else None
            while len(took) < TRIES and sum(took) < TRIES_S:
                model, progress = self._model(spec, small), _telling(check)
                context = PassContext(placement=placement, progress=progress, calibration_ids=ids)
                drop_mapped_weights()  # they are read for the first time in every try
                began = time.perf_counter()
                tried.apply(model, context)
                took.append(time.perf_counter() - began)
        except GptcoreError:
            return None
        return min(took)

    def _model(self, spec: ModelSpec, small: ModelSpec) -> GPT:
        """Return a model of the first blocks, random where the real ones are not to be had."""
        from gptcore import weights

        variant, catalogue = self.variant, open_catalogue()
        random = variant.weights_id.startswith("random:")
        if random or spec != variant.spec or catalogue.artifact(variant.model):
            return weights.build_random(small, variant.placement)
        source = replace(catalogue.checkpoint(variant.model), spec=small)
        return weights.build(source, variant.placement)

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
