"""What the live page computes from one look at the lab."""

from __future__ import annotations

import math
import time

import pytest

from gptcore.records import RunState, Token
from pages.parts import charts
from pages.parts.live_chart import GAP_S
from tests.fakes_live import FakeLab, a_run, filled_store


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    store = filled_store(tmp_path_factory.mktemp("charts"), gpu=True)
    yield FakeLab(store, gpu_absence=None)
    store.close()


@pytest.fixture
def picture(lab):
    return charts.picture(lab, 300, time.time())


def test_percentiles_stand_in_order_in_every_part_of_the_range(picture):
    p50, p95, p99 = (line.values for line in charts.latency_lines(picture, "ttft_s"))
    together = [three for three in zip(p50, p95, p99, strict=True) if None not in three]
    assert together
    assert all(a <= b <= c for a, b, c in together)


def test_the_number_beside_a_percentile_is_that_of_all_requests_of_the_range(lab, picture):
    # Two ways to one number: the store's, and plain interpolation over the runs.
    ttft = sorted(
        1000 * run.numbers.ttft_s
        for run in lab.runs(state=RunState.DONE)
        if picture.start <= run.ended_at.timestamp() <= picture.end
    )
    rank = 0.95 * (len(ttft) - 1)
    low = math.floor(rank)
    expected = ttft[low] + (ttft[low + 1] - ttft[low]) * (rank - low)
    line = charts.latency_lines(picture, "ttft_s")[1]
    assert line.name == "p95"
    assert line.now == pytest.approx(expected)
    assert charts.requests_measured(picture, "ttft_s") == len(ttft)


def test_the_error_rate_leaves_the_cancelled_out(lab, picture):
    states = [
        run.state for run in lab.runs() if picture.start <= run.ended_at.timestamp() <= picture.end
    ]
    failed, cancelled = states.count(RunState.FAILED), states.count(RunState.CANCELLED)
    assert failed
    assert cancelled
    assert charts.error_ratio(picture) == pytest.approx(failed / (len(states) - cancelled))
    assert charts.requests_ended(picture) == len(states)


def test_errors_are_named_by_their_kind_in_words(picture):
    assert [line.name for line in charts.error_lines(picture)] == ["does not fit"]


def test_nothing_that_was_not_measured_is_shown_as_zero(tmp_path):
    with filled_store(tmp_path, seconds=0, runs=0) as store:
        empty = charts.picture(FakeLab(store), 300, time.time())
    assert charts.error_ratio(empty) is None
    assert charts.latest(empty.readings, charts.CPU, empty.end) is None
    assert charts.reading_lines(empty, charts.GPU) == []
    assert charts.request_lines(empty, "mbu_ratio") == []
    assert all(line.now is None for line in charts.latency_lines(empty, "ttft_s"))


def test_a_reading_of_long_ago_is_not_now(picture):
    at = max(times[-1] for times, _ in picture.readings.values())
    assert charts.latest(picture.readings, charts.CPU, at) is not None
    assert charts.latest(picture.readings, charts.CPU, at + charts.STALE_S + 2) is None


def test_utilization_is_shown_in_percent(picture):
    (line,) = charts.reading_lines(picture, charts.CPU, scale=100)
    (_, ratios) = picture.readings[charts.CPU, ""]
    assert list(line.values) == pytest.approx([100 * ratio for ratio in ratios])


def test_the_curves_of_a_gpu_are_its_own(picture):
    assert charts.gpus(picture.readings) == ["cuda:0"]
    assert charts.reading_lines(picture, charts.GPU, subject="cuda:0")
    assert charts.reading_lines(picture, charts.GPU, subject="cuda:1") == []


def test_one_second_of_holes_is_seen_in_five_minutes_and_thinning_makes_none_in_a_month(picture):
    assert picture.gap_s == GAP_S
    month = charts.RANGES_S["30 d"]
    far = charts.Picture(0, month, {}, None, None, None, None, ())
    assert far.gap_s > month / charts.LINE_POINTS


def test_ten_sessions_in_one_second_ask_the_database_once(tmp_path):
    with filled_store(tmp_path, seconds=10, runs=2) as store:
        lab = FakeLab(store)
        asked = []
        lab.latencies = lambda *a: asked.append(a) or store.latencies(0, 1, a[1])
        now = math.floor(time.time()) + 0.2
        pictures = [charts.picture(lab, 60, now + i / 20) for i in range(10)]
    assert len(asked) == 2  # the whole range, and its parts
    assert all(one is pictures[0] for one in pictures)


def test_a_database_that_cannot_be_read_is_a_sentence_beside_empty_charts(tmp_path):
    store = filled_store(tmp_path, seconds=5, runs=1)
    store.close()
    broken = charts.picture(FakeLab(store), 300, time.time())
    assert "closed" in broken.problem
    assert charts.latency_lines(broken, "ttft_s") == []
    assert charts.error_lines(broken) == []
    assert charts.rate_lines(broken, "requests_per_s") == []
    assert charts.error_curve(broken) is None


def test_few_requests_are_cut_into_few_parts():
    buckets = [charts.percentile_buckets(n) for n in (0, 39, 40, 149, 599, 10_000)]
    assert buckets == sorted(buckets)
    assert buckets[0] >= 2


def test_the_bars_of_a_timeline_add_up_to_its_decode_time():
    run, tokens = a_run(new_tokens=30)
    arrivals, bars = charts.token_timeline(tokens, run.numbers).data
    assert sum(bars.y) / 1000 == pytest.approx(arrivals.y[-1] - arrivals.y[0])
    assert len(bars.y) == 29


def test_the_tokens_of_a_branchs_trunk_are_no_part_of_its_timeline():
    _, tokens = a_run(new_tokens=10)
    trunk = [Token(i, i, "x", -1.0, 1.0, 0.0, forced=True) for i in range(5)]
    figure = charts.token_timeline((*trunk, *tokens), None)
    assert len(figure.data[0].y) == 10


@pytest.mark.parametrize(
    "text",
    ["<b>x</b>", '<a href="javascript:alert(1)">x</a>', "&lt;b&gt;", "a\x00b\u202e", "\n", "  "],
)
def test_a_tokens_text_has_no_character_that_plotly_reads_as_markup(text):
    plain = charts.plain_for_plotly(text)
    assert "<" not in plain
    assert ">" not in plain
    assert (
        plain.replace("&amp;", "")
        .replace("&lt;", "")
        .replace("&gt;", "")
        .replace("&quot;", "")
        .replace("&#x27;", "")
        .count("&")
        == 0
    )


def test_every_state_has_a_name_an_icon_and_a_colour():
    assert set(charts.STATE_LOOKS) == set(RunState)
