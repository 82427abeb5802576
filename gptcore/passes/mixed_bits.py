"""Quantize each layer to bits of its own: 8 where it hurts, 3 where it does not, else 4.

Which layer gets which is written out in a field, or follows from how many bits all of them may take
together: then a scan of the calibration text finds what rounding each does, see ``sensitivity.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from gptcore.device import Placement
from gptcore.passes.base import PassContext
from gptcore.passes.calibrate import text_for
from gptcore.passes.formats import Format
from gptcore.passes.quantize import Quantizer, layer_shapes
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

BITS = (3, 4, 8)
SEQUENCE, SEQUENCES = 128, 32
"""Tokens of a sequence that is scanned, and how many at most: many short ones tell more than a few
long ones."""
SCAN_SHARE = 0.7
"""Of the time, about."""
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

    effective_bits: float = Field(
        0.0,
        ge=0.0,
        le=9.0,
        title="Bits a weight, of all layers",
        description="Scan the calibration text for what rounding each layer does, and deal out "
        "bits so that all together take no more, scales included; 4.5 is what 4 bits in groups of "
        "64 take. 0 scans nothing: each layer has the bits that are written.",
    )
    later: ClassVar[frozenset[str]] = Quantizer.later | {"effective_bits"}

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

    @field_validator("effective_bits")
    @classmethod
    def _enough(cls, bits: float) -> float:
        if 0 < bits < min(BITS):
            raise ValueError(f"no layer has fewer than {min(BITS)} bits: choose that or more")
        return bits

    @model_validator(mode="after")
    def _written_or_found(self) -> MixedBits:
        if self.effective_bits and self.layers:
            raise ValueError(
                "layers with bits of their own and bits to be dealt out exclude each other: leave "
                "one of the two out"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether a text is scanned, or the method looks at one."""
        return bool(self.effective_bits) or super().needs_calibration

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the bytes of what is written; of what will be dealt out, about as many.

        Error: bits that are dealt out are taken to be 4 and 8; where 3 are among them, which memory
        holds in 4, it is more.
        """
        if not self.effective_bits:
            return super().weights_bytes_after(spec, placement, before)
        few = 4 + 32 / self.group
        share = min(1.0, max(0.0, (self.effective_bits - few) / (8 - few)))
        ends = [self._uniform(bits).weights_bytes_after(spec, placement, before) for bits in (4, 8)]
        return round(ends[0] + share * (ends[1] - ends[0]))

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every layer by one of its bits; where these are dealt out, scan first.

        Raises:
            NumericalError: a weight is NaN or infinite.
            InvalidInput: the calibration text is missing or does not suit, or even the fewest bits
                take more than was asked for.
        """
        if not self.effective_bits:
            return super().apply(model, context)

        def told(begin: float, end: float) -> Callable[[float], None]:
            return lambda done: context.progress(begin + done * (end - begin))

        dealt = self.dealt(model, _short(text_for(self, context)), told(0.0, SCAN_SHARE))
        rest = replace(context, progress=told(SCAN_SHARE, 1.0))
        return dealt.apply(model, rest)

    def dealt(
        self, model: GPT, ids: Tensor, progress: Callable[[float], None] = lambda share: None
    ) -> MixedBits:
        """Return the pass with bits written out that do least harm on a text.

        Args:
            model: in floating point; not written to.
            ids: (N, T) int64.
            progress: told the share done.

        Raises:
            InvalidInput: nothing can be rounded, or even the fewest bits take more.
        """
        from gptcore.linears.wide import wide_products
        from gptcore.passes.sensitivity import assign, scan

        with wide_products(model):
            damages = scan(model, ids, group=self.group, progress=progress)
        found = assign(damages, model.spec, self.effective_bits, group=self.group)
        return self.model_copy(
            update={"bits": found.bits, "layers": found.layers, "effective_bits": 0.0}
        )

    def _uniform(self, bits: int) -> MixedBits:
        return self.model_copy(update={"bits": bits, "effective_bits": 0.0})

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


def _short(ids: Tensor) -> Tensor:
    """Return a text as short sequences, (N, SEQUENCE), or as it is where its own are shorter."""
    if ids.shape[1] < SEQUENCE:
        return ids[: SEQUENCE * SEQUENCES // ids.shape[1]]
    each = ids.shape[1] // SEQUENCE
    return ids[:, : each * SEQUENCE].reshape(-1, SEQUENCE)[:SEQUENCES]
