"""A GPT, top to bottom: attention, MLP, block, model, cache. Both shapes in one file.

By the fields of ``ModelSpec`` the same code is GPT-2 and GPT-3 (learned positions, LayerNorm,
GELU, biases; Radford et al. 2019) or Llama and Qwen (rotary positions, RMSNorm, SwiGLU, grouped
queries; Touvron et al. 2023, arXiv:2302.13971; Yang et al. 2025, arXiv:2505.09388).

Letters of shapes: B batch, T new tokens, S tokens known so far, H query heads, G key/value heads,
D head width, W model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptcore.errors import ContextOverflow
from gptcore.spec import ModelSpec, RopeScaling


class KVCache:
    """Keys and values of all layers, allocated once; ``length`` positions are filled."""

    def __init__(
        self, spec: ModelSpec, capacity: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.layers, batch, spec.kv_heads, capacity, spec.head_width)
        self._allocate(shape, dtype, device)

    def _allocate(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.k = torch.empty(shape, dtype=dtype, device=device)  # (L, B, G, capacity, D)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = shape[3]
        self.length = 0
        self.cuts = 0
        """How often something was forgotten, so that a copy knows whether it still is one."""
        self._layers = tuple(zip(self.k, self.v, strict=True))

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, T, D) behind what is known and return all of it, (B, G, S, D)."""
        known_k, known_v = self._layers[layer]
        new = k.shape[2]
        known_k.narrow(2, self.length, new).copy_(k)
        known_v.narrow(2, self.length, new).copy_(v)
        end = self.length + new
        return known_k.narrow(2, 0, end), known_v.narrow(2, 0, end)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Write keys and values as ``extend`` does, and return what ``attend`` finds in all."""
        return attend(q, *self.extend(layer, k, v), mask)

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        assert 0 <= length <= self.length
        self.cuts += length < self.length
        self.length = length

    def keep(self, rows: Tensor) -> None:
        """Forget every sequence but ``rows``, (n,) int64 in ascending order."""
        self.cuts += 1
        for layer in (one for pair in self._layers for one in pair):
            known = layer.narrow(2, 0, self.length)  # (B, G, S, D)
            known[: len(rows)] = known[rows]
        self.k, self.v = self.k[:, : len(rows)], self.v[:, : len(rows)]
        self._layers = tuple(zip(self.k, self.v, strict=True))


class Positions(NamedTuple):
    """What the T new positions of a call have in common in all layers."""

    mask: Tensor | None
    """(T, S) bool, see ``later_mask``; of a text each where these differ."""
    cos: Tensor | None = None
    """(T, D), and ``sin`` likewise: rotary tables, None where positions are learned."""
    sin: Tensor | None = None


class Attention(nn.Module):
    """Multi-head attention, with fewer key/value heads than query heads where the spec says so."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.q = nn.Linear(spec.width, spec.q_width, bias=spec.qkv_bias)
        self.k = nn.Linear(spec.width, spec.kv_width, bias=spec.qkv_bias)
        self.v = nn.Linear(spec.width, spec.kv_width, bias=spec.qkv_bias)
        self.out = nn.Linear(spec.q_width, spec.width, bias=spec.bias)
        if spec.qk_norm:
            self.q_norm = nn.RMSNorm(spec.head_width, eps=spec.norm_eps)
            self.k_norm = nn.RMSNorm(spec.head_width, eps=spec.norm_eps)

    def forward(self, x: Tensor, where: Positions, cache: KVCache | None, layer: int) -> Tensor:
        """Return what each of the T positions takes from those it may see: (B, T, W)."""
        spec = self.spec
        q = self.q(x).unflatten(-1, (spec.heads, spec.head_width)).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).unflatten(-1, (spec.kv_heads, spec.head_width)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (spec.kv_heads, spec.head_width)).transpose(1, 2)
        if spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if where.cos is not None and where.sin is not None:
            q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        found = attend if cache is None else partial(cache.attend, layer)
        y = found(q, k, v, where.mask)  # (B, H, T, D)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))  # (B, T, W)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Let the last T of S positions look at themselves and all before.

    Source: Vaswani et al. 2017, section 3.2.1, arXiv:1706.03762; grouped queries: Ainslie et al.
    2023, arXiv:2305.13245.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D), S ≥ T; H is a multiple of G.
        v: (B, G, S, D).
        mask: ``later_mask``'s, needed where 1 < T < S only.

    Returns:
        (B, H, T, D), dtype of ``q``.
    """
    batch, heads, new, width = q.shape
    groups, known = k.shape[1], k.shape[2]
    if new == 1:
        # One position sees everything, so the queries that share a key head can stand where
        # several positions would: the keys are then read once a group, and on a CPU in bf16
        # at 512 positions this is nine times faster than enable_gqa.
        q = q.reshape(batch, groups, heads // groups, width)
        y = F.scaled_dot_product_attention(q, k, v)
        return y.reshape(batch, heads, 1, width)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=bool(new == known), enable_gqa=heads != groups
    )


def later_mask(new: int, known: int, device: torch.device) -> Tensor | None:
    """Return which of ``known`` positions the last ``new`` of them may see, where it is needed.

    The triangle of ``is_causal`` is aligned to the upper left corner, so it serves only where
    all positions are new.

    Returns:
        (T, S) bool, or None where no mask is needed: one new position, or all of them new.
    """
    if new in (1, known):
        return None
    return torch.ones(new, known, dtype=torch.bool, device=device).tril_(known - new)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + D/2) by their position's angle.

    Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of Llama's checkpoints.

    Args:
        x: (B, H, T, D).
        cos: (T, D), the same for both halves.
        sin: (T, D), negated in the first half.

    Returns:
        As ``x``.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotary_tables(spec: ModelSpec, positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles, each (positions, D) float32; sin has its sign."""
    steps = torch.arange(0, spec.head_width, 2, dtype=torch.float32) / spec.head_width
    frequencies = 1.0 / spec.rope_theta**steps  # (D/2,)
    if spec.rope_scaling is not None:
        frequencies = stretched(frequencies, spec.rope_scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1)


def stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return Llama 3's frequencies: slow turns slowed by ``factor``, fast ones kept.

    Source: Grattafiori et al. 2024, arXiv:2407.21783, section 3.2, as released with Llama 3.1.
    """
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class MLP(nn.Module):
    """The position-wise network: GELU between two layers, or SwiGLU (arXiv:2002.05202)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.swiglu = spec.mlp == "swiglu"
        self.approximate = "tanh" if spec.gelu == "tanh" else "none"
        if self.swiglu:
            self.gate = nn.Linear(spec.width, spec.hidden, bias=spec.bias)
        self.up = nn.Linear(spec.width, spec.hidden, bias=spec.bias)
        self.down = nn.Linear(spec.hidden, spec.width, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return each position's own transformation: (B, T, W) -> (B, T, W)."""
        if self.swiglu:
            inner = F.silu(self.gate(x)) * self.up(x)  # (B, T, hidden)
        else:
            inner = F.gelu(self.up(x), approximate=self.approximate)
        out: Tensor = self.down(inner)  # (B, T, W)
        return out


def norm(spec: ModelSpec) -> nn.Module:
    """Return the spec's normalisation over the model's width."""
    kind = nn.LayerNorm if spec.norm == "layernorm" else nn.RMSNorm
    return kind(spec.width, eps=spec.norm_eps)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = norm(spec)
        self.attention = Attention(spec)
        self.mlp_norm = norm(spec)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, where: Positions, cache: KVCache | None, layer: int) -> Tensor:
        """Return the residual stream after this block: (B, T, W) -> (B, T, W)."""
        between: Tensor = x + self.attention(self.attention_norm(x), where, cache, layer)
        after: Tensor = between + self.mlp(self.mlp_norm(between))
        return after


def local(weight: Tensor) -> Tensor:
    """Return what this process holds of a weight; all of it where the model is not split."""
    as_local: Callable[[], Tensor] | None = getattr(weight, "to_local", None)
    return weight if as_local is None else as_local()


@dataclass(frozen=True, slots=True)
class Draft:
    """A cheaper copy of a model that guesses its tokens ahead, see ``lookup``."""

    model: GPT
    guesses: int
    """Tokens that it guesses at once."""
    cost: float
    """Bytes that a step of it reads ÷ those of the model's."""


class GPT(nn.Module):
    """Token ids in, logits out."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        if spec.position == "learned":
            self.positions = nn.Embedding(spec.context, spec.width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = norm(spec)
        self.head = nn.Linear(spec.width, spec.vocabulary, bias=False)
        if spec.tied_head:
            self.head.weight = self.embedding.weight
        self.cache_kind: Callable[..., KVCache] = KVCache
        """What makes a cache; a pass may put one of fewer bits here."""
        self.native = True
        """Whether decode may be computed by our own library; a pass may want torch's operations."""
        self.draft: Draft | None = None
        """What guesses this model's tokens ahead; a pass may put a copy of fewer bits here."""
        self._rotary: tuple[Tensor, Tensor] | None = None

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, *, last_only: bool = False
    ) -> Tensor:
        """Return the logits after each of T tokens.

        Args:
            ids: (B, T) int64.
            cache: what is known so far; the tokens stand behind it and are added to it.
            last_only: compute the head for the last position only.

        Returns:
            (B, T, V), or (B, 1, V) with ``last_only``.

        Raises:
            ContextOverflow: more positions than the spec's context or the cache's capacity.
        """
        start = cache.length if cache is not None else 0
        self.check_room(start + ids.shape[1], cache)
        x, where = self.enter(ids, start)
        for layer, block in enumerate(self.blocks):
            x = block(x, where, cache, layer)
        return self._leave(x, start, cache, last_only=last_only)

    def by_blocks(
        self,
        ids: Tensor,
        cache: KVCache,
        *,
        last_only: bool = False,
        around: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
    ) -> Iterator[Tensor | None]:
        """Do what ``forward`` does, and yield None behind every block; the logits come last.

        The cache must not be used before that. Every block, and the head, runs in the context that
        ``around`` gives for it.
        """
        start = cache.length
        self.check_room(start + ids.shape[1], cache)
        x, where = self.enter(ids, start)
        for layer, block in enumerate(self.blocks):
            with around(block):
                x = block(x, where, cache, layer)
            yield None
        with around(self.head):
            logits = self._leave(x, start, cache, last_only=last_only)
        yield logits

    def check_room(self, end: int, cache: KVCache | None) -> None:
        """Raise ContextOverflow where so many positions do not fit."""
        room = self.spec.context if cache is None else min(self.spec.context, cache.capacity)
        if end > room:
            raise ContextOverflow(f"{end:,} positions do not fit into {room:,}: shorten the text.")

    def _leave(self, x: Tensor, start: int, cache: KVCache | None, *, last_only: bool) -> Tensor:
        """Note in the cache what it knows now, and return the logits: (B, T, W) -> (B, T, V)."""
        if cache is not None:
            cache.length = start + x.shape[1]
        if last_only:
            x = x[:, -1:]
        logits: Tensor = self.head(self.norm(x))
        return logits

    def enter(self, ids: Tensor, start: int = 0) -> tuple[Tensor, Positions]:
        """Return what the first block is given: (B, T, W), and where the T tokens stand.

        Args:
            ids: (B, T) int64.
            start: position of the first of them.
        """
        end = start + ids.shape[1]
        x: Tensor = self.embedding(ids)  # (B, T, W)
        mask = later_mask(end - start, end, x.device)
        if self.spec.position == "learned":
            return x + self.positions.weight[start:end], Positions(mask)
        cos, sin = self._tables(end, x.dtype, x.device)
        return x, Positions(mask, cos[start:end], sin[start:end])

    def enter_at(self, ids: Tensor, positions: Tensor, capacity: int) -> tuple[Tensor, Positions]:
        """Return what ``enter`` does for a token a text, at positions that the device knows.

        Args:
            ids: (B, 1) int64.
            positions: (B,) int64, one for each.
            capacity: positions of the cache, which the mask covers: (B, 1, 1, capacity) bool.
        """
        x: Tensor = self.embedding(ids)  # (B, 1, W)
        known = torch.arange(capacity, device=x.device) <= positions[:, None]
        mask = known[:, None, None]
        if self.spec.position == "learned":
            return x + self.positions.weight[positions][:, None], Positions(mask)
        cos, sin = self._tables(capacity, x.dtype, x.device)
        return x, Positions(mask, cos[positions][:, None, None], sin[positions][:, None, None])

    @property
    def divisible(self) -> bool:
        """Whether blocks may be run one by one: nothing stands in the place of ``forward``."""
        changed = "forward" in vars(self) or self._forward_hooks or self._forward_pre_hooks
        return not changed

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Return an empty cache for ``capacity`` positions, on the model's device."""
        weight = next(self.norm.parameters())
        return self.cache_kind(self.spec, capacity, batch, weight.dtype, weight.device)

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the projections of all blocks by name: what passes convert."""
        for name, module in self.blocks.named_modules(prefix="blocks"):
            if isinstance(module, nn.Linear):
                yield name, module

    def _tables(
        self, positions: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the rotary tables, made once and grown by doubling as texts get longer."""
        known = self._rotary
        if known is not None and known[0].shape[0] >= positions:
            if known[0].dtype == dtype and known[0].device == device:
                return known
            positions = known[0].shape[0]
        size = min(self.spec.context, max(256, 1 << (positions - 1).bit_length()))
        with torch.inference_mode(False):  # tables of inference mode could not serve training
            cos, sin = rotary_tables(self.spec, size)
            self._rotary = cos.to(device, dtype), sin.to(device, dtype)
        return self._rotary
