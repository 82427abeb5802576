"""Which layers hurt when they get fewer bits, and which bits each should have.

The damage of a layer at some bits is the KL divergence of the model's predictions on a text when
only that layer is rounded, from the unchanged model's. For small changes it is half of δᵀ·F·δ, with
δ the change of the layer's weights and F the Fisher information: the mean of g·gᵀ, where g is the
gradient of the log-likelihood of tokens that the model itself draws (Martens 2014,
arXiv:1412.1193, section 5). A sequence gives one sample, (g·δ)² ÷ 2, of the damages of all layers
at all bits together, at the price of a few runs over the text; rounding each layer by itself and
measuring takes hundreds of them. Damages of several layers are then taken to add up, and bits are
dealt out so that their sum is small for what they take.

Error: of n sequences a damage is known to √(2 / n) of itself, ± 25 % with 32; it is a quadratic
form's, so what ruins the model altogether counts for too much. Damages do not quite add up: on
SmolLM2 those of all layers at 4 bits sum to 0.31, and 0.39 is measured. The order of the layers is
what matters, and what a choice gives has to be measured as a whole.

Letters of shapes: B sequences, T tokens, V vocabulary, W width, O outputs and I inputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.calibrate import TOKENS_AT_ONCE, Residual, named_linears
from gptcore.passes.mixed_bits import BITS, MixedBits
from gptcore.passes.quantize import layer_shapes
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gptcore.model import GPT

ROWS_AT_ONCE = 8192
"""Rows of the head that are looked at together."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What a layer's rounding does to the model."""

    layer: str
    bits: int
    kl: float
    """Mean over the text's tokens, in nats."""


def scan(
    model: GPT,
    ids: Tensor,
    *,
    bits: Sequence[int] = BITS,
    group: int = 64,
    seed: int = 0,
    progress: Callable[[float], None] = lambda ratio: None,
) -> tuple[Damage, ...]:
    """Return the damage of every layer, the head included, at each of some bits.

    The model is not written to. Beside it and one block's gradients, what is in memory are the
    hidden states of ``TOKENS_AT_ONCE`` tokens in front of every block.

    Args:
        model: in floating point; fp32, or rounding gradients is seen too.
        ids: (B, T) int64, the text; more sequences tell more than longer ones.
        bits: to round to.
        group: of 3 and 4 bits; layers that it does not divide are left out at these.
        seed: of the tokens that the model draws.
        progress: told the share done; raises Cancelled where the user stopped the work.

    Raises:
        InvalidInput: the text does not suit the model, or nothing in it can be rounded.
        NumericalError: the model produces NaN or infinity.
    """
    import torch

    drawn = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    chunks = torch.split(ids, max(1, TOKENS_AT_ONCE // ids.shape[1]))
    products: dict[tuple[str, int], list[Tensor]] = {}
    with torch.no_grad():
        for done, chunk in enumerate(chunks):
            tell = partial(_part, progress, done / len(chunks), (done + 1) / len(chunks))
            for key, found in _products(model, chunk, bits, group, drawn, tell):
                products.setdefault(key, []).append(found)
    progress(1.0)
    if not products:
        raise InvalidInput(
            "There is no layer whose bits could be chosen: earlier passes took all of them. Begin "
            "with a recipe that leaves weights in floating point."
        )
    means = {
        key: float(torch.cat(found).double().square().mean()) for key, found in products.items()
    }
    return tuple(
        Damage(name, width, means[name, width] / 2 / ids.shape[1])
        for name, _ in layer_shapes(model.spec)
        for width in bits
        if (name, width) in means
    )


def _products(
    model: GPT,
    ids: Tensor,
    bits: Sequence[int],
    group: int,
    drawn: torch.Generator,
    progress: Callable[[float], None],
) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Yield for each layer and its bits g·δ of every sequence, (B,), from the head to the front."""
    import torch

    steps = 2 * len(model.blocks) + 1
    text = Residual(model, ids)
    before: list[list[Tensor]] = []
    for layer in range(len(model.blocks)):
        progress(layer / steps)
        before.append(list(text.batches))
        text.advance(layer, progress=lambda share: None)
    progress(len(before) / steps)
    changes = {
        ("head", width): change
        for name, linear in named_linears(model.head, "head")
        for width in bits
        if (change := _change(name, linear, width, group)) is not None
    }
    sums: dict[tuple[str, int], list[Tensor]] = {key: [] for key in changes}
    slopes = []
    for x in text.batches:
        rows = [_from_head(model, row, changes, sums, drawn) for row in torch.split(x, 1)]
        slopes.append(torch.cat(rows))
    del changes
    yield from ((key, torch.stack(found)) for key, found in sums.items())
    for layer in reversed(range(len(model.blocks))):
        progress((steps - 1 - layer) / steps)
        linears = named_linears(model.blocks[layer], f"blocks.{layer}")
        changes = {
            (name, width): change
            for name, linear in linears
            for width in bits
            if (change := _change(name, linear, width, group)) is not None
        }
        sums = {key: [] for key in changes}
        for place, x in enumerate(before.pop()):
            run = partial(model.blocks[layer], where=text.where, cache=None, layer=layer)
            slopes[place], seen = _backwards(run, x, slopes[place], linears)
            for name, (inputs, slope) in seen.items():
                gradient = slope.transpose(1, 2) @ inputs  # (B, O, I)
                for width in bits:
                    if (name, width) in changes:
                        found = (gradient * changes[name, width]).sum((1, 2))
                        sums[name, width].append(found)
        yield from ((key, torch.cat(found)) for key, found in sums.items())


def _from_head(
    model: GPT,
    x: Tensor,
    changes: Mapping[tuple[str, int], Tensor],
    sums: Mapping[tuple[str, int], list[Tensor]],
    drawn: torch.Generator,
) -> Tensor:
    """Draw a token behind each of a sequence's; return the slope of their log-likelihood in ``x``.

    What the head's changes make of it is added to ``sums``.

    Args:
        model: for its last norm and its head.
        x: (1, T, W), behind the last block.
        changes: of the head's weights, (V, W) each.
        sums: by the same keys.
        drawn: what the tokens are drawn with.
    """
    import torch

    with torch.enable_grad():
        entered = x.detach().requires_grad_()
        normed = model.norm(entered)
        logits = model.head(normed)
    slope = -logits.detach()[0].float().softmax(-1)  # (T, V)
    tokens = torch.multinomial(-slope, 1, generator=drawn)
    slope.scatter_add_(1, tokens, torch.ones_like(slope[:, :1]))
    for key, change in changes.items():
        found = slope.new_zeros(())
        for begin in range(0, len(change), ROWS_AT_ONCE):
            rows = slice(begin, begin + ROWS_AT_ONCE)
            gradient = slope[:, rows].T @ normed.detach()[0].float()
            found += (gradient * change[rows]).sum()
        sums[key].append(found)
    (result,) = torch.autograd.grad(logits, entered, slope[None].to(logits.dtype))
    return result


def _backwards(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    slope: Tensor,
    linears: Sequence[tuple[str, nn.Linear]],
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the slope in front of a block, and by layer its inputs and the slope of its outputs.

    Args:
        run: the block.
        x: (B, T, W), what goes into it.
        slope: (B, T, W), of what comes out.
        linears: its layers, by name.
    """
    import torch

    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, linear: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen[name] = given[0].detach().float(), made

    hooks = [one.register_forward_hook(partial(keep, name)) for name, one in linears]
    try:
        with torch.enable_grad():
            entered = x.detach().requires_grad_()
            left = run(entered)
    finally:
        for hook in hooks:
            hook.remove()
    first, *others = torch.autograd.grad(left, [entered, *(y for _, y in seen.values())], slope)
    return first, {
        name: (inputs, found.float())
        for (name, (inputs, _)), found in zip(seen.items(), others, strict=True)
    }


def _change(name: str, linear: nn.Linear, bits: int, group: int) -> Tensor | None:
    """Return what rounding adds to a layer's weights, (O, I) in bfloat16, which is exact enough.

    None where the group does not divide its columns.
    """
    form = MixedBits.model_validate({"bits": bits, "group": group}).format(name)
    if form.skips(linear.out_features, linear.in_features, "cpu"):
        return None
    weight = linear.weight.detach().float()
    return form.grid().quantize(weight).dequantized().sub_(weight).bfloat16()


def _part(tell: Callable[[float], None], begin: float, end: float, share: float) -> None:
    tell(begin + share * (end - begin))


def assign(
    damages: Sequence[Damage],
    spec: ModelSpec,
    effective_bits: float,
    *,
    group: int = 64,
) -> MixedBits:
    """Return the bits of every layer with the least sum of damages for what a file may take.

    Each layer starts with the bits that take least, and the step up that saves most damage for its
    bytes is taken, as long as it fits.

    Args:
        damages: of ``scan``, for every layer at each of its choices.
        spec: the shape.
        effective_bits: stored bits ÷ weights, scales and zeros counted, of all scanned layers.
        group: of 3 and 4 bits.

    Raises:
        InvalidInput: even the fewest bits take more.
    """
    asked = MixedBits.model_validate({"group": group})
    shapes = dict(layer_shapes(spec))
    placement = Placement(precision="bf16")
    choices: dict[str, list[tuple[int, float, int]]] = {}
    """By layer: (bytes, damage, bits), ascending in bytes."""
    for one in damages:
        shape = shapes[one.layer]
        form = asked.model_copy(update={"bits": one.bits}).format(one.layer)
        size = form.stored_bytes(shape.rows, shape.columns, False, placement)
        choices.setdefault(one.layer, []).append((size, one.kl, one.bits))
    weights = sum(shapes[name].rows * shapes[name].columns for name in choices)
    hulls = {name: _lower_hull(sorted(known)) for name, known in choices.items()}
    left = int(effective_bits * weights / 8) - sum(hull[0][0] for hull in hulls.values())
    if left < 0:
        least = 8 * sum(hull[0][0] for hull in hulls.values()) / weights
        raise InvalidInput(
            f"{effective_bits:g} bits a weight are fewer than these layers take at least, "
            f"{math.ceil(least * 100) / 100:g} with scales: choose more, or larger groups."
        )
    chosen = dict.fromkeys(hulls, 0)
    steps = sorted(
        (
            ((before[1] - after[1]) / (after[0] - before[0]), name, place)
            for name, hull in hulls.items()
            for place, (before, after) in enumerate(pairwise(hull), start=1)
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    for _, name, place in steps:
        more = hulls[name][place][0] - hulls[name][chosen[name]][0]
        if place == chosen[name] + 1 and more <= left:
            left -= more
            chosen[name] = place
    return _written({name: hulls[name][place][2] for name, place in chosen.items()}, group)


def _lower_hull(points: Sequence[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Return the choices of a layer that are best for some price of a byte, by rising bytes."""
    hull: list[tuple[int, float, int]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - point[1]) * (hull[-1][0] - hull[-2][0]) >= (
            hull[-2][1] - hull[-1][1]
        ) * (point[0] - hull[-1][0]):
            hull.pop()
        hull.append(point)
    return hull


def _written(bits: Mapping[str, int], group: int) -> MixedBits:
    """Return the pass that says these bits: the most frequent ones first, the others by name."""
    values = list(bits.values())
    common = max(BITS, key=values.count)
    others = " ".join(f"{name}:{one}" for name, one in bits.items() if one != common)
    return MixedBits.model_validate({"bits": common, "layers": others, "group": group})
