"""A linear layer in 8-bit floating point, for GPUs that multiply in it.

Weights have a scale a row and activations one a token, so that the largest number of each is the
largest that float8_e4m3fn holds. Source of the format: Micikevicius et al. 2022, arXiv:2209.05433.

Letters of shapes: T tokens, O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

LARGEST = 448.0
"""The largest number of float8_e4m3fn."""


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (O, I) as float8_e4m3fn, and the scale of each row, (O,) float32.

    Error: 2⁻⁴ of a number, or 2⁻¹⁰ of the row's scale where that is more.
    """
    scale = weight.float().abs().amax(1).clamp_min(1e-12) / LARGEST
    return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """Weights and activations of 8-bit floats: (…, I) -> (…, O), in the type of the input."""

    kind: ClassVar[str] = "fp8"
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.rows, self.columns = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.packed_bytes = sum(tensor.nbytes for tensor in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs."""
        flat = x.reshape(-1, self.columns)
        step = flat.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / LARGEST  # (T, 1)
        y: Tensor = torch._scaled_mm(
            (flat.float() / step).to(torch.float8_e4m3fn),
            self.codes.t(),
            scale_a=step,
            scale_b=self.scale[None],
            out_dtype=torch.bfloat16,
        )
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.rows)
        return y if self.bias is None else y + self.bias

    def dequantized(self) -> Tensor:
        """Return the weights that this layer computes with, (O, I) float32."""
        return self.codes.float() * self.scale[:, None]

    def stored(self) -> dict[str, Tensor]:
        """Return codes, scales, and the bias if any."""
        return dict(self.named_buffers())

    def settings(self) -> dict[str, Any]:
        """Return nothing: the tensors say all."""
        return {}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Return the layer that ``stored`` gave, bit for bit."""
        return cls(tensors["codes"], tensors["scale"], tensors.get("bias"))
