"""Many texts at once from one model: prompts of equal length in one batch, which shrinks.

A decode step of one stream reads every weight for one token; of a batch, for one token each. So
the batch is as large as memory allows, and a sequence that has ended leaves it. The words that all
prompts of a batch begin with are computed once, and looked at once a step for all.

Letters of shapes: B sequences still written, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptcore.errors import NumericalError
from gptcore.records import Sampling
from gptcore.sampling import uniform

if TYPE_CHECKING:
    import torch

    from gptcore.model import GPT, KVCache

CANDIDATES = 64
"""Draws are among this many likeliest tokens where ``top_k`` does not say fewer."""
END_PULL = 0.03
SHRINK = 0.9
"""The batch is made smaller when fewer than this share of it is still written."""


@dataclass(slots=True)
class Continuation:
    """What the model wrote behind one prompt."""

    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    """Sum over ``ids`` and the end of text, at temperature 1."""
    ended: bool = False
    """Whether it ends with the end of text, and not at the limit."""

    @property
    def mean_logprob(self) -> float:
        """Mean log-likelihood a token, the end of text included."""
        return self.logprob / max(1, len(self.ids) + self.ended)


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many ids all prompts begin with, at most all but one of them."""
    same = 0
    for column in zip(*prompts, strict=True):
        if len(set(column)) > 1:
            break
        same += 1
    return min(same, len(prompts[0]) - 1)


def write_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    sampling: Sampling,
    end_ids: frozenset[int],
    max_new_tokens: int,
    end_after: int | None = None,
    breathe: Callable[[], None] = lambda: None,
) -> list[Continuation]:
    """Return a continuation of each prompt.

    A text depends on its prompt, seed and sampling; with passes that quantize activations by the
    batch (int8), slightly on its neighbours too.

    Args:
        model: on its device.
        prompts: B prompts of the same number of ids.
        seeds: of the draws, one a prompt.
        sampling: temperature above 0 and no top-p; the repetition penalty lowers what the text
            itself holds, and not its prompt.
        end_ids: that end a text.
        max_new_tokens: a text that is longer is cut and not ``ended``.
        end_after: tokens from which on the end of text is favoured more and more, ``END_PULL``
            nats a token, where it is among the likeliest anyway; None never favours it.
        breathe: called before every step; what it raises ends the work.

    Raises:
        NumericalError: the model's logits are no numbers.
    """
    import torch

    assert sampling.temperature > 0
    assert sampling.top_p == 1.0
    found = [Continuation() for _ in prompts]
    with torch.inference_mode():
        cache, logits = _read(model, prompts, max_new_tokens)
        favoured = torch.tensor(sorted(end_ids), device=logits.device)
        rows = list(range(len(prompts)))  # rows[i] is the text that sequence i of the batch writes
        written = torch.zeros_like(logits, dtype=torch.bool)  # (B, V)
        for position in range(max_new_tokens):
            breathe()
            randoms = [uniform(seeds[row], position) for row in rows]
            pull = 0.0 if end_after is None else END_PULL * max(0, position - end_after)
            ids, logprobs = draw(logits, sampling, randoms, written, favoured, pull)
            written.scatter_(1, ids[:, None], True)
            for row, id, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
                one = found[row]
                if one.ended:
                    continue
                one.logprob += logprob
                if id in end_ids:
                    one.ended = True
                else:
                    one.ids.append(id)
            going = [i for i, row in enumerate(rows) if not found[row].ended]
            if not going:
                break
            if len(going) < SHRINK * len(rows):
                kept = torch.tensor(going, device=logits.device)
                cache.keep(kept)
                ids, written, rows = ids[kept], written[kept], [rows[i] for i in going]
            logits = model(ids[:, None], cache, last_only=True)[:, -1]
    return found


def _read(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[KVCache, torch.Tensor]:
    """Return a cache that holds the prompts, and the logits after them: (B, V)."""
    import torch

    from gptcore.corpus.shared_cache import SharedPrefixCache

    capacity, shared = len(prompts[0]) + max_new_tokens, common_prefix(prompts)
    device = next(model.parameters()).device
    if shared:
        one = model.new_cache(shared)
        model(torch.tensor([list(prompts[0][:shared])], device=device), one, last_only=True)
        cache: KVCache = SharedPrefixCache(model.spec, one, capacity, len(prompts))
    else:
        cache = model.new_cache(capacity, len(prompts))
    rest = torch.tensor([list(prompt[shared:]) for prompt in prompts], device=device)
    return cache, model(rest, cache, last_only=True)[:, -1]


def draw(
    logits: torch.Tensor,
    sampling: Sampling,
    randoms: Sequence[float],
    written: torch.Tensor,
    favoured: torch.Tensor,
    pull: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token a row, and its log-likelihood at temperature 1.

    Args:
        logits: (B, V).
        sampling: see ``write_batch``.
        randoms: B numbers in [0, 1).
        written: (B, V) bool, what the repetition penalty lowers.
        favoured: (N,) int64 ids whose logits are raised by ``pull`` where they are candidates.
        pull: nats.

    Returns:
        (B,) int64 and (B,) float32.

    Raises:
        NumericalError: logits are NaN or infinite.
    """
    import torch

    logits = logits.float()
    total = logits.logsumexp(-1)  # (B,)
    if not total.isfinite().all():
        raise NumericalError("The teacher's logits are no numbers: choose another precision.")
    count = min(sampling.top_k or CANDIDATES, logits.shape[-1])
    raw, ids = logits.topk(count)  # (B, K), the likeliest first
    old, penalty = written.gather(1, ids), sampling.repetition_penalty
    lowered = torch.where(raw > 0, raw / penalty, raw * penalty)
    best = torch.where(old, lowered, raw) + pull * torch.isin(ids, favoured)
    weights = ((best - best.amax(-1, keepdim=True)) / sampling.temperature).exp()
    weights = weights.where(weights >= sampling.min_p, 0.0).double()
    cumulative = weights.cumsum(-1)
    at = torch.tensor(randoms, dtype=torch.float64, device=logits.device)[:, None]
    chosen = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True)
    chosen = chosen.clamp(max=count - 1)
    return ids.gather(1, chosen)[:, 0], raw.gather(1, chosen)[:, 0] - total
