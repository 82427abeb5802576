"""Leave out the blocks that change the residual stream least.

The influence of a block is one minus the mean cosine between what goes into it and what comes out,
over all positions of a text (ShortGPT, Men et al. 2024, arXiv:2403.03853). A block whose output
points where its input did was nearly skipped anyway. Or a person names the blocks, as the ranking
of ``explain.worth`` has them: what each is worth on a text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Coverage, Pass, PassContext, Stage
from gptcore.passes.calibrate import Residual, text_for
from gptcore.spec import BYTES, ModelSpec

if TYPE_CHECKING:
    from gptcore.model import GPT

ENOUGH_TOKENS = 8192
"""Tokens that are looked at: an influence is a mean over positions, and settles soon."""


class DropLayers(Pass):
    """Whole blocks fewer: those that a text needs least."""

    name: ClassVar[str] = "drop_layers"
    stage: ClassVar[Stage] = Stage.SHAPE
    title: ClassVar[str] = "Drop layers"
    mechanism: ClassVar[str] = (
        "fewer bytes moved, fewer operations and less cache, in proportion to the blocks dropped"
    )

    layers: int = Field(
        1,
        ge=0,
        le=999,
        title="Layers dropped",
        description="Blocks to leave out, the least influential first; 0 changes nothing.",
    )

    chosen: tuple[int, ...] = Field(
        (),
        max_length=999,
        title="Layers chosen",
        description="These blocks instead, counted from 0, as a ranking of Explain has them.",
    )

    @field_validator("chosen", mode="before")
    @classmethod
    def _from_text(cls, chosen: Any) -> Any:
        return re.findall(r"[^\s,()\[\]]+", chosen) if isinstance(chosen, str) else chosen

    @field_validator("chosen")
    @classmethod
    def _distinct(cls, chosen: tuple[int, ...]) -> tuple[int, ...]:
        if min(chosen, default=0) < 0 or len(set(chosen)) < len(chosen):
            raise ValueError("each layer is chosen once, by its number from 0 on")
        return tuple(sorted(chosen))

    @property
    def count(self) -> int:
        """How many blocks go."""
        return len(self.chosen) or self.layers

    @property
    def needs_calibration(self) -> bool:
        """Whether there is anything to choose."""
        return self.layers > 0 and not self.chosen

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run: a block at least must stay, and those chosen be there."""
        if self.count >= spec.layers:
            return f"it has {spec.layers} layers, of which {self.count} cannot go: drop fewer."
        if self.chosen and self.chosen[-1] >= spec.layers:
            return f"there is no layer {self.chosen[-1]}: the last is {spec.layers - 1}."
        return None

    def on_few_layers(self, layers: int) -> DropLayers:
        """Return the pass with fewer layers to drop: what takes time is to look at them."""
        few = tuple(one for one in self.chosen if one < layers)[: layers - 1]
        return self.model_copy(update={"layers": min(self.layers, layers - 1), "chosen": few})

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with so many layers fewer."""
        return spec.model_copy(update={"layers": spec.layers - self.count})

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the exact bytes: each block has the same."""
        gone = spec.parameters - self.spec_after(spec).parameters
        return before - gone * BYTES[placement.precision]

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Leave out blocks; the model's spec says how many are left.

        Raises:
            InvalidInput: there is no calibration text, too little, or no block would be left.
            NumericalError: NaN or infinity comes out of a block.
        """
        from torch import nn

        spec = model.spec
        if blocked := self.blocked_by(spec, context.placement):
            raise InvalidInput(f"{self.title} cannot run here: {blocked}")
        found: list[float] = []
        if self.needs_calibration:
            ids = text_for(self, context)
            ids = ids[: max(1, ENOUGH_TOKENS // ids.shape[1])]
            found = influences(model, Residual(model, ids), context)
        ranked = sorted(range(len(found)), key=found.__getitem__)
        gone = set(self.chosen or ranked[: self.layers])
        block = sum(one.rows * one.columns for one in spec.linears[:-1])
        reasons = ["it was not chosen"] * spec.layers
        if found:
            least = max(found[i] for i in gone)
            reasons = [
                f"its influence of {one:.3f} is above the {least:.3f} of those gone"
                for one in found
            ]
        context.coverage[self.name] = Coverage(
            block * len(gone),
            spec.matmul_parameters,
            tuple((f"blocks.{i}", one) for i, one in enumerate(reasons) if i not in gone)
            if gone
            else (("blocks", "none was to be dropped"),),
            stored_bytes=0,
            resident_bytes=0,
        )
        model.blocks = nn.ModuleList(b for i, b in enumerate(model.blocks) if i not in gone)
        model.spec = self.spec_after(spec)
        context.progress(1.0)
        return model


def influences(model: GPT, text: Residual, context: PassContext) -> list[float]:
    """Return one minus the mean cosine of input and output, block by block."""
    import torch

    found = []
    with torch.no_grad():
        for layer in range(len(model.blocks)):
            context.progress(layer / len(model.blocks))
            before = list(text.batches)
            text.advance(layer, progress=lambda share: None)
            cosines = [
                torch.cosine_similarity(x.float(), y.float(), dim=-1).flatten()
                for x, y in zip(before, text.batches, strict=True)
            ]
            found.append(1 - torch.cat(cosines).mean().item())
    context.progress(1.0)
    return found
