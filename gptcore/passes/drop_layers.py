"""Leave out the blocks that change the residual stream least.

The influence of a block is one minus the mean cosine between what goes into it and what comes out,
over all positions of a text (ShortGPT, Men et al. 2024, arXiv:2403.03853). A block whose output
points where its input did was nearly skipped anyway. We differ by default: among the blocks of
little influence they go one at a time, each the one without which the predictions on the text
change least. Or a person names the blocks, as the ranking of ``explain.worth`` has them: what each
is worth on a text.

The MLP in front of a gap then makes up for it: what it adds to the residual stream is multiplied by
the matrix that comes nearest to what the blocks behind it added, and the product with its last
layer takes that layer's place (ReplaceMe, Shopkhoev et al. 2025, arXiv:2505.02819). So no weight is
added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field, field_validator

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.base import Coverage, Pass, PassContext, Stage
from gptcore.passes.calibrate import Residual, text_for
from gptcore.spec import BYTES, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT, Block

ENOUGH_TOKENS = 8192
"""Tokens that are looked at: an influence is a mean over positions, and settles soon."""
MEASURED_TOKENS = 1024
"""Tokens on which blocks are left out by turns."""
HEAD_TOKENS = 128
"""Tokens whose predictions are computed at once, as a vocabulary is large."""
MORE_CANDIDATES = 6
"""Blocks that are tried beside as many as are to go."""
DAMPING = 1e-3
"""Share of the mean curvature that holds the matrix of a gap to the identity."""


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

    compensated: bool = Field(
        True,
        title="Compensated",
        description="The MLP in front of a gap makes up for what is gone, as far as a linear map "
        "of its output can.",
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
        """Whether there is anything to choose, or to make up for."""
        return self.count > 0 and (self.compensated or not self.chosen)

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

        Error: what a few tokens' predictions take besides, and hidden states, are left out.
        """
        held = MEASURED_TOKENS * spec.vocabulary * 4
        return before + (held if self.measured and self.layers and not self.chosen else 0)

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
            ids = text_for(self, context)
            few = ids[: max(1, ENOUGH_TOKENS // ids.shape[1])]
            made_up = 0.2 if self.compensated else 0.0
            if not self.chosen:
                tell = partial(_told, context.progress, 0.0, 1.0 - made_up)
                gone, reasons = self._found(model, few, tell)
            if self.compensated:
                make_up(model, few, gone, partial(_told, context.progress, 1.0 - made_up, 1.0))
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

    def _found(
        self, model: GPT, ids: Tensor, progress: Callable[[float], None]
    ) -> tuple[set[int], list[str]]:
        """Return the blocks that go, and for every block what is said of it if it stays."""
        share = 0.3 if self.measured else 1.0
        tell = partial(_told, progress, 0.0, share)
        found = influences(model, Residual(model, ids), tell)
        ranked = sorted(range(len(found)), key=found.__getitem__)
        if not self.measured:
            gone = set(ranked[: self.layers])
            least = max(found[i] for i in gone)
            above = "its influence of {:.3f} is above the {:.3f} of those gone"
            return gone, [above.format(one, least) for one in found]
        candidates = ranked[: self.layers + MORE_CANDIDATES]
        few = ids[: max(1, MEASURED_TOKENS // ids.shape[1])]
        tell = partial(_told, progress, share, 1.0)
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


def make_up(
    model: GPT,
    ids: Tensor,
    gone: Collection[int],
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Let the MLP in front of every gap put out what comes nearest to what the gap's blocks did.

    With m what the MLP adds at a position behind shorter beginnings, a what stands beside it, and y
    what comes out of the gap's last block in the whole model, the matrix T minimises the mean of
    |m·T + a − y|², held to the identity a little. The blocks of a gap in front of all others are
    not made up for, nor is one behind an MLP whose last layer is packed.

    Args:
        model: with all its blocks; the last layers of some MLPs are replaced.
        ids: (N, T) int64.
        gone: the blocks that will be left out.
        progress: told the share done.

    Raises:
        NumericalError: NaN or infinity comes out of a block.
    """
    import torch
    from torch import nn

    from gptcore.linears.wide import wide_products

    def quiet(share: float) -> None:
        pass

    with torch.no_grad(), wide_products(model):
        whole, short = Residual(model, ids), Residual(model, ids)
        for layer, block in enumerate(cast("Iterable[Block]", model.blocks)):
            progress(layer / len(model.blocks))
            whole.advance(layer, progress=quiet)
            if layer in gone:
                continue
            down = block.mlp.down
            if layer + 1 in gone and isinstance(down, nn.Linear):
                wanted = _behind_gap(whole, layer, gone)
                block.mlp.down = _turned(down, _nearest(model, short, layer, wanted))
            short.advance(layer, progress=quiet)
    progress(1.0)


def _behind_gap(whole: Residual, layer: int, gone: Collection[int]) -> Iterator[Tensor]:
    """Yield what the whole model has behind the blocks that go after a layer, batch by batch."""
    gap = layer + 1
    while gap in gone:
        gap += 1
    for x in whole.batches:
        for one in range(layer + 1, gap):
            x = whole.model.blocks[one](x, whole.where, None, one)
        yield x


def _nearest(model: GPT, short: Residual, layer: int, wanted: Iterable[Tensor]) -> Tensor:
    """Return the matrix, (W, W) float64, by which a layer's MLP comes nearest to what is wanted."""
    import torch

    written: list[Tensor] = []
    block = cast("Block", model.blocks[layer])
    hook = block.mlp.register_forward_hook(lambda module, given, out: written.append(out))
    width = model.spec.width
    squares = torch.zeros(width, width, dtype=torch.float64, device=model.embedding.weight.device)
    products = torch.zeros_like(squares)
    try:
        for y, target in zip(short.outputs(layer), wanted, strict=True):
            m = written.pop().flatten(0, -2).double()
            missing = target.flatten(0, -2).double() - y.flatten(0, -2).double()
            squares.addmm_(m.T, m)
            products.addmm_(m.T, m + missing)
    finally:
        hook.remove()
    held = torch.eye(width, dtype=squares.dtype, device=squares.device)
    held *= DAMPING * squares.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    nearest: Tensor = torch.linalg.solve(squares + held, products + held)
    return nearest


def _turned(linear: nn.Linear, matrix: Tensor) -> nn.Linear:
    """Return a layer whose outputs are those of ``linear`` times a matrix."""
    from torch import nn

    weight = linear.weight
    made = nn.Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        device="meta",
    )

    def parameter(one: Tensor) -> nn.Parameter:
        return nn.Parameter(one.to(weight.dtype).contiguous(), requires_grad=False)

    made.weight = parameter(matrix.T @ weight.double())
    if linear.bias is not None:
        made.bias = parameter(linear.bias.double() @ matrix)
    return made


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
