"""Set weights of the block projections to zero: by magnitude, Wanda or SparseGPT.

Magnitude (Han et al. 2015, arXiv:1506.02626) drops the smallest weights of a layer. Wanda (Sun et
al. 2023, arXiv:2306.11695) weighs each with the size of its input, row by row. SparseGPT (Frantar
and Alistarh 2023, arXiv:2301.00774) goes through the columns, drops those weights whose loss the
others can make up for best, and changes the columns to come so that they do.

The zeros are stored in one bit each; the layers stay dense in memory, since a CPU has no faster
product for scattered zeros, nor for 2:4 patterns.

Letters of shapes: R rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from gptcore.device import Placement
from gptcore.passes.base import Pass, PassContext, Stage
from gptcore.passes.calibrate import Inverses, Statistic, Statistics, text_for
from gptcore.passes.convert import convert_projections
from gptcore.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT

COLUMNS_AT_ONCE = 128
"""Columns among which SparseGPT chooses together, and whose effect on later ones is put off."""


class Prune(Pass):
    """Zeros in the block projections, chosen so that the outputs change least."""

    name: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = Stage.NUMBERS
    title: ClassVar[str] = "Pruning"
    mechanism: ClassVar[str] = (
        "storage only: zeros take one bit on disk; no change expected in speed or memory on a CPU"
    )

    sparsity: float = Field(
        0.5,
        ge=0.0,
        lt=1.0,
        title="Sparsity",
        description="Share of the weights that become zero; 0 changes nothing.",
    )
    method: Literal["sparsegpt", "wanda", "magnitude"] = Field(
        "sparsegpt",
        title="Method",
        description="SparseGPT also adjusts the weights that stay; Wanda weighs them with their "
        "inputs; magnitude needs no text, and hurts most.",
    )
    pattern: Literal["unstructured", "2:4"] = Field(
        "unstructured",
        title="Pattern",
        description="Zeros anywhere, or two in every four neighbours, which is half of them.",
    )
    damping: float = Field(
        0.01,
        gt=0.0,
        le=1.0,
        title="Damping",
        description="Share of the mean curvature that SparseGPT adds, so that it can be inverted.",
    )

    @model_validator(mode="after")
    def _half_in_two_of_four(self) -> Prune:
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(
                f"the pattern 2:4 makes half of the weights zero, not {self.sparsity}: choose a "
                "sparsity of 0.5 or the pattern unstructured"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at inputs."""
        return self.method != "magnitude" and self.sparsity > 0

    def blocked_by(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return why this cannot run: 2:4 needs columns in fours."""
        odd = sorted({one.columns for one in spec.linears[:-1] if one.columns % 4})
        if self.pattern == "2:4" and odd:
            return f"2:4 needs columns in fours, and layers have {', '.join(map(str, odd))}."
        return None

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every block projection by one with zeros; the head is left.

        Raises:
            InvalidInput: there is no calibration text, or too little.
            NumericalError: a weight is NaN or infinite, or the text leads to some.
        """
        from gptcore.linears.sparse import SparseLinear

        inverses = Inverses(self.damping)

        def convert(name: str, linear: nn.Linear, seen: Statistics | None) -> nn.Module | str:
            if self.pattern == "2:4" and linear.in_features % 4:
                return f"{linear.in_features} columns do not come in fours"
            weight = linear.weight.detach().float()
            pruned = self._pruned(weight, seen, inverses).to(linear.weight.dtype)
            return SparseLinear(pruned, linear.bias)

        ids = text_for(self, context) if self.needs_calibration else None
        wants: Statistic = "hessian" if self.method == "sparsegpt" else "moments"
        context.coverage[self.name] = convert_projections(
            model, context, convert, ids=ids, statistics=(wants,)
        )
        return model

    def _pruned(self, weight: Tensor, seen: Statistics | None, inverses: Inverses) -> Tensor:
        """Return the weights with their zeros, (R, I) float32."""
        group = 4 if self.pattern == "2:4" else None
        if self.method == "sparsegpt" and seen is not None:
            return sparsegpt(weight, inverses.of(seen), self.sparsity, group)
        if self.method == "wanda" and seen is not None and seen.rms is not None:
            return kept(weight, weight.abs() * seen.rms, self.sparsity, group or weight.shape[1])
        if group:
            return kept(weight, weight.abs(), self.sparsity, group)
        flat = weight.reshape(1, -1)
        return kept(flat, flat.abs(), self.sparsity, flat.shape[1]).view_as(weight)


def kept(weight: Tensor, worth: Tensor, sparsity: float, group: int) -> Tensor:
    """Return ``weight`` without the least worthy weights of each group of neighbours in a row.

    Args:
        weight: (R, I).
        worth: (R, I), what is lost with each.
        sparsity: share of each group that becomes zero, rounded to whole weights.
        group: neighbours that are compared; divides I.
    """
    import torch

    grouped = worth.view(len(worth), -1, group)
    least = grouped.argsort(dim=2, stable=True)[..., : round(sparsity * group)]
    gone = torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, least, True)
    return weight.masked_fill(gone.flatten(1), 0.0)


def sparsegpt(weight: Tensor, inverse: Tensor, sparsity: float, group: int | None) -> Tensor:
    """Return weights with zeros, the others changed to make up for them.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1.

    Args:
        weight: (R, I) float32; not written to.
        inverse: (I, I), the upper Cholesky factor of the inverse Hessian, see ``Inverses``.
        sparsity: share of the weights of each ``COLUMNS_AT_ONCE`` columns that become zero.
        group: 4 for two zeros in every four neighbours; None for zeros anywhere.

    Error: each step is the least squares answer for all columns to its right, those to its left
    fixed; against the best of all patterns of 3 zeros in 6 columns, less than twice the squared
    error was seen.
    """
    import torch

    # (I, R), so that a column is one piece of memory; a copy, also where there is only one row.
    moved = weight.T.clone(memory_format=torch.contiguous_format)
    columns = len(moved)
    for begin in range(0, columns, COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, columns)
        now, factor = moved[begin:end], inverse[begin:end, begin:end]
        scale = factor.diagonal()[:, None]
        if group is None:
            gone = _smallest((now / scale).square(), sparsity)
        else:
            gone = torch.zeros_like(now, dtype=torch.bool)
        errors = torch.zeros_like(now)
        for i in range(end - begin):
            if group is not None and i % group == 0:
                worth = (now[i : i + group] / scale[i : i + group]).square()
                least = worth.argsort(dim=0, stable=True)[: group // 2]
                gone[i : i + group].scatter_(0, least, True)
            errors[i] = torch.where(gone[i], now[i] / scale[i], 0.0)
            now[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
            now[i].masked_fill_(gone[i], 0.0)
        moved[end:].addmm_(inverse[begin:end, end:].T, errors, alpha=-1)
    return moved.T.contiguous()


def _smallest(worth: Tensor, share: float) -> Tensor:
    """Return where the least worthy share of a whole matrix stands, as bool of its shape."""
    import torch

    flat = worth.flatten()
    count = round(share * flat.numel())
    gone = torch.zeros_like(flat, dtype=torch.bool)
    gone[flat.topk(count, largest=False, sorted=False).indices] = True
    return gone.view_as(worth)
