"""Quantize every linear layer by round-to-nearest: int8 with dynamic activations, or int4.

int8 keeps one scale a row of the weights and quantizes the activations of each call to 8 bits
(``quantized::linear_dynamic``), so that it multiplies integers. int4 keeps a scale and a zero a
group of columns and multiplies bf16 activations (``_weight_int4pack_mm_for_cpu``), so that it
moves a quarter of the bytes. Both are really packed: the float weights are gone.

Error: int8 is off by at most half a step, max|w of the row| / 254 a weight; int4 by
(max − min of the group) / 30 and the rounding of scale and zero to bf16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gptcore.device import Placement
from gptcore.passes.base import Coverage, Pass, PassContext, Stage
from gptcore.spec import BYTES, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gptcore.model import GPT

ROW_MULTIPLE = 16
"""The int4 operation takes output rows in blocks of this many; the last block is padded."""


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
            return f"its operation takes fp32 activations, not {placement.precision}."
        return None

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return one byte a weight and two floats a row; the rest (an embedding too) stays."""
        return before - _replaced_bytes(spec, placement) + spec.matmul_parameters * 102 // 100

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every linear layer, the head included."""
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
            return f"its operation takes bf16 activations, not {placement.precision}."
        if all(columns % self.group for columns in (spec.width, spec.hidden, spec.q_width)):
            return f"groups of {self.group} divide neither {spec.width} nor {spec.hidden} columns."
        return None

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return half a byte a weight and 4 bytes a group; the rest (an embedding too) stays."""
        packed = spec.matmul_parameters * (0.5 + 4 / self.group)
        return before - _replaced_bytes(spec, placement) + int(packed)

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every linear layer whose columns the group size divides."""

        def pack(linear: nn.Linear) -> nn.Module | str:
            if linear.in_features % self.group:
                return f"{linear.in_features} columns are no multiple of {self.group}"
            return _packed_int4(linear, self.group)

        context.coverage[self.name] = _replace_linears(model, pack, context)
        return model


def _replaced_bytes(spec: ModelSpec, placement: Placement) -> int:
    kept_head = spec.vocabulary * spec.width if spec.tied_head else 0
    return (spec.matmul_parameters - kept_head) * BYTES[placement.precision]


def _replace_linears(
    model: GPT, pack: Callable[[nn.Linear], nn.Module | str], context: PassContext
) -> Coverage:
    from torch import nn

    found = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    converted, skipped = 0, []
    for done, (name, linear) in enumerate(found):
        context.progress(done / len(found))
        packed = pack(linear)
        if isinstance(packed, str):
            skipped.append((name, packed))
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
        converted += linear.weight.numel()
    return Coverage(converted, sum(one.weight.numel() for _, one in found), tuple(skipped))


def _packed_int8(linear: nn.Linear) -> nn.Module:
    import torch
    from torch import nn

    class Int8Linear(nn.Module):
        """A linear layer of packed 8-bit weights: (…, in) float32 -> (…, out) float32."""

        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            super().__init__()
            scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127  # (out,)
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
            self.packed_bytes = weight.numel() + 2 * 4 * weight.shape[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.quantized.linear_dynamic(x, self.packed, False)

    bias = None if linear.bias is None else linear.bias.detach().float()
    return Int8Linear(linear.weight.detach().float(), bias)


def _packed_int4(linear: nn.Linear, group: int) -> nn.Module:
    import torch
    from torch import nn

    class Int4Linear(nn.Module):
        """A linear layer of packed 4-bit weights: (…, in) bfloat16 -> (…, out) bfloat16."""

        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            super().__init__()
            self.rows = weight.shape[0]
            short = -self.rows % ROW_MULTIPLE
            weight = torch.nn.functional.pad(weight, (0, 0, 0, short))
            grouped = weight.unflatten(1, (-1, group))  # (out, in / group, group)
            low, high = grouped.amin(dim=2), grouped.amax(dim=2)
            scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
            zero = (low + 8 * scale.float()).bfloat16()  # the operation computes (q − 8)·s + z
            steps = (grouped - zero.float()[..., None]) / scale.float()[..., None]
            codes = (steps.round() + 8).clamp(0, 15).to(torch.int32).flatten(1)
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.scales = torch.stack([scale.T, zero.T], dim=2).contiguous()  # (in/g, out, 2)
            self.bias = bias
            self.packed_bytes = self.packed.nbytes + self.scales.nbytes

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, group, self.scales)
            y = y[:, : self.rows].reshape(*x.shape[:-1], self.rows)
            return y if self.bias is None else y + self.bias

    bias = None if linear.bias is None else linear.bias.detach()
    return Int4Linear(linear.weight.detach().float(), bias)
