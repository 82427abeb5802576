"""Arithmetic on what happened over time: thinning a line, percentiles and rates by time bucket.

Percentiles are linearly interpolated, as everywhere in this program. A request belongs to the
bucket in which it *ended*, so that a bucket of the past never changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tsdownsample import MinMaxLTTBDownsampler

Floats = NDArray[np.float64]
Series = dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]]
"""(name, subject) -> (times, values); times in seconds since 1970, ascending."""
THINNER = MinMaxLTTBDownsampler()  # type: ignore[no-untyped-call]
PERCENTS = (50.0, 95.0, 99.0)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """One latency over time; None where no request of a bucket has the number."""

    p50: tuple[float | None, ...]
    p95: tuple[float | None, ...]
    p99: tuple[float | None, ...]
    n: tuple[int, ...]
    """Requests that the percentiles of a bucket are taken from."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies of the finished generations of a time range, by time bucket."""

    bucket_s: float
    times: tuple[float, ...]
    """The middle of each bucket, seconds since 1970."""
    ttft_s: Percentiles
    tpot_s: Percentiles
    e2e_s: Percentiles


@dataclass(frozen=True, slots=True)
class Rates:
    """What was served in a time range, by time bucket."""

    bucket_s: float
    times: tuple[float, ...]
    """The middle of each bucket, seconds since 1970."""
    input_tokens_per_s: tuple[float, ...]
    """Prompt tokens of requests that succeeded."""
    output_tokens_per_s: tuple[float, ...]
    """Generated tokens of requests that succeeded."""
    requests_per_s: tuple[float, ...]
    """All that ended: succeeded, failed, cancelled and interrupted."""
    error_ratio: Mapping[str, tuple[float | None, ...]]
    """By kind of error: failed and interrupted ones / all but the cancelled ones; None where
    nothing ended."""
    cancelled_ratio: tuple[float | None, ...]
    """Cancelled ones / all: incomplete, and no error."""


def thinned(times: Floats, values: Floats, points: int) -> tuple[Floats, Floats]:
    """Return at most ``points`` of a line that look like all of it; its extremes stay.

    Source: Van Der Donckt et al. 2023, MinMaxLTTB, arXiv:2305.00332.
    """
    if len(times) <= points:
        return times, values
    kept = THINNER.downsample(times, values, n_out=max(3, points))
    return times[kept], values[kept]


def bucket_edges(start: float, end: float, points: int) -> Floats:
    """Return (points + 1,) edges of equal buckets over ``start`` to ``end``."""
    return np.linspace(start, end, points + 1)


def percentiles(values: Floats, buckets: NDArray[np.intp], points: int) -> Percentiles:
    """Return p50, p95 and p99 of each bucket; NaN in ``values`` is a missing number.

    Args:
        values: (N,) a number for each request.
        buckets: (N,) the bucket of each request, 0 to points - 1.
        points: number of buckets.
    """
    there = ~np.isnan(values)
    values, buckets = values[there], buckets[there]
    order = np.lexsort((values, buckets))
    values, buckets = values[order], buckets[order]
    n = np.bincount(buckets, minlength=points)
    first = np.concatenate(([0], np.cumsum(n)))[:-1]
    lines: list[tuple[float | None, ...]] = []
    for percent in PERCENTS:
        line: list[float | None] = [None] * points
        full = np.flatnonzero(n)
        rank = (n[full] - 1) * percent / 100.0
        low = np.floor(rank).astype(np.intp)
        high = np.minimum(low + 1, n[full] - 1)
        below, above = values[first[full] + low], values[first[full] + high]
        for bucket, value in zip(
            full.tolist(), (below + (above - below) * (rank - low)).tolist(), strict=True
        ):
            line[bucket] = value
        lines.append(tuple(line))
    p50, p95, p99 = lines
    return Percentiles(p50, p95, p99, tuple(n.tolist()))


def rates(
    buckets: NDArray[np.intp],
    states: Sequence[str],
    error_kinds: Sequence[str | None],
    prompt_tokens: Floats,
    new_tokens: Floats,
    edges: Floats,
) -> Rates:
    """Return tokens, requests and errors by bucket; all arguments have one entry a request."""
    points = len(edges) - 1
    bucket_s = float(edges[1] - edges[0])
    state = np.array(states, dtype=object)
    done, cancelled = state == "done", state == "cancelled"

    def per_second(weights: Floats) -> tuple[float, ...]:
        total = np.bincount(buckets, np.nan_to_num(weights) * done, minlength=points)
        return tuple((total / bucket_s).tolist())

    ended = np.bincount(buckets, minlength=points)
    stopped = np.bincount(buckets[cancelled], minlength=points)
    kinds = np.array(
        [kind or state for kind, state in zip(error_kinds, states, strict=True)],
        dtype=object,
    )
    wrong = ~(done | cancelled)
    return Rates(
        bucket_s=bucket_s,
        times=_middles(edges),
        input_tokens_per_s=per_second(prompt_tokens),
        output_tokens_per_s=per_second(new_tokens),
        requests_per_s=tuple((ended / bucket_s).tolist()),
        error_ratio={
            kind: _ratio(
                np.bincount(buckets[wrong & (kinds == kind)], minlength=points), ended - stopped
            )
            for kind in sorted(set(kinds[wrong].tolist()))
        },
        cancelled_ratio=_ratio(stopped, ended),
    )


def latencies(ttft: Floats, tpot: Floats, e2e: Floats, at: Floats, edges: Floats) -> Latencies:
    """Return the percentiles of three latencies by bucket; one entry a request, NaN if missing."""
    points = len(edges) - 1
    buckets = bucket_of(at, edges)
    return Latencies(
        float(edges[1] - edges[0]),
        _middles(edges),
        *(percentiles(values, buckets, points) for values in (ttft, tpot, e2e)),
    )


def bucket_of(at: Floats, edges: Floats) -> NDArray[np.intp]:
    """Return (N,) the bucket of each moment; the last one includes its end."""
    width = (edges[-1] - edges[0]) / (len(edges) - 1)
    found: NDArray[np.intp] = np.clip(((at - edges[0]) / width).astype(np.intp), 0, len(edges) - 2)
    return found


def _middles(edges: Floats) -> tuple[float, ...]:
    return tuple(((edges[:-1] + edges[1:]) / 2).tolist())


def _ratio(part: NDArray[np.intp], whole: NDArray[np.intp]) -> tuple[float | None, ...]:
    return tuple(p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True))
