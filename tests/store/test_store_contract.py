"""What every database must keep, the same on SQLite and PostgreSQL."""

import dataclasses
import random
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import StoreError
from gptcore.records import Measurement, Reading, RunKind, RunState
from gptcore.store import Store, open_store
from gptcore.store.store import (
    DAY_S,
    HOUR_S,
    MINUTE_S,
    MINUTES_KEPT_S,
    MINUTES_RANGE_S,
    RAW_KEPT_S,
    RAW_RANGE_S,
)
from gptcore.store.tables import escaped, unescaped
from tests.store.examples import START, T0, ended, numbers, provenance, run, tokens

# Runs and tokens


def test_a_run_comes_back_as_it_went_in(store: Store) -> None:
    full = run(
        state=RunState.DONE,
        started_at=START + timedelta(microseconds=1),
        ended_at=START + timedelta(seconds=3, microseconds=999_999),
        text="NUL \x00, half a pair \udfff, a backslash \\u0000, a fox 🦊",
        error_kind="host_lost",
        error="'; DROP TABLE runs; --",
        numbers=numbers(),
        parent_id="abc",
    )
    store.add_run(full)
    assert store.run(full.id) == full
    assert store.run(full.id) is not full


def test_numbers_that_are_not_known_stay_unknown(store: Store) -> None:
    none = numbers(ttft_s=None, tpot_s=None, mbu_ratio=None, peak_memory_bytes=None)
    store.add_run(one := run(numbers=none))
    assert store.run(one.id) == one


def test_an_unknown_run_is_none_and_has_no_tokens(store: Store) -> None:
    assert store.run("nothing") is None
    assert store.tokens("nothing") == ()
    assert store.measurements("nothing") == ()


def test_times_come_back_in_utc_to_the_microsecond(store: Store) -> None:
    east = datetime(2026, 3, 1, 1, 2, 3, 4, tzinfo=UTC).astimezone()
    for _ in range(20):
        moment = east + timedelta(microseconds=random.Random(1).randrange(10**15))
        store.add_run(one := run(created_at=moment))
        kept = store.run(one.id)
        assert kept is not None
        assert kept.created_at == moment
        assert kept.created_at.tzinfo is UTC


def test_a_second_run_of_the_same_id_is_refused_and_the_first_stays(store: Store) -> None:
    store.add_run(first := run(text="first"))
    with pytest.raises(StoreError, match=f"already a run {first.id}"):
        store.add_run(dataclasses.replace(first, text="second"))
    assert store.run(first.id) == first


def test_an_update_changes_what_it_names_and_nothing_else(store: Store) -> None:
    store.add_run(one := run())
    store.update_run(one.id, state=RunState.RUNNING, started_at=START, text="so far\x00")
    expected = dataclasses.replace(one, state=RunState.RUNNING, started_at=START, text="so far\x00")
    assert store.run(one.id) == expected
    store.update_run(one.id, numbers=numbers(), settings={"prompt": "other"})
    expected = dataclasses.replace(expected, numbers=numbers(), settings={"prompt": "other"})
    assert store.run(one.id) == expected


def test_an_update_of_nothing_that_exists_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="no run 0123"):
        store.update_run("0123", text="x")
    with pytest.raises(TypeError, match="colour"):
        store.update_run("0123", colour="red")
    with pytest.raises(TypeError, match="id"):
        store.update_run("0123", id="other")


def test_finishing_keeps_the_run_and_every_token(store: Store) -> None:
    store.add_run(one := run())
    done = dataclasses.replace(
        one, state=RunState.DONE, text="all", numbers=numbers(), ended_at=START
    )
    store.finish_run(done, tokens())
    assert store.run(one.id) == done
    assert store.tokens(one.id) == tokens()


def test_finishing_a_run_that_could_not_be_added_adds_it(store: Store) -> None:
    store.finish_run(done := run(state=RunState.DONE), tokens(3))
    assert store.run(done.id) == done
    assert store.tokens(done.id) == tokens(3)


def test_a_finish_that_fails_leaves_everything_as_it_was(store: Store) -> None:
    store.add_run(one := run())
    broken = (*tokens(2), dataclasses.replace(tokens(1)[0], id=object()))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        store.finish_run(dataclasses.replace(one, state=RunState.DONE), broken)
    assert store.run(one.id) == one
    assert store.tokens(one.id) == ()


def test_saved_tokens_take_the_place_of_earlier_ones(store: Store) -> None:
    store.add_run(one := run())
    store.save_tokens(one.id, tokens(30))
    store.save_tokens(one.id, tokens(5))
    assert store.tokens(one.id) == tokens(5)
    store.save_tokens(one.id, ())
    assert store.tokens(one.id) == ()


def test_tokens_of_a_run_that_is_not_there_are_refused(store: Store) -> None:
    with pytest.raises(StoreError):
        store.save_tokens("nobody", tokens(1))


def test_deleting_a_run_takes_its_tokens_and_measurements_along(store: Store) -> None:
    store.add_run(one := run())
    store.save_tokens(one.id, tokens(2))
    store.add_measurements([Measurement(one.id, "ttft_s", (0.1,))])
    store.delete_run(one.id)
    assert store.run(one.id) is None
    assert store.tokens(one.id) == ()
    assert store.measurements(one.id) == ()


@given(st.text(st.characters()))
def test_escaping_is_undone_for_every_string_and_stores_what_any_database_takes(
    text: str,
) -> None:
    stored = escaped(text)
    assert unescaped(stored) == text
    assert "\x00" not in stored
    stored.encode("utf-8")


# Lists


def _made(store: Store, count: int, **changes: object) -> list[str]:
    made = [run(created_at=START + timedelta(seconds=i), **changes) for i in range(count)]
    for one in made:
        store.add_run(one)
    return [one.id for one in made]


def test_runs_come_newest_first_and_in_pages(store: Store) -> None:
    ids = _made(store, 7)
    assert [one.id for one in store.runs()] == ids[::-1]
    assert [one.id for one in store.runs(limit=3, offset=2)] == ids[::-1][2:5]


def test_runs_are_filtered_by_kind_state_and_time(store: Store) -> None:
    pulled = _made(store, 2, kind=RunKind.PULL)
    failed = _made(store, 3, state=RunState.FAILED)
    assert {one.id for one in store.runs(kind=RunKind.PULL)} == set(pulled)
    assert {one.id for one in store.runs(state="failed")} == set(failed)
    assert store.runs(kind=RunKind.PULL, state="failed") == ()
    since, until = START + timedelta(seconds=1), START + timedelta(seconds=2)
    assert {one.id for one in store.runs(since=since, until=until)} == {pulled[1], failed[1]}
    assert store.count_runs() == {"queued": 2, "failed": 3}
    assert store.count_runs(kind="pull") == {"queued": 2}


@pytest.mark.parametrize(
    "needle", ["FOX", "100%", "a_b", "back\\slash", "it's", "upon a TIME", "question"]
)
def test_a_search_finds_its_words_and_takes_no_character_as_a_wildcard(
    store: Store, needle: str
) -> None:
    texts = ["the Fox", "100%", "a_b", "back\\slash", "it's"]
    wanted = {
        "upon a TIME": store_one(store, settings={"prompt": "Once upon a time"}),
        "question": store_one(
            store, settings={"messages": [{"role": "user", "content": "a question"}]}
        ),
    } | {
        needle: store_one(store, text=text, settings={})
        for needle, text in zip(["FOX", "100%", "a_b", "back\\slash", "it's"], texts, strict=True)
    }
    for decoy in ("100 and more", "axb", "backslash"):
        store_one(store, text=decoy, settings={})
    assert [one.id for one in store.runs(search=needle)] == [wanted[needle]]


def store_one(store: Store, **changes: object) -> str:
    store.add_run(one := run(**changes))
    return one.id


# Owners


def test_only_unfinished_runs_of_dead_owners_are_interrupted(store: Store) -> None:
    dead = store_one(store, owner="1:1", state=RunState.RUNNING)
    waiting = store_one(store, owner="1:1", state=RunState.QUEUED)
    done = store_one(store, owner="1:1", state=RunState.DONE)
    living = store_one(store, owner="2:2", state=RunState.RUNNING)
    assert store.interrupt_orphans(lambda owner: owner == "2:2") == 2
    states = {id: one.state for id in (dead, waiting, done, living) if (one := store.run(id))}
    assert states == {
        dead: RunState.INTERRUPTED,
        waiting: RunState.INTERRUPTED,
        done: RunState.DONE,
        living: RunState.RUNNING,
    }
    marked = store.run(dead)
    assert marked is not None
    assert marked.error_kind == "interrupted"
    assert marked.error
    assert marked.ended_at is not None
    assert store.interrupt_orphans(lambda owner: owner == "2:2") == 0


def test_another_machines_work_is_left_alone(url: str) -> None:
    with open_store(url) as first:
        here = Store(first._database, machine="here")
        there = Store(first._database, machine="there")
        id = store_one(there, state=RunState.RUNNING)
        assert here.interrupt_orphans(lambda owner: False) == 0
        there.add_readings([Reading("cpu_utilization_ratio", 0.5, T0)])
        assert here.readings(["cpu_utilization_ratio"], T0 - 1, T0 + 1) == {}
        assert there.interrupt_orphans(lambda owner: False) == 1
        assert there.run(id) == here.run(id)


# Variants and measurements


def test_a_variant_is_kept_with_its_provenance(store: Store) -> None:
    definition = {"spec": {"layers": 2}, "recipe": [{"name": "int8"}], "text": "\x00\ud800"}
    store.add_variant("ab", definition, provenance())
    assert store.variant("ab") == (definition, provenance())
    assert store.variant("cd") is None


def test_a_run_keeps_the_provenance_of_its_own_time(store: Store) -> None:
    store.add_variant("ab", {}, provenance(app_version="1"))
    between = datetime.now(UTC)
    time.sleep(0.002)
    store.add_variant("ab", {}, provenance(app_version="2"))
    store.add_variant("ab", {}, provenance(app_version="2"))
    now = store.variant("ab")
    then = store.variant("ab", between)
    assert now is not None
    assert then is not None
    assert (now[1].app_version, then[1].app_version) == ("2", "1")


def test_measurements_keep_every_observation_and_the_newest_of_a_name(store: Store) -> None:
    store.add_run(one := run())
    store.add_measurements(
        [Measurement(one.id, "ttft_s", (0.1, 1 / 3)), Measurement(one.id, "e2e_s", (2.0,))]
    )
    store.add_measurements([Measurement(one.id, "e2e_s", (3.0, 4.0))])
    assert store.measurements(one.id) == (
        Measurement(one.id, "e2e_s", (3.0, 4.0)),
        Measurement(one.id, "ttft_s", (0.1, 1 / 3)),
    )


# Readings


def _line(name: str, start: float, values: np.ndarray, subject: str = "") -> list[Reading]:
    return [Reading(name, float(v), start + i, subject) for i, v in enumerate(values)]


def test_readings_come_back_by_name_and_subject(store: Store) -> None:
    store.add_readings(
        [
            Reading("gpu_power_watts", 1.0, T0, "cuda:0"),
            Reading("gpu_power_watts", 2.0, T0, "cuda:1"),
            Reading("memory_used_bytes", 3.0 * 2**40, T0 + 1),
            Reading("memory_used_bytes", float("nan"), T0 + 2),
        ]
    )
    assert store.readings(["gpu_power_watts", "memory_used_bytes", "none_s"], T0, T0 + 9) == {
        ("gpu_power_watts", "cuda:0"): ((T0,), (1.0,)),
        ("gpu_power_watts", "cuda:1"): ((T0,), (2.0,)),
        ("memory_used_bytes", ""): ((T0 + 1,), (3.0 * 2**40,)),
    }
    assert store.readings(["memory_used_bytes"], T0 + 2, T0 + 9) == {}
    assert store.readings([], T0, T0 + 9) == {}


def test_the_same_reading_twice_is_kept_once(store: Store) -> None:
    for _ in range(2):
        store.add_readings([Reading("cpu_utilization_ratio", 0.5, T0)] * 2)
    line = store.readings(["cpu_utilization_ratio"], T0 - 1, T0 + 1)
    assert line == {("cpu_utilization_ratio", ""): ((T0,), (0.5,))}


def test_minutes_and_hours_are_the_minimum_maximum_mean_and_count_of_raw_readings(
    store: Store,
) -> None:
    start = T0 // HOUR_S * HOUR_S
    values = np.random.default_rng(0).random(2 * HOUR_S)
    store.add_readings(_line("x_ratio", start, values))
    store.roll_up(start + 2 * HOUR_S + 10)
    for table, step in (("readings_1m", MINUTE_S), ("readings_1h", HOUR_S)):
        with store._database.reading() as connection:
            found = connection.exec_driver_sql(
                f"SELECT at, min, max, mean, count FROM {table} ORDER BY at"
            ).all()
        parts = values.reshape(-1, step)
        expected = [
            (start + i * step, part.min(), part.max(), part.mean(), step)
            for i, part in enumerate(parts)
        ]
        # The mean of means rounds differently from the mean: 1e-12 is thousands of roundings.
        assert np.allclose(np.array(found, dtype=float), np.array(expected), rtol=1e-12, atol=0)


def test_rolling_up_twice_changes_nothing(store: Store) -> None:
    store.add_readings(_line("x_ratio", T0, np.linspace(0, 1, 500)))
    lines = []
    for _ in range(2):
        store.roll_up(T0 + 500)
        lines.append(store.readings(["x_ratio"], T0 - DAY_S, T0 + 500))
    assert lines[0] == lines[1]
    assert lines[0]


def test_a_reading_that_comes_late_is_still_summed_up(store: Store) -> None:
    start = T0 // MINUTE_S * MINUTE_S
    store.add_readings([Reading("x_ratio", 0.1, start + 5)])
    store.roll_up(start + 2 * MINUTE_S)
    store.add_readings([Reading("x_ratio", 0.9, start + 6)])
    store.roll_up(start + 3 * MINUTE_S)
    _, values = store.readings(["x_ratio"], start - DAY_S, start + 200)["x_ratio", ""]
    assert (min(values), max(values)) == (0.1, 0.9)


def test_a_long_range_shows_extremes_and_what_is_not_rolled_up_yet(store: Store) -> None:
    start = T0 // HOUR_S * HOUR_S
    values = np.full(3 * HOUR_S, 0.5)
    values[1234], values[5000], values[-1] = 1.0, 0.0, 0.75
    store.add_readings(_line("x_ratio", start, values))
    store.roll_up(start + 2 * HOUR_S)
    end = start + 3 * HOUR_S
    for length in (RAW_RANGE_S + 1, 3 * HOUR_S, MINUTES_RANGE_S, MINUTES_RANGE_S + 1, 30 * DAY_S):
        times, shown = store.readings(["x_ratio"], end - length, end)["x_ratio", ""]
        assert times[-1] == end - 1
        assert shown[-1] == 0.75
        assert all(a <= b for a, b in pairwise(times))
        if length >= 3 * HOUR_S:
            assert (min(shown), max(shown)) == (0.0, 1.0)
            for value, at in ((1.0, start + 1234), (0.0, start + 5000)):
                # A bucket of an hour at the most, of which a quarter is the error either way.
                assert abs(times[shown.index(value)] - at) <= 0.75 * HOUR_S


def test_no_range_gives_more_points_than_asked_for_or_none_outside_it(store: Store) -> None:
    values = np.random.default_rng(1).random(6000)
    store.add_readings(_line("x_ratio", T0, values))
    store.roll_up(T0 + 6000)
    for length in (100, 3000, 3600, 6000, 6 * HOUR_S):
        for points in (50, 600):
            start = T0 + 6000 - length
            times, _ = store.readings(["x_ratio"], start, T0 + 6000, points)["x_ratio", ""]
            assert 2 <= len(times) <= points
            assert times[0] >= start
            assert times[-1] <= T0 + 6000


def test_what_is_old_goes_and_stays_in_the_coarser_table(store: Store) -> None:
    start = T0 // HOUR_S * HOUR_S
    store.add_readings(_line("x_ratio", start, np.linspace(0, 1, 120)))
    store.roll_up(start + HOUR_S + 10)

    def rows(table: str) -> int:
        with store._database.reading() as connection:
            found = connection.exec_driver_sql(f"SELECT count(*) FROM {table}")
            return int(found.scalar_one())

    assert (rows("readings"), rows("readings_1m"), rows("readings_1h")) == (120, 2, 1)
    store.roll_up(start + RAW_KEPT_S + 300)
    assert (rows("readings"), rows("readings_1m"), rows("readings_1h")) == (0, 2, 1)
    lines = store.readings(["x_ratio"], start, start + 600)  # a short range, and no raw readings
    assert max(lines["x_ratio", ""][1]) == 1.0
    store.roll_up(start + MINUTES_KEPT_S + DAY_S)
    assert (rows("readings"), rows("readings_1m"), rows("readings_1h")) == (0, 0, 1)
    assert max(store.readings(["x_ratio"], start, start + 600)["x_ratio", ""][1]) == 1.0


def test_a_clock_that_was_set_back_does_not_stop_the_roll_up(store: Store) -> None:
    start = T0 // HOUR_S * HOUR_S
    store.add_readings([Reading("x_ratio", 0.1, start)])
    store.roll_up(start + DAY_S)
    store.add_readings([Reading("x_ratio", 0.9, start + 600)])
    store.roll_up(start + 700)
    store.roll_up(start + 800)
    _, values = store.readings(["x_ratio"], start, start + 2 * HOUR_S)["x_ratio", ""]
    assert (min(values), max(values)) == (0.1, 0.9)


# Latencies and rates


def test_percentiles_equal_numpys_linear_interpolation(store: Store) -> None:
    random_ = np.random.default_rng(2)
    ends = random_.uniform(0, 100, 60)
    ttft = random_.lognormal(size=60)
    for end, value in zip(ends, ttft, strict=True):
        store.add_run(ended(float(end), numbers=numbers(ttft_s=float(value), tpot_s=None)))
    found = store.latencies(T0, T0 + 100, points=4)
    for bucket in range(4):
        inside = ttft[(ends >= 25 * bucket) & (ends < 25 * (bucket + 1))]
        assert found.ttft_s.n[bucket] == len(inside) > 0
        shown = [line[bucket] for line in (found.ttft_s.p50, found.ttft_s.p95, found.ttft_s.p99)]
        assert np.allclose(shown, np.percentile(inside, [50, 95, 99]), rtol=1e-12)
    assert found.tpot_s.p50 == (None,) * 4
    assert found.tpot_s.n == (0,) * 4
    assert found.e2e_s.p99 == pytest.approx((0.4,) * 4)
    assert np.allclose(found.times, T0 + np.array([12.5, 37.5, 62.5, 87.5]))


def test_latencies_are_those_of_generations_that_succeeded(store: Store) -> None:
    store.add_run(ended(1, RunState.FAILED, numbers=numbers()))
    store.add_run(ended(1, RunState.CANCELLED, numbers=numbers()))
    store.add_run(ended(1, kind=RunKind.PULL, numbers=numbers()))
    assert store.latencies(T0, T0 + 2, 2).e2e_s.n == (0, 0)


def test_rates_count_tokens_of_successes_and_errors_by_kind(store: Store) -> None:
    for _ in range(3):
        store.add_run(ended(1, numbers=numbers(prompt_tokens=10, new_tokens=20)))
    store.add_run(ended(2, RunState.FAILED, error_kind="host_lost", numbers=numbers()))
    store.add_run(ended(3, RunState.CANCELLED, numbers=numbers()))
    store.add_run(ended(16, RunState.INTERRUPTED))
    found = store.rates(T0, T0 + 30, points=3)
    assert found.bucket_s == pytest.approx(10)
    assert found.input_tokens_per_s == pytest.approx((3.0, 0, 0))
    assert found.output_tokens_per_s == pytest.approx((6.0, 0, 0))
    assert found.requests_per_s == pytest.approx((0.5, 0.1, 0))
    # 4 that were not cancelled ended in the first ten seconds, 1 of them wrong.
    assert found.error_ratio == {"host_lost": (0.25, 0, None), "interrupted": (0, 1.0, None)}
    assert found.cancelled_ratio == (0.2, 0, None)


def test_nothing_that_ended_gives_empty_buckets(store: Store) -> None:
    assert store.latencies(T0, T0 + 9, 3).ttft_s.p50 == (None, None, None)
    found = store.rates(T0, T0 + 9, 3)
    assert found.requests_per_s == (0, 0, 0)
    assert found.error_ratio == {}


# Service


def test_the_check_says_which_database_is_well(store: Store) -> None:
    assert store.check().endswith("well.")
    assert store.size_bytes() > 0


def test_a_closed_store_says_so_and_closing_twice_does_no_harm(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.runs()


def test_what_was_kept_is_there_after_opening_again(url: str) -> None:
    with open_store(url) as store:
        store.finish_run(one := run(), tokens())
    with open_store(url) as store:
        assert store.run(one.id) == one
        assert store.tokens(one.id) == tokens()
