"""Statistics held against known truths: synthetic machines with a known delay, and definitions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import combinations

import numpy as np
import pytest
from pydantic import ValidationError

from gptcore.errors import InvalidInput
from gptcore.measure.statistics import (
    Comparison,
    NoiseFloor,
    Quantity,
    StopRule,
    Verdict,
    block_value,
    compare,
    counted,
    holm,
    interleaved,
    median_interval,
    noise_floor,
    pairs_for,
    quantity_of,
    summary,
)
from tests.conftest import ROOT

PAIRS = StopRule().max_pairs
REPETITIONS = 5


@dataclass(frozen=True)
class Machine:
    """A synthetic computer: what one repetition of the same work takes from moment to moment."""

    within: float = 0.05
    """Spread of ln seconds from one repetition to the next."""
    between: float = 0.03
    """From block to block."""
    drift: float = 0.2
    """How far it swings slowly, over 15 to 60 blocks."""
    spikes: float = 0.03
    """Share of repetitions that take 1.5 to 4 times as long."""
    switch: float = 0.0
    """Chance a block that a neighbour starts or stops, which doubles everything."""

    def blocks(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return the values of so many blocks in a row."""
        at = np.arange(count)
        swing = np.sin(2 * np.pi * (at / rng.uniform(15, 60) + rng.random()))
        busy = (np.cumsum(rng.random(count) < self.switch) + rng.integers(2)) % 2
        level = self.drift * swing + rng.normal(0, self.between, count)
        if self.switch:
            level += math.log(2) * busy
        seconds = np.exp(level[:, None] + rng.normal(0, self.within, (count, REPETITIONS)))
        spiked = rng.random(seconds.shape) < self.spikes
        seconds *= np.where(spiked, rng.uniform(1.5, 4, seconds.shape), 1)
        return np.array([block_value(block) for block in seconds])

    def sides(
        self, rng: np.random.Generator, pairs: int, delay: float
    ) -> tuple[list[float], list[float]]:
        """Return the blocks of A and of B, which takes ``delay`` times as long."""
        order = interleaved(pairs, int(rng.integers(2**31)))
        values = self.blocks(rng, 2 * pairs)
        return (
            [float(value) for value, side in zip(values, order, strict=True) if side == "A"],
            [
                float(value) * delay
                for value, side in zip(values, order, strict=True)
                if side == "B"
            ],
        )


DRIFTING = Machine()
SHARED = Machine(within=0.06, between=0.02, drift=0.05, spikes=0.05, switch=0.04)


def hundred(
    machine: Machine, delay: float, measure: Callable[..., Comparison], seed: int
) -> tuple[int, int]:
    """Return in how many of 100 comparisons B is called slower or faster, and the truth covered."""
    rng = np.random.default_rng(seed)
    claims = covers = 0
    for _ in range(100):
        found = measure(machine, rng, delay)
        assert found.low is not None
        assert found.high is not None
        claims += found.verdict.claims
        covers += found.low <= delay <= found.high
    return claims, covers


def fixed(machine: Machine, rng: np.random.Generator, delay: float) -> Comparison:
    return compare(*machine.sides(rng, PAIRS, delay))


def until_narrow(machine: Machine, rng: np.random.Generator, delay: float) -> Comparison:
    """Measure pair after pair and ask a rule of width each time, as a comparison does."""
    rule = StopRule(half_width=0.03, max_pairs=40)
    a, b = machine.sides(rng, rule.max_pairs, delay)
    pairs = next(n for n in range(1, rule.max_pairs + 1) if rule.ended(a[:n], b[:n], 0.0))
    return compare(a[:pairs], b[:pairs], least_pairs=rule.min_pairs)


def test_the_same_against_itself_is_claimed_to_differ_in_at_most_10_of_100() -> None:
    claims, covers = hundred(DRIFTING, 1.0, fixed, seed=11)
    assert claims <= 10
    assert covers >= 90


def test_a_delay_of_10_percent_is_found_and_covered_in_at_least_90_of_100() -> None:
    claims, covers = hundred(DRIFTING, 1.1, fixed, seed=12)
    assert claims >= 90
    assert covers >= 90


@pytest.mark.slow
@pytest.mark.parametrize("machine", [DRIFTING, SHARED], ids=["drifting", "shared"])
@pytest.mark.parametrize("measure", [fixed, until_narrow])
def test_neither_a_rule_of_width_nor_neighbours_invent_a_difference(machine, measure) -> None:
    """On the shared machine others come and go and double every time."""
    claims, covers = hundred(machine, 1.0, measure, seed=13)
    assert claims <= 10
    assert covers >= 90


@pytest.mark.slow
def test_on_a_shared_machine_a_delay_is_still_found() -> None:
    claims, _ = hundred(SHARED, 1.1, fixed, seed=14)
    assert claims >= 90


def test_a_drift_moves_the_plain_ratio_further_off_than_ours() -> None:
    """The reason for dividing each block by its pair's level."""
    rng = np.random.default_rng(3)
    ours, plain = [], []
    for _ in range(60):
        found = compare(*DRIFTING.sides(rng, PAIRS, 1.1))
        assert found.ratio is not None
        assert found.raw_ratio is not None
        ours.append(abs(math.log(found.ratio / 1.1)))
        plain.append(abs(math.log(found.raw_ratio / 1.1)))
    assert np.median(plain) > 1.5 * np.median(ours)


def test_without_a_drift_the_ratio_is_the_plain_ratio_of_medians() -> None:
    still = [1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03]
    found = compare(still, [value * 1.25 for value in still])
    assert found.ratio == pytest.approx(1.25)
    assert found.raw_ratio == pytest.approx(1.25)


def test_a_jump_of_the_whole_machine_does_not_move_the_ratio() -> None:
    a = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01]
    b = [value * 1.2 for value in a]
    jumped = compare([*a[:4], *(v * 3 for v in a[4:])], [*b[:4], *(v * 3 for v in b[4:])])
    assert jumped.ratio == pytest.approx(1.2)
    assert jumped.verdict is Verdict.SLOWER


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pairs", [0, 1, 2, 3, 8, 21])
def test_the_order_is_balanced_and_every_pair_holds_both_sides(pairs: int, seed: int) -> None:
    order = interleaved(pairs, seed)
    assert len(order) == 2 * pairs
    assert all({*order[at : at + 2]} == {"A", "B"} for at in range(0, len(order), 2))
    for at in range(0, len(order) - 3, 4):
        assert order[at : at + 4] in (("A", "B", "B", "A"), ("B", "A", "A", "B"))
    assert order == interleaved(pairs, seed)


def test_the_seed_draws_which_side_is_first() -> None:
    assert {interleaved(2, seed)[0] for seed in range(20)} == {"A", "B"}
    assert len({interleaved(20, seed) for seed in range(20)}) > 10
    with pytest.raises(InvalidInput, match="-1 pairs"):
        interleaved(-1)


def test_p_counts_every_exchange_within_pairs() -> None:
    """Held against a loop over all 2^7 exchanges and the signed ranks."""
    a = np.array([1.0, 1.1, 0.9, 1.3, 1.0, 1.2, 0.8])
    b = a * np.array([1.05, 1.10, 1.02, 0.97, 1.08, 1.01, 1.12])
    logs = np.log(b / a)
    ranks = np.abs(logs).argsort().argsort() + 1
    observed = (np.sign(logs) * ranks).sum()
    every = [
        (np.array([1 if bit >> k & 1 else -1 for k in range(7)]) * ranks).sum()
        for bit in range(2**7)
    ]
    share = np.mean(np.abs(every) >= abs(observed))
    assert compare(a, b).p == pytest.approx(share)


def test_tied_pairs_are_counted_too() -> None:
    """Coarse clocks give the same ratio many times."""
    found = compare([1.0] * 8, [1.25] * 8)
    assert found.p == pytest.approx(2 / 2**8)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.25, 1.25, 1.25))
    assert found.verdict is Verdict.SLOWER
    many = compare([1.0] * 30, [1.25] * 30)
    assert many.p is not None
    assert many.p < 0.001


def test_a_side_against_itself_has_no_difference_at_all() -> None:
    same = [1.0, 1.1, 0.9, 1.3, 1.0, 1.2]
    found = compare(same, same, noise_floor=1.0)
    assert (found.ratio, found.low, found.high, found.p, found.effect) == (1, 1, 1, 1, 0)
    assert found.verdict is Verdict.NO_DIFFERENCE
    assert not found.coloured


@pytest.mark.parametrize(
    ("quantity", "factor", "verdict", "effect"),
    [
        (Quantity.TIME, 1.3, Verdict.SLOWER, -1),
        (Quantity.TIME, 0.7, Verdict.FASTER, 1),
        (Quantity.RATE, 1.3, Verdict.FASTER, 1),
        (Quantity.RATE, 0.7, Verdict.SLOWER, -1),
        (Quantity.AMOUNT, 1.3, Verdict.MORE, -1),
        (Quantity.AMOUNT, 0.7, Verdict.LESS, 1),
    ],
)
def test_the_word_fits_what_is_compared(quantity, factor, verdict, effect) -> None:
    rng = np.random.default_rng(1)
    a = rng.lognormal(0, 0.01, 10)
    b = rng.lognormal(0, 0.01, 10) * factor
    found = compare(a, b, quantity=quantity)
    assert found.verdict is verdict
    assert found.effect == effect
    assert found.verdict.good is (effect > 0)
    assert f"{found.ratio:.3f}" in found.sentence
    assert verdict.value in found.sentence


def test_the_names_of_measurements_say_what_they_are() -> None:
    names = ("tpot_s", "decode_tokens_per_s", "peak_memory_bytes", "energy_j")
    assert [quantity_of(name).value for name in names] == ["time", "rate", "amount", "amount"]


def test_a_verdict_needs_p_and_interval_both() -> None:
    found = compare([1.0, 1.1, 0.9, 1.3, 1.0, 1.2], [1.5, 1.6, 1.4, 1.9, 1.55, 1.75])
    assert found.verdict is Verdict.SLOWER
    (same,) = holm([found])
    assert same.verdict is Verdict.SLOWER
    (p_too_large, _) = holm([found, found])
    assert p_too_large.p_holm == pytest.approx(2 * 2 / 2**6)
    assert p_too_large.verdict is Verdict.NO_DIFFERENCE
    (interval_over_1,) = holm([replace(found, low=0.99)])
    assert interval_over_1.verdict is Verdict.NO_DIFFERENCE


def test_what_is_below_the_noise_floor_is_said_but_not_coloured() -> None:
    rng = np.random.default_rng(2)
    a = rng.lognormal(0, 0.005, 20)
    b = rng.lognormal(0, 0.005, 20) * 1.03
    unknown, below, above, faster = (
        compare(a, b),
        compare(a, b, noise_floor=1.05),
        compare(a, b, noise_floor=NoiseFloor("2026-11-21T00:00:00+00:00", 1.01, 1, 20)),
        compare(b, a, noise_floor=1.05),
    )
    assert {one.verdict for one in (unknown, below, above)} == {Verdict.SLOWER}
    assert [one.coloured for one in (unknown, below, above, faster)] == [True, False, True, False]
    assert [one.noise_floor for one in (unknown, below, above)] == [None, 1.05, 1.01]


def test_fewer_than_six_pairs_have_no_verdict_and_keep_the_medians() -> None:
    found = compare([1.0, 2.0, 3.0], [5.0] * 20)
    assert found.verdict is Verdict.INCOMPLETE
    assert found.reason == "there are 3 pairs of blocks; 6 are the least for a verdict."
    assert (found.a_median, found.b_median, found.ratio, found.p) == (2.0, 5.0, None, None)
    assert (found.pairs, found.a_blocks, found.b_blocks) == (3, 3, 20)
    assert found.sentence == f"Incomplete: {found.reason}"
    assert found.half_width is None


def test_a_side_that_never_ran_leaves_the_numbers_of_the_other() -> None:
    found = compare([1.0, 2.0, 4.0], [])
    assert found.verdict is Verdict.INCOMPLETE
    assert found.reason == "B has no blocks."
    assert (found.a_median, found.b_median) == (2.0, None)
    assert compare([], [], incomplete="Both failed to load.").reason == "Both failed to load."


def test_an_end_by_hand_is_no_verdict_however_clear_the_numbers() -> None:
    found = compare([1.0] * 10, [2.0] * 10, incomplete="It was stopped after 10 of 20 pairs.")
    assert found.verdict is Verdict.INCOMPLETE
    assert not found.coloured
    assert found.ratio == pytest.approx(2)
    assert found.sentence.startswith(
        "Incomplete: It was stopped after 10 of 20 pairs. So far B / A is 2.000 in time"
    )


def test_the_least_of_a_stop_rule_is_the_least_of_its_comparison() -> None:
    a = [1.0, 1.1, 0.9, 1.3, 1.0, 1.2, 1.05, 0.95]
    assert compare(a, a, least_pairs=8).verdict is Verdict.NO_DIFFERENCE
    assert compare(a, a, least_pairs=9).verdict is Verdict.INCOMPLETE


@pytest.mark.parametrize(
    ("wrong", "shown"), [(0.0, "is 0"), (-1.0, "is -1"), (math.nan, "nan"), (math.inf, "inf")]
)
def test_a_value_that_has_no_ratio_is_refused_by_its_place(wrong: float, shown: str) -> None:
    with pytest.raises(InvalidInput, match=rf"Block 2 of B .*{shown}"):
        compare([1.0, 1.0], [1.0, wrong])
    with pytest.raises(InvalidInput, match="no ratio"):
        counted(1.0, wrong)


def test_counted_things_need_no_interval() -> None:
    found = counted(400, 100)
    assert (found.ratio, found.low, found.high, found.p) == (0.25, 0.25, 0.25, None)
    assert found.verdict is Verdict.LESS
    assert found.coloured
    assert found.sentence == "B needs less than A: B / A is 0.250 in amount, counted."
    assert counted(7, 7).verdict is Verdict.NO_DIFFERENCE


def test_a_comparison_goes_through_json() -> None:
    found = compare([1.0, 1.1, 0.9, 1.3, 1.0, 1.2], [1.0, 1.1, 0.9, 1.3, 1.0, 1.21])
    again = json.loads(json.dumps(asdict(found)))
    assert again["verdict"] == "no detectable difference"
    assert again["quantity"] == "time"
    kept = {**again, "verdict": Verdict(again["verdict"]), "quantity": Quantity(again["quantity"])}
    assert Comparison(**kept) == found


def test_the_same_blocks_give_the_same_numbers() -> None:
    sides = DRIFTING.sides(np.random.default_rng(8), PAIRS, 1.05)
    assert compare(*sides, seed=4) == compare(*sides, seed=4)


def holm_by_definition(ps: list[float], alpha: float) -> list[bool]:
    """Return which hypotheses the step-down procedure rejects."""
    rejected = [False] * len(ps)
    for step, at in enumerate(sorted(range(len(ps)), key=lambda at: ps[at])):
        if ps[at] >= alpha / (len(ps) - step):
            break
        rejected[at] = True
    return rejected


def closed_testing(ps: list[float], alpha: float) -> list[bool]:
    """Reject where Bonferroni rejects every set that holds it: what Holm's steps abbreviate."""
    every = range(len(ps))
    sets = [s for size in range(1, len(ps) + 1) for s in combinations(every, size)]
    return [all(min(ps[k] for k in s) * len(s) < alpha for s in sets if at in s) for at in every]


def test_holm_is_the_step_down_procedure_and_its_closure() -> None:
    """A verdict after Holm is what the definition rejects, for 200 grids of 1 to 6 cells."""
    template = compare([1.0] * 8, [1.25] * 8)
    rng = np.random.default_rng(4)
    for _ in range(200):
        ps = [float(p) for p in rng.beta(0.3, 3, size=rng.integers(1, 7))]
        cells = holm([replace(template, p=p) for p in ps])
        claimed = [cell.verdict.claims for cell in cells]
        assert claimed == holm_by_definition(ps, 0.05) == closed_testing(ps, 0.05)
        order = np.argsort(ps)
        adjusted = [float(cells[at].p_holm or 0) for at in order]
        assert adjusted == sorted(adjusted)
        assert all(p <= q <= 1 for p, q in zip(np.sort(ps), adjusted, strict=True))


def test_cells_without_a_p_take_no_part_in_holm() -> None:
    sure = compare([1.0] * 8, [1.25] * 8)
    missing = compare([1.0], [])
    first, second, third = holm([missing, sure, missing])
    assert second.p_holm == sure.p
    assert (first, third) == (missing, missing)
    assert holm([]) == ()


def test_a_grid_of_sixteen_equal_cells_rarely_claims_anything() -> None:
    """At most 5 of 100 grids in the long run; 20 uncorrected grids would claim in 5 or more."""
    rng = np.random.default_rng(5)
    grids = [holm([compare(*DRIFTING.sides(rng, 12, 1.0)) for _ in range(16)]) for _ in range(6)]
    assert sum(any(cell.verdict.claims for cell in grid) for grid in grids) <= 1
    assert all(cell.p_holm is not None for grid in grids for cell in grid)


def test_the_stop_rule_ends_by_width_by_budget_or_by_number() -> None:
    rule = StopRule(half_width=0.05, min_pairs=8, max_pairs=24, seconds=100)
    narrow = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.01, 1.0] * 3
    wide = [1.0, 2.0, 0.5, 3.0, 1.0, 0.3, 1.7, 0.9] * 3
    other = [1.0] * 24
    assert rule.ended(narrow[:7], other[:7], 0) is None
    assert "within ±5.0%" in (rule.ended(narrow[:8], other[:8], 0) or "")
    assert rule.ended(narrow[:9], other[:9], 0) is None, "the width is looked at every 4 pairs"
    assert rule.ended(wide[:8], other[:8], 0) is None
    assert "all 24 pairs" in (rule.ended(wide, other, 0) or "")
    assert "budget of 100 s was used up after 2 pairs" in (
        rule.ended(wide[:2], other[:2], 100.5) or ""
    )
    never = StopRule(half_width=None, min_pairs=8, max_pairs=24)
    assert never.ended(narrow[:8], other[:8], 1e9) is None


def test_the_stop_rule_does_not_see_where_the_interval_lies() -> None:
    """The same spread around a ratio of 1 and of 3 ends at the same pair: no peeking."""
    rule = StopRule(half_width=0.02, min_pairs=8, max_pairs=60)
    rng = np.random.default_rng(6)
    a, b = rng.lognormal(0, 0.04, 60), rng.lognormal(0, 0.04, 60)
    ends = [
        next(n for n in range(1, 61) if rule.ended(a[:n], factor * b[:n], 0))
        for factor in (1.0, 1.03, 3.0)
    ]
    assert len(set(ends)) == 1
    assert 8 < ends[0] < 60


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"half_width": 0}, "greater than 0"),
        ({"min_pairs": 5}, "greater than or equal to 6"),
        ({"min_pairs": 20, "max_pairs": 10}, "below the least"),
        ({"seconds": math.inf}, "finite"),
        ({"until_significant": True}, "not permitted"),
    ],
)
def test_a_stop_rule_that_makes_no_sense_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        StopRule(**fields)


def test_the_noise_floor_is_dated_and_holds_for_the_next_runs() -> None:
    """Of 100 further A/A runs at most 10 lie beyond the floor that 5 runs gave."""
    rng = np.random.default_rng(7)
    at = datetime(2026, 11, 21, 14, 30, tzinfo=timezone(timedelta(hours=2)))
    floor = noise_floor([DRIFTING.sides(rng, PAIRS, 1.0) for _ in range(5)], at)
    assert (floor.at, floor.runs, floor.pairs) == ("2026-11-21T12:30:00+00:00", 5, 5 * PAIRS)
    assert 1.01 < floor.ratio < 1.1
    beyond = 0
    for _ in range(100):
        found = compare(*DRIFTING.sides(rng, PAIRS, 1.0)).ratio
        assert found is not None
        beyond += abs(math.log(found)) > math.log(floor.ratio)
    assert beyond <= 10


def test_a_systematic_difference_of_equal_sides_raises_the_floor() -> None:
    """As when the second of two equal models lies worse in memory."""
    a = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.01, 1.0]
    assert noise_floor([(a, [v * 1.08 for v in a])]).ratio == pytest.approx(1.08, rel=1e-6)
    assert noise_floor([(a, a)]).ratio == 1
    moment = datetime.fromisoformat(noise_floor([(a, a)]).at)
    assert abs(datetime.now(UTC) - moment) < timedelta(minutes=1)


def test_a_noise_floor_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one"):
        noise_floor([])
    with pytest.raises(InvalidInput, match="5 pairs of blocks; 6 are the least"):
        noise_floor([([1.0] * 5, [1.0] * 6)])


def test_a_summary_has_linear_percentiles() -> None:
    found = summary([4.0, 1.0, 3.0, 2.0])
    assert (found.n, found.mean, found.minimum, found.maximum) == (4, 2.5, 1.0, 4.0)
    assert (found.p05, found.p25, found.median, found.p75) == (1.15, 1.75, 2.5, 3.25)
    assert (found.p90, found.p95, found.p99) == pytest.approx((3.7, 3.85, 3.97))
    assert found.iqr == 1.5
    assert summary([3.0]).p95 == 3.0


def test_a_far_tail_needs_a_thousand_observations() -> None:
    assert summary(range(999)).p999 is None
    assert summary(range(1001)).p999 == pytest.approx(999.0)


@pytest.mark.parametrize("wrong", [[], [1.0, math.nan], [math.inf]])
def test_a_summary_of_nothing_or_of_no_numbers_is_refused(wrong: list[float]) -> None:
    for ask in (summary, median_interval, block_value):
        with pytest.raises(InvalidInput, match=r"observations"):
            ask(wrong)


def test_the_interval_of_a_median_covers_it() -> None:
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(200):
        found = median_interval(rng.lognormal(0, 0.5, 25))
        assert found is not None
        covered += found[0] <= 1 <= found[1]
    assert covered >= 184
    assert median_interval([1.0] * 5) is None


def test_scipy_is_paid_for_only_by_who_compares() -> None:
    code = "import sys, gptcore.measure.statistics; print({'scipy', 'torch'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("comparisons", "pairs"), [(1, 6), (3, 7), (12, 9), (64, 12)])
def test_the_least_pairs_of_a_grid_can_just_be_claimed(comparisons: int, pairs: int) -> None:
    assert pairs_for(comparisons) == pairs
    agreeing = np.linspace(1.0, 1.1, pairs)
    slower = compare(agreeing, agreeing * np.linspace(1.2, 1.3, pairs))
    same = compare(agreeing, agreeing * np.linspace(0.99, 1.01, pairs))
    assert holm([slower] + [same] * (comparisons - 1))[0].verdict.claims
    if pairs > 6:
        fewer = compare(agreeing[:-1], (agreeing * np.linspace(1.2, 1.3, pairs))[:-1])
        assert not holm([fewer] + [same] * (comparisons - 1))[0].verdict.claims
