"""Numbers as a person reads them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from pages.parts import format as shown

FORMATTERS = (
    shown.duration,
    shown.size,
    shown.gigabytes,
    shown.number,
    shown.rate,
    shown.share,
    shown.whole,
    shown.parameters,
    shown.watts,
    shown.celsius,
)


@pytest.mark.parametrize("formatter", FORMATTERS)
@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_what_is_unknown_is_a_dash_and_never_a_zero(formatter, unknown):
    assert formatter(unknown) == shown.UNKNOWN


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_a_known_zero_is_shown_as_zero(formatter):
    assert formatter(0).split()[0] == "0"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0172, "17.2 ms"),
        (0.00004, "0.0400 ms"),
        (0.9996, "1.00 s"),
        (1.237, "1.24 s"),
        (59.97, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3 * 3600 + 61, "3 h 01 min"),
        (2 * 86_400 + 7200, "2 d 2 h"),
    ],
)
def test_a_duration_has_three_digits_or_two_units(seconds, text):
    assert shown.duration(seconds) == text


def test_the_largest_gpt3_in_fp32_takes_698_gb():
    assert shown.gigabytes(174_604_259_328 * 4) == "698 GB"


@pytest.mark.parametrize(
    ("count", "text"),
    [(124_439_808, "124 M"), (1_557_611_200, "1.56 B"), (999_900_000, "1.00 B"), (12, "12")],
)
def test_parameters_are_rounded_to_three_digits(count, text):
    assert shown.parameters(count) == text


def test_three_digits_stay_within_half_a_unit_of_the_third_digit():
    # Two ways to one number: the text read back, and the value itself.
    for value in (0.0123456, 0.9996, 9.996, 12.345, 99.96, 123.4, 1234.5, 987654.3):
        back = float(shown.three_digits(value).replace(",", ""))
        assert abs(back - value) <= 0.5 * 10 ** (math.floor(math.log10(value)) - 2) * 1.000001


def test_a_small_share_is_not_rounded_to_nothing():
    assert shown.share(0.0001) == "< 0.1 %"


def test_bytes_choose_their_unit():
    assert [shown.size(n) for n in (512, 2048, 93e6, 1.5 * 2**30)] == [
        "512 B",
        "2 KiB",
        "89 MiB",
        "1.5 GiB",
    ]


def test_a_moment_is_shown_in_the_time_zone_of_the_browser():
    noon = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
    assert shown.moment(noon, shown.zone_of("Europe/Berlin")) == "2026-01-02 13:00:00"


@pytest.mark.parametrize("name", [None, "", "Not/AZone", "../../etc/passwd"])
def test_an_unknown_time_zone_falls_back_to_utc(name):
    assert shown.zone_of(name) is UTC


def test_how_long_ago_takes_the_largest_unit_that_fits():
    now = datetime(2026, 1, 2, tzinfo=UTC)
    pasts = (1, 12, 90, 7200, 200_000)
    assert [shown.ago(now - timedelta(seconds=s), now) for s in pasts] == [
        "just now",
        "12 s ago",
        "1 min ago",
        "2 h ago",
        "2 d ago",
    ]


def test_one_line_has_no_line_end_and_no_control_character():
    text = shown.one_line("a\nb\x00c\u202ed\te", 80)
    assert text == "a b c d e"


def test_one_line_ends_in_dots_exactly_when_something_was_left_out():
    assert shown.one_line("x" * 80, 80) == "x" * 80
    assert shown.one_line("x" * 81, 80) == "x" * 79 + "…"
    assert shown.one_line("x" + " " * 10_000 + "y", 80).endswith("…")


def test_escaped_text_leaves_no_markup_character_bare():
    hostile = ":red[a] $x$ [l](http://h) **b** <b> `c` ~~d~~ www.h.com"
    out = shown.escaped(hostile)
    bare = out.replace("\\\\", "")
    for mark in ":[]()$*<>`~.":
        assert all(bare[i - 1] == "\\" for i, c in enumerate(bare) if c == mark), mark
