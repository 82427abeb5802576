"""Small whole numbers in as few bits as they need: 8 of them fill exactly that many bytes.

Letters of shapes: R rows, C columns, b bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024
"""Rows that are packed together: on the way a code takes eight bytes."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes in ``bits`` bits each, every row from a byte of its own.

    Args:
        codes: (R, C), whole numbers from 0 to 2^bits − 1.
        bits: 1 to 7; 8 needs no packing.

    Returns:
        (R, b · ⌈C / 8⌉) uint8. The first code of eight stands in the lowest bits.
    """
    assert 1 <= bits <= 8
    if bits == 8:
        return codes.to(torch.uint8)
    rows, columns = codes.shape
    places = torch.arange(8, device=codes.device) * bits
    bytes_ = torch.arange(bits, device=codes.device) * 8
    packed = []
    for part in torch.split(codes, ROWS_AT_ONCE):
        eights = torch.nn.functional.pad(part.long(), (0, -columns % 8)).view(len(part), -1, 8)
        words = (eights << places).sum(2)  # (R, ⌈C / 8⌉), at most 56 bits used
        packed.append((words[..., None] >> bytes_ & 255).to(torch.uint8).flatten(1))
    return torch.cat(packed) if packed else codes.new_zeros(rows, 0, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that ``pack`` was given.

    Args:
        packed: (R, b · ⌈C / 8⌉) uint8.
        bits: 1 to 8.
        columns: C.

    Returns:
        (R, C) uint8.
    """
    if bits == 8:
        return packed
    if 8 % bits == 0:  # no code crosses a byte
        places = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        codes = packed[..., None] >> places & (1 << bits) - 1
        return codes.flatten(1)[:, :columns]
    parts = []
    for part in torch.split(packed, ROWS_AT_ONCE):
        bytes_ = torch.arange(bits, device=packed.device) * 8
        words = (part.view(len(part), packed.shape[1] // bits, bits).long() << bytes_).sum(2)
        places = torch.arange(8, device=packed.device) * bits
        codes = words[..., None] >> places & (1 << bits) - 1
        parts.append(codes.to(torch.uint8).flatten(1)[:, :columns])
    return torch.cat(parts)
