"""The numbers for Prometheus: counted rightly, named as its linter wants."""

import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptcore.monitor.prometheus import GAUGES, STALE_S, Metrics
from gptcore.records import Reading, RunState
from tests.monitor.fake_machine import Clock
from tests.store.examples import numbers, run

CLOCK = Clock()


def _values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Return what a scrape sees: (name, label values...) -> value."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def _full() -> Metrics:
    metrics = Metrics(CLOCK)
    metrics.finished(run(state=RunState.DONE, numbers=numbers()), [0.004, 0.02])
    metrics.finished(run(state=RunState.FAILED, error_kind="host_lost"), [])
    metrics.finished(run(state=RunState.CANCELLED, numbers=numbers()), [0.01])
    metrics.readings(
        Reading(name, 0.5, CLOCK(), "cuda:0" if name.startswith("gpu") else "") for name in GAUGES
    )
    return metrics


def test_promtool_has_nothing_to_say() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    for metrics in (Metrics(CLOCK), _full()):
        done = subprocess.run(
            [promtool, "check", "metrics"],
            input=metrics.exposition(),
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_name_has_the_one_prefix() -> None:
    assert {name.partition("_")[0] for name, *_ in _values(_full())} == {"gptlab"}


def test_a_success_counts_in_every_histogram_and_by_its_reason() -> None:
    metrics = Metrics(CLOCK)
    metrics.finished(run(state=RunState.DONE, numbers=numbers()), [0.004, 0.02, 0.02])
    found = _values(metrics)
    assert found["gptlab_request_success_total", "eos"] == 1
    assert found["gptlab_request_success_total", "length"] == 0
    assert found["gptlab_prompt_tokens_total",] == 4
    assert found["gptlab_generation_tokens_total",] == 30
    assert found["gptlab_time_to_first_token_seconds_sum",] == pytest.approx(0.1)
    assert found["gptlab_e2e_request_latency_seconds_sum",] == pytest.approx(0.4)
    assert found["gptlab_request_queue_time_seconds_sum",] == pytest.approx(0.25)
    assert found["gptlab_inter_token_latency_seconds_count",] == 3
    assert found["gptlab_inter_token_latency_seconds_bucket", "0.005"] == 1
    assert found["gptlab_inter_token_latency_seconds_bucket", "0.025"] == 3


def test_a_failure_counts_by_kind_and_a_cancelled_run_is_no_error() -> None:
    metrics = Metrics(CLOCK)
    metrics.finished(run(state=RunState.FAILED, error_kind="numerical_error"), [])
    metrics.finished(run(state=RunState.INTERRUPTED), [])
    metrics.finished(run(state=RunState.CANCELLED, numbers=numbers(ttft_s=None)), [])
    found = _values(metrics)
    assert found["gptlab_request_errors_total", "numerical_error"] == 1
    assert found["gptlab_request_errors_total", "interrupted"] == 1
    assert found["gptlab_request_cancelled_total",] == 1
    assert found["gptlab_e2e_request_latency_seconds_count",] == 0
    assert found["gptlab_time_to_first_token_seconds_count",] == 0
    assert sum(v for key, v in found.items() if key[0] == "gptlab_request_success_total") == 0


def test_gauges_take_their_last_value_and_unknown_readings_are_left_out() -> None:
    metrics = Metrics(CLOCK)
    metrics.readings([Reading("gpu_power_watts", v, CLOCK(), "cuda:0") for v in (1.0, 2.0)])
    metrics.readings([Reading("input_tokens_per_s", 9.0, CLOCK())])
    metrics.queue(running=1, waiting=3)
    found = _values(metrics)
    assert found["gptlab_gpu_power_watts", "cuda:0"] == 2.0
    assert found["gptlab_num_requests_running",] == 1
    assert found["gptlab_num_requests_waiting",] == 3
    assert not [key for key in found if "tokens_per_s" in key[0]]


def test_a_gpu_that_is_gone_has_no_value_any_more() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    metrics.readings([Reading("gpu_power_watts", 1.0, clock(), "cuda:0")])
    clock.now += STALE_S + 1
    assert ("gptlab_gpu_power_watts", "cuda:0") not in _values(metrics)


def test_two_labs_in_one_process_count_apart() -> None:
    first, second = Metrics(CLOCK), Metrics(CLOCK)
    first.finished(run(state=RunState.DONE, numbers=numbers()), [])
    assert _values(second)["gptlab_prompt_tokens_total",] == 0
