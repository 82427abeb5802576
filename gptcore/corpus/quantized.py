"""A teacher of 8-bit weights whose activations are quantized row by row.

A batch multiplies much arithmetic with few bytes, so integers are what makes it faster: twice as
fast as fp32 here. One scale for the activations of a whole call, as the int8 pass has, lets every
text pay for the largest activation of its neighbours.

Error: on 48 texts of 64 tokens read side by side, the mean KL divergence from fp32 was 0.06 nats a
token with a scale a row and 0.19 with one scale (SmolLM2-135M).
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from gptcore.device import cpu_flags

if TYPE_CHECKING:
    from gptcore.model import GPT


def suits(device: str) -> bool:
    """Return whether integers are worth it: on x86 CPUs that add four products at once."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return device == "cpu" and x86 and "avx512_vnni" in cpu_flags()


def quantize_rows(model: GPT) -> GPT:
    """Replace every linear layer of an fp32 model, in place, and return it."""
    import torch
    from torch import Tensor, nn

    class RowInt8(nn.Module):
        """(…, in) float32 -> (…, out) float32."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach()  # (out, in)
            self.scale = weight.abs().amax(1).clamp_min(1e-12) / 127  # (out,)
            self.weight = (weight / self.scale[:, None]).round().to(torch.int8).t()
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])  # (R, in)
            scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127  # (R, 1)
            codes = (rows / scale).round_().to(torch.int8)
            y: Tensor = torch._int_mm(codes, self.weight) * scale  # (R, out)
            y = y.mul_(self.scale).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias

    for name, one in list(model.named_modules()):
        if isinstance(one, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, RowInt8(one))
    return model
