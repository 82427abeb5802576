"""Keep the keys and values of the context in 8 or 4 bits.

Error: see ``QuantizedKVCache``: half a step of the range of a head at a position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gptcore.device import Placement
from gptcore.passes.base import Pass, PassContext, Stage
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from gptcore.model import GPT

SCALE_BYTES = 4
"""Scale and zero of a head at a position."""


class KVCacheBits(Pass):
    """Keys and values in 8 or 4 bits, with a scale and a zero for every head of every position."""

    name: ClassVar[str] = "kv_cache"
    stage: ClassVar[Stage] = Stage.RUNTIME
    title: ClassVar[str] = "Quantized KV cache"
    mechanism: ClassVar[str] = (
        "less memory for long contexts and large batches; keys and values are made float at every "
        "step, so a single text is not written faster"
    )

    bits: Literal[4, 8] = Field(8, title="Bits", description="Of a key's or value's number.")

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why rows of that width cannot be packed, or None."""
        if spec.head_width % 4:
            return f"heads of {spec.head_width} numbers do not fill whole bytes; 4 must divide it."
        return None

    def kv_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the bytes that a token of context takes: codes, scales and zeros."""
        row = spec.head_width * self.bits // 8 + SCALE_BYTES
        return 2 * spec.layers * spec.kv_heads * row

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Let the model make caches of these bits; its weights stay as they are."""
        from functools import partial

        from gptcore.kv_cache import QuantizedKVCache

        model.cache_kind = partial(QuantizedKVCache, bits=self.bits)
        context.progress(1.0)
        return model
