"""Guess tokens ahead with a copy of the model in few bits; the model itself checks them.

The text is that of the model alone, token for token: see ``lookup``. What is gained is time, as
long as most guesses are right, since one step of the model then stands for several tokens. Texts
that are written side by side share their steps, and are not guessed ahead.

Source: Leviathan et al. 2023, arXiv:2211.17192; the draft of the same weights in fewer bits:
Tiwari et al. 2025, arXiv:2502.10424.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Pass, PassContext, Stage, refuse_nan
from gptcore.passes.formats import Format
from gptcore.passes.quantize import layer_shapes
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from gptcore.model import GPT

GROUP = 32
"""Weights that share a scale: with 64, half as many guesses were right (SmolLM2, 4 bits)."""
M = TypeVar("M", bound="nn.Module")


class DraftModel(Pass):
    """A draft of the same weights guesses, the model decides."""

    name: ClassVar[str] = "draft"
    stage: ClassVar[Stage] = Stage.RUNTIME
    title: ClassVar[str] = "Guess ahead with a draft"
    mechanism: ClassVar[str] = (
        "a copy of the weights in few bits guesses some tokens, and the model checks them in one "
        "step: the same text in fewer readings of the weights. A request is faster; a step, and "
        "reading a prompt, are not"
    )

    bits: Literal[3, 4] = Field(4, title="Bits", description="Of a weight of the draft.")
    guesses: int = Field(
        3, ge=1, le=7, title="Guesses", description="Tokens that the draft is ahead, at most."
    )

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why guesses could not be checked there, or None."""
        from gptcore.kernels.library import unavailable

        if placement.device != "cpu":
            return (
                "several tokens are checked at once by the native step, which is for CPUs, not "
                f"{placement.device}."
            )
        return unavailable()

    def caution(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return when it does not help."""
        return (
            "Hot temperatures leave few guesses right, and then it pauses; texts written side by "
            "side are not guessed ahead."
        )

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the bytes with the draft's packed layers; norms and embedding are shared."""
        form = Format(4, GROUP)
        return before + sum(
            form.resident_bytes(one.rows, one.columns, one.bias, placement)
            for _, one in layer_shapes(spec)
        )

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Give the model a draft; its own weights stay as they are.

        Raises:
            InvalidInput: it cannot run here, or the model is packed already.
            NumericalError: a weight is NaN or infinite.
        """
        from torch import nn

        from gptcore.kernels.linear import Arena, NativeLinear
        from gptcore.linears.grid import Grid
        from gptcore.model import Draft, KVCache

        if blocked := self.blocked_by(model.spec, context.placement):
            raise InvalidInput(f"{self.title} cannot run here: {blocked}")
        names = [name for name, _ in layer_shapes(model.spec)]
        if not all(isinstance(model.get_submodule(name), nn.Linear) for name in names):
            raise InvalidInput(
                f"{self.title} needs weights in floating point: a packed model reads hardly more "
                "than its draft would. Leave the pass out."
            )
        draft, arena, grid = _twin(model), Arena(), Grid(self.bits, GROUP)
        packed_bytes = float_bytes = 0
        for done, name in enumerate(names):
            layer = draft.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            refuse_nan(name, layer.weight)
            parent, _, child = name.rpartition(".")
            packed = NativeLinear.of(grid.quantize(layer.weight), layer.bias, arena)
            setattr(draft.get_submodule(parent), child, packed)
            packed_bytes += packed.packed_bytes
            float_bytes += layer.weight.nbytes
            context.progress((done + 1) / len(names))
        draft.cache_kind = KVCache
        model.draft = Draft(draft, self.guesses, packed_bytes / float_bytes)
        return model


def _twin(module: M) -> M:
    """Return a module of the same tensors, whose parts can be replaced without the other's."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # what another pass put there is bound to the other
    twin._parameters = dict(module._parameters)
    twin._modules = {
        name: None if part is None else _twin(part) for name, part in module._modules.items()
    }
    return twin
