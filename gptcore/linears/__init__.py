"""Linear layers that a file keeps in another form than one float matrix, and those forms.

A module that has such a form says so by three methods: ``stored`` gives the tensors that a file
keeps, ``settings`` what else it takes to build the module again (as JSON-able values), and the
class method ``restored`` builds it. Its own parameters are then not stored; its children are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Stored(Protocol):
    """A module with a form of its own on disk."""

    kind: ClassVar[str]
    """Names the form in a file."""

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that a file keeps for this module, its children's left out."""

    def settings(self) -> dict[str, Any]:
        """Return what ``restored`` needs beside the tensors."""

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:
        """Return the module that gave these; children without tensors are on the meta device."""


def stored_bytes(module: nn.Module) -> int:
    """Return what a file keeps of a module and all below it; shared tensors count once."""
    seen: dict[int, int] = {}
    packed = 0
    for one in module.modules():
        if isinstance(one, Stored):
            known = getattr(one, "stored_bytes", None)
            packed += known or sum(tensor.nbytes for tensor in one.stored().values())
            seen |= {p.data_ptr(): 0 for p in one.parameters(recurse=False)}
            continue
        for tensor in (*one.parameters(recurse=False), *one.buffers(recurse=False)):
            seen.setdefault(tensor.data_ptr(), tensor.nbytes)
        packed += getattr(one, "packed_bytes", 0)
    return sum(seen.values()) + packed


def resident_bytes(module: nn.Module) -> int:
    """Return what a module and all below it take in memory; shared tensors count once."""
    seen: dict[int, int] = {}
    packed = 0
    for one in module.modules():
        said = getattr(one, "packed_bytes", None)
        packed += said or 0
        for tensor in one.parameters(recurse=False):
            seen[tensor.data_ptr()] = tensor.nbytes
        if said is None:
            seen |= {tensor.data_ptr(): tensor.nbytes for tensor in one.buffers(recurse=False)}
    return sum(seen.values()) + packed


def filled(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer its tensors, without a copy and without gradients."""
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)


def plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer of these tensors, (R, C) and (R,)."""
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    filled(made, weight.contiguous(), bias)
    return made
