"""What a live chart sends to the browser."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages.parts.live_chart import GAP_S, Line, opened, packed


def unpacked(block: bytes) -> tuple[dict, list[tuple[np.ndarray, np.ndarray]]]:
    """Read a block as the script in the browser does."""
    (length,) = struct.unpack_from("<I", block)
    head = json.loads(block[4 : 4 + length])
    offset, times, lines = 4 + length, np.empty(0), []
    for line in head["lines"]:
        if not line["shared"]:
            times = np.frombuffer(block, "<f4", line["count"], offset).astype(float) + head["start"]
            offset += 4 * line["count"]
        values = np.frombuffer(block, "<f4", line["count"], offset)
        offset += 4 * line["count"]
        lines.append((times, values))
    assert offset == len(block)
    return head, lines


def test_a_hole_longer_than_three_seconds_is_left_open():
    times, values = opened([0, 1, 2, 6, 7], [5, 5, 5, 9, 9], GAP_S)
    assert times.tolist() == [0, 1, 2, 4, 6, 7]
    assert np.isnan(values).tolist() == [False, False, False, True, False, False]


def test_a_pause_of_three_seconds_is_no_hole():
    times, values = opened([0, 3, 6], [1, 2, 3], GAP_S)
    assert times.tolist() == [0, 3, 6]
    assert values.tolist() == [1, 2, 3]


@given(
    st.lists(st.tuples(st.floats(0.1, 20), st.floats(-1e6, 1e6) | st.none()), max_size=60),
    st.floats(0.5, 10),
)
def test_opening_holes_keeps_every_point_and_leaves_no_line_across_one(steps, gap_s):
    at = np.cumsum([step for step, _ in steps]).tolist()
    known = [value for _, value in steps]
    times, values = opened(at, known, gap_s)
    kept = [(t, None if np.isnan(v) else v) for t, v in zip(times, values, strict=True)]
    assert [point for point in kept if point[0] in set(at)] == list(zip(at, known, strict=True))
    drawn = ~np.isnan(values)
    bridged = drawn[:-1] & drawn[1:]
    assert (np.diff(times)[bridged] <= gap_s).all()


def test_what_is_packed_is_read_back_as_it_was():
    start = 1.79e9
    times = [start + i for i in range(200)]
    a = Line("a", times, [i / 7 for i in range(200)])
    b = Line("b", times[:50], [None if i % 5 else 1.0 for i in range(50)], 3, "dots", now=2.5)
    head, lines = unpacked(packed({"title": "Größe", "unit": "ms"}, [a, b], start, start + 200))
    assert head["title"] == "Größe"
    assert [one["name"] for one in head["lines"]] == ["a", "b"]
    assert head["lines"][1] == {
        "name": "b", "color": 3, "style": "dots", "count": 50, "shared": False, "now": 2.5
    }  # fmt: skip
    np.testing.assert_allclose(lines[0][0], times, rtol=0, atol=1e-3)
    np.testing.assert_allclose(lines[0][1], a.values, rtol=1e-6)
    assert [None if np.isnan(v) else float(v) for v in lines[1][1]] == list(b.values)


def test_thirty_days_of_times_are_resolved_to_less_than_a_third_of_a_second():
    start = 1.79e9
    times = [start + i * 3600 + 0.5 for i in range(24 * 30)]
    _, lines = unpacked(packed({}, [Line("a", times, times, gap_s=1e9)], start, times[-1]))
    assert np.abs(lines[0][0] - times).max() < 0.3


def test_lines_of_the_same_times_send_them_once():
    times = list(range(300))
    lines = [Line(name, times, times) for name in ("p50", "p95", "p99")]
    head, read = unpacked(packed({}, lines, 0, 300))
    assert [one["shared"] for one in head["lines"]] == [False, True, True]
    assert all(np.array_equal(t, times) for t, _ in read)


def test_a_refresh_of_300_points_in_three_lines_is_less_than_8_kib():
    times = [1.79e9 + i for i in range(300)]
    lines = [Line(name, times, times) for name in ("p50", "p95", "p99")]
    block = packed({"title": "Time to first token", "unit": "ms"}, lines, times[0], times[-1])
    assert len(block) < 8 * 1024


@pytest.mark.parametrize("title", ["x", "xy", "xyz", "wxyz", "é"])
def test_the_numbers_stand_on_a_multiple_of_their_size(title):
    block = packed({"title": title}, [Line("a", [0], [1])], 0, 1)
    assert struct.unpack_from("<I", block)[0] % 4 == 0


def test_a_chart_without_any_line_is_only_its_head():
    head, lines = unpacked(packed({"empty": "nothing"}, [], 0, 1))
    assert head["empty"] == "nothing"
    assert lines == []
