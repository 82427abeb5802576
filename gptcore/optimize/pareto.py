"""All proven variants side by side, and those that no other one beats on every axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gptcore.records import Run, RunKind, RunState

Key = TypeVar("Key")


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
    """Return the run ids of the points that no other beats: faster, nearer and smaller at once."""
    return frozenset(
        unbeaten({one.run_id: (-one.speedup, one.kl_nats, one.size_ratio) for one in points})
    )


def unbeaten(costs: Mapping[Key, Sequence[float]]) -> set[Key]:
    """Return the keys of the costs that no other beats.

    One is beaten by another that is no higher anywhere and lower somewhere; two equal ones beat
    each other not.
    """
    return {
        key
        for key, mine in costs.items()
        if not any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in costs.values()
        )
    }
