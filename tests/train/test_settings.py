"""Settings: the learning rate's course, and what is refused."""

import pytest
from pydantic import ValidationError

from gptcore.sentences import sentence
from gptcore.train.settings import Training


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    settings = Training(steps=110, warmup=10, learning_rate=1.0, least_rate_ratio=0.1)
    rates = [settings.rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    middle = 10 + (109 - 10) / 2
    assert (settings.rate(int(middle)) + settings.rate(int(middle) + 1)) / 2 == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_one_step_without_warm_up_has_the_largest_rate() -> None:
    assert Training(steps=1, warmup=0, learning_rate=0.5).rate(0) == 0.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch": 0}, "Batch is 0; the least is 1."),
        ({"batch": 10, "parts": 3}, "A batch of 10 cannot be computed in 3 equal parts"),
        ({"learning_rate": float("nan")}, "Learning rate is nan; it must be a number."),
        ({"learning_rate": "fast"}, "Learning rate is fast; it must be a number."),
        ({"dropout": 1.0}, "Dropout is 1.0; it must be below 1."),
        ({"steps": 50, "warmup": 50}, "A warm-up of 50 steps leaves none of 50"),
        ({"precision": "int8"}, "Precision is int8; there are: 'fp32', 'bf16' or 'fp16'."),
    ],
)
def test_what_is_not_allowed_is_said_in_a_sentence(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Training.model_validate(given)
    assert sentence(caught.value, Training).startswith(said)


def test_every_field_has_a_title_and_a_description() -> None:
    for name, field in Training.model_fields.items():
        assert field.title, name
        assert field.description, name
