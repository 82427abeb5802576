"""The header of a GGUF file, read with suspicion: every count is held against the file's size.

Source: the GGUF specification, versions 2 and 3 (ggml/docs/gguf.md). The ``gguf`` package has a
reader too, but that one believes what a file promises: 49 bytes (one key whose array claims 2⁶²
elements) make it grow without end, and it takes seconds for the vocabulary of an ordinary model.
So only the dequantization is the package's; the reading is here.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSIONS = (2, 3)
LEAST_KEY_BYTES = 13
LEAST_TENSOR_BYTES = 32
"""What an entry takes at the least: a file cannot hold more of them than its size allows."""
MAX_NESTED = 3
MAX_NAME_BYTES = 65_535
MAX_DIMENSIONS = 4
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""GGUF's value types that have a fixed size."""
STRING, ARRAY = 8, 9


class Refused(Exception):
    """Why a file cannot be converted: the end of a sentence that begins with the file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor where it lies in the file, still as it is stored."""

    name: str
    shape: tuple[int, ...]
    """Outermost extent first, as numpy has it (the file has it the other way round)."""
    type: int
    """A number of ``gguf.GGMLQuantizationType``."""
    data: NDArray[np.uint8]
    """The stored bytes, mapped."""

    @property
    def type_name(self) -> str:
        """The type's name, such as ``Q4_1``."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.type).name

    def dequantized(self) -> NDArray[np.float32]:
        """Return the values in fp32, in the tensor's shape.

        Raises:
            Refused: the ``gguf`` package cannot dequantize the type.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType(self.type)
        if kind.name in ("F32", "F16"):
            stored = self.data.view("<f4" if kind.name == "F32" else "<f2")
            return stored.astype("<f4", copy=False).reshape(self.shape)
        # The package goes on 16 rows at a time: longer rows mean fewer and quicker steps.
        rows = math.prod(self.shape[:-1])
        rows //= math.gcd(rows, 16)
        block_bytes = GGML_QUANT_SIZES[kind][1]
        try:
            found = dequantize(self.data.reshape(rows, -1), kind)
        except NotImplementedError:
            raise Refused(
                f"its tensor {self.name!r} is stored as {kind.name} ({block_bytes} bytes a "
                "block), which cannot be turned back into numbers here: take another quantization"
            ) from None
        return np.asarray(found, "<f4").reshape(self.shape)


class GGUFFile:
    """The keys and tensors of a file.

    Attributes:
        keys: name -> number, bool, text, array of numbers, or list of texts.
        tensors: name -> where it lies.

    Raises:
        Refused: it is no GGUF file, cut off, or promises what its size cannot hold.
    """

    def __init__(self, path: Path) -> None:
        self._size = path.stat().st_size
        if self._size < 24:
            raise Refused(f"it has {self._size} bytes: it is empty or cut off")
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self._view = self._bytes.data
        self._at = 0
        tensor_count, key_count = self._read_start()
        self.keys: dict[str, Any] = {}
        for _ in range(key_count):
            name = self._text(MAX_NAME_BYTES, "the name of a key")
            self.keys[name] = self._value(self._unpack("<I"), name)
        self.tensors = self._read_tensors(tensor_count)

    def _read_start(self) -> tuple[int, int]:
        if bytes(self._take(4, "its first word")) != b"GGUF":
            raise Refused("it is no GGUF file: it does not begin with that word")
        version, tensors, keys = self._unpack("<I"), self._unpack("<Q"), self._unpack("<Q")
        if version not in VERSIONS:
            raise Refused(f"it is of GGUF version {version}; versions 2 and 3 can be read")
        if tensors * LEAST_TENSOR_BYTES + keys * LEAST_KEY_BYTES > self._size:
            raise Refused(
                f"it promises {tensors:,} tensors and {keys:,} keys in {self._size:,} bytes: it "
                "is damaged"
            )
        return int(tensors), int(keys)

    def _take(self, size: int, what: str) -> memoryview:
        if size > self._size - self._at:
            raise Refused(
                f"{what} claims {size:,} bytes at byte {self._at:,} of {self._size:,}: it is cut "
                "off or damaged"
            )
        begin, self._at = self._at, self._at + size
        return self._view[begin : self._at]

    def _unpack(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), "a number"))[0]

    def _text(self, limit: int, what: str) -> str:
        length = self._unpack("<Q")
        if length > limit:
            raise Refused(f"{what} has {length:,} bytes, more than the {limit:,} allowed")
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise Refused(f"{what} at byte {self._at:,} is no UTF-8 text: it is damaged") from None

    def _value(self, kind: int, name: str, nested: int = 0) -> Any:
        where = f"its key {name[:80]!r}"
        if kind == STRING:
            return self._text(self._size, where)
        if kind in NUMBERS:
            return self._numbers(kind, 1, where)[0].item()
        if kind != ARRAY:
            raise Refused(f"{where} is of the unknown type {kind}: it is damaged")
        if nested == MAX_NESTED:
            raise Refused(f"{where} holds arrays in arrays, more than {MAX_NESTED} deep")
        inner, count = self._unpack("<I"), self._unpack("<Q")
        if inner in NUMBERS:
            return self._numbers(inner, count, where)
        # Each text or array takes at least its own length: 8 bytes.
        if count * 8 > self._size - self._at:
            raise Refused(
                f"{where} claims an array of {count:,} elements in a file of {self._size:,} "
                "bytes: it is cut off or damaged"
            )
        if inner == STRING:
            return self._texts(count, where)
        return [self._value(inner, name, nested + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int, where: str) -> NDArray[Any]:
        form = np.dtype(NUMBERS[kind])
        return np.frombuffer(self._take(count * form.itemsize, where), form)

    def _texts(self, count: int, where: str) -> list[str]:
        # Most of a header's time: vocabularies have 10⁵ of these. So no method call for each.
        view, at, size = self._view, self._at, self._size
        length_at = struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + length_at(view, at)[0]
                if at > size:
                    raise Refused(f"{where} runs beyond the end: it is cut off or damaged")
                found.append(str(view[begin:at], "utf-8"))
        except struct.error:
            raise Refused(f"{where} runs beyond the end: it is cut off or damaged") from None
        except UnicodeDecodeError:
            raise Refused(f"{where} holds no UTF-8 text at byte {at:,}: it is damaged") from None
        self._at = at
        return found

    def _read_tensors(self, count: int) -> dict[str, StoredTensor]:
        entries = []
        for _ in range(count):
            name = self._text(MAX_NAME_BYTES, "the name of a tensor")
            dimensions = self._unpack("<I")
            if dimensions > MAX_DIMENSIONS:
                raise Refused(f"its tensor {name[:80]!r} has {dimensions} dimensions, not 1 to 4")
            shape = tuple(self._unpack("<Q") for _ in range(dimensions))[::-1]
            entries.append((name, shape, self._unpack("<I"), self._unpack("<Q")))
        alignment = self.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise Refused(f"its alignment is {str(alignment)[:40]}, not 1 to {2**20:,}")
        begin = -(-self._at // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in entries:
            if name in found:
                raise Refused(f"its tensor {name[:80]!r} occurs twice")
            size = stored_bytes(name, shape, kind)
            at = begin + offset
            if at + size > self._size:
                raise Refused(
                    f"its tensor {name[:80]!r} ends at byte {at + size:,} of {self._size:,}: it "
                    "is cut off or damaged"
                )
            found[name] = StoredTensor(name, shape, kind, self._bytes[at : at + size])
        total = sum(one.data.size for one in found.values())
        if total > self._size:
            raise Refused(f"its tensors take {total:,} of {self._size:,} bytes: they overlap")
        return found


def stored_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Return the bytes that a tensor of ``kind`` takes.

    Raises:
        Refused: the type is unknown, or a row is no whole number of its blocks.
    """
    from gguf import GGML_QUANT_SIZES

    known = {int(one): sizes for one, sizes in GGML_QUANT_SIZES.items()}
    if kind not in known:
        raise Refused(f"its tensor {name[:80]!r} is of the unknown type {kind}")
    block, block_bytes = known[kind]
    if not shape or min(shape) < 1 or shape[-1] % block:
        raise Refused(
            f"its tensor {name[:80]!r} has the shape {shape}, whose rows are no whole blocks of "
            f"{block}"
        )
    return math.prod(shape) // block * block_bytes
