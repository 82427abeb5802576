"""Linear layers in the step's own packed format, and the way there from the passes' packed layers.

A model keeps one copy of its weights: the packed layer takes the place of the one that it was made
from, and serves prefill (many vectors at once) as well as decode.

Letters of shapes: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.kernels.library import CLinear, Format, library

ALIGNMENT = 64
INT4_BLOCK = 64
"""Rows that torch's 4-bit layout treats as one."""
GROUPS = (32, 64)


class PackedLinear(nn.Module):
    """A linear layer of packed 8-bit or 4-bit weights: (…, K) -> (…, N), dtype of the input.

    Activations are quantized to 8 bits a group of columns as they come; see native/linear.hpp.
    """

    def __init__(
        self,
        packed: Tensor,
        rows: int,
        columns: int,
        format: Format,
        group: int,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.packed = packed
        self.rows = rows
        self.columns = columns
        self.format = format
        self.group = group
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.packed_bytes = packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def described(self) -> CLinear:
        """Return what the library knows of this layer; it points into this module."""
        return CLinear(
            weights=self.packed.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            rows=self.rows,
            columns=self.columns,
            format=self.format,
            group=self.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias for any number of vectors."""
        if x.shape[-1] != self.columns:
            raise ValueError(f"{x.shape[-1]} columns meet a layer of {self.columns}")
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"activations are float32 or bfloat16, not {x.dtype}")
        flat = x.detach().reshape(-1, self.columns).contiguous()  # (T, K)
        y = torch.empty(flat.shape[0], self.rows)
        failed = library().gpt_linear(
            ctypes.byref(self.described()),
            flat.data_ptr(),
            x.dtype == torch.bfloat16,
            flat.shape[0],
            y.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("out of memory in the packed linear layer")
        return y.to(x.dtype).reshape(*x.shape[:-1], self.rows)

    def extra_repr(self) -> str:
        """Return what torch prints of this layer."""
        return f"{self.columns}, {self.rows}, {self.format.name}, group={self.group}"


class Arena:
    """Memory for the packed layers of a model, on large pages where the system has them."""

    LARGE_PAGE = 1 << 21
    SLAB = 1 << 25

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """Return so many bytes, aligned to a cache line; they live as long as they are used."""
        nbytes += -nbytes % ALIGNMENT
        if nbytes > self._slab.numel():
            size = max(self.SLAB, nbytes)
            memory = torch.empty(size + self.LARGE_PAGE, dtype=torch.uint8)
            self._slab = memory[-memory.data_ptr() % self.LARGE_PAGE :][:size]
            library().gpt_large_pages(self._slab.data_ptr(), size)
        taken, self._slab = self._slab[:nbytes], self._slab[nbytes:]
        return taken


def packed_size(format: Format, rows: int, columns: int, group: int) -> int:
    """Return the bytes of a packed layer, filled-up rows and columns included."""
    return int(library().gpt_packed_bytes(format, rows, columns, group))


def pack(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group: int,
    bias: Tensor | None = None,
    arena: Arena | None = None,
) -> PackedLinear:
    """Return a layer of these integers; nothing is rounded.

    Args:
        codes: (N, K) int8: -127 to 127, or 0 to 15 where there are zeros.
        scales: (N,) float32 for whole rows, or (N, ⌈K / group⌉) bfloat16.
        zeros: as grouped scales, w = (code - 8) · scale + zero; None for 8 bits.
        group: 32 or 64: columns that share the scale of their activations, at least.
        bias: (N,), or None.
        arena: where the bytes shall lie; anywhere if not given.
    """
    assert group in GROUPS, group
    rows, columns = codes.shape
    if zeros is not None:
        format = Format.INT4
    else:
        format = Format.INT8_ROWS if scales.ndim == 1 else Format.INT8_GROUPS
    dtype = torch.float32 if format is Format.INT8_ROWS else torch.bfloat16
    assert scales.dtype == dtype, scales.dtype
    assert zeros is None or zeros.dtype == dtype, zeros
    if format is not Format.INT8_ROWS:
        assert scales.shape == (rows, -(-columns // group)), scales.shape
    size = packed_size(format, rows, columns, group)
    packed = torch.empty(size, dtype=torch.uint8) if arena is None else arena.take(size)
    codes, scales = codes.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    library().gpt_pack(
        format,
        rows,
        columns,
        group,
        codes.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return PackedLinear(packed, rows, columns, format, group, bias)


def quantized(linear: nn.Linear, bits: int, group: int, arena: Arena | None = None) -> PackedLinear:
    """Return a floating-point layer rounded to the nearest of 8 or 4 bits, a scale a group.

    Error: half a step a weight: max|w of the group| / 254, or (max - min) / 30 and the rounding
    of scale and zero to bf16; an activation as native/linear.hpp says.
    """
    weight = linear.weight.detach().float()  # (N, K)
    rows, columns = weight.shape
    filled = nn.functional.pad(weight, (0, -columns % group)).reshape(rows, -1, group)
    if bits == 8:
        scales = _bf16_up(filled.abs().amax(dim=2).clamp_min(1e-12) / 127)
        codes, zeros = (filled / scales.float()[..., None]).round(), None
    else:
        low, high = filled.amin(dim=2), filled.amax(dim=2)
        scales = ((high - low) / 15).clamp_min(1e-8).bfloat16()
        zeros = (low + 8 * scales.float()).bfloat16()
        codes = (filled - zeros.float()[..., None]) / scales.float()[..., None] + 8
        codes = codes.round().clamp(0, 15)
    flat = codes.to(torch.int8).flatten(1)[:, :columns]
    return pack(flat, scales, zeros, group=group, bias=linear.bias, arena=arena)


def _bf16_up(x: Tensor) -> Tensor:
    """Return the least bfloat16 that is not below x, so that no integer exceeds its range."""
    near = x.bfloat16()
    return torch.where(near.float() < x, (near.view(torch.int16) + 1).view(torch.bfloat16), near)


def repacked(module: nn.Module, arena: Arena) -> PackedLinear | None:
    """Return a pass's packed layer in our format, integer for integer; None where it is none.

    What was packed by torch's own operations is unpacked by them or, as torch cannot unpack its
    4-bit layout, by looking where it puts the bits of known numbers.
    """
    packed: Any = getattr(module, "packed", None)
    bias: Any = getattr(module, "bias", None)
    if isinstance(packed, torch.ScriptObject):
        return _from_int8(packed, bias, arena)
    if isinstance(packed, Tensor) and packed.dtype == torch.uint8:
        return _from_int4(module, packed, arena)
    return None


def _from_int8(
    packed: torch.ScriptObject, bias: Tensor | None, arena: Arena
) -> PackedLinear | None:
    weight, _ = torch.ops.quantized.linear_unpack(packed)
    codes = weight.int_repr()  # (N, K) int8
    if weight.qscheme() != torch.per_channel_affine or weight.q_per_channel_zero_points().any():
        return None
    if int(codes.min()) < -127:  # the sign of -128 cannot be turned in a byte
        return None
    scales = weight.q_per_channel_scales().float()
    return pack(codes, scales, None, group=64, bias=bias, arena=arena)


def _from_int4(module: Any, packed: Tensor, arena: Arena) -> PackedLinear | None:
    rows, columns = int(module.rows), packed.shape[1] * 2
    both = module.scales.transpose(0, 1)[:rows]  # (N, K / group, 2) bfloat16
    group = columns // both.shape[1]
    if group % GROUPS[0] or both.dtype != torch.bfloat16:
        return None
    codes = int4_codes_of(packed)[:rows]
    if group > GROUPS[-1]:  # weights share a scale more widely than activations
        both = both.repeat_interleave(group // GROUPS[-1], dim=1)
        group = GROUPS[-1]
    scales, zeros = both.unbind(2)
    return pack(codes, scales, zeros, group=group, bias=module.bias, arena=arena)


def int4_codes_of(packed: Tensor) -> Tensor:
    """Return the codes in torch's 4-bit layout for CPUs, which differs from CPU to CPU.

    Args:
        packed: (N, K / 2) uint8; N is a multiple of 16.

    Returns:
        (N, K) int8, 0 to 15.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    codes = torch.empty(rows, columns, dtype=torch.int8)
    tail = rows - rows % INT4_BLOCK
    for begin, end, height in ((0, tail, INT4_BLOCK), (tail, rows, rows - tail)):
        if begin == end:
            continue
        places = _int4_places(height, columns)
        for first in range(begin, end, height):
            block = packed[first : first + height].flatten()
            nibbles = torch.stack((block & 15, block >> 4), dim=1).flatten()
            codes[first : first + height] = nibbles[places].view(torch.int8).reshape(height, -1)
    return codes


@functools.lru_cache(maxsize=8)
def _int4_places(rows: int, columns: int) -> Tensor:
    """Return where torch puts each code: (N · K,) indices of halves of bytes.

    Every code is told its own number, one bit at a time, and so carries it to its place.
    """
    numbers = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)
    found = torch.zeros(rows * columns, dtype=torch.int64)
    for bit in range((rows * columns - 1).bit_length()):
        block = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers >> bit & 1, 1).flatten()
        found |= torch.stack((block & 15, block >> 4), dim=1).flatten().long() << bit
    return found.argsort()
