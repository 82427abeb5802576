"""A linear layer whose weights are few shared values: a table of them, and packed codes.

It is kept packed on disk. In memory it is unpacked, and as fast and as large as any layer; or
packed too, and unpacked at every call.

Letters of shapes: R rows, C columns, K values a table, b bits a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptcore.linears import codes, filled

ROWS_AT_ONCE = 1024
"""Rows that a packed layer unpacks together."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """A matrix as codes into tables of 16-bit values.

    Attributes:
        packed: (R, b · ⌈C / 8⌉) uint8, see ``codes.pack``.
        table: (R, K), a table a row, or (1, K), one for all; float16 or bfloat16.
        columns: C.
    """

    packed: Tensor
    table: Tensor
    columns: int

    @classmethod
    def of(cls, indices: Tensor, table: Tensor) -> Self:
        """Return the clusters for indices (R, C) into ``table``."""
        return cls(codes.pack(indices, bits_for(table.shape[1])), table, indices.shape[1])

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], columns: int) -> Self:
        """Return the clusters that a file kept."""
        return cls(tensors["codes"], tensors["table"], columns)

    @classmethod
    def found_in(cls, weight: Tensor, dtype: torch.dtype, *, shared: bool) -> Self:
        """Return the clusters of a matrix that was made of some.

        Args:
            weight: (R, C), with at most 256 values a row, or in all.
            dtype: of the table; must hold these values exactly.
            shared: one table for all rows.
        """
        values = weight.float()
        if shared:
            table = torch.unique(values)[None]  # (1, K)
        else:
            ordered = values.sort(dim=1).values
            place = F.pad(ordered.diff(dim=1) != 0, (1, 0)).cumsum(1)
            table = ordered[:, -1:].repeat(1, int(place.max()) + 1)
            table.scatter_(1, place, ordered)
        indices = nearest(values, table)
        return cls.of(indices, table.to(dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix, (R, C)."""
        table = self.table.to(dtype)
        indices = codes.unpack(self.packed, bits_for(table.shape[1]), self.columns)
        if table.shape[0] == 1:
            return table[0].index_select(0, indices.flatten().int()).view_as(indices)
        return table.gather(1, indices.long())

    @property
    def nbytes(self) -> int:
        """What codes and table take."""
        return self.packed.nbytes + self.table.nbytes


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Return which value of its row's table is next to each number.

    Args:
        values: (R, C) float32.
        table: (R, K), or (1, K) for all rows; float32, every row rising.

    Returns:
        (R, C) uint8.
    """
    middle = (table[:, 1:] + table[:, :-1]) / 2
    parts = []
    for begin in range(0, len(values), ROWS_AT_ONCE):
        part = values[begin : begin + ROWS_AT_ONCE].contiguous()
        if len(table) == 1:
            found = torch.bucketize(part, middle[0], out_int32=True)
        else:
            own = middle[begin : begin + ROWS_AT_ONCE].contiguous()
            found = torch.searchsorted(own, part, out_int32=True)
        parts.append(found.to(torch.uint8))
    return torch.cat(parts)


def bits_for(values: int) -> int:
    """Return the bits of a code for so many values: 4 for 9 to 16."""
    return max(1, (values - 1).bit_length())


class _Unpacked:
    """A module whose weight is a dense matrix of clustered values."""

    weight: Tensor
    shared: bool
    """Whether one table serves all rows."""
    table_dtype: torch.dtype
    """Float16 or bfloat16, in which the values are exact."""

    def _own(self) -> dict[str, Tensor]:
        clusters = Clusters.found_in(self.weight, self.table_dtype, shared=self.shared)
        return {"codes": clusters.packed, "table": clusters.table}

    def settings(self) -> dict[str, Any]:
        """Return the number of columns, as rows are padded to whole bytes, and the precision."""
        precision = str(self.weight.dtype).removeprefix("torch.")
        return {"columns": self.weight.shape[1], "dtype": precision}


class ClusteredLinear(_Unpacked, nn.Linear):
    """Computes as any linear layer does, and finds its clusters again to be stored."""

    kind: ClassVar[str] = "clustered"

    def __init__(self, clusters: Clusters, bias: Tensor | None, dtype: torch.dtype) -> None:
        rows, columns = clusters.packed.shape[0], clusters.columns
        nn.Linear.__init__(self, columns, rows, bias=bias is not None, device="meta")
        filled(self, clusters.dense(dtype), bias)
        self.shared, self.table_dtype = clusters.table.shape[0] == 1, clusters.table.dtype

    def stored(self) -> dict[str, Tensor]:
        """Return codes, table, and the bias if any."""
        return self._own() if self.bias is None else {**self._own(), "bias": self.bias.detach()}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Return the layer that ``stored`` gave, bit for bit."""
        clusters = Clusters.from_tensors(tensors, settings["columns"])
        return cls(clusters, tensors.get("bias"), getattr(torch, settings["dtype"]))


class ClusteredEmbedding(_Unpacked, nn.Embedding):
    """Looks up as any embedding does, and finds its clusters again to be stored."""

    kind: ClassVar[str] = "clustered_embedding"

    def __init__(self, clusters: Clusters, dtype: torch.dtype) -> None:
        rows = clusters.packed.shape[0]
        nn.Embedding.__init__(self, rows, clusters.columns, device="meta")
        self.weight = nn.Parameter(clusters.dense(dtype), requires_grad=False)
        self.shared, self.table_dtype = clusters.table.shape[0] == 1, clusters.table.dtype

    def stored(self) -> dict[str, Tensor]:
        """Return codes and table."""
        return self._own()

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Return the embedding that ``stored`` gave, bit for bit."""
        clusters = Clusters.from_tensors(tensors, settings["columns"])
        return cls(clusters, getattr(torch, settings["dtype"]))


class PackedClusteredLinear(nn.Module):
    """Keeps codes and table, and makes the dense weights of some rows at a time at every call."""

    kind: ClassVar[str] = "clustered_packed"

    def __init__(self, clusters: Clusters, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.codes: Tensor
        self.table: Tensor
        self.bias: Tensor | None
        self.register_buffer("codes", clusters.packed)
        self.register_buffer("table", clusters.table)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.columns, self.dtype = clusters.columns, dtype

    @property
    def packed_bytes(self) -> int:
        """What the layer takes in memory between two calls."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def dense(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Return rows of the matrix."""
        table = self.table if self.table.shape[0] == 1 else self.table[begin:end]
        return Clusters(self.codes[begin:end], table, self.columns).dense(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs: (…, C) -> (…, R)."""
        rows = self.codes.shape[0]
        parts = [
            F.linear(x, self.dense(begin, min(rows, begin + ROWS_AT_ONCE)))
            for begin in range(0, rows, ROWS_AT_ONCE)
        ]
        y = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias

    def stored(self) -> dict[str, Tensor]:
        """Return codes, table, and the bias if any: what is in memory."""
        return dict(self.named_buffers())

    def settings(self) -> dict[str, Any]:
        """Return the number of columns, as rows are padded to whole bytes, and the precision."""
        return {"columns": self.columns, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Return the layer that ``stored`` gave."""
        clusters = Clusters.from_tensors(tensors, settings["columns"])
        return cls(clusters, tensors.get("bias"), getattr(torch, settings["dtype"]))
