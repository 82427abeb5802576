"""From logits to a token: penalty, temperature, top-k, top-p, min-p, and one draw. NumPy only.

The same code draws tokens in the host and explains them in the server's process, which has no
torch; so what a page shows is what the draw saw. The order is fixed: repetition penalty (Keskar et
al. 2019, arXiv:1909.05858, section 4.1), temperature, top-k (Fan et al. 2018, arXiv:1805.04833),
top-p (Holtzman et al. 2020, arXiv:1904.09751), min-p (Nguyen et al. 2024, arXiv:2407.01082).

Every position of a text has a random number of its own, a function of seed and position alone.
So a branch that keeps the first i tokens, and a text computed in a batch, draw the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptcore.errors import NumericalError
from gptcore.records import STAGES, Sampling

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the chain: unnormalised weights and their sum."""

    weights: Floats
    """(V,), each ≥ 0, the largest 1."""
    total: float

    def probabilities(self, ids: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return the probabilities of ``ids``, or of all V tokens."""
        chosen = self.weights if ids is None else self.weights[ids]
        return chosen.astype(np.float64) / self.total


def stages(
    logits: Floats,
    sampling: Sampling,
    seen_ids: Sequence[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> list[Stage]:
    """Return what the probabilities are after each of ``records.STAGES``.

    A sampler at its neutral setting changes nothing, so its stage is the one before.

    Args:
        logits: (V,) float32, raw.
        sampling: the settings.
        seen_ids: prompt and text so far; the repetition penalty applies to them.
        allowed: (V,), the tokens that a constraint leaves, at least one; the first stage is the
            model's own, all after it hold to the constraint.

    Raises:
        NumericalError: a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise NumericalError(
            f"The model gave {logits[bad]} as the logit of token {bad}; "
            "try precision fp32, or check the weights."
        )
    chain = [_softmax(logits)]
    if allowed is not None:
        logits = np.where(allowed, logits, np.float32(-np.inf))
    if sampling.repetition_penalty != 1.0 and len(seen_ids):
        logits = penalised(logits, sampling.repetition_penalty, seen_ids)
        chain.append(_softmax(logits))
    else:
        chain.append(chain[-1] if allowed is None else _softmax(logits))
    chain.append(_tempered(logits, sampling.temperature) or chain[-1])
    chain.append(_top_k(chain[-1], sampling.top_k))
    chain.append(_top_p(chain[-1], sampling.top_p))
    chain.append(_min_p(chain[-1], sampling.min_p))
    assert len(chain) == len(STAGES)
    return chain


def penalised(logits: Floats, penalty: float, seen_ids: Sequence[int]) -> Floats:
    """Return the logits after the repetition penalty: (V,)."""
    seen = np.unique(np.asarray(seen_ids, dtype=np.int64))
    made = logits.copy()
    old = logits[seen]
    made[seen] = np.where(old > 0, old / np.float32(penalty), old * np.float32(penalty))
    return made


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) that belongs to ``seed`` and ``position``.

    Source: Philox 4×64 (Salmon et al. 2011), one key a seed and one counter a position.
    """
    bits = np.random.Philox(key=seed, counter=position)
    return float(np.random.Generator(bits).random())


def draw(last: Stage, random: float) -> int:
    """Return the token id at which the cumulative probability first exceeds ``random``.

    Args:
        last: the final stage.
        random: in [0, 1).
    """
    cumulative = np.cumsum(last.weights, dtype=np.float64)
    found = int(np.searchsorted(cumulative, random * cumulative[-1], side="right"))
    if found < len(cumulative) and last.weights[found] > 0:
        return found
    return int(np.flatnonzero(last.weights)[-1])


def likeliest(logits: Floats, count: int) -> NDArray[np.int64]:
    """Return the ids of the ``count`` largest logits, largest first, ties by the lower id.

    Args:
        logits: (V,).
        count: at most V are returned.
    """
    count = min(count, len(logits))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    # A partition of the whole vocabulary costs ten times a comparison with a threshold, and the
    # top tokens nearly always lie within a few nats of the first.
    near = np.flatnonzero(logits > logits.max() - 8.0)
    if len(near) < count:
        kth = np.partition(logits, len(logits) - count)[len(logits) - count]
        near = np.flatnonzero(logits >= kth)
    order = np.lexsort((near, -logits[near]))
    return near[order[:count]]


def _softmax(logits: Floats) -> Stage:
    weights = np.exp(logits - logits.max())
    return Stage(weights, float(weights.sum(dtype=np.float64)))


def _tempered(logits: Floats, temperature: float) -> Stage | None:
    if temperature == 1.0:
        return None
    if temperature == 0.0:
        weights = np.zeros_like(logits)
        weights[int(logits.argmax())] = 1.0
        return Stage(weights, 1.0)
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf, weight 0
        return _softmax(((logits - logits.max()).astype(np.float64) / temperature).astype("f4"))


def _top_k(before: Stage, k: int) -> Stage:
    if k == 0 or k >= len(before.weights):
        return before
    kth = np.partition(before.weights, len(before.weights) - k)[len(before.weights) - k]
    return _kept(before, before.weights >= kth)


def _top_p(before: Stage, p: float) -> Stage:
    if p >= 1.0:
        return before
    weights = before.weights
    # All tokens below (1 − p)/V together hold less than 1 − p, so none of them is needed.
    candidates = np.flatnonzero(weights >= (1.0 - p) * before.total / len(weights))
    candidates = candidates[np.argsort(-weights[candidates], kind="stable")]
    cumulative = np.cumsum(weights[candidates], dtype=np.float64)
    needed = int(np.searchsorted(cumulative, p * before.total, side="left")) + 1
    keep = np.zeros(len(weights), dtype=bool)
    keep[candidates[:needed]] = True
    return _kept(before, keep)


def _min_p(before: Stage, share: float) -> Stage:
    if share == 0.0:
        return before
    return _kept(before, before.weights >= share * before.weights.max())


def _kept(before: Stage, keep: NDArray[np.bool_]) -> Stage:
    weights = np.where(keep, before.weights, np.float32(0))
    return Stage(weights, float(weights.sum(dtype=np.float64)))
