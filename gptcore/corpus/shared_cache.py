"""A cache of many sequences that begin alike: what they share is kept and read once.

Letters of shapes: B sequences, G key/value heads, R query heads of each, T new tokens, P shared
positions, S positions of a sequence's own, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore.model import KVCache
from gptcore.spec import ModelSpec


class SharedPrefixCache(KVCache):
    """Behind the positions of ``prefix``, those of B sequences; ``length`` counts both."""

    def __init__(self, spec: ModelSpec, prefix: KVCache, capacity: int, batch: int) -> None:
        """Take over what ``prefix``, a cache of one sequence, knows.

        Args:
            spec: the model's.
            prefix: is not copied, and must not change any more.
            capacity: positions of a sequence, the shared ones among them.
            batch: B.
        """
        assert prefix.k.shape[1] == 1, prefix.k.shape
        self.shared = prefix.length
        own = capacity - self.shared
        super().__init__(spec, own, batch, prefix.k.dtype, prefix.k.device)
        self.capacity = capacity
        self.length = self.shared
        self._prefix = prefix.k[:, 0, :, : self.shared], prefix.v[:, 0, :, : self.shared]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, T, D) behind what is known and return each one's own, (B, G, S, D)."""
        known_k, known_v = self._layers[layer]
        begin, new = self.length - self.shared, k.shape[2]
        known_k.narrow(2, begin, new).copy_(k)
        known_v.narrow(2, begin, new).copy_(v)
        return known_k.narrow(2, 0, begin + new), known_v.narrow(2, 0, begin + new)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Write keys and values, and let (B, G·R, T, D) queries look at the shared ones and these.

        The queries of all sequences stand side by side before the shared keys: one product of
        matrices, and one reading.
        """
        k, v = self.extend(layer, k, v)
        shared_k, shared_v = (one[layer] for one in self._prefix)  # (G, P, D)
        batch, heads, new, width = q.shape
        groups, rows = k.shape[1], heads // k.shape[1] * new
        q = (q * width**-0.5).reshape(batch, groups, rows, width)
        own = q @ k.transpose(-1, -2)  # (B, G, R·T, S)
        if mask is not None:
            hidden = ~mask[:, self.shared :]  # (T, S)
            own.view(batch, groups, -1, *hidden.shape).masked_fill_(hidden, float("-inf"))
        beside = q.transpose(0, 1).reshape(groups, batch * rows, width)
        common = (beside @ shared_k.transpose(-1, -2)).view(groups, batch, rows, self.shared)
        weights = torch.cat((common.transpose(0, 1), own), dim=-1).softmax(-1)
        common, own = weights[..., : self.shared], weights[..., self.shared :]
        beside = common.transpose(0, 1).reshape(groups, batch * rows, self.shared)
        y = (beside @ shared_v).view(groups, batch, rows, width).transpose(0, 1)
        return torch.add(y, own @ v).reshape(batch, heads, new, width)

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on; the shared ones stay."""
        assert self.shared <= length <= self.length
        self.length = length

    def keep(self, rows: Tensor) -> None:
        """Forget every sequence but ``rows``, (n,) int64 in ascending order."""
        total, self.length = self.length, self.length - self.shared
        super().keep(rows)
        self.length = total
