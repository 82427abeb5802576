"""In what form a layer's weights are kept and multiplied, and what that takes in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptcore.device import Placement
from gptcore.spec import BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.linears.grid import Grid, Quantized
    from gptcore.linears.quantized import PackedLinear

ROW_MULTIPLE = 16
"""The 4-bit operation of the CPU takes output rows in blocks of this many; the last is padded."""
TILE_ROWS, TILE_COLUMNS = 8, 64
"""What the 4-bit operation of CUDA takes whole multiples of."""


@dataclass(frozen=True, slots=True)
class Format:
    """Bits of a code, columns that share a scale, and what is done with the activations."""

    bits: int
    group: int = 0
    """0 stands for a whole row, on a symmetric grid; groups have a zero of their own."""
    activations: bool = False
    """Whether activations are rounded to 8 bits too, and multiplied as integers."""
    ranged: bool = False
    """Whether the range of the activations is known beforehand, not looked for in each token."""
    activation_bits: int = 16
    """Of activations that our own library rounds; torch's operation rounds them to 8."""
    small: bool = False
    """Whether the layer is as small in memory as in a file, and slow."""

    def skips(self, rows: int, columns: int, device: str) -> str | None:
        """Return why a layer of that shape is left as it is, or None."""
        if self.group and columns % self.group:
            return f"{columns} columns are no multiple of {self.group}"
        if device.startswith("cuda") and (self.activations or self._tiled):
            many = TILE_COLUMNS if self._tiled else TILE_ROWS
            if rows % TILE_ROWS or columns % many:
                return f"{rows} × {columns} are no multiples of {TILE_ROWS} × {many}"
        return None

    def grid(self) -> Grid:
        """Return the numbers that a weight may become."""
        import torch

        from gptcore.linears.grid import Grid

        if self.group:
            return Grid(self.bits, self.group)
        return Grid(
            self.bits, symmetric=True, dtype=torch.float32 if self.activations else torch.bfloat16
        )

    def layer(self, numbers: Quantized, bias: Tensor | None, device: str) -> PackedLinear:
        """Return the layer that computes with these numbers fastest on a device."""
        from gptcore.linears import quantized

        on_cpu = device == "cpu"
        bias = None if bias is None else bias.detach()
        if self.activations:
            if on_cpu:
                bias = None if bias is None else bias.float()
                return quantized.Int8Linear(numbers, bias, self.activation_bits)
            return quantized.Int8MatmulLinear(numbers, bias)
        if self.small or not (on_cpu or self.bits == 8 or self._tiled):
            return quantized.SmallLinear(numbers, bias)
        if self.bits == 8:
            return quantized.Int8WeightLinear(numbers, bias)
        return (quantized.Int4Linear if on_cpu else quantized.TiledInt4Linear)(numbers, bias)

    @property
    def _tiled(self) -> bool:
        return self.group > 0 and self.bits <= 4 and not self.small

    def stored_bytes(self, rows: int, columns: int, bias: bool, placement: Placement) -> int:
        """Return what a file keeps of a layer: codes, scales, zeros, bias."""
        scales = rows * columns // self.group * 4 if self.group else rows * self._scale_bytes
        return (
            rows * self.bits * -(-columns // 8) + scales + rows * bias * BYTES[placement.precision]
        )

    def resident_bytes(self, rows: int, columns: int, bias: bool, placement: Placement) -> int:
        """Return what a layer takes in memory.

        Error: the padding of torch's 8-bit kernel is left out, see ``quantized.int8_bytes``.
        """
        from_bias = rows * bias * BYTES[placement.precision]
        if self.activations and placement.device == "cpu":
            return rows * columns + rows * (12 if self.ranged else 16) + from_bias
        if not self._tiled:
            return self.stored_bytes(rows, columns, bias, placement)
        padded = rows + (-rows % ROW_MULTIPLE if placement.device == "cpu" else 0)
        return padded * columns // 2 + padded * (columns // self.group) * 4 + from_bias

    @property
    def _scale_bytes(self) -> int:
        return 4 if self.activations else 2


def int8_bytes(rows: int, columns: int, bias: bool) -> int:
    """Return what a layer of 8-bit weights and activations takes on a CPU."""
    return Format(8, activations=True).resident_bytes(rows, columns, bias, Placement())


def int4_bytes(rows: int, columns: int, bias: bool, group: int) -> int:
    """Return what a layer of 4-bit weights takes on a CPU, padding included."""
    return Format(4, group).resident_bytes(rows, columns, bias, Placement(precision="bf16"))
