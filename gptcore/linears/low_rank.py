"""A linear layer as two thin ones, with the rows that the others are made of kept as they are.

A matrix of rank r has r rows that all others are combinations of. So the first layer need not be a
change of basis: it computes those r outputs themselves, and the second one the rest from them. That
takes r · (R + C − r) weights instead of r · (R + C), always fewer than R · C.

Source: Zhao et al. 2025, "Pivoting factorization", arXiv:2501.19090.

Letters of shapes: R rows (outputs), C columns (inputs), r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gptcore.linears import plain


class LowRankLinear(nn.Module):
    """Two linear layers in place of one: (…, C) -> (…, R).

    Attributes:
        inner: C to r.
        outer: r to R, or to the R − r outputs that are not the inner layer's own.
        order: (R,), where each output stands behind (inner's, outer's); None where outer has all.
    """

    kind: ClassVar[str] = "low_rank"

    def __init__(self, inner: nn.Linear, outer: nn.Linear, order: Tensor | None) -> None:
        super().__init__()
        self.inner = inner
        self.outer = outer
        self.order: Tensor | None
        self.register_buffer("order", order, persistent=False)
        self.packed_bytes = 0 if order is None else order.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs."""
        few = self.inner(x)  # (…, r)
        rest: Tensor = self.outer(few)
        if self.order is None:
            return rest
        return torch.cat((few, rest), dim=-1).index_select(-1, self.order)

    @classmethod
    def of(
        cls, outer: Tensor, inner: Tensor, bias: Tensor | None, dtype: torch.dtype, *, pivoted: bool
    ) -> Self:
        """Return the layer that multiplies with outer · inner.

        Args:
            outer: (R, r) float64, of full rank.
            inner: (r, C) float64.
            bias: (R,) or None.
            dtype: what the layer computes in.
            pivoted: compute r of the outputs directly, see the top of this file.
        """
        if not pivoted:
            return cls(plain(inner.to(dtype), None), plain(outer.to(dtype), bias), None)
        rank = inner.shape[0]
        # Partial pivoting picks rows that the others are moderate combinations of.
        permutation, lower, _ = torch.linalg.lu(outer)
        rows = permutation.argmax(dim=0)  # the row that was moved to each place
        own, rest = rows[:rank], rows[rank:]
        mix = torch.linalg.solve_triangular(
            lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
        )  # (R − r, r): outer[rest] = mix · outer[own]
        first = second = None
        if bias is not None:
            first = bias[own]
            second = (bias[rest].double() - mix @ first.double()).to(bias.dtype)
        return cls(
            plain((outer[own] @ inner).to(dtype), first),
            plain(mix.to(dtype), second),
            rows.argsort().to(torch.int32),
        )

    def dense(self) -> Tensor:
        """Return the matrix that this layer stands for, (R, C) float32."""
        inner, outer = self.inner.weight.float(), self.outer.weight.float()
        if self.order is None:
            return outer @ inner
        return torch.cat((inner, outer @ inner)).index_select(0, self.order)

    def dense_bias(self) -> Tensor | None:
        """Return the bias of that matrix, (R,) float32, or None."""
        if self.outer.bias is None:
            return None
        second = self.outer.bias.float()
        if self.order is None:
            return second
        first = self.inner.bias.float()
        mixed = second + self.outer.weight.float() @ first
        return torch.cat((first, mixed)).index_select(0, self.order)

    def stored(self) -> dict[str, Tensor]:
        """Return ``order`` if there is one; the two layers are stored as what they are."""
        return {} if self.order is None else {"order": self.order}

    def settings(self) -> dict[str, Any]:
        """Return the shapes."""
        return {
            "rows": self.outer.out_features
            + (0 if self.order is None else self.inner.out_features),
            "columns": self.inner.in_features,
            "rank": self.inner.out_features,
            "bias": self.outer.bias is not None,
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Return the module, its two layers without tensors, on the meta device."""
        rows, columns, rank = settings["rows"], settings["columns"], settings["rank"]
        order = tensors.get("order")
        rest = rows if order is None else rows - rank
        biased = settings["bias"]
        inner = nn.Linear(columns, rank, bias=biased and order is not None, device="meta")
        return cls(inner, nn.Linear(rank, rest, bias=biased, device="meta"), order)
