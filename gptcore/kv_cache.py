"""A cache whose keys and values are kept in 8 or 4 bits, and made float when they are attended to.

Every head of every position has a scale and a zero of its own, beside its codes in one row of
bytes: what is copied, kept or cut as the plain cache's rows is so here too.

Letters of shapes: L layers, B batch, G key/value heads, T new tokens, S tokens known, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore.linears.grid import Grid, decoded
from gptcore.model import KVCache
from gptcore.spec import ModelSpec

SCALE_BYTES = 4
"""Scale and zero, in bfloat16 each."""


def row_bytes(head_width: int, bits: int) -> int:
    """Return what a head of a position takes: codes, scale and zero."""
    return head_width * bits // 8 + SCALE_BYTES


class QuantizedKVCache(KVCache):
    """Keys and values in few bits; ``k`` and ``v`` are (L, B, G, capacity, bytes of a row) uint8.

    Error: a number is off by half a step, (max − min of its head and position) / (2**bits − 1) / 2,
    and the rounding of scale and zero to bfloat16.
    """

    def __init__(
        self,
        spec: ModelSpec,
        capacity: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        bits: int,
    ) -> None:
        self.bits = bits
        self.width = spec.head_width
        self.dtype = dtype
        self._grid = Grid(bits, spec.head_width)
        row = row_bytes(spec.head_width, bits)
        shape = (spec.layers, batch, spec.kv_heads, capacity, row)
        self._allocate(shape, torch.uint8, device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, T, D) behind what is known and return all of it, (B, G, S, D), as kept."""
        known_k, known_v = super().extend(layer, self._rows(k), self._rows(v))
        return self._floats(known_k), self._floats(known_v)

    def _rows(self, x: Tensor) -> Tensor:
        """Return (B, G, T, D) as rows of bytes, (B, G, T, row)."""
        wide = x.float()
        scale, zero = self._grid.fit(wide)  # (B, G, T)
        assert zero is not None
        codes = self._grid.encode(wide, scale, zero)
        if self.bits == 4:
            low, high = codes.chunk(2, dim=-1)
            codes = low | high << 4
        scales = torch.stack((scale, zero), dim=-1).view(torch.uint8)
        return torch.cat((codes, scales), dim=-1)

    def _floats(self, rows: Tensor) -> Tensor:
        """Return rows of bytes, (B, G, S, row), as (B, G, S, D) in the model's type."""
        codes = rows[..., :-SCALE_BYTES]
        scale, zero = rows[..., -SCALE_BYTES:].view(torch.bfloat16).unbind(-1)
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        return decoded(codes, scale, zero, self.bits).to(self.dtype)
