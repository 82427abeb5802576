"""GPTQ: round a layer's columns one by one, and let the later ones make up for the error.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1. What rounding column i adds to the
layer's squared error on the calibration text is least if each later column j moves by
−e · U[i, j], where e is the error of column i divided by U[i, i], and U is the upper Cholesky
factor of the inverse of H, the mean of x·xᵀ. The columns with the largest inputs come first (the
authors' later ``act_order``): they are rounded before others pushed their errors onto them.

We differ in two things. Scales are fixed beforehand, so that groups stay where they are in spite
of the order; and the range of a group is shrunk where that lowers its own error, weighted by the
mean squares of the inputs.

Letters of shapes: O outputs, I inputs, G groups of a row, g columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptcore.passes.calibrate import inverse_factor
from gptcore.passes.ranges import fitted

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.linears.grid import Grid, Quantized

BLOCK = 128
"""Columns whose errors are pushed onto the rest together."""
ROWS_AT_ONCE = 4096
"""Rows are independent of one another, and fewer of them stay in the processor's cache."""
DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean, as in the paper."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a text brings to a layer, ready to be solved with; layers of the same input share it."""

    importance: Tensor
    """(I,): the mean square of each input."""
    order: Tensor
    """(I,): the columns in the order in which they are rounded."""
    factor: Tensor
    """(I, I): U of the Hessian in that order."""

    @classmethod
    def of(cls, hessian: Tensor, damping: float = DAMPING) -> Inputs:
        """Return them for a Hessian, (I, I) float32; it is not written to.

        Raises:
            NumericalError: the Hessian holds NaN, or cannot be inverted.
        """
        importance = hessian.diagonal()
        order = importance.argsort(descending=True, stable=True)
        return cls(importance, order, inverse_factor(hessian[order][:, order], damping))


def solve(weight: Tensor, inputs: Inputs, grid: Grid) -> Quantized:
    """Return numbers of the grid that change the layer's outputs on the text little.

    Error: none is bounded; on the layers of a trained model the mean squared error of the outputs
    was 0.32 (4 bits, groups of 64) and 0.25 (3 bits) of what rounding to the nearest gives.

    Args:
        weight: (O, I), any float type; never written to.
        inputs: what reaches the layer.
        grid: its group divides I.
    """
    import torch

    from gptcore.linears.grid import Quantized

    parts = [_solved(rows.float(), inputs, grid) for rows in torch.split(weight, ROWS_AT_ONCE)]
    codes, scales, zeros = zip(*parts, strict=True)
    zero = None if grid.symmetric else torch.cat(zeros)
    return Quantized(grid.bits, torch.cat(codes), torch.cat(scales), zero)


def _solved(weight: Tensor, inputs: Inputs, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes (O, I), scale and zero (O, G) of some rows; the loop of the paper."""
    import torch

    rows, columns = weight.shape
    group = grid.width(columns)
    grouped = weight.view(rows, -1, group)
    scale, zero = fitted(grouped, inputs.importance.view(-1, group), grid)
    place = inputs.order // group  # (I,): the group of each column
    left = weight.T[inputs.order].contiguous()  # (I, O): a column is one piece of memory
    found = torch.empty_like(left, dtype=torch.uint8)
    for begin in range(0, columns, BLOCK):
        end = min(columns, begin + BLOCK)
        within = inputs.factor[begin:end, begin:end]
        step = scale.T.float()[place[begin:end]]  # (block, O)
        each = step.reciprocal()
        middle = None if zero is None else zero.T.float()[place[begin:end]]
        weigh = step / within.diagonal()[:, None]
        errors = torch.empty_like(step)
        for i in range(end - begin):
            column = torch.addmv(left[begin + i], errors[:i].T, within[:i, i], alpha=-1)
            if middle is not None:
                column -= middle[i]
            column *= each[i]
            code = column.round().clamp_(grid.least, grid.most)
            found[begin + i] = code + grid.half
            torch.mul(column.sub_(code), weigh[i], out=errors[i])
        left[end:].addmm_(inputs.factor[begin:end, end:].T, errors, alpha=-1)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    codes[:, inputs.order] = found.T
    return codes, scale, zero
