"""Linear layers and embeddings in the step's own packed format, and the way there and back.

A model keeps one copy of its weights: the native layer takes the place of the packed one that a
pass made, with the same numbers, and serves prefill (many vectors at once) as well as decode. An
embedding that shares the head's numbers reads them there.

Letters of shapes: N rows (outputs), K columns (inputs), G groups of a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from gptcore.device import trim_heap
from gptcore.kernels.library import CLinear, Format, library
from gptcore.linears.embedding import PackedEmbedding
from gptcore.linears.grid import Quantized
from gptcore.linears.quantized import (
    FINE_BITS,
    Int4Linear,
    Int8Linear,
    Int8WeightLinear,
    PackedLinear,
)

ALIGNMENT = 64
BLOCK = 16
"""Rows of a packed matrix that lie interleaved."""
GROUPS = (64, 32)
"""Columns that share a scale of their activations, those that are tried first."""
DTYPES = (torch.float32, torch.bfloat16)
TAKEN = (Int8Linear, Int8WeightLinear, Int4Linear)
"""Whose numbers are taken over. The others were chosen for how they compute, or for their size."""


class Arena:
    """Memory for the packed layers of a model, on large pages where the system has them."""

    LARGE_PAGE = 1 << 21
    SLAB = 1 << 22

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """Return so many bytes, aligned to a cache line; they live as long as they are used."""
        nbytes += -nbytes % ALIGNMENT
        if nbytes > self._slab.numel():
            trim_heap()  # the layers that were taken over meanwhile were small, and freed
            size = max(self.SLAB, nbytes)
            memory = torch.empty(size + self.LARGE_PAGE, dtype=torch.uint8)
            self._slab = memory[-memory.data_ptr() % self.LARGE_PAGE :][:size]
            library().gpt_large_pages(self._slab.data_ptr(), size)
        taken, self._slab = self._slab[:nbytes], self._slab[nbytes:]
        return taken


class Matrix:
    """A packed matrix, (N, K): bytes as native/linear.hpp describes them.

    Attributes:
        packed: the bytes.
        group: columns that share a scale of the activations.
        scale_dtype: of the numbers that it was made of; a scale a row is kept as float32.
    """

    def __init__(self, packed: Tensor, rows: int, columns: int, format: Format, group: int) -> None:
        self.packed, self.rows, self.columns = packed, rows, columns
        self.format, self.group = format, group
        self.scale_dtype = torch.float32 if format is Format.INT8_ROWS else torch.bfloat16

    @classmethod
    def empty(
        cls, rows: int, columns: int, format: Format, group: int, arena: Arena | None = None
    ) -> Self:
        """Return a matrix whose rows are still to be written, in the arena if there is one."""
        assert group in GROUPS, group
        size = library().gpt_packed_bytes(format, rows, columns, group)
        packed = torch.empty(size, dtype=torch.uint8) if arena is None else arena.take(size)
        return cls(packed, rows, columns, format, group)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        group: int,
        arena: Arena | None = None,
    ) -> Self:
        """Return a matrix of these numbers, see ``write``; nothing is rounded.

        Args:
            codes: (N, K) int8: -127 to 127, or 0 to 15 where there are zeros.
            scale: for all rows.
            zero: for all rows.
            group: 32 or 64.
            arena: where the bytes shall lie; in memory of their own if not given.
        """
        rows, columns = codes.shape
        made = cls.empty(rows, columns, format_of(scale, zero), group, arena)
        made.write(0, codes, scale, zero, middle=0 if zero is None else 8)
        return made

    def write(
        self, begin: int, codes: Tensor, scale: Tensor, zero: Tensor | None, *, middle: int
    ) -> None:
        """Write some rows, the first of which begins a block.

        Args:
            begin: the first row, a multiple of 16.
            codes: (R, K) bytes: ``middle`` and up to 127 more or less, or with zeros 7 more and 8
                less.
            scale: (R,) float32 for whole rows, or (R, ⌈K / group⌉) bfloat16.
            zero: as grouped scales, w = (code - middle) · scale + zero; None for 8 bits.
            middle: the code of no steps: 0 or 128 for 8 bits.
        """
        rows, groups = len(codes), -(-self.columns // self.group)
        whole = self.format is Format.INT8_ROWS
        assert begin % BLOCK == 0, begin
        assert begin + rows <= self.rows, (begin, rows)
        assert self.format is format_of(scale, zero), self.format
        assert codes.shape[1] == self.columns, codes.shape
        for one in (scale,) if zero is None else (scale, zero):
            assert one.dtype == (torch.float32 if whole else torch.bfloat16), one.dtype
            assert one.shape == ((rows,) if whole else (rows, groups)), one.shape
        shift = (8 if self.format is Format.INT4 else 128) - middle
        assert self.format is Format.INT4 or shift in (0, 128), middle
        codes, scale = codes.contiguous(), scale.contiguous()
        zero = None if zero is None else zero.contiguous()
        sizes = self.format, rows, self.columns, self.group
        library().gpt_pack(
            *sizes,
            codes.data_ptr(),
            shift,
            scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            self.packed[library().gpt_packed_bytes(self.format, begin, *sizes[2:]) :].data_ptr(),
            torch.get_num_threads(),
        )

    def described(self, bias: Tensor | None = None, activation_bits: int = FINE_BITS) -> CLinear:
        """Return what the library knows of this matrix; it points here, and to the bias."""
        assert activation_bits in (8, FINE_BITS), activation_bits
        assert activation_bits == FINE_BITS or self.format is Format.INT8_ROWS, self.format
        return CLinear(
            weights=self.packed.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            rows=self.rows,
            columns=self.columns,
            format=self.format,
            group=self.group,
            activation_bits=activation_bits,
        )

    def times(self, x: Tensor, bias: Tensor | None, *, activation_bits: int = FINE_BITS) -> Tensor:
        """Return x Wᵀ + bias for (T, K) float32 or bfloat16, as (T, N) float32.

        Args:
            x: the activations; they are rounded with a scale a group.
            bias: (N,) float32.
            activation_bits: 16, or 8 where a row of weights has one scale, which takes half the
                time where T is large.
        """
        assert x.shape[1] == self.columns, (x.shape, self.columns)
        x = x.contiguous()
        y = torch.empty(len(x), self.rows)
        failed = library().gpt_linear(
            ctypes.byref(self.described(bias, activation_bits)),
            x.data_ptr(),
            x.dtype == torch.bfloat16,
            len(x),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("out of memory in a native linear layer")
        return y

    def pick(self, rows: Tensor) -> Tensor:
        """Return rows, (T,) int64, of the matrix: (T, K) float32."""
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.rows:
            raise IndexError(f"there are {self.rows} rows")
        found = torch.empty(len(rows), self.columns)
        rows = rows.contiguous()  # kept until the call is over
        library().gpt_rows(
            ctypes.byref(self.described()),
            rows.data_ptr(),
            len(rows),
            found.data_ptr(),
        )
        return found

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the codes, scales and zeros that ``of`` was given."""
        groups = -(-self.columns // self.group)
        codes = torch.empty(self.rows, self.columns, dtype=torch.int8)
        zero = None
        if self.format is Format.INT8_ROWS:
            scale = torch.empty(self.rows)
        else:
            scale = torch.empty(self.rows, groups, dtype=torch.bfloat16)
        if self.format is Format.INT4:
            zero = torch.empty(self.rows, groups, dtype=torch.bfloat16)
        library().gpt_unpack(
            ctypes.byref(self.described()),
            codes.data_ptr(),
            scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            torch.get_num_threads(),
        )
        return codes, scale, zero


class NativeLinear(PackedLinear):
    """A packed linear layer that our library multiplies: (…, K) -> (…, N), in the input's type.

    In a file it is what it was made of: ``kind`` and ``settings`` are those of that layer.
    """

    def __init__(
        self, numbers: Quantized | PackedLinear, bias: Tensor | None, matrix: Matrix
    ) -> None:
        super().__init__(numbers, bias)
        self.matrix = matrix
        self.packed_bytes += matrix.packed.nbytes
        self.activation_bits = FINE_BITS
        self.bias32 = None if bias is None else bias.detach().float().contiguous()

    @classmethod
    def of(cls, numbers: Quantized, bias: Tensor | None, arena: Arena | None = None) -> Self:
        """Return a layer of these numbers, which our format ``fits``."""
        matrix = _matrix(numbers.rows, (numbers,), arena)
        assert matrix is not None
        return cls(numbers, bias, matrix)

    @classmethod
    def in_place_of(cls, layer: PackedLinear, arena: Arena | None = None) -> Self | None:
        """Return a layer of the same numbers, or None where they do not fit our format.

        They are never there as a whole, where ``layer`` gives them by rows.
        """
        matrix = _matrix(layer.rows, layer.numbers_by_rows(), arena)
        if matrix is None:
            return None
        made = cls(layer, layer.bias, matrix)
        made.kind, made._settings = layer.kind, layer.settings()  # type: ignore[misc]
        made.activation_bits = made._settings.get("activation_bits", FINE_BITS)
        return made

    kind: ClassVar[str] = "native"
    _settings: Mapping[str, Any] | None = None

    def described(self) -> CLinear:
        """Return what the library knows of this layer; it points into this module."""
        return self.matrix.described(self.bias32, self.activation_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias for any number of vectors of float32 or bfloat16."""
        flat = x.detach().reshape(-1, self.columns)
        y = self.matrix.times(
            flat if x.dtype in DTYPES else flat.float(),
            self.bias32,
            activation_bits=self.activation_bits,
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], self.rows)

    def numbers(self) -> Quantized:
        """Return the codes, scales and zeros that this layer was made of."""
        codes, scale, zero = self.matrix.unpacked()
        if self.matrix.format is Format.INT8_ROWS:
            scale = scale[:, None].to(self.matrix.scale_dtype)
        else:  # weights may share a scale more widely than activations
            step = self.group // self.matrix.group
            scale = scale[:, ::step].contiguous()
            zero = None if zero is None else zero[:, ::step].contiguous()
        middle = 2 ** (self.bits - 1) - (0 if zero is None else 8)
        return Quantized(self.bits, (codes + middle).to(torch.uint8), scale, zero)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the layer that this one replaced."""
        return super().settings() if self._settings is None else dict(self._settings)


class NativeEmbedding(PackedEmbedding):
    """A token embedding that looks its rows up in a native layer, which may be the head."""

    def __init__(self, replaced: PackedEmbedding, layer: NativeLinear) -> None:
        super().__init__(None, replaced.dtype, tied=replaced.tied)
        self.bits, self.columns = layer.bits, layer.columns
        self._layer = (layer,)  # so that torch does not take the head for a part of this module
        self.packed_bytes = 0 if replaced.tied else layer.packed_bytes

    @property
    def layer(self) -> NativeLinear:
        """The layer whose rows these are."""
        return self._layer[0]

    @property
    def weight(self) -> Tensor:
        """The packed numbers: where the rows lie, as any embedding tells."""
        return self.layer.matrix.packed

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of these ids in the model's type."""
        found = self.layer.matrix.pick(ids.flatten()).to(self.dtype)
        return found.view(*ids.shape, self.columns)

    def numbers(self) -> Quantized:
        """Return the codes, scales and zeros that this embedding was made of."""
        return self.layer.numbers()

    def stored(self) -> dict[str, Tensor]:
        """Return codes, scales and zeros, or nothing where the head has them."""
        return {} if self.tied else self.numbers().stored()


def format_of(scale: Tensor, zero: Tensor | None) -> Format:
    """Return the format of weights with these scales, a row each or some, and zeros."""
    if zero is not None:
        return Format.INT4
    return Format.INT8_ROWS if scale.ndim == 1 else Format.INT8_GROUPS


def fits(numbers: Quantized) -> bool:
    """Return whether our format holds these numbers exactly.

    8 bits: symmetric, a scale a row, or a bf16 scale for 32 columns or a multiple of them. 4 bits
    or fewer: such groups, each with a zero.
    """
    grouped = numbers.scale.dtype == torch.bfloat16 and numbers.group % GROUPS[-1] == 0
    if numbers.bits == 8:
        # -128 is left out: its sign cannot be turned within a byte.
        return (
            numbers.zero is None
            and (numbers.scale.shape[1] == 1 or grouped)
            and int(numbers.codes.min()) > 0
        )
    return numbers.bits <= 4 and numbers.zero is not None and grouped


def _matrix(rows: int, pieces: Iterable[Quantized], arena: Arena | None) -> Matrix | None:
    """Return the numbers that are given for some rows each, None where one does not fit."""
    matrix, begin = None, 0
    for numbers in pieces:
        if not fits(numbers):
            return None
        scale, zero, columns = numbers.scale, numbers.zero, numbers.columns
        if numbers.bits == 8 and scale.shape[1] == 1:
            group = min(GROUPS, key=lambda one: -columns % one)  # the first of those that pad least
            scale = scale[:, 0].float()
        else:
            group = next(one for one in GROUPS if numbers.group % one == 0)
            times = numbers.group // group
            scale = scale.repeat_interleave(times, dim=1)
            zero = None if zero is None else zero.repeat_interleave(times, dim=1)
        if matrix is None:
            matrix = Matrix.empty(rows, columns, format_of(scale, zero), group, arena)
            matrix.scale_dtype = numbers.scale.dtype
        matrix.write(begin, numbers.codes, scale, zero, middle=2 ** (numbers.bits - 1))
        begin += numbers.rows
    return matrix


def take_over(model: nn.Module) -> int:
    """Put native layers in the place of packed ones, one by one, and return how many.

    Nothing is rounded: the numbers stay what they are. A packed embedding that is tied to the head
    lets go of its own copy.
    """
    arena, taken = Arena(), 0
    for name in [name for name, one in model.named_modules() if isinstance(one, TAKEN)]:
        replaced = cast(PackedLinear, model.get_submodule(name))
        if layer := NativeLinear.in_place_of(replaced, arena):
            model.set_submodule(name, layer)
            taken += 1
    embedding, head = getattr(model, "embedding", None), getattr(model, "head", None)
    if type(embedding) is PackedEmbedding:
        if embedding.tied and isinstance(head, NativeLinear):
            model.embedding = NativeEmbedding(embedding, head)
        elif not embedding.tied and fits(numbers := embedding.numbers()):
            model.embedding = NativeEmbedding(embedding, NativeLinear.of(numbers, None, arena))
    return taken
