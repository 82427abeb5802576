"""The pictures of trainings: where each point stands."""

from __future__ import annotations

import pytest

from gptcore.lab import Event, Stepped, Validated
from pages.parts.train_charts import MOST_POINTS, SECONDS, STEPS, curve, loss, places, thinned


def step(number: int, seconds: float = 0.5) -> Stepped:
    return Stepped(number, 3.0 - number / 100, 1e-3, 0.5, seconds, 1000.0, None, None)


def validated(number: int, nats: float) -> Validated:
    return Validated(number, nats, nats / 2, True, 0.1, None, "unavailable", "")


SLOW: list[Event] = [step(1), step(2), validated(2, 2.5), step(3), step(4), validated(4, 2.25)]
FAST: list[Event] = [step(1, 0.25), step(2, 0.25), validated(2, 2.75)]


def test_one_training_shows_steps_and_validations() -> None:
    training, validation = loss({"mine": SLOW}).data
    assert list(training.x) == [1, 2, 3, 4]
    assert list(training.y) == pytest.approx([2.99, 2.98, 2.97, 2.96])
    assert (list(validation.x), list(validation.y)) == ([2, 4], [2.5, 2.25])
    assert (training.name, validation.name) == ("training", "validation")


def test_trainings_side_by_side_stand_where_their_time_had_come() -> None:
    _, slow, fast = loss({"slow": SLOW, "fast": FAST}, by=SECONDS).data
    assert (slow.name, list(slow.x)) == ("slow", [1.0, 2.0])
    assert (fast.name, list(fast.x)) == ("fast", [0.5])
    assert slow.line.color != fast.line.color


def test_a_validation_after_a_resume_has_its_place_among_the_steps() -> None:
    resumed: list[Event] = [validated(2, 2.5), *SLOW[3:]]
    assert places(resumed, STEPS) == {3: 3.0, 4: 4.0}
    assert list(loss({"mine": resumed}).data[1].x) == [4]


def test_a_long_training_is_thinned_and_keeps_its_end() -> None:
    steps = [step(number) for number in range(1, 5001)]
    found = thinned(steps)
    assert len(found) <= MOST_POINTS + 1
    assert (found[0], found[-1]) == (steps[0], steps[-1])
    assert list(curve(steps, "tokens_per_s", "Tokens/s").data[0].y) == [1000.0] * len(found)
