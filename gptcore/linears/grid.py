"""The numbers that a weight may become: equal steps, with one scale for each group of columns.

A code c of b bits stands for (c − 2**(b−1)) · scale + zero. A symmetric grid has no zero. Scales
and zeros are kept in the type in which the operations read them, and codes are chosen for these
rounded ones.

Letters of shapes: O outputs (rows), I inputs (columns), G groups of a row, g columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.linears import codes as packing

ROWS_AT_ONCE = 512
"""Rows that are quantized at once: the float copies of a head would be as big as a model."""
LEAST_SCALE = {torch.float32: 1e-12, torch.bfloat16: 1e-8}
"""So that a row of zeros does not divide by zero."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight matrix as codes, scales and zeros."""

    bits: int
    codes: Tensor
    """(O, I) uint8, each below 2**bits."""
    scale: Tensor
    """(O, G)."""
    zero: Tensor | None = None
    """(O, G), None on a symmetric grid."""

    @property
    def rows(self) -> int:
        """O."""
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        """I."""
        return self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scale.shape[1]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights that the codes stand for, (O, I)."""
        found = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for begin in range(0, self.codes.shape[0], ROWS_AT_ONCE):
            rows = slice(begin, begin + ROWS_AT_ONCE)
            zero = None if self.zero is None else self.zero[rows]
            grouped = self.codes[rows].view(-1, self.scale.shape[1], self.group)
            found[rows] = decoded(grouped, self.scale[rows], zero, self.bits).flatten(1).to(dtype)
        return found

    @property
    def stored_bytes(self) -> int:
        """What a file keeps: packed codes, scales, zeros."""
        zeros = 0 if self.zero is None else self.zero.nbytes
        return self.rows * self.bits * -(-self.columns // 8) + self.scale.nbytes + zeros

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that a file keeps; ``from_stored`` reads them back."""
        kept = {"codes": packing.pack(self.codes, self.bits), "scale": self.scale}
        return kept if self.zero is None else {**kept, "zero": self.zero}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], bits: int, columns: int) -> Quantized:
        """Return what ``stored`` packed, as a matrix of so many columns."""
        codes = packing.unpack(tensors["codes"], bits, columns)
        return cls(bits, codes, tensors["scale"], tensors.get("zero"))


def joined(pieces: Iterable[Quantized]) -> Quantized:
    """Return the numbers of all rows, where those of some rows each are given."""
    several = list(pieces)
    zeros = [one.zero for one in several if one.zero is not None]
    return Quantized(
        several[0].bits,
        torch.cat([one.codes for one in several]),
        torch.cat([one.scale for one in several]),
        torch.cat(zeros) if zeros else None,
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """How fine, how many columns share a scale (0: a whole row), and in which type scales are."""

    bits: int
    group: int = 0
    symmetric: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def half(self) -> int:
        """The code that stands for zero plus nothing."""
        return int(2 ** (self.bits - 1))

    @property
    def least(self) -> int:
        """The least step from the middle; a symmetric grid has as many below as above."""
        return self.symmetric - self.half

    @property
    def most(self) -> int:
        """The most steps from the middle."""
        return self.half - 1

    def width(self, columns: int) -> int:
        """Return how many of so many columns share a scale."""
        return self.group or columns

    def fit(self, grouped: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero that cover the range of each group.

        Args:
            grouped: (…, g) float32.
            shrink: the share of the range that is covered; what lies outside is clipped.

        Returns:
            two of (…), rounded to the grid's type; no zero where the grid is symmetric.
        """
        low, high = grouped.aminmax(dim=-1)
        least = LEAST_SCALE[self.dtype]
        if self.symmetric:
            reach = torch.maximum(high, -low) * shrink
            return (reach / self.most).clamp_min(least).to(self.dtype), None
        low, high = low * shrink, high * shrink
        scale = ((high - low) / (2**self.bits - 1)).clamp_min(least).to(self.dtype)
        return scale, (low + self.half * scale.float()).to(self.dtype)

    def encode(self, grouped: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the codes nearest to (…, g) float32 weights, as uint8."""
        moved = grouped if zero is None else grouped - zero.float()[..., None]
        steps = moved / scale.float()[..., None]
        return steps.round_().clamp_(self.least, self.most).add_(self.half).to(torch.uint8)

    def nearest(self, grouped: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the numbers of the grid nearest to (…, g) float32 weights, as float32."""
        return decoded(self.encode(grouped, scale, zero), scale, zero, self.bits)

    def quantize(
        self,
        weight: Tensor,
        dtype: torch.dtype | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Quantized:
        """Return each weight rounded to the nearest number of its group's grid.

        Args:
            weight: (O, I), any float type; the group divides I.
            dtype: the type that the weights are brought to before; their own if not given.
            progress: told the share of the rows that is done, every ``ROWS_AT_ONCE``.

        Error: half a step, (max − min of the group) / (2**bits − 1) / 2 a weight, or
        max|w| / (2**bits − 2) on a symmetric grid; and the rounding of scale and zero.
        """
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales, zeros = [], []
        for begin in range(0, len(weight), ROWS_AT_ONCE):
            rows = weight[begin : begin + ROWS_AT_ONCE].to(dtype or weight.dtype)
            grouped = rows.float().view(len(rows), -1, self.width(weight.shape[1]))
            scale, zero = self.fit(grouped)
            codes[begin : begin + len(rows)] = self.encode(grouped, scale, zero).flatten(1)
            scales.append(scale)
            zeros += [] if zero is None else [zero]
            if progress is not None:
                progress((begin + len(rows)) / len(weight))
        zero = torch.cat(zeros) if zeros else None
        return Quantized(self.bits, codes, torch.cat(scales), zero)


def decoded(grouped: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Return the weights of (…, g) codes, float32, for scale and zero of (…)."""
    found = grouped.float().sub_(2 ** (bits - 1)).mul_(scale.float()[..., None])
    return found if zero is None else found.add_(zero.float()[..., None])
