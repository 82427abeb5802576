"""What a recipe should do to speed by the bytes it moves, and the rule where it does otherwise.

The expectation is a roofline (Williams et al. 2009): a stretch of work takes as long as its
operations at the measured peak, or its bytes at the measured bandwidth, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gptcore.measure.bench import CEILING_TOLERANCE, COSTS, Weighed, arithmetic
from gptcore.measure.peaks import peak_bandwidth, peak_flops
from gptcore.measure.timing import Cell
from gptcore.work import Loaded

AGREES = 0.25
"""A measured ratio this near to the expected one agrees with it."""
LOW_SHARE = 0.5
"""Below this share of its roofline a side is bound by something else."""


@dataclass(frozen=True, slots=True)
class Expected:
    """One expectation beside what was measured; ratios are times of B ÷ A."""

    target: str
    """``prefill`` or ``decode``."""
    cell: Cell
    expected_ratio: float
    measured_ratio: float
    agrees: bool
    a_share: float
    """Roofline's time ÷ measured time of A: 1 is at the limit of the machine."""
    b_share: float
    rule: str
    """Why it came otherwise, or why it came so, in a sentence."""


def expected(
    a: Loaded,
    b: Loaded,
    cell: Cell,
    target: str,
    *,
    a_s: float,
    b_s: float,
    ratio: float,
    roof: Callable[[Loaded, Cell, str, float], float] | None = None,
) -> Expected:
    """Return the expectation for one stretch of work, with the rule that speaks for the outcome.

    Args:
        a: the baseline.
        b: the variant.
        cell: what was timed.
        target: ``prefill`` or ``decode``.
        a_s: measured seconds of A.
        b_s: of B.
        ratio: B ÷ A as the comparison found it.
        roof: seconds at the limit of the machine; ``roofline_s`` if not given.
    """
    bound = roof or roofline_s
    a_roof, b_roof = bound(a, cell, target, a_s), bound(b, cell, target, b_s)
    wanted = b_roof / a_roof
    agrees = abs(ratio / wanted - 1) <= AGREES
    a_share, b_share = a_roof / a_s, b_roof / b_s
    rule = _rule(a, b, target, wanted, ratio, agrees, a_share, b_share)
    return Expected(target, cell, wanted, ratio, agrees, a_share, b_share, rule)


def roofline_s(loaded: Loaded, cell: Cell, target: str, took_s: float) -> float:
    """Return the seconds that the measured peaks of this machine allow.

    A peak that the work itself beat was measured while the machine was busy, and is measured again.
    """
    placement = loaded.variant.placement
    threads = placement.resolved_threads
    cost = COSTS[target](Weighed.of(loaded), cell)
    bandwidth = peak_bandwidth(
        placement.device, cost.working_set, threads, at_least=cost.moved / took_s
    )
    moved = cost.moved / bandwidth.bytes_per_s
    compute = peak_flops(
        placement.device, arithmetic(loaded.variant), threads, at_least=cost.flop / took_s
    )
    return max(moved, cost.flop / compute.flop_per_s if compute else 0.0)


def _rule(
    a: Loaded,
    b: Loaded,
    target: str,
    wanted: float,
    ratio: float,
    agrees: bool,
    a_share: float,
    b_share: float,
) -> str:
    if max(a_share, b_share) > CEILING_TOLERANCE:
        return (
            f"No rule: A reached {a_share:.0%} and B {b_share:.0%} of what was measured as the "
            "machine's limit, so that limit is wrong."
        )
    same_bytes = abs(b.step_bytes / a.step_bytes - 1) < 0.02
    if agrees and same_bytes and target == "decode":
        return "It reads as many bytes a token as before, so nothing was to be gained."
    if agrees:
        return "It came as the bytes and operations say."
    if ratio > wanted:
        if b_share < LOW_SHARE and b_share < a_share:
            return (
                f"B works at {b_share:.0%} of what this machine allows and A at {a_share:.0%}: the "
                "rest is spent on starting operations, or on making packed numbers float, which "
                "fewer bytes do not change."
            )
        return (
            f"Both sides are far from the limit (A {a_share:.0%}, B {b_share:.0%}): the time goes "
            "to starting operations, and there are as many of them as before."
        )
    if a_share < b_share:
        return (
            f"A works at {a_share:.0%} of what this machine allows and B at {b_share:.0%}: B's "
            "operations use the machine better, beyond what its bytes say."
        )
    return "It gained more than bytes and operations say: the peaks may have been measured too low."
