"""Bits for every layer of mixed precision, dealt out by what rounding each does to a text.

A search begins with a scan (``passes/sensitivity.py``) and then only says of which layers the
damage counts for more or less than the scan found: whatever it tries takes the same bytes. Two
hundred layers with bits of their own would be far too many settings for a few dozen trials.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from gptcore.measure.calibration import named_text, rows
from gptcore.passes.mixed_bits import SEQUENCE, MixedBits
from gptcore.passes.sensitivity import Damage, assign, scan
from gptcore.recipe import Calibration, Variant
from gptcore.spec import ModelSpec
from gptcore.work import Desk

if TYPE_CHECKING:
    from gptcore.work import Loaded


class BitScan(BaseModel):
    """A look at what each layer's rounding does, and how many bits are to be dealt out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    effective_bits: float = Field(
        4.5,
        ge=3.0,
        le=9.0,
        title="Bits a weight",
        description="Of all layers together, scales included; 4.5 is what 4 bits in groups of 64 "
        "take.",
    )
    group: Literal[32, 64, 128] = Field(
        64, title="Group size", description="Weights of 3 and 4 bits that share a scale."
    )
    tokens: int = Field(
        4096,
        ge=SEQUENCE,
        le=65_536,
        title="Tokens scanned",
        description="At most, of the calibration text; a scan takes as long as a few runs over "
        "them.",
    )

    def exact(self, variant: Variant) -> Variant:
        """Return the variant that is scanned: in fp32, so that rounding is all that is seen."""
        placement = variant.placement.model_copy(update={"precision": "fp32"})
        return variant.model_copy(update={"placement": placement})

    def identity(self, variant: Variant) -> str:
        """Return what decides a scan's result, as text."""
        text = named_text(Calibration(), paths=False).hash
        return f"{self.exact(variant).hash} {self.group} {self.tokens} {text}"

    def perform(self, desk: Desk, loaded: Loaded) -> tuple[Damage, ...]:
        """Return the damage of every layer at 3, 4 and 8 bits, on the calibration text that ships.

        Raises:
            InvalidInput: nothing in the model can be rounded.
        """
        model = loaded.engine.model
        wanted = Calibration(sequences=self.tokens // SEQUENCE, tokens=SEQUENCE)
        text = named_text(wanted, paths=False).content
        ids = rows(text, wanted, loaded.engine.tokenizer, model.spec.context)

        def progress(share: float) -> None:
            desk.check()
            desk.phase("scanning the layers", share)

        return scan(model, ids, group=self.group, progress=progress)

    def deal(
        self, damages: Sequence[Damage], spec: ModelSpec, weights: Mapping[str, float]
    ) -> MixedBits:
        """Return the bits of every layer with the least weighed damage for the bytes.

        Raises:
            InvalidInput: even the fewest bits take more.
        """
        return assign(weighed(damages, weights), spec, self.effective_bits, group=self.group)

    def uniform(self) -> MixedBits | None:
        """Return the same bits for all layers, as many as they may take; None where that is none.

        Layers of 8 bits have a scale a row, which takes next to nothing.
        """
        scales = 32 / self.group
        sizes = {3: 3 + scales, 4: 4 + scales, 8: 8.0}
        fitting = [bits for bits, size in sizes.items() if size <= self.effective_bits + 1e-9]
        if not fitting:
            return None
        return MixedBits.model_validate({"bits": max(fitting), "group": self.group})


def weighed(damages: Sequence[Damage], weights: Mapping[str, float]) -> tuple[Damage, ...]:
    """Return the damages, each doubled as often as the patterns of ``weights`` say that fit it."""
    powers = {
        layer: sum(power for pattern, power in weights.items() if fnmatchcase(layer, pattern))
        for layer in {one.layer for one in damages}
    }
    return tuple(replace(one, kl=one.kl * 2.0 ** powers[one.layer]) for one in damages)


def damages_to_text(damages: Sequence[Damage]) -> str:
    """Return damages as JSON."""
    return json.dumps([[one.layer, one.bits, one.kl] for one in damages])


def damages_from_text(text: str) -> tuple[Damage, ...]:
    """Return the damages that ``damages_to_text`` wrote."""
    return tuple(Damage(layer, bits, kl) for layer, bits, kl in json.loads(text))
