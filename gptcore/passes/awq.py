"""AWQ: give the channels with large inputs finer steps, by scaling them up before rounding.

Source: Lin et al. 2023, arXiv:2306.00978, section 3: the scale of channel j is a power α of the
mean magnitude of its input, the same α for a layer; the α is kept with which rounding changes the
outputs least on the calibration text. The inverse scale goes where the input comes from (see
``folding.py``). As the authors' program does, the range of a group is shrunk where that helps.

We differ in how the change of the outputs is computed: not by running the layer, but as
tr(D·H·Dᵀ) for the change D of the weights and the mean H of x·xᵀ, which is the same number.

Letters of shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.linears.grid import Grid

POWERS = tuple(i / 10 for i in range(11))
"""0 leaves everything as it is."""


def channel_scales(
    weights: Sequence[tuple[Tensor, Grid]],
    hessian: Tensor,
    mean_abs: Tensor,
    share: Callable[[Tensor], Tensor] = lambda scale: scale,
    powers: Sequence[float] = POWERS,
) -> Tensor:
    """Return the scale of each input channel, (I,), with which rounding changes least.

    Args:
        weights: (O, I) of each layer with that input, and its grid.
        hessian: (I, I): the mean of x·xᵀ.
        mean_abs: (I,): the mean magnitude of each input channel.
        share: makes scales equal that must be.
        powers: of the magnitude, to be tried; the first is kept among equals.
    """
    import torch

    magnitude = mean_abs.clamp_min(mean_abs.mean() * 1e-4 + 1e-12)
    best, least = torch.ones_like(magnitude), torch.inf
    for power in powers:
        scale = share(magnitude**power)
        scale = scale / (scale.max() * scale.min()).sqrt()
        cost = sum(output_change(weight, scale, grid, hessian) for weight, grid in weights)
        if cost < least:
            best, least = scale, cost
    return best


def output_change(weight: Tensor, scale: Tensor, grid: Grid, hessian: Tensor) -> float:
    """Return the summed mean square by which rounding changes the outputs.

    Args:
        weight: (O, I).
        scale: (I,), by which the columns are scaled before rounding.
        grid: its group divides I.
        hessian: (I, I): the mean of x·xᵀ.
    """
    change = grid.quantize(weight.float() * scale).dequantized() / scale - weight.float()
    return float((change @ hessian).mul_(change).sum())
