"""Leave out the blocks that change the residual stream least.

The influence of a block is one minus the mean cosine between what goes into it and what comes out,
over all positions of a text (ShortGPT, Men et al. 2024, arXiv:2403.03853). A block whose output
points where its input did was nearly skipped anyway. We differ by default: among the blocks of
little influence they go one at a time, each the one without which the predictions on the text
change least. Or a person names the blocks, as the ranking of ``explain.worth`` has them: what each
is worth on a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Coverage, Pass, PassContext, Stage
from gptcore.passes.calibrate import Residual, text_for
from gptcore.spec import BYTES, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

ENOUGH_TOKENS = 8192
"""Tokens that are looked at: an influence is a mean over positions, and settles soon."""
MEASURED_TOKENS = 1024
"""Tokens on which blocks are left out by turns."""
HEAD_TOKENS = 128
"""Tokens whose predictions are computed at once, as a vocabulary is large."""
MORE_CANDIDATES = 6
"""Blocks that are tried beside as many as are to go."""


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

    measured: bool = Field(
        True,
        title="Measured",
        description="Leave out the least influential ones by turns and see what it does to the "
        "predictions, one block at a time; else go by influence alone, which is sooner.",
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

    def weights_peak_bytes(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the whole model, and the predictions that those of shorter ones are held against.

        Error: what a few tokens' predictions take besides is left out.
        """
        held = MEASURED_TOKENS * spec.vocabulary * 4
        return before + (held if self.needs_calibration and self.measured else 0)

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
        gone, reasons = set(self.chosen), ["it was not chosen"] * spec.layers
        if self.needs_calibration:
            gone, reasons = self._found(model, text_for(self, context), context)
        block = sum(one.rows * one.columns for one in spec.linears[:-1])
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

    def _found(self, model: GPT, ids: Tensor, context: PassContext) -> tuple[set[int], list[str]]:
        """Return the blocks that go, and for every block what is said of it if it stays."""
        share = 0.3 if self.measured else 1.0
        few = ids[: max(1, ENOUGH_TOKENS // ids.shape[1])]
        tell = partial(_told, context.progress, 0.0, share)
        found = influences(model, Residual(model, few), tell)
        ranked = sorted(range(len(found)), key=found.__getitem__)
        if not self.measured:
            gone = set(ranked[: self.layers])
            least = max(found[i] for i in gone)
            above = "its influence of {:.3f} is above the {:.3f} of those gone"
            return gone, [above.format(one, least) for one in found]
        candidates = ranked[: self.layers + MORE_CANDIDATES]
        few = ids[: max(1, MEASURED_TOKENS // ids.shape[1])]
        tell = partial(_told, context.progress, share, 1.0)
        gone, damages = least_missed(model, few, candidates, self.layers, tell)
        most = max(found[i] for i in candidates)
        return gone, [
            f"without it too, KL is {damages[i]:.3f}"
            if i in damages
            else f"its influence of {one:.3f} is above the {most:.3f} of those tried"
            for i, one in enumerate(found)
        ]


def _told(tell: Callable[[float], None], begin: float, end: float, share: float) -> None:
    """Tell of a part as a share of the whole."""
    tell(begin + share * (end - begin))


def least_missed(
    model: GPT,
    ids: Tensor,
    candidates: Sequence[int],
    count: int,
    progress: Callable[[float], None],
) -> tuple[set[int], dict[int, float]]:
    """Return the blocks to leave out, and the damage of each other candidate beside them.

    Args:
        model: with all its blocks.
        ids: (N, T) int64.
        candidates: blocks that may go.
        count: how many go, one after another.
        progress: told the share done.

    Returns:
        The blocks, and by block the mean KL divergence of the predictions, in nats, from those of
        the whole model, when it goes in the place of the last one.
    """
    import torch

    from gptcore.linears.wide import wide_products

    gone: set[int] = set()
    damages: dict[int, float] = {}
    with torch.no_grad(), wide_products(model):
        blocks = range(len(model.blocks))
        whole = list(_predicted(model, Residual(model, ids).batches, ids, blocks))
        for turn in range(count):
            damages = {}
            text = Residual(model, ids)
            kept = [i for i in range(len(model.blocks)) if i not in gone]
            for layer in kept:
                if layer in candidates:
                    rest = [i for i in kept if i > layer]
                    now = _predicted(model, text.batches, ids, rest)
                    damages[layer] = _divergence(whole, now)
                    progress((turn + len(damages) / (len(candidates) - turn)) / count)
                text.advance(layer, progress=lambda share: None)
            gone.add(min(damages, key=damages.__getitem__))
    return gone, damages


def _predicted(
    model: GPT, batches: Sequence[Tensor], ids: Tensor, layers: Sequence[int]
) -> Iterator[Tensor]:
    """Yield ln p after every token when these blocks follow, (n, V) float32 of n tokens each."""
    import torch

    where = model.enter(ids[:1].to(model.embedding.weight.device))[1]
    for x in batches:
        for layer in layers:
            x = model.blocks[layer](x, where, None, layer)
        for some in torch.split(model.norm(x).flatten(0, 1), HEAD_TOKENS):
            yield model.head(some).float().log_softmax(-1)


def _divergence(whole: Sequence[Tensor], now: Iterable[Tensor]) -> float:
    """Return the mean KL divergence over all tokens, in nats."""
    pairs = zip(whole, now, strict=True)
    sums = [float((one.exp() * (one - other)).sum()) for one, other in pairs]
    return sum(sums) / sum(map(len, whole))


def influences(
    model: GPT, text: Residual, progress: Callable[[float], None] = lambda share: None
) -> list[float]:
    """Return one minus the mean cosine of input and output, block by block."""
    import torch

    found = []
    with torch.no_grad():
        for layer in range(len(model.blocks)):
            progress(layer / len(model.blocks))
            before = list(text.batches)
            text.advance(layer, progress=lambda share: None)
            cosines = [
                torch.cosine_similarity(x.float(), y.float(), dim=-1).flatten()
                for x, y in zip(before, text.batches, strict=True)
            ]
            found.append(1 - torch.cat(cosines).mean().item())
    progress(1.0)
    return found
