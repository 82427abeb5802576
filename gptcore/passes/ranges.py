"""Which range of a group's weights its grid covers: fewer steps outside, finer ones inside.

Letters of shapes: O outputs, I inputs, G groups of a row, g columns of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.linears.grid import Grid, Quantized

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's range that are tried."""
ROWS_AT_ONCE = 512


def fitted(
    grouped: Tensor, importance: Tensor, grid: Grid, shrinks: Sequence[float] = SHRINKS
) -> tuple[Tensor, Tensor | None]:
    """Return the scale and zero of each group that serve its weights best, by themselves.

    Args:
        grouped: (O, G, g) float32.
        importance: (G, g): how much a squared error of each column counts.
        grid: for these groups.
        shrinks: shares of the range that are tried; the first is kept among equals.

    Returns:
        Two of (O, G) in the grid's type; no zero where it is symmetric.
    """
    import torch

    def cost(scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the weighted squared error of each group, (O, G)."""
        return grid.nearest(grouped, scale, zero).sub_(grouped).square_().mul_(importance).sum(-1)

    scale, zero = grid.fit(grouped, shrinks[0])
    least = cost(scale, zero)
    for shrink in shrinks[1:]:
        other, middle = grid.fit(grouped, shrink)
        now = cost(other, middle)
        better = now < least
        least, scale = torch.where(better, now, least), torch.where(better, other, scale)
        if zero is not None and middle is not None:
            zero = torch.where(better, middle, zero)
    return scale, zero


def rounded(weight: Tensor, importance: Tensor, grid: Grid) -> Quantized:
    """Return each weight rounded to the nearest number of the grid that serves its group best.

    Args:
        weight: (O, I), any float type; never written to.
        importance: (I,): how much a squared error of each column counts.
        grid: its group divides I.
    """
    import torch

    from gptcore.linears.grid import Quantized

    group = grid.width(weight.shape[1])
    codes, scales, zeros = [], [], []
    for rows in torch.split(weight, ROWS_AT_ONCE):
        grouped = rows.float().reshape(len(rows), -1, group)
        scale, zero = fitted(grouped, importance.view(-1, group), grid)
        codes.append(grid.encode(grouped, scale, zero).flatten(1))
        scales.append(scale)
        zeros.append(zero)
    zero = torch.cat([one for one in zeros if one is not None]) if not grid.symmetric else None
    return Quantized(grid.bits, torch.cat(codes), torch.cat(scales), zero)
