"""Where in the network two variants part: the stream layer by layer, and every token's prediction.

What a block of B does wrong is told from what it was handed on: ``accumulated`` is the error of B's
own stream behind the block, ``introduced`` the error of that block alone when it is given A's
stream. So A's streams are kept, and A need not be in memory when B runs.

Letters of shapes: L layers, T tokens, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptcore.errors import InvalidInput
from gptcore.explain.excerpt import batch_of, stream_of

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

MOST_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Trace:
    """What one variant computed for a text, on the CPU."""

    streams: Tensor
    """(L + 1, T, W) float32: the embedding, then what stands behind each block."""
    logs: Tensor
    """(T, V) float32: log-probabilities of the next token."""


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """The stream of B against that of A behind so many blocks, means over the tokens."""

    blocks: int
    """0 is the embedding."""
    cosine: float
    """Of the two streams, position by position: 1 is the same direction."""
    accumulated: float
    """|B − A| ÷ |A|."""
    introduced: float | None
    """The same behind B's block alone, given A's stream; None for the embedding."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where B parts from A."""

    layers: tuple[LayerDifference, ...]
    """Empty where the two have not the same number of layers: then no layer answers another."""
    kl_nats: Tensor
    """(T,): KL(A ‖ B) of the next token after each position."""
    a_ids: Tensor
    """(T,): A's likeliest next token."""
    b_ids: Tensor
    true_probabilities: Tensor
    """(2, T − 1): what A and B give the token that really comes next."""

    @property
    def first_divergence(self) -> int | None:
        """The first position after which the two would say another token; None if there is none."""
        apart = (self.a_ids != self.b_ids).nonzero()
        return int(apart[0]) if len(apart) else None

    @property
    def same_top_ratio(self) -> float:
        """Share of positions at which both find the same token likeliest."""
        return float((self.a_ids == self.b_ids).float().mean())


def trace(model: GPT, ids: Sequence[int], *, check: Callable[[], None] = lambda: None) -> Trace:
    """Return the streams and predictions of a text.

    Args:
        model: on its device.
        ids: T token ids, at least 2.
        check: called before each block; may raise to stop.
    """
    import torch

    with torch.inference_mode():
        batch = batch_of(model, [ids])
        x, where = model.enter(batch)
        streams = [x[0].float().cpu()]
        for layer, block in enumerate(model.blocks):
            check()
            x = block(x, where, None, layer)
            streams.append(x[0].float().cpu())
        logs = model.head(model.norm(x))[0].float().log_softmax(-1).cpu()
        return Trace(torch.stack(streams), logs)


def introduced(
    model: GPT, ids: Sequence[int], a: Trace, *, check: Callable[[], None] = lambda: None
) -> list[float]:
    """Return the relative error of each block of B alone, given what A has in front of it.

    Args:
        model: B, with as many layers as A.
        ids: T token ids.
        a: what A computed for them.
        check: called before each block; may raise to stop.
    """
    import torch

    found = []
    with torch.inference_mode():
        _, where = model.enter(batch_of(model, [ids]))
        for layer, block in enumerate(model.blocks):
            check()
            given = a.streams[layer][None].to(stream_of(model))
            made = block(given, where, None, layer)[0].float().cpu()
            found.append(_relative(made, a.streams[layer + 1]))
    return found


def difference(
    a: Trace, model: GPT, ids: Sequence[int], *, check: Callable[[], None] = lambda: None
) -> Difference:
    """Return where B parts from A on a text.

    Args:
        a: what A computed.
        model: B.
        ids: T token ids, at least 2.
        check: may raise to stop.

    Raises:
        InvalidInput: the two have other vocabularies or widths.
    """
    import torch
    from torch.nn import functional as F

    b = trace(model, ids, check=check)
    if a.logs.shape != b.logs.shape:
        raise InvalidInput(
            f"The first model tells {a.logs.shape[1]:,} tokens apart and the second "
            f"{b.logs.shape[1]:,}: compare two variants of one model."
        )
    layers: tuple[LayerDifference, ...] = ()
    if a.streams.shape == b.streams.shape:
        alone = [None, *introduced(model, ids, a, check=check)]
        layers = tuple(
            LayerDifference(
                blocks=blocks,
                cosine=float(F.cosine_similarity(of_a, of_b, dim=-1).mean()),
                accumulated=_relative(of_b, of_a),
                introduced=one,
            )
            for blocks, (of_a, of_b, one) in enumerate(
                zip(a.streams, b.streams, alone, strict=True)
            )
        )
    after = torch.tensor(list(ids[1:]))[:, None]
    return Difference(
        layers=layers,
        kl_nats=(a.logs.exp() * (a.logs - b.logs)).sum(-1).clamp_min(0),
        a_ids=a.logs.argmax(-1),
        b_ids=b.logs.argmax(-1),
        true_probabilities=torch.stack(
            [one.logs[:-1].gather(-1, after)[:, 0].exp() for one in (a, b)]
        ),
    )


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Return |found − wanted| ÷ |wanted|, a mean over the tokens of (T, W)."""
    gap = (found - wanted).norm(dim=-1)
    return float((gap / wanted.norm(dim=-1).clamp_min(1e-12)).mean())
