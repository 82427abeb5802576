"""What the model would say if it stopped after each layer: the logit lens.

The residual stream after every block goes through the model's last norm and head, as the last one
does. Source: nostalgebraist 2020, "interpreting GPT: the logit lens". The rows of the last block
are the model's own output, by the same operations on the same numbers.

Error: the early layers never learned to be read this way; on models whose stream turns late, as
GPT-2's, their words say little (Belrose et al. 2023, arXiv:2303.08112).

Letters of shapes: T tokens, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptcore.explain.excerpt import batch_of

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.model import GPT

MOST_TOKENS = 96
CANDIDATES = 3


@dataclass(frozen=True, slots=True)
class Depth:
    """What can be read after so many blocks, at every position."""

    blocks: int
    """0 is the embedding, L the model's output."""
    ids: Tensor
    """(T, C): the likeliest next tokens."""
    probabilities: Tensor
    """(T, C)."""
    final_probability: Tensor
    """(T,): of the token that the whole model finds likeliest."""
    next_probability: Tensor
    """(T − 1,): of the token that stands next in the text."""
    entropy_bits: Tensor
    """(T,)."""
    kl_nats: Tensor
    """(T,): divergence of the whole model's distribution from this one."""


def logits_by_depth(
    model: GPT, ids: Sequence[int], *, check: Callable[[], None] = lambda: None
) -> Iterator[Tensor]:
    """Yield what norm and head make of the stream after 0, 1, … L blocks: (T, V) each.

    The last one equals the model's own output exactly.
    """
    import torch

    with torch.inference_mode():
        batch = batch_of(model, [ids])
        x, where = model.enter(batch)
        yield model.head(model.norm(x))[0]
        for layer, block in enumerate(model.blocks):
            check()
            x = block(x, where, None, layer)
            yield model.head(model.norm(x))[0]


def lens(
    model: GPT, ids: Sequence[int], *, check: Callable[[], None] = lambda: None
) -> list[Depth]:
    """Return the lens of a text, one entry for each depth.

    Args:
        model: on its device.
        ids: T token ids, at least 2.
        check: called before each block; may raise to stop.
    """
    import torch

    with torch.inference_mode():
        batch = batch_of(model, [ids])
        final = model(batch)[0].float().log_softmax(-1)  # (T, V)
        best = final.argmax(-1, keepdim=True)  # (T, 1)
        after = batch[0, 1:, None]
        found = []
        for blocks, logits in enumerate(logits_by_depth(model, ids, check=check)):
            logs = logits.float().log_softmax(-1)
            top = logs.topk(min(CANDIDATES, logs.shape[-1]), dim=-1)
            found.append(
                Depth(
                    blocks=blocks,
                    ids=top.indices,
                    probabilities=top.values.exp(),
                    final_probability=logs.gather(-1, best)[:, 0].exp(),
                    next_probability=logs[:-1].gather(-1, after)[:, 0].exp(),
                    entropy_bits=torch.special.entr(logs.exp()).sum(-1) / math.log(2),
                    kl_nats=(final.exp() * (final - logs)).sum(-1),
                )
            )
        return found
