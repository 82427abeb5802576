"""A desk for a Work without a host: real tiny models, and what was said and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.errors import Cancelled, DoesNotFit
from gptcore.measure.memory import weight_bytes
from gptcore.recipe import Variant
from gptcore.spec import ModelSpec, gpt
from gptcore.tokenizer import byte_tokenizer
from gptcore.weights import build_random
from gptcore.work import Loaded

TINY = gpt(2, 32, 2, context=64, vocabulary=300)


def variant(seed: int = 0, spec: ModelSpec = TINY, precision: str = "fp32") -> Variant:
    """Return a variant with random weights."""
    return Variant(
        model=f"tiny-{seed}",
        spec=spec,
        weights_id=f"random:{seed}",
        placement=Placement(device="cpu", precision=precision, threads=1),
    )


class FakeDesk:
    """Keeps at most ``room`` variants; refuses those of ``broken``; stops after ``checks``."""

    device = "cpu"

    def __init__(
        self, *, room: int = 4, broken: Mapping[str, int] = {}, checks: int | None = None
    ) -> None:
        self.room = room
        self.broken = dict(broken)
        """Model name -> how many loads go well first."""
        self.checks = checks
        self.loads: list[str] = []
        self.phases: list[tuple[str, float | None]] = []
        self.partials: list[Mapping[str, Any]] = []
        self.kept: dict[str, tuple[float, ...]] = {}
        self._loaded: dict[str, Loaded] = {}

    def load(self, variant: Variant) -> Loaded:
        left = self.broken.get(variant.model)
        if left is not None:
            if left == 0:
                raise DoesNotFit(f"{variant.model} does not fit.")
            self.broken[variant.model] = left - 1
        if variant.hash not in self._loaded:
            while len(self._loaded) >= self.room:
                self._loaded.pop(next(iter(self._loaded)))
            self.loads.append(variant.model)
            torch.set_num_threads(1)
            seed = int(variant.weights_id.removeprefix("random:"))
            model = build_random(variant.spec, variant.placement, seed).eval()
            resident, step = weight_bytes(model)
            engine = Engine(model, byte_tokenizer(variant.spec.vocabulary))
            self._loaded[variant.hash] = Loaded(variant, engine, resident, step, {}, 0.01)
        return self._loaded[variant.hash]

    def holds(self, variant: Variant) -> bool:
        return variant.hash in self._loaded

    def unload(self, variant: Variant) -> None:
        self._loaded.pop(variant.hash, None)

    def phase(self, text: str, progress: float | None = None) -> None:
        self.phases.append((text, progress))

    def check(self) -> None:
        if self.checks is not None:
            self.checks -= 1
            if self.checks < 0:
                raise Cancelled("Cancelled.")

    def partial(self, result: Mapping[str, Any]) -> None:
        self.partials.append(result)

    def measured(self, name: str, observations: Sequence[float]) -> None:
        self.kept[name] = tuple(observations)
