"""Linear layers of packed numbers: what a quantizing pass puts in the place of float ones.

Each keeps its numbers once, in the arrangement that its operation reads, and gives them back
exactly (``numbers``), so that a file can keep them packed and a loaded layer computes the same.

Weight-only layers have an operation for few tokens, which is bound by reading the weights. It is
slower than a float product for many tokens at once, so these are multiplied with weights that are
made float for the moment, a piece of a layer at a time: in bf16 where the processor has
instructions for it, else in fp32.

Letters of shapes: T tokens, O outputs (rows), I inputs (columns), G groups of a row.
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptcore.device import cpu_flags
from gptcore.errors import InvalidInput
from gptcore.linears.grid import Quantized, joined

ENGINES = ("x86", "fbgemm", "qnnpack")
"""Torch's int8 kernels that hold one byte a weight, the fastest first; a Mac has the last only."""
ROW_MULTIPLE = 16
"""The int4 operation takes output rows in blocks of this many; the last block is padded."""
PACKED_ROWS = 1024
"""Rows of int4 weights that are packed at once, which takes four bytes a weight; whole blocks."""
MANY_TOKENS = 96
"""From here on a float product was faster than the operations of 4- and of 8-bit weights."""
PIECE_WEIGHTS = 2**21
"""Weights that are float at a moment: 8 MiB."""
LEAST_GPU_ROWS = 17
"""CUDA's integer product takes so many tokens at least."""
FINE_BITS = 16
"""To which our own library rounds activations unless it is told otherwise."""
INT8_ROW_BYTES = 12
"""Beside its weights, torch's integer kernels keep a scale, a zero and a sum for a row."""
BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


class PackedLinear(nn.Module):
    """A linear layer of packed numbers: (…, I) -> (…, O), in the type of its input."""

    kind: ClassVar[str]
    """Names the operation; what a file keeps beside the numbers."""
    bias: Tensor | None
    bits: int
    rows: int
    columns: int
    group: int
    packed_bytes: int
    """What is held in memory."""
    stored_bytes: int
    """What a file keeps: the bytes of ``stored``, without packing it."""

    def __init__(self, numbers: Quantized | PackedLinear, bias: Tensor | None) -> None:
        """Take the shape and the bias; another layer of the same numbers tells the shape too."""
        super().__init__()
        self.bits, self.group = numbers.bits, numbers.group
        self.rows, self.columns = numbers.rows, numbers.columns
        self.packed_bytes, self.stored_bytes = 0, numbers.stored_bytes
        if bias is not None and isinstance(numbers, Quantized):
            self.stored_bytes += bias.nbytes
        self._keep(bias=bias)

    def numbers(self) -> Quantized:
        """Return the codes, scales and zeros that this layer was made of."""
        raise AssertionError(f"{type(self).__name__} does not give its numbers back")

    def numbers_by_rows(self) -> Iterator[Quantized]:
        """Yield them for some rows after the others, as many as come easily."""
        yield self.numbers()

    def make_ready(self) -> None:
        """Do now what the first use would otherwise have to wait for."""

    def dequantized(self) -> Tensor:
        """Return the weights that this layer computes with, (O, I) float32."""
        return self.numbers().dequantized()

    def stored(self) -> dict[str, Tensor]:
        """Return packed codes, scales, zeros and the bias if any."""
        kept = self.numbers().stored()
        return kept if self.bias is None else {**kept, "bias": self.bias}

    def settings(self) -> dict[str, Any]:
        """Return the bits of a code and the number of columns."""
        return {"bits": self.bits, "columns": self.columns}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Return the layer that ``stored`` gave, bit for bit."""
        known = dict(settings)
        numbers = Quantized.from_stored(tensors, known.pop("bits"), known.pop("columns"))
        return cls(numbers, tensors.get("bias"), **known)

    def extra_repr(self) -> str:
        """Return the shape and the format, for printing."""
        return f"{self.columns}, {self.rows}, bits={self.bits}, group={self.group}"

    def _keep(self, **tensors: Tensor | None) -> None:
        """Hold tensors as buffers and count their bytes."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
            self.packed_bytes += 0 if tensor is None else tensor.nbytes


class _PrepackedInt8(PackedLinear):
    """8-bit numbers in the arrangement of torch's integer kernels for the CPU, out of its sight.

    Arranging them takes as long as reading them back, so that waits until the layer is used: our
    own library takes the numbers over as they are.
    """

    def __init__(self, numbers: Quantized, bias: Tensor | None) -> None:
        super().__init__(numbers, bias)
        choose_engine()
        self._waiting: Quantized | None = numbers
        self._arranged: torch.ScriptObject | None = None
        self.packed_bytes += self.rows * (self.columns + INT8_ROW_BYTES)
        self.reduce_range = reduces_range()

    @property
    def integers(self) -> torch.ScriptObject:
        """The numbers as torch's kernels read them."""
        self._arrange()
        assert self._arranged is not None
        return self._arranged

    def _arrange(self) -> None:
        if self._waiting is not None:
            self._arranged, self._waiting = prepacked(self._waiting), None

    def numbers(self) -> Quantized:
        """Return the codes and scales that this layer was made of."""
        return self._waiting or unprepacked(self.integers)

    def make_ready(self) -> None:
        """Arrange the numbers now."""
        self._arrange()


class Int8Linear(_PrepackedInt8):
    """8-bit weights and activations, multiplied as integers on a CPU (fp32 in, fp32 out).

    The range of a token's activations is its own, whatever stands beside it in a call: several
    tokens are brought to the same range first, since torch's operation has one range a call.
    """

    kind: ClassVar[str] = "int8_dynamic"
    sums: Tensor
    """(O,): each row's sum of weights, which a shift of the activations is multiplied with."""

    def __init__(
        self, numbers: Quantized, bias: Tensor | None, activation_bits: int = FINE_BITS
    ) -> None:
        super().__init__(numbers, bias)
        self.activation_bits = activation_bits
        """Where our own library multiplies; the operation of this layer has 8."""
        self.packed_bytes += 4 * self.rows

    def settings(self) -> dict[str, Any]:
        """Return what every layer has, and the activations' bits where they are few."""
        few = {} if self.activation_bits == FINE_BITS else {"activation_bits": self.activation_bits}
        return {**super().settings(), **few}

    def _arrange(self) -> None:
        if (numbers := self._waiting) is not None:
            codes = numbers.codes.sum(1, dtype=torch.float32) - 128 * self.columns
            self.sums = codes * numbers.scale[:, 0]
        super()._arrange()

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) float32 -> (…, O) float32."""
        multiply = torch.ops.quantized.linear_dynamic
        if x.numel() == self.columns:
            y: Tensor = multiply(x, self.integers, self.reduce_range)
        elif not x.numel():
            y = x.new_empty(*x.shape[:-1], self.rows)
        else:
            low = x.amin(-1, keepdim=True).clamp_max_(0.0)
            high = x.amax(-1, keepdim=True).clamp_min_(0.0)
            half = ((high - low) / 2).clamp_min_(1e-12)
            middle = low + half
            moved = torch.addcdiv(-middle / half, x, half)
            y = multiply(moved, self.integers, self.reduce_range)
            y.mul_(half).addcmul_(middle, self.sums)
        return y if self.bias is None else y.add_(self.bias)


class StaticInt8Linear(_PrepackedInt8):
    """8-bit weights and activations with one scale known beforehand, on a CPU (fp32 in and out)."""

    kind: ClassVar[str] = "int8_static"

    def __init__(self, numbers: Quantized, bias: Tensor | None, low: float, high: float) -> None:
        super().__init__(numbers, bias)
        self.low, self.high = min(low, 0.0), max(high, 0.0)
        levels = 127 if self.reduce_range else 255
        self.scale = max(self.high - self.low, 1e-12) / levels
        self.zero = round(-self.low / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) float32 -> (…, O) float32; what lies outside the known range is clipped."""
        if self.reduce_range:
            x = x.clamp(self.low, self.high)
        y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, self.scale, self.zero, self.integers
        )
        return y if self.bias is None else y.add_(self.bias)

    def settings(self) -> dict[str, Any]:
        """Return bits and columns, and the range of the activations."""
        return {**super().settings(), "low": self.low, "high": self.high}


class Int8MatmulLinear(PackedLinear):
    """8-bit weights and activations by ``torch._int_mm``, for GPUs; one scale a token."""

    kind: ClassVar[str] = "int8_matmul"
    codes: Tensor
    scale: Tensor

    def __init__(self, numbers: Quantized, bias: Tensor | None) -> None:
        super().__init__(numbers, bias)
        self._keep(codes=signed(numbers.codes), scale=numbers.scale[:, 0].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O) in the type of ``x``."""
        flat = x.reshape(-1, self.columns).float()
        step = flat.abs().amax(1, keepdim=True).clamp_min_(1e-12) / 127  # (T, 1)
        codes = (flat / step).round_().to(torch.int8)
        if (missing := LEAST_GPU_ROWS - len(flat)) > 0:
            codes = F.pad(codes, (0, 0, 0, missing))
        sums = torch._int_mm(codes, self.codes.t())[: len(flat)]
        y = (sums.float() * step * self.scale).to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.rows)

    def numbers(self) -> Quantized:
        """Return the codes and scales that this layer was made of."""
        return Quantized(8, unsigned(self.codes), self.scale[:, None])


class WeightOnlyLinear(PackedLinear):
    """Packed weights that meet float activations."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O) in the type of ``x``."""
        flat = x.reshape(-1, self.columns)
        y = self.few(flat) if len(flat) < MANY_TOKENS else self.many(flat)
        y = y.reshape(*x.shape[:-1], self.rows)
        return y if self.bias is None else y + self.bias

    def few(self, x: Tensor) -> Tensor:
        """Multiply without making the weights float: (T, I) -> (T, O)."""
        return self.many(x)

    def many(self, x: Tensor) -> Tensor:
        """Multiply with the weights made float, piece by piece: (T, I) -> (T, O)."""
        wide = x.to(float_type(x))
        y = x.new_empty(len(x), self.rows)
        for begin, weight in self.pieces(wide.dtype):
            y[:, begin : begin + weight.shape[1]] = wide @ weight
        return y

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the transposed float weights, (I, some rows), of each piece."""
        raise AssertionError(f"{type(self).__name__} has no pieces")

    def _rows_at_once(self) -> int:
        return max(64, PIECE_WEIGHTS // self.columns // 64 * 64)


class Int8WeightLinear(WeightOnlyLinear):
    """8-bit weights, one scale a row, and bf16 activations."""

    kind: ClassVar[str] = "int8_weights"
    codes: Tensor
    scale: Tensor

    def __init__(self, numbers: Quantized, bias: Tensor | None) -> None:
        super().__init__(numbers, bias)
        self._keep(codes=signed(numbers.codes), scale=numbers.scale[:, 0].contiguous())

    def few(self, x: Tensor) -> Tensor:
        """Multiply by the operation for 8-bit weights; it is fast in bf16 on a CPU only."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return self.many(x)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)
        return y

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield pieces of rows."""
        size = self._rows_at_once()
        for begin in range(0, self.rows, size):
            rows = slice(begin, begin + size)
            yield begin, (self.codes[rows].to(dtype) * self.scale[rows, None].to(dtype)).T

    def numbers(self) -> Quantized:
        """Return the codes and scales that this layer was made of."""
        return Quantized(8, unsigned(self.codes), self.scale[:, None])


class Int4Linear(WeightOnlyLinear):
    """Weights of 4 bits or fewer in groups, and bf16 activations, on a CPU.

    Codes of 3 bits are held in 4, which is what the operation reads; a file keeps them in 3.
    """

    kind: ClassVar[str] = "int4"
    packed: Tensor
    scales: Tensor
    """(G, padded O, 2) bfloat16: scale and zero, where code 8 is the middle."""

    def __init__(self, numbers: Quantized, bias: Tensor | None) -> None:
        super().__init__(numbers, bias)
        assert numbers.zero is not None
        padded = self.rows + -self.rows % ROW_MULTIPLE
        scales = torch.zeros(self.columns // self.group, padded, 2, dtype=torch.bfloat16)
        scales[:, : self.rows, 0] = numbers.scale.T
        scales[:, : self.rows, 1] = numbers.zero.T
        packed = torch.empty(padded, self.columns // 2, dtype=torch.uint8)
        for begin in range(0, self.rows, PACKED_ROWS):  # blocks of rows lie one after the other
            some = numbers.codes[begin : begin + PACKED_ROWS].int()
            some = F.pad(some, (0, 0, 0, -len(some) % ROW_MULTIPLE)).add_(self._shift)
            made = torch.ops.aten._convert_weight_to_int4pack_for_cpu(some, 1)
            packed[begin : begin + len(some)] = made
        self._keep(packed=packed, scales=scales)

    @property
    def _shift(self) -> int:
        """From the middle of the layer's own codes to that of 4-bit ones."""
        return int(8 - 2 ** (self.bits - 1))

    def few(self, x: Tensor) -> Tensor:
        """Multiply by the operation for 4-bit weights."""
        flat = x.bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, self.scales)
        found: Tensor = y[:, : self.rows].to(x.dtype)
        return found

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield pieces of whole blocks of rows."""
        scale, zero = self.scales.to(dtype).unbind(2)  # (G, O)
        for begin, codes in self._codes():
            rows = slice(begin, begin + codes.shape[1])
            weight = codes.to(dtype).view(-1, self.group, codes.shape[1])  # (G, g, O)
            weight.sub_(8).mul_(scale[:, None, rows]).add_(zero[:, None, rows])
            yield begin, weight.flatten(0, 1)[:, : self.rows - begin]

    def numbers(self) -> Quantized:
        """Return the codes, scales and zeros that this layer was made of."""
        return joined(self.numbers_by_rows())

    def numbers_by_rows(self) -> Iterator[Quantized]:
        """Yield the numbers of whole blocks of rows, one after the other."""
        scale, zero = (one.T[: self.rows] for one in self.scales.unbind(2))
        for begin, codes in self._codes():
            rows = slice(begin, begin + codes.shape[1])
            some = codes.T[: self.rows - begin].contiguous().sub_(self._shift)
            yield Quantized(self.bits, some, scale[rows].contiguous(), zero[rows].contiguous())

    def _codes(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the transposed codes, (I, some rows) uint8, of each piece."""
        block, halves = int4_layout()
        padded, rows = len(self.packed), self._rows_at_once()
        whole = padded // block * block
        octets = self.packed.view(-1)
        for begin in range(0, whole, rows):
            end = min(whole, begin + rows)
            span = octets[begin * self.columns // 2 : end * self.columns // 2]
            yield begin, nibbles(span.view(-1, self.columns, block // 2), halves=halves)
        if whole < padded:
            rest = octets[whole * self.columns // 2 :].view(1, self.columns, (padded - whole) // 2)
            yield whole, nibbles(rest, halves=False)


class TiledInt4Linear(WeightOnlyLinear):
    """Weights of 4 bits or fewer in groups, and bf16 activations, on a CUDA device.

    The numbers are read back by multiplying with one-hot vectors, scale 1 and zero 0: the order in
    which CUDA's operation keeps them need not be known.
    """

    kind: ClassVar[str] = "int4_tiled"
    packed: Tensor
    scales: Tensor
    """(G, O, 2) bfloat16: scale and zero, where code 8 is the middle."""

    def __init__(self, numbers: Quantized, bias: Tensor | None) -> None:
        super().__init__(numbers, bias)
        assert numbers.zero is not None
        codes = numbers.codes + self._shift
        tiles = 8 if self.columns % 128 == 0 else 4
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
        scales = torch.stack((numbers.scale.T, numbers.zero.T), dim=2).bfloat16().contiguous()
        self._keep(packed=packed, scales=scales)

    @property
    def _shift(self) -> int:
        return int(8 - 2 ** (self.bits - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O) in the type of ``x``, for any number of tokens."""
        y = self._multiply(x.reshape(-1, self.columns).bfloat16(), self.scales).to(x.dtype)
        y = y.reshape(*x.shape[:-1], self.rows)
        return y if self.bias is None else y + self.bias

    def numbers(self) -> Quantized:
        """Return the codes, scales and zeros that this layer was made of."""
        plain = torch.zeros_like(self.scales)
        plain[..., 0] = 1
        ones = torch.eye(self.columns, dtype=torch.bfloat16, device=self.packed.device)
        codes = torch.cat([self._multiply(some, plain) for some in torch.split(ones, 64)]).T
        codes = (codes + 8 - self._shift).to(torch.uint8)
        scale, zero = (one.T.contiguous() for one in self.scales.unbind(2))
        return Quantized(self.bits, codes, scale, zero)

    def _multiply(self, x: Tensor, scales: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group, scales)
        return y


class SmallLinear(WeightOnlyLinear):
    """Weights of any bits, as small in memory as in a file; made float at every call."""

    kind: ClassVar[str] = "small"

    def __init__(self, numbers: Quantized, bias: Tensor | None) -> None:
        super().__init__(numbers, bias)
        self._keep(**numbers.stored())

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield pieces of rows."""
        size = self._rows_at_once()
        for begin in range(0, self.rows, size):
            yield begin, self._some(slice(begin, begin + size)).dequantized(dtype).T

    def numbers(self) -> Quantized:
        """Return the codes, scales and zeros that this layer was made of."""
        return self._some(slice(None))

    def _some(self, rows: slice | Tensor) -> Quantized:
        kept = {name: one[rows] for name, one in self.named_buffers() if name != "bias"}
        return Quantized.from_stored(kept, self.bits, self.columns)


def int8_bytes(rows: int, columns: int, bias: bool) -> int:
    """Return what a packed layer holds: a byte a weight; a scale, a zero and two sums a row.

    Error: the kernel's own padding is left out, as torch does not tell it. With FBGEMM on AVX-512
    up to 13 % more was seen resident for layers of 512 columns or more, a third for narrower ones.
    """
    return rows * columns + rows * (4 + bias) * 4


def choose_engine() -> None:
    """Let torch pack for a kernel that it has; some builds start with none chosen.

    Raises:
        InvalidInput: this torch has no such kernel.
    """
    there = torch.backends.quantized.supported_engines
    usable = [one for one in ENGINES if one in there]
    if not usable:
        raise InvalidInput(
            f"This build of torch has no int8 kernels ({', '.join(there)}): choose bf16 or int4."
        )
    if torch.backends.quantized.engine not in usable:
        torch.backends.quantized.engine = usable[0]


def reduces_range() -> bool:
    """Return whether activations must keep to 7 bits.

    Without the VNNI instructions an x86 kernel adds two products in 16 bits, and 2 · 255 · 127
    is more than these hold.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return x86 and "avx512_vnni" not in cpu_flags()


def signed(codes: Tensor) -> Tensor:
    """Return codes around 128 as int8 around 0."""
    return (codes ^ 128).view(torch.int8)


def unsigned(codes: Tensor) -> Tensor:
    """Return int8 codes around 0 as uint8 around 128."""
    return codes.view(torch.uint8) ^ 128


def prepacked(numbers: Quantized) -> torch.ScriptObject:
    """Return symmetric 8-bit numbers of whole rows as torch's integer kernels read them."""
    assert numbers.bits == 8
    assert numbers.zero is None
    with _deprecated_tensors():
        rows = torch._make_per_channel_quantized_tensor(
            signed(numbers.codes),
            numbers.scale[:, 0].double(),
            torch.zeros(len(numbers.scale), dtype=torch.long),
            0,
        )
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(rows, None)
    return packed


def unprepacked(packed: torch.ScriptObject) -> Quantized:
    """Return the numbers that ``prepacked`` was given."""
    with _deprecated_tensors():
        rows, _ = torch.ops.quantized.linear_unpack(packed)
    return Quantized(8, unsigned(rows.int_repr()), rows.q_per_channel_scales().float()[:, None])


def _deprecated_tensors() -> warnings.catch_warnings[None]:
    """Silence torch's notice of the end of its quantized tensors.

    It has no other way yet to pack weights for its integer operations.
    """
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def float_type(x: Tensor) -> torch.dtype:
    """Return the type in which activations are multiplied fastest: their own, or fp32.

    Most CPUs have no instructions for bf16, and compute with it several times slower.
    """
    if x.device.type != "cpu" or (x.dtype == torch.bfloat16 and cpu_flags() & BF16_FLAGS):
        return x.dtype
    return torch.float32


def nibbles(octets: Tensor, *, halves: bool) -> Tensor:
    """Return the transposed codes of int4 blocks, (I, rows) uint8.

    Args:
        octets: (blocks, I, rows of a block / 2) uint8.
        halves: whether a byte holds rows that are half a block apart, or two neighbours.
    """
    blocks, columns, half = octets.shape
    found = octets.new_empty(columns, blocks, 2 * half)
    low = found[..., :half] if halves else found[..., ::2]
    high = found[..., half:] if halves else found[..., 1::2]
    low.copy_((octets & 15).transpose(0, 1))
    high.copy_((octets >> 4).transpose(0, 1))
    return found.view(columns, -1)


@functools.cache
def int4_layout() -> tuple[int, bool]:
    """Return how torch arranges 4-bit codes on this processor, learned by packing known ones.

    Returns:
        rows of a block, and whether a byte holds rows that are half a block apart, as in
        ``nibbles``; a last block that is not full holds neighbours.
    """
    codes = torch.randint(0, 16, (128, 32), generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1).view(-1)
    for block, halves in ((64, True), (32, True), (64, False), (32, False), (16, False)):
        found = nibbles(packed.view(-1, 32, block // 2), halves=halves)
        if torch.equal(found.T, codes.to(torch.uint8)):
            return block, halves
    raise InvalidInput(
        "This build of torch packs 4-bit weights in an order that is not known here: choose int8."
    )
