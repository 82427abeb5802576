"""All proven variants side by side, and those that no other one beats on every axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptcore.records import Run, RunKind, RunState


@dataclass(frozen=True, slots=True)
class Point:
    """One proven variant against its baseline."""

    run_id: str
    model: str
    recipe: str
    baseline: str
    speedup: float
    """Decode at batch 1, times as fast."""
    kl_nats: float
    size_ratio: float
    """Stored bytes, times the baseline's."""
    accepted: bool | None
    """Whether its goals were met; None where there were none."""


def card_of(run: Run) -> Mapping[str, Any] | None:
    """Return the proof card that a run holds, None where it holds none."""
    if not run.result:
        return None
    found = run.result.get("proof") if run.kind is RunKind.OPTIMIZE else run.result
    return found if found and found.get("axes") else None


def point_of(run: Run) -> Point | None:
    """Return the point of a finished proof, None where an axis is not known."""
    card = card_of(run)
    if card is None or run.state is not RunState.DONE:
        return None
    decode = _ratio(card, "decode_s")
    size = _ratio(card, "stored_bytes")
    kl = card.get("quality", {}).get("kl_mean")
    if decode is None or size is None or kl is None:
        return None
    a, b = card["sides"]
    return Point(
        run_id=run.id,
        model=b["model"],
        recipe=b["recipe"] if b["recipe"] != "baseline" else b["precision"],
        baseline=f"{a['model']} {a['precision']}",
        speedup=1 / decode,
        kl_nats=kl,
        size_ratio=size,
        accepted=card["accepted"],
    )


def _ratio(card: Mapping[str, Any], metric: str) -> float | None:
    return next(
        (
            one["ratio"]
            for one in card["axes"]
            if one["metric"] == metric
            and one["verdict"] != "incomplete"
            and (one["cell"] is None or one["cell"]["batch"] == 1)
        ),
        None,
    )


def front(points: Sequence[Point]) -> frozenset[str]:
    """Return the run ids of the points that no other beats: faster, nearer and smaller at once.

    A point is beaten by one that is no worse on all three axes and better on one; two equal points
    beat each other not.
    """
    return frozenset(
        one.run_id for one in points if not any(_beats(other, one) for other in points)
    )


def _beats(one: Point, other: Point) -> bool:
    mine = (-one.speedup, one.kl_nats, one.size_ratio)
    theirs = (-other.speedup, other.kl_nats, other.size_ratio)
    return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs
