"""SmoothQuant: 8-bit activations with one scale a layer, known beforehand.

Source: Xiao et al. 2022, arXiv:2211.10438, section 4: a few channels of the activations are far
larger than the rest and take all the steps of a common scale. Each channel j is divided by
s_j = max|x_j|^α / max|w_j|^(1 − α) and the weights are multiplied by it, so that both are about as
hard to round. The division goes into what the channels come from (see ``folding.py``).

We differ in α: by default it is chosen for each place, as the one with which rounding inputs and
weights is expected to change the outputs least.

The range of a layer's inputs is the one that a calibration text brings to it, after the division;
what lies outside is clipped.

Letters of shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gptcore.device import Placement
from gptcore.passes.base import PassContext
from gptcore.passes.calibrate import Statistic, Statistics, calibrate, text_for
from gptcore.passes.folding import Folding, shared, sites
from gptcore.passes.formats import Format
from gptcore.passes.packing import Fill, replace
from gptcore.passes.quantize import Int8
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.linears.quantized import PackedLinear
    from gptcore.model import GPT

FORMAT = Format(8, activations=True, ranged=True)
MOMENTS: tuple[Statistic, ...] = ("moments",)
LEVELS = 255
STRENGTHS = tuple(i / 20 for i in range(4, 21))
"""Smoothings that are tried, least first."""
LEAST = 1e-5
"""The least magnitude of a channel or column that counts."""


class Int8Static(Int8):
    """8-bit weights, one scale a row; activations to 8 bits in a range known beforehand."""

    name: ClassVar[str] = "int8_static"
    title: ClassVar[str] = "8-bit weights and activations, static scales"
    mechanism: ClassVar[str] = (
        "a quarter of the bytes of fp32, integer multiplications; no range is looked for at run "
        "time"
    )
    later: ClassVar[frozenset[str]] = frozenset()

    method: Literal["round"] = Field(
        "round", title="Method", description="Weights are rounded to the nearest."
    )
    smoothing: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        title="Smoothing",
        description="How much of the activations' large channels is moved into the weights: 0 "
        "leaves all as it is, 1 makes all channels equally large.",
    )
    search: bool = Field(
        True,
        title="Search",
        description="Choose the smoothing of each place anew, for the least rounding error that is "
        "to be expected; the one above then only says whether there is any.",
    )

    def format(self, name: str) -> Format:
        """Return the form of every layer."""
        return FORMAT

    @property
    def needs_calibration(self) -> bool:
        """Always: the ranges come from a text."""
        return True

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run: its operation is one of x86 CPUs."""
        if placement.device != "cpu":
            return f"its operation is for the CPU, not {placement.device}; choose int8 there."
        return super().blocked_by(spec, placement)

    def _fill(self) -> Fill:
        return partial(_fill, self)


def _fill(one: Int8Static, model: GPT, formats: dict[str, Format], context: PassContext) -> None:
    """Look at the inputs of all layers, then smooth and pack them block by block."""
    seen: dict[str, Statistics] = {}

    def progress(share: float) -> None:
        context.progress(0.9 * share)

    calibrate(
        model,
        text_for(one, context),
        lambda name, linear, known: seen.update({name: known}),
        progress=progress,
        statistics=MOMENTS,
        wanted=formats.__contains__,
        head="head" in formats,
    )
    for done, (number, block) in enumerate(model.blocks.named_children()):
        context.progress(0.9 + 0.1 * done / len(model.blocks))
        below = f"blocks.{number}."
        known = {name.removeprefix(below): seen[name] for name in formats if name.startswith(below)}
        for name, layer in _smoothed(model.spec, block, known, one).items():
            replace(model, f"{below}{name}", layer)
    if "head" in formats:
        head = model.head
        replace(model, "head", _packed(head.weight.detach(), head.bias, seen["head"]))


def _smoothed(
    spec: ModelSpec, block: nn.Module, seen: dict[str, Statistics], one: Int8Static
) -> dict[str, PackedLinear]:
    """Return the packed layers of a block by name."""
    folding = Folding(block, spec)
    scales: dict[str, Tensor] = {}
    for site in sites(spec):
        names = [name for name in site.layers if name in seen]
        if one.smoothing > 0 and names and folding.can(site):
            weights = [folding.layer(name).weight.detach() for name in names]
            choices = [
                shared(smoothing_scale(weights, _absmax(seen[names[0]]), smoothing), spec, site)
                for smoothing in (STRENGTHS if one.search else (one.smoothing,))
            ]
            best = min(choices, key=partial(expected_error, weights, seen[names[0]]))
            scales |= dict.fromkeys(names, folding.add(site, best))
    made = {
        name: _packed(*folding.tensors(name), known, scales.get(name))
        for name, known in seen.items()
    }
    folding.settle(keep=set(seen))
    return made


def smoothing_scale(weights: Sequence[Tensor], absmax: Tensor, smoothing: float) -> Tensor:
    """Return what each input channel is divided by, (I,).

    Args:
        weights: (O, I) of each layer with that input.
        absmax: (I,): the largest magnitude of each input channel.
        smoothing: α of the paper.
    """
    import torch

    columns = torch.stack([one.abs().amax(0) for one in weights]).amax(0).float()
    inputs = absmax.clamp_min(LEAST) ** smoothing
    return (inputs / columns.clamp_min(LEAST) ** (1 - smoothing)).clamp_min(LEAST)


def expected_error(weights: Sequence[Tensor], seen: Statistics, scale: Tensor) -> float:
    """Return the mean squared error of the outputs, summed, if rounding were independent noise.

    A number that is rounded in steps of d is off by d² / 12 in the mean square; each output sums
    these over its inputs, weighed by what they are multiplied with.

    Args:
        weights: (O, I) of each layer with that input.
        seen: its input.
        scale: (I,), by which the input's channels are divided.
    """
    assert seen.rms is not None
    low, high = _range(seen, scale)
    inputs, total = (seen.rms / scale).square().sum(), 0.0
    for weight in weights:
        scaled = weight.float() * scale
        from_inputs = ((high - low) / LEVELS) ** 2 * scaled.square().sum()
        from_weights = (scaled.abs().amax(1) / (LEVELS // 2)).square().sum() * inputs
        total += float(from_inputs + from_weights) / 12
    return total


def _range(seen: Statistics, scale: Tensor | None) -> tuple[float, float]:
    """Return the least and the greatest input, after the division."""
    assert seen.low is not None
    assert seen.high is not None
    low, high = (seen.low, seen.high) if scale is None else (seen.low / scale, seen.high / scale)
    return min(low.min().item(), 0.0), max(high.max().item(), 0.0)


def _packed(
    weight: Tensor, bias: Tensor | None, seen: Statistics, scale: Tensor | None = None
) -> PackedLinear:
    from gptcore.linears.quantized import StaticInt8Linear

    numbers = FORMAT.grid().quantize(weight)
    return StaticInt8Linear(numbers, bias, *_range(seen, scale))


def _absmax(seen: Statistics) -> Tensor:
    assert seen.absmax is not None
    return seen.absmax
