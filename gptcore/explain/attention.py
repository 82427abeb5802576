"""What each head looks at: softmax(QKᵀ/√d)V with the model's real Q, K and V.

The model computes this in one fused operation that never has the weights in memory as a whole. So
the Q, K and V that it is given are caught on their way, with what it makes of them; the weights are
computed again plainly in float32, and weights · V is held against what the model's own operation
returned. Where an attention runs without the fused operation, Q, K and V are computed again from
its projections.

Source: Vaswani et al. 2017, section 3.2.1, arXiv:1706.03762.

Letters of shapes: L layers, H query heads, G key/value heads, T tokens, D head width, N squares of
a small picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptcore.errors import InvalidInput
from gptcore.explain.excerpt import batch_of

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT, Attention, Positions

MOST_TOKENS = 512
SMALL = 20
"""Rows and columns of a head's small picture."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What all heads of one layer computed for a text."""

    q: Tensor
    """(H, T, D), after its norm and rotation."""
    k: Tensor
    """(H, T, D): a key head stands once for every query head that shares it."""
    v: Tensor
    """(H, T, D)."""
    weights: Tensor
    """(H, T, T) float32, each row a distribution over the positions up to its own."""
    output: Tensor
    """(H, T, D): what the model's own attention returned."""
    fused: bool
    """Whether Q, K and V were caught at the fused operation, and not computed again."""

    @property
    def disagreement(self) -> float:
        """Largest |weights · V − the model's output|, as a share of the largest output."""
        own = self.output.float()
        again = self.weights @ self.v.float()
        return float((again - own).abs().max() / own.abs().max().clamp_min(1e-12))


@dataclass(frozen=True, slots=True)
class Character:
    """One head in four numbers, each a mean over the positions from the second on."""

    layer: int
    head: int
    first: float
    """Share of the attention that goes to the first token."""
    itself: float
    previous: float
    distance: float
    """Tokens back that it looks, on average."""
    entropy_bits: float


def attention_weights(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """Return softmax(QKᵀ·scale) where each position sees itself and all before, in float32.

    Args:
        q: (…, T, D).
        k: (…, T, D).
        scale: 1/√D if not given.

    Returns:
        (…, T, T); every row sums to 1.
    """
    import torch

    size, width = q.shape[-2:]
    scores = q.float() @ k.float().transpose(-1, -2)  # (…, T, T)
    scores *= 1 / math.sqrt(width) if scale is None else scale
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill_(later, -math.inf).softmax(-1)


def look(
    model: GPT,
    ids: Sequence[int],
    visit: Callable[[int, Heads], None],
    *,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run a text through the blocks and show ``visit`` the heads of each layer in turn.

    Args:
        model: on its device.
        ids: T token ids, at least 2.
        visit: called with each layer's number and heads; nothing of it is kept here.
        check: called before each layer; may raise to stop.

    Raises:
        InvalidInput: an attention runs without the fused operation and has no projections.
    """
    import torch

    with torch.inference_mode():
        batch = batch_of(model, [ids])
        x, where = model.enter(batch)
        for layer, block in enumerate(model.blocks):
            check()
            attention: Any = block.attention
            caught = _Caught(attention)
            with caught:
                after = block(x, where, None, layer)
            visit(layer, caught.heads(where))
            x = after


def small(weights: Tensor, size: int = SMALL) -> Tensor:
    """Return pictures of N × N whose rows still sum to 1: sums over keys, means over queries.

    Args:
        weights: (H, T, T).
        size: N; texts of fewer tokens stay as they are.

    Returns:
        (H, N, N) float32, N at most T.
    """
    import torch

    length = weights.shape[-1]
    if length <= size:
        return weights
    edges = torch.linspace(0, length, size + 1).round().long()
    cell = torch.bucketize(torch.arange(length), edges[1:], right=True)
    into = torch.zeros(length, size, device=weights.device)
    into[torch.arange(length), cell] = 1
    return (into / into.sum(0)).T @ weights @ into


def characters(layer: int, weights: Tensor) -> list[Character]:
    """Return every head of a layer in a few numbers.

    Args:
        layer: its number.
        weights: (H, T, T).
    """
    import torch

    length = weights.shape[-1]
    back = torch.arange(length, device=weights.device)
    distance = (back[:, None] - back).clamp_min(0).float()  # (T, T)
    rows = weights[:, 1:]
    first = rows[..., 0].mean(-1)
    itself = weights.diagonal(dim1=-2, dim2=-1)[:, 1:].mean(-1)
    previous = weights.diagonal(-1, dim1=-2, dim2=-1).mean(-1)
    far = (rows * distance[1:]).sum(-1).mean(-1)
    entropy = torch.special.entr(rows).sum(-1).mean(-1) / math.log(2)
    table = torch.stack((first, itself, previous, far, entropy), dim=1).tolist()
    return [Character(layer, head, *row) for head, row in enumerate(table)]


class _Caught:
    """Catches what one attention's fused operation is given and returns, while in its context."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._given: tuple[Tensor, Tensor, Tensor] | None = None
        self._scale: float | None = None
        self._returned: Tensor | None = None
        self._x: Tensor | None = None
        self._into_out: Tensor | None = None

    def __enter__(self) -> None:
        import torch
        from torch.overrides import TorchFunctionMode

        caught = self
        fused = torch.nn.functional.scaled_dot_product_attention

        class Watch(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                returned = func(*args, **(kwargs or {}))
                if func is fused:
                    caught._given = args[:3]
                    caught._scale = (kwargs or {}).get("scale")
                    caught._returned = returned
                return returned

        def keep_input(module: Any, args: Any) -> None:
            self._x = args[0]

        def keep_into_out(module: Any, args: Any) -> None:
            self._into_out = args[0]

        self._open = ExitStack()
        self._open.callback(self._attention.register_forward_pre_hook(keep_input).remove)
        if (out := getattr(self._attention, "out", None)) is not None:
            self._open.callback(out.register_forward_pre_hook(keep_into_out).remove)
        self._open.enter_context(Watch())

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def heads(self, where: Positions) -> Heads:
        """Return the heads, once the attention has run."""
        if self._given is not None and self._returned is not None:
            q, k, v = (one[0] for one in self._given)
            output, fused = self._returned[0], True
        else:
            q, k, v = self._again(where)
            if self._into_out is None:
                raise InvalidInput(_FUSED_AWAY)
            joined = self._into_out[0]  # (T, H · D)
            output, fused = joined.view(len(joined), len(q), -1).transpose(0, 1), False
        shared = len(q) // len(k)
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        return Heads(q, k, v, attention_weights(q, k, scale=self._scale), output, fused)

    def _again(self, where: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K, V of an attention that used no fused operation, from its projections."""
        from gptcore.model import rotate

        attention, x = self._attention, self._x
        if x is None or not all(hasattr(attention, name) for name in "qkv"):
            raise InvalidInput(_FUSED_AWAY)
        width = attention.spec.head_width
        q, k, v = (
            getattr(attention, name)(x)[0].unflatten(-1, (-1, width)).transpose(0, 1)
            for name in "qkv"
        )  # (H, T, D), (G, T, D), (G, T, D)
        if attention.spec.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        if where.cos is not None and where.sin is not None:
            q, k = (rotate(one[None], where.cos, where.sin)[0] for one in (q, k))
        return q, k, v


_FUSED_AWAY = (
    "A pass of this recipe fused the attention away, so that there are no queries and keys to look "
    "at: look at the variant without its last pass."
)
