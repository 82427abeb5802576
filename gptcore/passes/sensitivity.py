"""Which layers hurt when they get fewer bits, and which bits each should have.

The damage of a layer at some bits is measured: the KL divergence of the model's predictions on a
text when only that layer is rounded, from the unchanged model's. Damages of several layers are then
taken to add up, and bits are dealt out so that their sum is small for what they take.

Error: damages do not quite add up; on SmolLM2 the order of the layers is what matters, and what a
choice gives has to be measured as a whole.

Letters of shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes.calibrate import Residual, named_linears
from gptcore.passes.mixed_bits import BITS, MixedBits
from gptcore.passes.packing import replace
from gptcore.passes.quantize import layer_shapes
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT


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
    progress: Callable[[float], None] = lambda ratio: None,
) -> tuple[Damage, ...]:
    """Return the damage of every layer, the head included, at each of some bits.

    The model is as before afterwards. Each layer runs the blocks from its own on, so that a scan
    takes about half as many passes over the text as there are layers, times the bits.

    Args:
        model: in floating point.
        ids: (B, T) int64, the text.
        bits: to round to.
        group: of 3 and 4 bits; layers that it does not divide are left out at these.
        progress: told the share done; raises Cancelled where the user stopped the work.

    Raises:
        InvalidInput: the text does not suit the model.
        NumericalError: the model produces NaN or infinity.
    """
    import torch

    from gptcore.linears.wide import wide_products

    found: list[Damage] = []
    asked = MixedBits.model_validate({"group": group})
    with torch.no_grad(), wide_products(model):
        text = Residual(model, ids)
        reference = _log_probabilities(model, text, 0)
        layers = len(layer_shapes(model.spec))
        stages: list[tuple[int, nn.Module, str]] = [
            (i, block, f"blocks.{i}") for i, block in enumerate(model.blocks)
        ]
        for start, part, below in [*stages, (len(model.blocks), model.head, "head")]:
            for name, linear in named_linears(part, below):
                progress(len({one.layer for one in found}) / layers)
                for width in bits:
                    form = asked.model_copy(update={"bits": width}).format(name)
                    if form.skips(linear.out_features, linear.in_features, "cpu"):
                        continue
                    rounded = form.grid().quantize(linear.weight).dequantized(linear.weight.dtype)
                    replace(model, name, _with_weight(linear, rounded))
                    try:
                        now = _log_probabilities(model, text, start)
                    finally:
                        replace(model, name, linear)
                    found.append(Damage(name, width, _divergence(reference, now)))
                    progress((len({one.layer for one in found}) - 0.5) / layers)
            if start < len(model.blocks):
                text.advance(start, progress=lambda share: None)
    progress(1.0)
    return tuple(found)


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


def _with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    from gptcore.linears import plain

    return plain(weight, linear.bias)


def _log_probabilities(model: GPT, text: Residual, start: int) -> list[Tensor]:
    """Return ln p after every token from block ``start`` on: (T, V) float32 a sequence."""
    import torch

    found = []
    for batch in text.batches:
        x = batch
        for layer in range(start, len(model.blocks)):
            x = model.blocks[layer](x, text.where, None, layer)
        for row in torch.split(x, 1):
            found.append(model.head(model.norm(row))[0].float().log_softmax(-1))
    return found


def _divergence(reference: Sequence[Tensor], now: Sequence[Tensor]) -> float:
    """Return the mean KL divergence over all tokens, in nats."""
    total = tokens = 0.0
    for left, right in zip(reference, now, strict=True):
        total += float((left.exp() * (left - right)).sum())
        tokens += len(left)
    return max(0.0, total / tokens)
