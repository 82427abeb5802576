"""Quantize every linear layer by round-to-nearest: int8 with dynamic activations, or int4.

int8 keeps one scale a row of the weights and quantizes the activations of each call to 8 bits
(``quantized::linear_dynamic``), so that it multiplies integers. int4 keeps a scale and a zero a
group of columns and multiplies bf16 activations (``_weight_int4pack_mm_for_cpu``), so that it
moves a quarter of the bytes. Both are really packed: the float weights are gone, one layer at a
time, so that the model is never there twice.

Error: int8 is off by at most half a step, max|w of the row| / 254 a weight; int4 by
(max − min of the group) / 30 and the rounding of scale and zero to bf16.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gptcore.device import Placement, cpu_flags
from gptcore.errors import InvalidInput, NumericalError
from gptcore.passes.base import Coverage, Pass, PassContext, Stage
from gptcore.spec import BYTES, LinearShape, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gptcore.model import GPT

ROW_MULTIPLE = 16
"""The int4 operation takes output rows in blocks of this many; the last block is padded."""
ROWS_AT_ONCE = 512
"""Rows whose int4 codes are computed at once: a head's float copies would be as big as a model."""
ENGINES = ("x86", "fbgemm", "qnnpack")
"""Torch's int8 kernels that hold one byte a weight, the fastest first; a Mac has the last only."""


class Int8(Pass):
    """8-bit weights, one scale a row; activations to 8 bits as they come."""

    name: ClassVar[str] = "int8"
    stage: ClassVar[Stage] = Stage.NUMBERS
    title: ClassVar[str] = "8-bit weights and activations"
    mechanism: ClassVar[str] = "a quarter of the bytes of fp32, integer multiplications"

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run: it needs a CPU and fp32 around the integer layers."""
        if placement.device != "cpu":
            return f"its operation is for the CPU, not {placement.device}; choose bf16 there."
        if placement.precision != "fp32":
            return (
                f"its operation takes fp32 activations, not {placement.precision}; choose fp32 "
                "under it."
            )
        return None

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the exact bytes, scales included; the rest (a tied embedding too) stays."""
        packed = {one.name: int8_bytes(one.rows, one.columns, one.bias) for one in spec.linears}
        return _after(spec, placement, before, packed)

    def weights_peak_bytes(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the most bytes: a layer's 8-bit numbers are there unpacked for a moment."""
        after = self.weights_bytes_after(spec, placement, before)
        return _peak(spec, before, after, lambda one: one.rows * one.columns)

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every linear layer, the head included.

        Raises:
            NumericalError: a weight is NaN or infinite.
            InvalidInput: this torch has no kernel for it.
        """
        context.coverage[self.name] = _replace_linears(model, _packed_int8, context)
        return model


class Int4(Pass):
    """4-bit weights in groups, each with a scale and a zero; activations stay in bf16."""

    name: ClassVar[str] = "int4"
    stage: ClassVar[Stage] = Stage.NUMBERS
    title: ClassVar[str] = "4-bit weights"
    mechanism: ClassVar[str] = "a quarter of the bytes of bf16"

    group: Literal[32, 64, 128] = Field(
        64, title="Group size", description="Weights that share a scale; fewer are more exact."
    )

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run: it needs a CPU, bf16, and columns that the group divides."""
        if placement.device != "cpu":
            return f"its operation is for the CPU, not {placement.device}; choose bf16 there."
        if placement.precision != "bf16":
            return (
                f"its operation takes bf16 activations, not {placement.precision}; choose bf16 "
                "under it."
            )
        if all(self._skips(one.columns) for one in spec.linears):
            found = " and ".join(map(str, sorted({one.columns for one in spec.linears})))
            return f"groups of {self.group} do not divide its layers of {found} columns."
        return None

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the exact bytes, scales, zeros and padding included; what is skipped stays."""
        packed = {
            one.name: int4_bytes(one.rows, one.columns, one.bias, self.group)
            for one in spec.linears
            if not self._skips(one.columns)
        }
        return _after(spec, placement, before, packed)

    def weights_peak_bytes(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the most bytes: a layer's codes take four bytes each until they are packed."""
        after = self.weights_bytes_after(spec, placement, before)
        return _peak(spec, before, after, lambda one: (one.rows + ROW_MULTIPLE) * one.columns * 4)

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every linear layer whose columns the group size divides.

        Raises:
            NumericalError: a weight is NaN or infinite.
        """

        def pack(linear: nn.Linear) -> nn.Module | str:
            if self._skips(linear.in_features):
                return f"{linear.in_features} columns are no multiple of {self.group}"
            return _packed_int4(linear, self.group)

        context.coverage[self.name] = _replace_linears(model, pack, context)
        return model

    def _skips(self, columns: int) -> bool:
        return columns % self.group != 0


def int8_bytes(rows: int, columns: int, bias: bool) -> int:
    """Return what a packed layer holds: a byte a weight; a scale, a zero and a sum a row.

    Error: the kernel's own padding is left out, as torch does not tell it. With FBGEMM on AVX-512
    up to 13 % more was seen resident for layers of 512 columns or more, a third for narrower ones.
    """
    return rows * columns + rows * (3 + bias) * 4


def int4_bytes(rows: int, columns: int, bias: bool, group: int) -> int:
    """Return what a packed layer holds: padded rows of 4 bits, a scale and a zero a group."""
    padded = rows + -rows % ROW_MULTIPLE
    return padded * columns // 2 + padded * (columns // group) * 2 * 2 + rows * bias * 2


def _after(spec: ModelSpec, placement: Placement, before: int, packed: dict[str, int]) -> int:
    size = BYTES[placement.precision]

    def float_bytes(one: LinearShape) -> int:
        shared = one.name == "head" and spec.tied_head
        return 0 if shared else (one.rows * one.columns + one.rows * one.bias) * size

    changed = [one for one in spec.linears if one.name in packed]
    return before + sum((packed[one.name] - float_bytes(one)) * one.count for one in changed)


def _peak(spec: ModelSpec, before: int, after: int, scratch: Callable[[LinearShape], int]) -> int:
    """Return the larger of two moments: the first block is packed, or the head is, the last."""
    *blocks, head = spec.linears
    return max(before + max(map(scratch, blocks)), after + scratch(head))


def _replace_linears(
    model: GPT, pack: Callable[[nn.Linear], nn.Module | str], context: PassContext
) -> Coverage:
    import torch
    from torch import nn

    names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    converted, total, skipped = 0, 0, []
    for done, name in enumerate(names):
        context.progress(done / len(names))
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        total += linear.weight.numel()
        if not linear.weight.detach().sum(dtype=torch.float32).isfinite():
            raise NumericalError(
                f"{name} holds NaN or infinite weights, which cannot be quantized: choose another "
                "model, or leave this one in floating point."
            )
        packed = pack(linear)
        if isinstance(packed, str):
            skipped.append((name, packed))
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
        converted += linear.weight.numel()
    return Coverage(converted, total, tuple(skipped))


def _choose_engine() -> None:
    """Let torch pack for a kernel that it has; some builds start with none chosen."""
    import torch

    there = torch.backends.quantized.supported_engines
    usable = [one for one in ENGINES if one in there]
    if not usable:
        raise InvalidInput(
            f"This build of torch has no int8 kernels ({', '.join(there)}): choose bf16 or int4."
        )
    if torch.backends.quantized.engine not in usable:
        torch.backends.quantized.engine = usable[0]


def _reduces_range() -> bool:
    """Return whether activations must keep to 7 bits.

    Without the VNNI instructions an x86 kernel adds two products in 16 bits, and 2 · 255 · 127
    is more than these hold.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return x86 and "avx512_vnni" not in cpu_flags()


def _packed_int8(linear: nn.Linear) -> nn.Module:
    import torch
    from torch import nn

    class Int8Linear(nn.Module):
        """A linear layer of packed 8-bit weights: (…, in) float32 -> (…, out) float32."""

        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            super().__init__()
            low, high = weight.aminmax(dim=1)
            scale = torch.maximum(high, -low).clamp_min(1e-12) / 127  # (out,)
            with warnings.catch_warnings():
                # torch announces the end of its quantized tensors, but has no other way yet to
                # pack weights for this operation.
                warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
                rows = torch.quantize_per_channel(
                    weight,
                    scale.double(),
                    torch.zeros_like(scale, dtype=torch.long),
                    0,
                    torch.qint8,
                )
            self.packed = torch.ops.quantized.linear_prepack(rows, bias)
            self.packed_bytes = int8_bytes(weight.shape[0], weight.shape[1], bias is not None)
            self.reduce_range = _reduces_range()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)
            return y

    _choose_engine()
    bias = None if linear.bias is None else linear.bias.detach().float()
    return Int8Linear(linear.weight.detach().float(), bias)


def _packed_int4(linear: nn.Linear, group: int) -> nn.Module:
    import torch
    from torch import nn

    class Int4Linear(nn.Module):
        """A linear layer of packed 4-bit weights: (…, in) bfloat16 -> (…, out) bfloat16."""

        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            super().__init__()
            self.rows, columns = weight.shape
            padded = self.rows + -self.rows % ROW_MULTIPLE
            codes = torch.zeros(padded, columns, dtype=torch.int32)
            self.scales = torch.zeros(columns // group, padded, 2, dtype=torch.bfloat16)
            for begin in range(0, self.rows, ROWS_AT_ONCE):
                end = min(self.rows, begin + ROWS_AT_ONCE)
                steps, scale, zero = int4_codes(weight[begin:end].float(), group)
                codes[begin:end] = steps
                self.scales[:, begin:end, 0] = scale.T
                self.scales[:, begin:end, 1] = zero.T
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.bias = bias
            self.packed_bytes = int4_bytes(self.rows, columns, bias is not None, group)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, group, self.scales)
            out: torch.Tensor = y[:, : self.rows].reshape(*x.shape[:-1], self.rows)
            return out if self.bias is None else out + self.bias

    bias = None if linear.bias is None else linear.bias.detach()
    return Int4Linear(linear.weight.detach(), bias)


def int4_codes(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes 0 to 15, scales and zeros, such that w ≈ (code − 8) · scale + zero.

    Args:
        weight: (out, in) float32; ``group`` divides in.
        group: columns that share a scale.

    Returns:
        (out, in) int32, and two of (out, in / group) bfloat16.
    """
    import torch

    grouped = weight.reshape(weight.shape[0], -1, group)  # (out, in / group, group)
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    steps = (grouped - zero.float()[..., None]) / scale.float()[..., None]
    return (steps.round() + 8).clamp(0, 15).to(torch.int32).flatten(1), scale, zero
