"""A model as one function of token ids, for programs that trace it: ids (B, T) -> logits (B, T, V).

There is no cache: a text is computed anew with each token.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.export.dense import Plain
from gptcore.model import Positions, rotary_tables

EXAMPLE = (2, 5)
"""Sequences and tokens that a model is traced with; both are free afterwards."""


class Logits(nn.Module):
    """The model in fp32, with its rotary tables as buffers."""

    cos: Tensor
    sin: Tensor

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.model = plain.model().float()
        self.rotary = plain.spec.position == "rotary"
        if self.rotary:
            cos, sin = rotary_tables(plain.spec, plain.spec.context)
            self.register_buffer("cos", cos)
            self.register_buffer("sin", sin)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits after each of T tokens: (B, T) int64 -> (B, T, V) float32."""
        tokens = ids.shape[1]
        x: Tensor = self.model.embedding(ids)  # (B, T, W)
        if self.rotary:
            where = Positions(None, self.cos[:tokens], self.sin[:tokens])
        else:
            x, where = x + self.model.positions(torch.arange(tokens)), Positions(None)
        for layer, block in enumerate(self.model.blocks):
            x = block(x, where, None, layer)
        logits: Tensor = self.model.head(self.model.norm(x))
        return logits


def example() -> Tensor:
    """Return ids to trace with."""
    return torch.arange(EXAMPLE[0] * EXAMPLE[1]).view(EXAMPLE)


def free_shapes(context: int) -> dict[str, Any]:
    """Return which dimensions of the ids are free, for torch.export."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    return {"ids": {0: batch, 1: torch.export.Dim("tokens", min=2, max=context)}}


@contextmanager
def quietly() -> Iterator[None]:
    """Silence what torch's exporters say of their own future, in a ``with`` block."""
    with warnings.catch_warnings(action="ignore"):
        yield
