"""A linear layer many of whose weights are zero: dense in memory, a bitmap and values on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gptcore.linears import codes, filled


class SparseLinear(nn.Linear):
    """Computes as any linear layer does; a file keeps one bit a weight and what is not zero."""

    kind: ClassVar[str] = "sparse"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=bias is not None, device="meta")
        filled(self, weight, bias)

    def stored(self) -> dict[str, Tensor]:
        """Return ``bitmap`` (R, ⌈C / 8⌉) uint8, ``values`` row by row, and the bias if any."""
        there = self.weight != 0
        kept = {"bitmap": codes.pack(there, 1), "values": self.weight[there]}
        return kept if self.bias is None else {**kept, "bias": self.bias.detach()}

    def settings(self) -> dict[str, Any]:
        """Return the number of columns: rows are padded to whole bytes."""
        return {"columns": self.in_features}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Return the layer that ``stored`` gave, bit for bit."""
        there = codes.unpack(tensors["bitmap"], 1, settings["columns"]).bool()
        values = tensors["values"]
        weight = torch.zeros(there.shape, dtype=values.dtype, device=values.device)
        return cls(weight.masked_scatter_(there, values), tensors.get("bias"))
