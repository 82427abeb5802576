"""One step of generation in numbers that chain: logits, temperature, masks, probabilities, a draw.

NumPy only, and by the very functions that draw tokens in the engine (``gptcore.sampling``), so that
what is explained is what happens. With z the logits after the repetition penalty and T the
temperature, a token's row reads from left to right:

    scaled = z / T,   weight = exp(scaled − max scaled) where the masks keep it, else 0,
    probability = weight / total,

and the token is drawn whose share of [0, 1), in the order of ids, holds the random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptcore.records import STAGES, Sampling
from gptcore.sampling import Floats, Stage, draw, likeliest, penalised, stages, uniform

TIMES = 1000
"""Draws of the histogram."""
LEAST_EXPECTED = 5.0
"""Outcomes expected less often are counted together; else chi-square's tail is not what it says."""
MASKS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of one token."""

    rank: int
    """1 is the largest logit."""
    id: int
    logit: float
    penalised: float
    """The logit after the repetition penalty."""
    scaled: float | None
    """That ÷ temperature; None at temperature 0, where the largest alone stays."""
    removed_by: str | None
    """The sampler that took it out, None where it can be drawn."""
    weight: float
    """exp(scaled − the largest scaled) where it can be drawn, else 0."""
    probabilities: tuple[float, ...]
    """After each of ``records.STAGES``; the last is weight ÷ total."""
    low: float
    """It is drawn where low ≤ the random number < ``high``."""
    high: float


@dataclass(frozen=True, slots=True)
class Step:
    """The whole step."""

    rows: tuple[Row, ...]
    """The largest logits first; where the drawn token is not among them, it is the last row."""
    max_scaled: float | None
    totals: tuple[float, ...]
    """Sum of the weights after each stage."""
    candidates: tuple[int, ...]
    """Tokens that could be drawn after each stage."""
    entropies_bits: tuple[float, ...]
    """After each stage."""
    random: float
    """The random number of this seed and position, in [0, 1)."""
    drawn_id: int
    last: Stage
    """What the draw saw, of all tokens."""


def one_step(
    logits: Floats,
    sampling: Sampling,
    seen_ids: Sequence[int],
    *,
    seed: int,
    position: int = 0,
    count: int = 12,
) -> Step:
    """Return how the next token comes about.

    Args:
        logits: (V,) float32, raw.
        sampling: the settings.
        seen_ids: prompt and text so far, for the repetition penalty.
        seed: of the generation.
        position: index of the token in the generated text.
        count: rows to tell of.

    Raises:
        NumericalError: a logit is NaN or infinite.
    """
    chain = stages(logits, sampling, seen_ids)
    last = chain[-1]
    random = uniform(seed, position)
    drawn = draw(last, random)
    before = penalised(logits, sampling.repetition_penalty, seen_ids)
    hot = sampling.temperature > 0
    scaled = before.astype(np.float64) / (sampling.temperature or 1.0)
    shown = likeliest(logits, count)
    if drawn not in shown:
        shown = np.append(shown, drawn)
    ranks = (logits[None] > logits[shown, None]).sum(axis=1) + 1
    table = np.stack([stage.probabilities(shown) for stage in chain], axis=1)
    edges = np.cumsum(last.weights, dtype=np.float64)
    edges /= edges[-1]
    return Step(
        rows=tuple(
            Row(
                rank=int(ranks[i]),
                id=int(id),
                logit=float(logits[id]),
                penalised=float(before[id]),
                scaled=float(scaled[id]) if hot else None,
                removed_by=_removed_by(table[i]),
                weight=float(last.weights[id]),
                probabilities=tuple(map(float, table[i])),
                low=float(edges[id - 1]) if id else 0.0,
                high=float(edges[id]),
            )
            for i, id in enumerate(shown)
        ),
        max_scaled=float(scaled.max()) if hot else None,
        totals=tuple(stage.total for stage in chain),
        candidates=tuple(int(np.count_nonzero(stage.weights)) for stage in chain),
        entropies_bits=tuple(entropy_bits(stage) for stage in chain),
        random=random,
        drawn_id=drawn,
        last=last,
    )


def entropy_bits(stage: Stage) -> float:
    """Return −Σ p log₂ p: 0 where one token is certain, log₂ V where all are alike."""
    p = stage.probabilities()
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum()) + 0.0  # no negative zero


def over_temperatures(
    logits: Floats, temperatures: Sequence[float], ids: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return entropies in bits, (N,), and probabilities of ``ids``, (N, I), at N temperatures."""
    chains = [stages(logits, Sampling(temperature=one)) for one in temperatures]
    wanted = np.asarray(ids, dtype=np.int64)
    return (
        np.array([entropy_bits(chain[-1]) for chain in chains]),
        np.array([chain[-1].probabilities(wanted) for chain in chains]),
    )


@dataclass(frozen=True, slots=True)
class Draws:
    """Many draws held against the probabilities that they come from."""

    times: int
    counts: dict[int, int]
    """How often each id was drawn."""
    chi_square: float | None
    """Σ (drawn − expected)² / expected over the outcomes; None where there is only one."""
    freedom: int
    """Outcomes less one; those expected fewer than 5 times count as one."""
    p_value: float | None
    """Chance of a chi-square at least as large if the draws follow the probabilities."""


def many_draws(last: Stage, *, seed: int, position: int = 0, times: int = TIMES) -> Draws:
    """Return what the seeds ``seed``, ``seed`` + 1, … draw at this position.

    Source: Pearson 1900; the tail by ``scipy.special.chdtrc``.

    Args:
        last: what the draw sees.
        seed: of the first draw.
        position: index of the token in the generated text.
        times: number of draws.
    """
    from scipy.special import chdtrc

    ids = [draw(last, uniform(seed + i, position)) for i in range(times)]
    found, often = np.unique(ids, return_counts=True)
    drawn = np.zeros(len(last.weights))
    drawn[found] = often
    expected = times * last.probabilities()
    alone = expected >= LEAST_EXPECTED
    if (rest := float(expected[~alone].sum())) > 0:
        outcomes = np.append(expected[alone], rest)
        seen = np.append(drawn[alone], drawn[~alone].sum())
        if rest < LEAST_EXPECTED and len(outcomes) > 1:  # too rare even together
            least = int(outcomes[:-1].argmin())
            outcomes[least] += outcomes[-1]
            seen[least] += seen[-1]
            outcomes, seen = outcomes[:-1], seen[:-1]
    else:
        outcomes, seen = expected[alone], drawn[alone]
    freedom = len(outcomes) - 1
    chi = float(((seen - outcomes) ** 2 / outcomes).sum()) if freedom else None
    return Draws(
        times=times,
        counts={int(id): int(n) for id, n in zip(found, often, strict=True)},
        chi_square=chi,
        freedom=freedom,
        p_value=None if chi is None else float(chdtrc(freedom, chi)),
    )


def _removed_by(probabilities: NDArray[np.float64]) -> str | None:
    """Return the first sampler after which nothing is left of a token."""
    gone = np.flatnonzero(probabilities == 0)
    return STAGES[int(gone[0])] if len(gone) else None
