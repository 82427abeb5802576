"""Put the linear layers in 8-bit floating point, on GPUs that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gptcore.device import Placement, compute_capability
from gptcore.passes.base import Coverage, Pass, PassContext, Stage, refuse_nan
from gptcore.spec import BYTES, ModelSpec

if TYPE_CHECKING:
    from gptcore.model import GPT

CAPABILITY = (8, 9)
"""The first CUDA compute capability (Ada) that multiplies 8-bit floats."""
MULTIPLE = 16
"""The operation takes rows and columns in whole multiples of this."""


class Fp8(Pass):
    """8-bit floating-point weights, a scale a row; activations likewise, a scale a token."""

    name: ClassVar[str] = "fp8"
    stage: ClassVar[Stage] = Stage.NUMBERS
    title: ClassVar[str] = "8-bit floating point"
    mechanism: ClassVar[str] = "half of the bytes of bf16, and multiplications at twice its rate"
    quantizes: ClassVar[bool] = True

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run: it needs such a GPU, and bf16 around the layers."""
        if not placement.device.startswith("cuda:"):
            return f"only NVIDIA GPUs from Ada on have it, not {placement.device}; choose int8."
        capability = compute_capability(placement.device)
        if capability is None:
            return f"what {placement.device} can do is unknown here; choose int8."
        if capability < CAPABILITY:
            return (
                f"{placement.device} has no 8-bit floating point (compute capability "
                f"{capability[0]}.{capability[1]}, 8.9 is needed); choose int8."
            )
        if placement.precision != "bf16":
            return f"its operation puts out bf16, not {placement.precision}; choose bf16 under it."
        return None

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the exact bytes, scales included; what is skipped stays."""
        size, after = BYTES[placement.precision], before
        for one in spec.linears:
            if _skips(one.rows, one.columns):
                continue
            shared = one.name == "head" and spec.tied_head
            floats = 0 if shared else one.rows * one.columns * size
            after += (one.rows * (one.columns + 4) - floats) * one.count
        return after

    def weights_peak_bytes(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the most bytes: a layer is there in fp32 for a moment."""
        after = self.weights_bytes_after(spec, placement, before)
        return max(before, after) + max(one.rows * one.columns for one in spec.linears) * 4

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every linear layer whose rows and columns the operation takes.

        Raises:
            NumericalError: a weight is NaN or infinite.
        """
        from torch import nn

        from gptcore.linears import resident_bytes, stored_bytes
        from gptcore.linears.fp8 import Fp8Linear, rounded
        from gptcore.passes.packing import replace

        names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
        made: list[Fp8Linear] = []
        skipped, total = [], 0
        for done, name in enumerate(names):
            context.progress(done / len(names))
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            refuse_nan(name, linear.weight)
            total += linear.weight.numel()
            if reason := _skips(linear.out_features, linear.in_features):
                skipped.append((name, reason))
                continue
            bias = None if linear.bias is None else linear.bias.detach()
            made.append(Fp8Linear(*rounded(linear.weight.detach()), bias))
            replace(model, name, made[-1])
        context.progress(1.0)
        context.coverage[self.name] = Coverage(
            sum(one.rows * one.columns for one in made),
            total,
            tuple(skipped),
            stored_bytes=sum(map(stored_bytes, made)),
            resident_bytes=sum(map(resident_bytes, made)),
        )
        return model


def _skips(rows: int, columns: int) -> str | None:
    """Return why a layer of that shape is left as it is, or None."""
    if rows % MULTIPLE or columns % MULTIPLE:
        return f"{rows} × {columns} are no multiples of {MULTIPLE}"
    return None
