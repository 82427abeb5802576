"""A token embedding of packed numbers, which may be those of the head.

Where it has the head's numbers, a file keeps them with the head alone, and ``complete`` takes them
from there. In memory it has its own, since the head keeps them in another arrangement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from gptcore.linears.grid import Quantized


@runtime_checkable
class Numbered(Protocol):
    """A layer that gives its numbers back."""

    def numbers(self) -> Quantized:
        """Return its codes, scales and zeros."""


class PackedEmbedding(nn.Module):
    """Rows of packed numbers, made float as they are looked up: (…,) int64 -> (…, W)."""

    kind: ClassVar[str] = "packed_embedding"
    codes: Tensor

    def __init__(self, numbers: Quantized | None, dtype: torch.dtype, *, tied: bool) -> None:
        super().__init__()
        self.dtype = dtype
        self.tied = tied
        """Whether the head has the same numbers."""
        self.packed_bytes = 0
        self.bits = self.columns = 0
        if numbers is not None:
            self._take(numbers)

    def _take(self, numbers: Quantized) -> None:
        self.bits, self.columns = numbers.bits, numbers.codes.shape[1]
        for name, tensor in numbers.stored().items():
            self.register_buffer(name, tensor)
            self.packed_bytes += tensor.nbytes

    @property
    def looked_up_bytes(self) -> int:
        """Of ``packed_bytes``, those that a step does not read: all but a row."""
        return self.packed_bytes

    @property
    def weight(self) -> Tensor:
        """The packed codes: where the rows lie, as any embedding tells."""
        return self.codes

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of these ids in the model's type."""
        return self._some(ids.flatten()).dequantized(self.dtype).view(*ids.shape, self.columns)

    def numbers(self) -> Quantized:
        """Return the codes, scales and zeros that this embedding was made of."""
        return self._some(slice(None))

    def _some(self, rows: slice | Tensor) -> Quantized:
        kept = {name: one[rows] for name, one in self.named_buffers()}
        return Quantized.from_stored(kept, self.bits, self.columns)

    def stored(self) -> dict[str, Tensor]:
        """Return codes, scales and zeros, or nothing where the head has them."""
        return {} if self.tied else dict(self.named_buffers())

    def settings(self) -> dict[str, Any]:
        """Return the form of the rows, and whether the head has the numbers."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"bits": self.bits, "columns": self.columns, "dtype": dtype, "tied": self.tied}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Return the embedding that ``stored`` gave; a tied one waits to be completed."""
        bits, columns, tied = settings["bits"], settings["columns"], settings["tied"]
        numbers = None if tied else Quantized.from_stored(tensors, bits, columns)
        return cls(numbers, getattr(torch, settings["dtype"]), tied=tied)

    def complete(self, head: nn.Module) -> None:
        """Take the numbers of the head, where they are the same."""
        if self.tied:
            assert isinstance(head, Numbered)
            self._take(head.numbers())
