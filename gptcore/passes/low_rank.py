"""Replace every block projection by two thin ones: its best approximation of lower rank.

The plain one (Eckart and Young 1936) is nearest to the weights, and useless here: what counts is
the outputs. The whitened one (SVD-LLM, Wang et al. 2024, arXiv:2403.07378) is nearest to the
outputs on the calibration text: with H the mean of x·xᵀ and S·Sᵀ = H, it cuts the singular values
of W·S. We find its subspace as eigenvectors of W·H·Wᵀ or Sᵀ·Wᵀ·W·S, whichever is smaller, in
float64: the largest activations are a thousand times the usual ones, and squared here.

Letters of shapes: R rows (outputs), C columns (inputs), r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gptcore.device import Placement
from gptcore.passes.base import Pass, PassContext, Stage
from gptcore.passes.calibrate import Statistics, root, text_for
from gptcore.passes.convert import convert_projections
from gptcore.spec import BYTES, LinearShape, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptcore.model import GPT

ORDER_BYTES = 4
"""A pivoted layer keeps the place of each output in 32 bits."""
DAMPING = 1e-6
"""Share of the mean curvature added to it: enough for a Cholesky factor in float64."""


class LowRank(Pass):
    """Two thin layers for each block projection, with the share of its weights that is wanted."""

    name: ClassVar[str] = "low_rank"
    stage: ClassVar[Stage] = Stage.SHAPE
    title: ClassVar[str] = "Low rank"
    mechanism: ClassVar[str] = (
        "fewer bytes moved and fewer operations, but two smaller multiplications for each one"
    )

    share: float = Field(
        0.8,
        ge=0.01,
        le=1.0,
        title="Weights kept",
        description="Share of each layer's weights that the two layers have; 1 changes nothing.",
    )
    method: Literal["whitened", "plain"] = Field(
        "whitened",
        title="Method",
        description="Whitened keeps the outputs on a text; plain keeps the weights, needs no text "
        "and ruins the model.",
    )
    pivoted: bool = Field(
        True,
        title="Pivoted",
        description="Compute some outputs directly and the rest from them: a higher rank for the "
        "same number of weights.",
    )
    rank: int = Field(
        0,
        ge=0,
        le=100_000,
        title="Rank",
        description="The same rank for every layer in place of the share; 0 goes by the share.",
    )

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at inputs."""
        return self.method == "whitened" and (self.share < 1 or self.rank > 0)

    def rank_of(self, rows: int, columns: int) -> int:
        """Return the rank of a layer of that shape, from ``rank`` or ``share``."""
        weights = self.share * rows * columns
        return self.rank or rank_for(rows, columns, weights, pivoted=self.pivoted)

    def left(self, rows: int, columns: int) -> str | None:
        """Return why a layer of that shape stays as it is, or None."""
        if not self.rank and self.share == 1:
            return "all of its weights are to be kept"
        rank, even = (
            self.rank_of(rows, columns),
            break_even_rank(rows, columns, pivoted=self.pivoted),
        )
        if rank >= even:
            return f"rank {rank:,} is not below {even:,}, where two layers take as much as one"
        return None

    def caution(self, spec: ModelSpec, placement: Placement) -> str | None:
        """Return a warning where the given rank makes layers larger, so that they are left."""
        if not self.rank:
            return None
        left = [one for one in spec.linears[:-1] if self.left(one.rows, one.columns)]
        if not left:
            return None
        least = min(
            break_even_rank(one.rows, one.columns, pivoted=self.pivoted)
            for one in spec.linears[:-1]
        )
        names = ", ".join(one.name for one in left)
        return (
            f"Rank {self.rank:,} saves nothing for {names}, which stay as they are: below "
            f"{least:,} it would for every layer."
        )

    def weights_bytes_after(self, spec: ModelSpec, placement: Placement, before: int) -> int:
        """Return the exact bytes of float layers: what is left stays."""
        size = BYTES[placement.precision]
        return before - sum(self._saved(one, size) * one.count for one in spec.linears[:-1])

    def _saved(self, one: LinearShape, size: int) -> int:
        if self.left(one.rows, one.columns):
            return 0
        rank = self.rank_of(one.rows, one.columns)
        two = weights_of(one.rows, one.columns, rank, pivoted=self.pivoted) * size
        return one.rows * one.columns * size - two - self.pivoted * one.rows * ORDER_BYTES

    def apply(self, model: GPT, context: PassContext) -> GPT:
        """Replace every block projection for which the rank pays.

        Raises:
            InvalidInput: there is no calibration text, or too little.
            NumericalError: a weight is NaN or infinite, or the text leads to some.
        """
        from gptcore.linears.low_rank import LowRankLinear

        def convert(name: str, linear: nn.Linear, seen: Statistics | None) -> nn.Module | str:
            rows, columns = linear.weight.shape
            if why := self.left(rows, columns):
                return why
            hessian = None if seen is None else seen.hessian
            outer, inner = factors(linear.weight.detach(), self.rank_of(rows, columns), hessian)
            dtype = linear.weight.dtype
            return LowRankLinear.of(outer, inner, linear.bias, dtype, pivoted=self.pivoted)

        ids = text_for(self, context) if self.needs_calibration else None
        context.coverage[self.name] = convert_projections(model, context, convert, ids=ids)
        return model


def factors(weight: Tensor, rank: int, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return outer (R, r) and inner (r, C) whose product is the best of that rank.

    Best is the least mean squared error of the outputs, trace((W − W′)·H·(W − W′)ᵀ), or of the
    weights themselves where there is no Hessian.

    Args:
        weight: (R, C).
        rank: at most min(R, C).
        hessian: (C, C), the mean of x·xᵀ, or None.

    Returns:
        In float64.

    Raises:
        NumericalError: the Hessian holds NaN.
    """
    import torch

    rows, columns = weight.shape
    exact = weight.double()
    if hessian is None:
        whitening = torch.eye(columns, dtype=torch.float64, device=weight.device)
    else:
        whitening = root(hessian.double(), DAMPING)
    seen = exact @ whitening  # (R, C)
    if rows <= columns:
        _, vectors = torch.linalg.eigh(seen @ seen.T)
        outer = vectors[:, -rank:]  # (R, r), orthonormal
        inner = outer.T @ exact
    else:
        _, vectors = torch.linalg.eigh(seen.T @ seen)
        outer = seen @ vectors[:, -rank:]
        inner = torch.linalg.solve_triangular(
            whitening, vectors[:, -rank:].T, upper=False, left=False
        )
    return outer, inner


def weights_of(rows: int, columns: int, rank: int, *, pivoted: bool) -> int:
    """Return how many weights two layers of that rank have."""
    return rank * (rows + columns - (rank if pivoted else 0))


def rank_for(rows: int, columns: int, weights: float, *, pivoted: bool) -> int:
    """Return the largest rank that takes at most so many weights, 1 at least."""
    if pivoted:
        both = rows + columns
        root = max(0.0, both * both / 4 - weights) ** 0.5
        found = int(both / 2 - root + 1e-9)
    else:
        found = int(weights / (rows + columns) + 1e-9)
    return max(1, min(found, rows, columns))


def break_even_rank(rows: int, columns: int, *, pivoted: bool) -> int:
    """Return the least rank whose two layers have as many weights as the one, or more."""
    return min(rows, columns) if pivoted else -(-rows * columns // (rows + columns))
