"""The map of a grid: a colour only where a difference is claimed and is more than noise."""

from __future__ import annotations

from typing import Any

import pytest

from gptcore.measure.statistics import Quantity, compare, holm
from pages.parts.compare_charts import BAD, GOOD, color_of, grid

BASE = [1.0 + 0.001 * (number % 5) for number in range(24)]


def cell(batch: int, prompt: int, ratio: float, floor: float | None = None) -> dict[str, Any]:
    """A verdict from blocks of which each is ``ratio`` times A's."""
    (found,) = holm(
        [compare(BASE, [ratio * one for one in BASE], quantity=Quantity.TIME, noise_floor=floor)]
    )
    return {
        "cell": {"batch": batch, "prompt_tokens": prompt, "new_tokens": 4},
        "ratio": found.ratio,
        "verdict": str(found.verdict),
        "coloured": found.coloured,
        "sentence": found.sentence,
    }


@pytest.mark.parametrize(
    ("ratio", "floor", "color"),
    [
        (0.8, None, GOOD),
        (1.25, None, BAD),
        (1.0, None, None),
        (0.8, 1.1, GOOD),
        (0.97, 1.1, None),  # claimed, but this machine makes that of no difference
        (1.03, 1.1, None),
    ],
)
def test_a_colour_is_a_claim_beyond_the_noise(
    ratio: float, floor: float | None, color: str | None
) -> None:
    assert color_of(cell(1, 8, ratio, floor)) == color


def test_the_map_has_a_square_for_each_batch_and_length_in_its_colour() -> None:
    """The place of each is told by a ratio of its own."""
    told = [cell(4, 64, 1.3), cell(1, 64, 1.0), cell(4, 8, 0.9), cell(1, 8, 0.7)]
    (heat,) = grid(told[:-1]).data
    assert (list(heat.x), list(heat.y)) == (["1", "4"], ["8", "64"])
    assert [list(row) for row in heat.z] == [[None, 1], [0, 2]]
    (heat,) = grid(told).data
    assert [list(row) for row in heat.z] == [[1, 1], [0, 2]]
    assert [[text.partition("<br>")[0] for text in row] for row in heat.text] == [
        ["<b>0.700 ×</b>", "<b>0.900 ×</b>"],
        ["<b>1.000 ×</b>", "<b>1.300 ×</b>"],
    ]
