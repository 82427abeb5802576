"""Whether B differs from A by more than the machine's own noise, and by how much.

A machine drifts (heat, neighbours, clocks), so the two sides are measured in turn, A B B A or
B A A B, and every number below compares blocks that lie beside each other in time:

ratio      median(b_i / l_i) / median(a_i / l_i), the ratio of the two medians after each block was
           divided by the level of its pair, l_i = sqrt(a_i * b_i). Without a drift that is the
           plain ratio of medians (``raw_ratio``, shown beside it). With a drift of 20 % the plain
           one needs three times the blocks to find the same 10 %, because the medians of A and of
           B then come from different moments.
interval   95 %, percentile bootstrap that draws whole pairs (``scipy.stats.bootstrap``), its
           percentiles moved out as Student's t is wider than the normal, since a plain one is too
           narrow for few pairs (Hesterberg 2015, The American Statistician 69, 371-386).
p          two-sided, of Wilcoxon's signed ranks of ln(b_i / a_i) when A and B are exchanged
           within pairs; all exchanges are counted (``scipy.stats.wilcoxon``, exact), or 9,999 of
           them drawn where ranks are tied (``scipy.stats.permutation_test``).
effect     Cliff's dominance within pairs, d_w: the share of pairs in which B was better minus the
           share in which it was worse (Cliff 1993, Psychological Bulletin 114).

A difference is claimed only if p is below 0.05 (after Holm's correction, where there are several
cells) *and* the interval leaves out 1. Fewer than 6 pairs cannot have a p below 0.05, so they get
no verdict.

Error: on synthetic machines with drift, spikes and neighbours, A against A is claimed to differ in
at most 3 % of the runs, and the interval covers the truth in 95 to 99 %. With the default 24 pairs
of blocks of 5 repetitions that spread by 5 %, a difference of 10 % is found in 99 of 100 runs, 5 %
in 78 and 2 % in 15; with 40 pairs in 100, 96 and 34 (tests/measure/test_statistics.py has the
machines).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptcore.errors import InvalidInput

ALPHA = 0.05
CONFIDENCE = 0.95
RESAMPLES = 1999
PERMUTATIONS = 9999
MOST_EXACT_PAIRS = 500
"""Beyond it counting all exchanges takes seconds."""
LEAST_PAIRS = 6
"""With one pair less, p is at least 2 / 2^5 = 0.0625 even where all agree."""
TAIL_OBSERVATIONS = 1000
"""From so many on there is a p99.9."""
METHOD = (
    "Ratio of medians of interleaved blocks, each divided by its pair's level; 95 % percentile "
    "bootstrap over pairs; two-sided permutation test of the signed ranks within pairs; a "
    "difference is claimed if p < 0.05 (Holm over a grid's cells) and the interval leaves out 1."
)

Side = Literal["A", "B"]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a set of observations looks like; percentiles are interpolated linearly."""

    n: int
    mean: float
    minimum: float
    p05: float
    p25: float
    median: float
    p75: float
    p90: float
    p95: float
    p99: float
    p999: float | None
    """Only with at least 1000 observations."""
    maximum: float
    iqr: float
    """p75 - p25."""


def summary(observations: Sequence[float]) -> Summary:
    """Return count, median, percentiles and spread of at least one finite observation."""
    values = _finite(observations, "observations")
    p05, p25, p50, p75, p90, p95, p99, p999 = (
        float(one) for one in np.percentile(values, [5, 25, 50, 75, 90, 95, 99, 99.9])
    )
    return Summary(
        n=len(values),
        mean=float(values.mean()),
        minimum=float(values.min()),
        p05=p05,
        p25=p25,
        median=p50,
        p75=p75,
        p90=p90,
        p95=p95,
        p99=p99,
        p999=p999 if len(values) >= TAIL_OBSERVATIONS else None,
        maximum=float(values.max()),
        iqr=p75 - p25,
    )


def median_interval(observations: Sequence[float]) -> tuple[float, float] | None:
    """Return a 95 % interval of the median of one run, or None for fewer than 6 observations.

    From order statistics, without an assumption on the shape (``scipy.stats.quantile_test``).

    Error: observations of one run follow each other on a machine that drifts; the interval speaks
    of that stretch of time only. Use ``compare`` on interleaved blocks to say that two differ.
    """
    from scipy import stats

    values = _finite(observations, "observations")
    if len(values) < LEAST_PAIRS:
        return None
    limits = [
        stats.quantile_test(values, p=0.5, alternative=side).confidence_interval(
            1 - (1 - CONFIDENCE) / 2
        )
        for side in ("greater", "less")
    ]
    return float(limits[0].low), float(limits[1].high)


def block_value(observations: Sequence[float]) -> float:
    """Return the one number that a block of repetitions stands for: their median."""
    return float(np.median(_finite(observations, "observations of a block")))


def interleaved(pairs: int, seed: int = 0) -> tuple[Side, ...]:
    """Return the order in which to measure ``pairs`` blocks of each side.

    Four blocks at a time, A B B A or B A A B as the seed draws it, so that a drift that is a
    straight line within four blocks cancels, and no rhythm of the machine meets the same side
    each time. The k-th block of A and the k-th of B are always neighbours.
    """
    if pairs < 0:
        raise InvalidInput(f"{pairs} pairs of blocks were asked for; 0 is the least.")
    first = np.random.default_rng(seed).integers(2, size=(pairs + 1) // 2)
    order: list[Side] = []
    for b_first in first:
        order += ["B", "A", "A", "B"] if b_first else ["A", "B", "B", "A"]
    return tuple(order[: 2 * pairs])


class StopRule(BaseModel):
    """When a comparison ends, fixed before its first block.

    It sees the width of the interval and never where the interval lies, so a look at the numbers
    cannot make a difference out of noise: in the tests' simulations A against A is claimed no more
    often than with a fixed number of pairs. The interval covers the truth one or two of 100 times
    less than with a fixed number, which is why a fixed number is the default, and why the width is
    not looked at before ``min_pairs``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    half_width: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        title="Interval half-width",
        description="End once the 95 % interval of the ratio is ± this share; empty: never.",
    )
    min_pairs: int = Field(
        16,
        ge=LEAST_PAIRS,
        le=10_000,
        title="Least pairs",
        description="Pairs of blocks to measure before the width is looked at.",
    )
    max_pairs: int = Field(
        24,
        ge=LEAST_PAIRS,
        le=10_000,
        title="Most pairs",
        description="Pairs of blocks after which the comparison ends.",
    )
    seconds: float | None = Field(
        None,
        gt=0.0,
        le=7 * 86_400.0,
        title="Time budget",
        description="Seconds after which no further pair begins; empty: no budget.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> StopRule:
        if self.max_pairs < self.min_pairs:
            raise ValueError(
                f"the most pairs ({self.max_pairs}) are below the least ({self.min_pairs}): "
                "raise the one or lower the other"
            )
        return self

    def ended(self, a: Sequence[float], b: Sequence[float], seconds: float) -> str | None:
        """Return why the comparison ends now, or None to measure on; ask after each whole pair.

        Args:
            a: block values of A so far.
            b: block values of B so far, as many.
            seconds: since the first block began.
        """
        pairs = min(len(a), len(b))
        if pairs >= self.max_pairs:
            return f"all {self.max_pairs} pairs of blocks were measured"
        if self.seconds is not None and seconds >= self.seconds:
            return f"the budget of {self.seconds:g} s was used up after {pairs} pairs of blocks"
        # Every fourth pair: two whole A B B A, and fewer looks.
        if (
            self.half_width is not None
            and pairs >= self.min_pairs
            and (pairs - self.min_pairs) % 4 == 0
        ):
            low, high = _interval(*_paired(a, b), seed=0)
            reached = math.sqrt(high / low) - 1
            if reached <= self.half_width:
                return (
                    f"the interval is ±{reached:.1%} wide after {pairs} pairs of blocks, "
                    f"within ±{self.half_width:.1%}"
                )
        return None


class Quantity(StrEnum):
    """What is compared, which decides what better means."""

    TIME = "time"
    """Seconds: less is faster."""
    RATE = "rate"
    """Something a second: more is faster."""
    AMOUNT = "amount"
    """Bytes, joules: less is less."""


def quantity_of(name: str) -> Quantity:
    """Return what a measurement is, from the unit that its name ends in."""
    if name.endswith("_per_s"):
        return Quantity.RATE
    return Quantity.TIME if name.endswith("_s") else Quantity.AMOUNT


class Verdict(StrEnum):
    """What may be said of B against A."""

    FASTER = "faster"
    SLOWER = "slower"
    LESS = "less"
    MORE = "more"
    NO_DIFFERENCE = "no detectable difference"
    INCOMPLETE = "incomplete"

    @property
    def claims(self) -> bool:
        """Whether this says that B differs from A."""
        return self not in (Verdict.NO_DIFFERENCE, Verdict.INCOMPLETE)

    @property
    def good(self) -> bool:
        """Whether B is said to be the better one."""
        return self in (Verdict.FASTER, Verdict.LESS)


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """How far two sides that are the same seem to lie apart on this machine."""

    at: str
    """When it was measured, ISO 8601 in UTC."""
    ratio: float
    """At least 1: a ratio between 1/this and this is within the noise."""
    runs: int
    """A/A comparisons that it comes from."""
    pairs: int
    """Pairs of blocks in all of them."""


def noise_floor(
    runs: Sequence[tuple[Sequence[float], Sequence[float]]], at: datetime | None = None
) -> NoiseFloor:
    """Return the noise floor from A/A comparisons, each the block values of its two sides.

    It is the 95 % quantile of the ratio's distance from 1, |ln ratio|, over the bootstrap draws
    of the pairs of each run, the runs pooled: with one run it says how far that run's interval
    reaches, with many also how much one run differs from the next.

    Error: the draws widen what the runs show already, by at most a factor of √2 where there are
    many runs; the floor is too high rather than too low.
    """
    if not runs:
        raise InvalidInput("A noise floor needs at least one A/A comparison; there is none.")
    distances, pairs = [], 0
    for a, b in runs:
        first, second = _paired(a, b)
        if len(first) < LEAST_PAIRS:
            raise InvalidInput(
                f"An A/A comparison has {len(first)} pairs of blocks; {LEAST_PAIRS} are the least."
            )
        pairs += len(first)
        distances.append(np.abs(_bootstrap(first, second, seed=0).bootstrap_distribution))
    floor = math.exp(float(np.percentile(np.concatenate(distances), 95)))
    moment = (at or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
    return NoiseFloor(at=moment, ratio=floor, runs=len(runs), pairs=pairs)


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A on the same work; see the module for how each number is made."""

    verdict: Verdict
    quantity: Quantity
    ratio: float | None
    """B / A."""
    low: float | None
    high: float | None
    """The 95 % interval of the ratio."""
    p: float | None
    p_holm: float | None
    """Holm's p over the cells of a grid; None for a comparison that stands alone."""
    effect: float | None
    """Share of pairs in which B was better minus the share in which it was worse."""
    pairs: int
    a_blocks: int
    b_blocks: int
    a_median: float | None
    b_median: float | None
    raw_ratio: float | None
    """Plain ratio of the medians; far from ``ratio`` where the machine drifted."""
    noise_floor: float | None
    """The ratio below which nothing is coloured; None: not measured."""
    coloured: bool
    """Whether a page may paint it: a claimed difference, and not below the noise floor."""
    reason: str
    """Why it is incomplete; else empty."""

    @property
    def half_width(self) -> float | None:
        """The interval as ± this share of the ratio; a smaller difference would not be seen."""
        if self.low is None or self.high is None or self.low <= 0:
            return None
        return math.sqrt(self.high / self.low) - 1

    @property
    def sentence(self) -> str:
        """The verdict with its numbers, as one sentence."""
        return self.told_of("B")

    def told_of(self, side: str) -> str:
        """Return the sentence for a side of another letter, where several are held against A."""
        if self.ratio is None or self.low is None or self.high is None:
            return f"Incomplete: {self.reason}"
        p = self.p if self.p_holm is None else self.p_holm
        ratio = f"{side} / A is {self.ratio:.3f} in {self.quantity}"
        if p is None:
            detail = f"{ratio}, counted"
        else:
            detail = (
                f"{ratio} (95 % interval {self.low:.3f} to {self.high:.3f}, "
                f"p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
                f"{'' if self.p_holm is None else ' after Holm'}, {self.pairs} pairs of blocks)"
            )
        match self.verdict:
            case Verdict.INCOMPLETE:
                return f"Incomplete: {self.reason} So far {detail}."
            case Verdict.NO_DIFFERENCE:
                return f"No detectable difference: {detail}."
            case Verdict.LESS | Verdict.MORE:
                return f"{side} needs {self.verdict} than A: {detail}."
            case _:
                return f"{side} is {self.verdict} than A: {detail}."


def compare(
    a: Sequence[float],
    b: Sequence[float],
    *,
    quantity: Quantity = Quantity.TIME,
    noise_floor: NoiseFloor | float | None = None,
    least_pairs: int = LEAST_PAIRS,
    incomplete: str = "",
    seed: int = 0,
) -> Comparison:
    """Return what interleaved blocks say of B against A.

    Args:
        a: one value a block of A (``block_value``), in the order of measuring; all above 0.
        b: the same for B; a block without its partner is left out of the ratio.
        quantity: what the values are.
        noise_floor: what this machine's A/A runs gave.
        least_pairs: with fewer the comparison is incomplete; the stop rule's ``min_pairs``.
        incomplete: why what was planned was not carried out; then there is no verdict, since an
            end that somebody chose while looking at the numbers is no stop rule.
        seed: of the resampling.

    Raises:
        InvalidInput: a value is not finite, or not above 0.
    """
    floor = noise_floor.ratio if isinstance(noise_floor, NoiseFloor) else noise_floor
    first, second = _paired(a, b)
    pairs = len(first)
    least = max(least_pairs, LEAST_PAIRS)
    if pairs < least and not incomplete:
        missing = next((name for name, side in (("A", a), ("B", b)) if not len(side)), None)
        incomplete = (
            f"{missing} has no blocks."
            if missing
            else f"there are {pairs} pairs of blocks; {least} are the least for a verdict."
        )
    ratio = low = high = p = effect = raw = None
    if pairs >= LEAST_PAIRS:
        ratio = math.exp(float(_log_ratio(first, second)))
        low, high = _interval(first, second, seed)
        p = _permutation_p(first, second, seed)
        raw = float(np.median(second) / np.median(first))
        better = np.sign(second - first) * (1 if quantity is Quantity.RATE else -1)
        effect = float(better.mean())
    return _judged(
        Comparison(
            verdict=Verdict.NO_DIFFERENCE,
            quantity=quantity,
            ratio=ratio,
            low=low,
            high=high,
            p=p,
            p_holm=None,
            effect=effect,
            pairs=pairs,
            a_blocks=len(a),
            b_blocks=len(b),
            a_median=float(np.median(a)) if len(a) else None,
            b_median=float(np.median(b)) if len(b) else None,
            raw_ratio=raw,
            noise_floor=floor,
            coloured=False,
            reason=incomplete,
        )
    )


def counted(a: float, b: float, quantity: Quantity = Quantity.AMOUNT) -> Comparison:
    """Return B against A where both are known exactly, such as bytes stored: no interval, no p."""
    if not (a > 0 and b > 0 and math.isfinite(a) and math.isfinite(b)):
        raise InvalidInput(f"{a:g} and {b:g} have no ratio: both must be above 0 and finite.")
    ratio = b / a
    return _judged(
        Comparison(
            verdict=Verdict.NO_DIFFERENCE,
            quantity=quantity,
            ratio=ratio,
            low=ratio,
            high=ratio,
            p=None,
            p_holm=None,
            effect=None,
            pairs=0,
            a_blocks=0,
            b_blocks=0,
            a_median=float(a),
            b_median=float(b),
            raw_ratio=ratio,
            noise_floor=None,
            coloured=False,
            reason="",
        )
    )


def holm(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Return the cells of a grid with Holm's p, and the verdicts that are left with it.

    With m cells, the k-th smallest p (k from 0) times m - k, never below the one before it: the
    chance of one or more false claims in the whole grid stays below 5 %.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    known = sorted((one.p, at) for at, one in enumerate(comparisons) if one.p is not None)
    adjusted, largest = {}, 0.0
    for rank, (p, at) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[at] = largest
    return tuple(
        _judged(replace(one, p_holm=adjusted.get(at))) for at, one in enumerate(comparisons)
    )


def pairs_for(comparisons: int) -> int:
    """Return the least pairs with which one of so many comparisons can be claimed after Holm.

    Where all pairs agree, p is 2 / 2^pairs; with fewer pairs even that is not enough.
    """
    return max(LEAST_PAIRS, math.floor(math.log2(2 * comparisons / ALPHA)) + 1)


def _judged(one: Comparison) -> Comparison:
    verdict = _verdict(one)
    above = (
        one.noise_floor is None
        or one.ratio is None
        or abs(math.log(one.ratio)) > abs(math.log(one.noise_floor))
    )
    return replace(one, verdict=verdict, coloured=verdict.claims and above)


def _verdict(one: Comparison) -> Verdict:
    if one.reason or one.ratio is None or one.low is None or one.high is None:
        return Verdict.INCOMPLETE
    p = one.p if one.p_holm is None else one.p_holm
    if (p is not None and p >= ALPHA) or one.low <= 1 <= one.high:
        return Verdict.NO_DIFFERENCE
    if one.quantity is Quantity.AMOUNT:
        return Verdict.LESS if one.ratio < 1 else Verdict.MORE
    return Verdict.FASTER if (one.ratio < 1) == (one.quantity is Quantity.TIME) else Verdict.SLOWER


def _log_ratio(a: Any, b: Any, axis: int = -1) -> Any:
    """Return ln(median(b / level) / median(a / level)) along ``axis``, level = sqrt(a * b)."""
    level = np.sqrt(a * b)
    return np.log(np.median(b / level, axis=axis) / np.median(a / level, axis=axis))


def _bootstrap(a: Array, b: Array, seed: int) -> Any:
    from scipy import stats

    pairs = len(a)
    tail = stats.t.isf((1 - CONFIDENCE) / 2, pairs - 1) * math.sqrt(pairs / (pairs - 1))
    return stats.bootstrap(
        (a, b),
        _log_ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * float(stats.norm.sf(tail)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def _interval(a: Array, b: Array, seed: int) -> tuple[float, float]:
    interval = _bootstrap(a, b, seed).confidence_interval
    return math.exp(float(interval.low)), math.exp(float(interval.high))


def _permutation_p(a: Array, b: Array, seed: int) -> float:
    from scipy import stats

    logs = np.log(b / a)
    distances = np.abs(logs)
    if len(np.unique(distances[distances > 0])) == len(logs) <= MOST_EXACT_PAIRS:
        return float(stats.wilcoxon(logs, method="exact").pvalue)
    ranks = stats.rankdata(distances)

    def signed_ranks(a: Array, b: Array, axis: int) -> Any:
        return (np.sign(b - a) * ranks).sum(axis=axis)

    test = stats.permutation_test(
        (a, b),
        signed_ranks,
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[Array, Array]:
    """Return both sides as arrays of one length."""
    sides = []
    for name, values in (("A", a), ("B", b)):
        array = np.asarray(values, dtype=np.float64)
        wrong = ~(np.isfinite(array) & (array > 0))
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidInput(
                f"Block {at + 1} of {name} is {array[at]:g}; a ratio needs finite values above 0."
            )
        sides.append(array)
    pairs = min(map(len, sides))
    return sides[0][:pairs], sides[1][:pairs]


def _finite(values: Sequence[float], what: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise InvalidInput(f"There are no {what}; at least one is needed.")
    if not np.isfinite(array).all():
        at = int((~np.isfinite(array)).argmax())
        raise InvalidInput(f"Number {at + 1} of the {what} is {array[at]}; it must be finite.")
    return array
