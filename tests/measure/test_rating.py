"""Ratings held against known strengths, a closed form, and Hunter's iteration."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace
from datetime import UTC

import numpy as np
import pytest
from pydantic import ValidationError

from gptcore.errors import InvalidInput
from gptcore.measure.rating import POINTS, Choice, Ratings, Vote, rate

STRENGTHS = (-1.2, -0.7, -0.25, 0.25, 0.7, 1.2)
BY_STRENGTH = tuple(f"v{at}" for at in reversed(range(len(STRENGTHS))))
TRUE = {f"v{at}": 1000 + POINTS * strength for at, strength in enumerate(STRENGTHS)}


def votes(
    rng: np.random.Generator,
    count: int = 1000,
    *,
    ties: float = 0.0,
    both_bad: float = 0.0,
    per_length: float = 0.0,
) -> list[Vote]:
    """Return votes of people who prefer by ``STRENGTHS``, and longer texts by ``per_length``.

    The weaker a variant, the longer its answers: e times as long for the weakest.
    """
    found = []
    for _ in range(count):
        left, right = (int(at) for at in rng.choice(len(STRENGTHS), 2, replace=False))
        lengths = [
            int(100 * math.exp(1 - at / (len(STRENGTHS) - 1)) * rng.lognormal(0, 0.4))
            for at in (left, right)
        ]
        logit = STRENGTHS[left] - STRENGTHS[right]
        logit += per_length * math.log(lengths[0] / lengths[1])
        what, luck = rng.random(2)
        if what < both_bad:
            choice = Choice.BOTH_BAD
        elif what < both_bad + ties:
            choice = Choice.TIE
        else:
            choice = Choice.LEFT if luck < 1 / (1 + math.exp(-logit)) else Choice.RIGHT
        found.append(
            Vote(
                left=f"v{left}",
                right=f"v{right}",
                choice=choice,
                left_tokens=lengths[0],
                right_tokens=lengths[1],
            )
        )
    return found


def vote(left: str, right: str, choice: Choice, lengths: tuple[int, int] = (10, 10)) -> Vote:
    return Vote(
        left=left, right=right, choice=choice, left_tokens=lengths[0], right_tokens=lengths[1]
    )


def ratings(found: Ratings) -> dict[str, float]:
    return {one.variant: one.rating for one in found.rated}


def covered(found: Ratings) -> list[bool]:
    return [one.low <= TRUE[one.variant] <= one.high for one in found.rated]


def test_a_thousand_votes_give_the_order_and_93_percent_of_intervals_cover() -> None:
    hits: list[bool] = []
    for seed in range(15):
        found = rate(votes(np.random.default_rng(seed)), resamples=200, seed=seed)
        assert tuple(one.variant for one in found.rated) == BY_STRENGTH
        hits += covered(found)
    assert sum(hits) / len(hits) >= 0.93


def test_with_ties_and_both_bad_the_order_is_still_found() -> None:
    found = rate(votes(np.random.default_rng(100), ties=0.2, both_bad=0.1), resamples=50)
    assert tuple(one.variant for one in found.rated) == BY_STRENGTH
    assert found.votes + found.both_bad == 1000
    assert 70 < found.both_bad < 130
    assert all(one.low < one.rating < one.high for one in found.rated)


def test_length_misleads_and_the_control_for_it_does_not() -> None:
    """Twice the length gains 87 points, and the weakest write the longest."""
    misled: list[bool] = []
    controlled: list[bool] = []
    gains = []
    for seed in range(10):
        given = votes(np.random.default_rng(700 + seed), per_length=0.72)
        plain = rate(given, resamples=100, seed=seed)
        equal = rate(given, equal_length=True, resamples=200, seed=seed)
        misled += covered(plain)
        controlled += covered(equal)
        assert tuple(one.variant for one in equal.rated) == BY_STRENGTH
        assert plain.length_points is None
        assert equal.length_points is not None
        gains.append(equal.length_points)
    assert sum(controlled) / len(controlled) >= 0.88
    assert sum(misled) / len(misled) < 0.7
    assert np.mean(gains) == pytest.approx(POINTS * 0.72 * math.log(2), abs=10)


def test_where_length_has_no_effect_its_interval_holds_zero() -> None:
    found = rate(votes(np.random.default_rng(300)), equal_length=True, resamples=200)
    assert found.length_low is not None
    assert found.length_high is not None
    assert found.length_low < 0 < found.length_high


def test_two_variants_differ_by_400_points_a_factor_of_ten() -> None:
    given = [vote("a", "b", Choice.LEFT)] * 1000 + [vote("b", "a", Choice.LEFT)] * 100
    found = ratings(rate(given, resamples=2))
    assert found["a"] - found["b"] == pytest.approx(400, abs=1)
    assert found["a"] + found["b"] == pytest.approx(2000, abs=1e-3)


def test_the_strengths_are_those_of_hunters_iteration() -> None:
    """Minorization and maximization, Hunter 2004: another way to the same maximum."""
    given = votes(np.random.default_rng(400), 600)
    names = sorted(TRUE)
    wins = np.zeros((6, 6))
    for one in given:
        winner, loser = (
            (one.left, one.right) if one.choice is Choice.LEFT else (one.right, one.left)
        )
        wins[names.index(winner), names.index(loser)] += 1
    gamma = np.ones(6)
    for _ in range(2000):
        together = (wins + wins.T) / (gamma[:, None] + gamma[None, :])
        gamma = wins.sum(axis=1) / together.sum(axis=1)
        gamma /= np.exp(np.log(gamma).mean())
    found = ratings(rate(given, resamples=2))
    for at, name in enumerate(names):
        assert found[name] == pytest.approx(1000 + POINTS * math.log(gamma[at]), abs=0.5)


def test_a_tie_is_half_a_win_for_each() -> None:
    ties = [vote("a", "b", Choice.TIE)] * 10
    halves = [vote("a", "b", Choice.LEFT)] * 5 + [vote("a", "b", Choice.RIGHT)] * 5
    for won in (0, 7):
        more = [vote("b", "a", Choice.LEFT)] * won
        assert ratings(rate(ties + more, resamples=2)) == pytest.approx(
            ratings(rate(halves + more, resamples=2)), abs=1e-3
        )


def test_neither_the_order_of_votes_nor_the_side_matters() -> None:
    given = votes(np.random.default_rng(500), 200)
    mirror = {Choice.LEFT: Choice.RIGHT, Choice.RIGHT: Choice.LEFT}
    turned = [
        vote(one.right, one.left, mirror[one.choice], (one.right_tokens, one.left_tokens))
        for one in given
    ]
    random.Random(1).shuffle(turned)
    for equal in (False, True):
        first = rate(given, equal_length=equal, resamples=2)
        second = rate(turned, equal_length=equal, resamples=2)
        assert ratings(first) == pytest.approx(ratings(second), abs=1e-2)
    assert rate(given, resamples=5) == rate(given, resamples=5)


def test_winning_every_vote_stays_finite() -> None:
    """Without the prior the likelihood has no maximum here."""
    found = rate([vote("a", "b", Choice.LEFT)] * 20, resamples=20)
    first, second = found.rated
    assert first.variant == "a"
    assert 800 < first.rating - second.rating < 2500
    assert math.isfinite(first.low)


def test_both_bad_is_counted_and_moves_nothing() -> None:
    given = votes(np.random.default_rng(600), 300)
    with_bad = given + [vote("v0", "v5", Choice.BOTH_BAD)] * 40
    first, second = rate(given, resamples=20), rate(with_bad, resamples=20)
    assert ratings(first) == ratings(second)
    assert (second.votes, second.both_bad) == (300, 40)
    assert {one.variant: one.both_bad for one in second.rated} == {
        name: 40 if name in ("v0", "v5") else 0 for name in TRUE
    }
    assert replace(second, both_bad=0, rated=()) == replace(first, rated=())


def test_each_variant_has_its_record() -> None:
    given = [
        vote("a", "b", Choice.LEFT),
        vote("b", "a", Choice.LEFT),
        vote("b", "a", Choice.RIGHT),
        vote("c", "a", Choice.TIE),
        vote("c", "b", Choice.BOTH_BAD),
    ]
    record = {
        one.variant: (one.wins, one.losses, one.ties, one.both_bad)
        for one in rate(given, resamples=2).rated
    }
    assert record == {"a": (2, 1, 1, 0), "b": (1, 2, 0, 1), "c": (0, 0, 1, 1)}


def test_variants_that_never_met_are_in_different_groups() -> None:
    apart = [vote("a", "b", Choice.LEFT), vote("c", "d", Choice.LEFT)] * 3
    found = {one.variant: one.group for one in rate(apart, resamples=2).rated}
    assert found["a"] == found["b"] != found["c"] == found["d"]
    linked = rate([*apart, vote("b", "c", Choice.TIE)], resamples=2)
    assert linked.groups == 1
    only_bad = rate([*apart, vote("b", "c", Choice.BOTH_BAD)], resamples=2)
    assert only_bad.groups == 2


def test_an_empty_answer_has_a_length_of_one() -> None:
    given = [vote("a", "b", Choice.LEFT, (0, 5)), vote("a", "b", Choice.RIGHT, (5, 0))]
    found = rate(given, equal_length=True, resamples=5)
    assert all(math.isfinite(one.rating) for one in found.rated)
    assert found.length_points is not None
    assert found.length_points < 0, "the shorter one was preferred both times"


@pytest.mark.parametrize("given", [[], [vote("a", "b", Choice.BOTH_BAD)] * 3])
def test_no_order_without_a_vote_that_gives_one(given: list[Vote]) -> None:
    with pytest.raises(InvalidInput, match=f"There are {len(given)} votes and none"):
        rate(given)


def test_a_vote_is_of_two_variants_and_goes_through_json() -> None:
    with pytest.raises(ValidationError, match="both sides are a"):
        vote("a", "a", Choice.LEFT)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        vote("a", "b", Choice.LEFT, (-1, 0))
    one = vote("a", "b", Choice.BOTH_BAD)
    assert one.at.tzinfo is UTC
    assert Vote.model_validate_json(one.model_dump_json()) == one
    assert json.loads(json.dumps(asdict(rate([vote("a", "b", Choice.TIE)], resamples=2))))
