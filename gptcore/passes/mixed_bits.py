"""Quantize each layer to bits of its own: 8 where it hurts, 3 where it does not, else 4.

Which layer gets which is a field, written out, so that a recipe says all and gives the same again;
``sensitivity.py`` finds it.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from gptcore.device import Placement
from gptcore.passes.formats import Format
from gptcore.passes.quantize import Quantizer, layer_shapes
from gptcore.spec import ModelSpec

BITS = (3, 4, 8)
ENTRY = re.compile(r"([A-Za-z0-9_.*?]+):([348])")


class MixedBits(Quantizer):
    """8, 4 or 3 bits a weight, chosen for every layer; activations stay in bf16."""

    name: ClassVar[str] = "mixed_bits"
    title: ClassVar[str] = "Mixed precision"
    mechanism: ClassVar[str] = (
        "a quarter of the bytes of bf16, spent where they matter; 3 bits are held in 4 in memory"
    )

    bits: Literal[3, 4, 8] = Field(
        4, title="Bits", description="Of every layer that is not named below."
    )
    layers: str = Field(
        "",
        max_length=100_000,
        title="Other layers",
        description="Layers with their bits, such as blocks.0.mlp.down:8 head:8; * stands for any "
        "characters, and the last entry that fits a layer counts.",
    )
    group: Literal[32, 64, 128] = Field(
        64,
        title="Group size",
        description="Weights of 3 and 4 bits that share a scale; fewer are more exact.",
    )

    @field_validator("layers")
    @classmethod
    def _readable(cls, text: str) -> str:
        for entry in text.split():
            if not ENTRY.fullmatch(entry):
                raise ValueError(
                    f"{entry[:60]!r} is no layer with its bits: write blocks.0.mlp.down:8, with 3, "
                    "4 or 8 bits"
                )
        return " ".join(text.split())

    def format(self, name: str) -> Format:
        """Return the form of the layer of that name."""
        bits = self.bits_of(name)
        return Format(8) if bits == 8 else Format(bits, self.group)

    def bits_of(self, name: str) -> int:
        """Return the bits of the layer of that name."""
        for entry in reversed(self.layers.split()):
            pattern, _, bits = entry.rpartition(":")
            if fnmatchcase(name, pattern):
                return int(bits)
        return self.bits

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run, or which entry fits no layer of that shape."""
        names = [name for name, _ in layer_shapes(spec)]
        for entry in self.layers.split():
            pattern = entry.rpartition(":")[0]
            if not any(fnmatchcase(name, pattern) for name in names):
                return f"it has no layer {pattern[:60]!r}; there are {names[0]} to {names[-1]}."
        return super().blocked_by(spec, placement)
