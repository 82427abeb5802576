"""What every collector must keep to, and what each of them says."""

import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from gptcore.monitor import Collector, machine_collectors
from gptcore.monitor.cpu import CpuCollector
from gptcore.monitor.gpu import TRY_AGAIN_S, GpuCollector
from gptcore.monitor.memory import MemoryCollector
from gptcore.monitor.processes import Processes, Usage
from gptcore.monitor.traffic import Traffic
from tests.monitor.fake_machine import GPU, Clock, Nvml

CLOCK = Clock()
UNITS = ("ratio", "bytes", "watts", "celsius", "count", "per_s")
COLLECTORS: dict[str, Collector] = {
    **{type(one).__name__: one for one in machine_collectors(CLOCK)},
    "GpuCollector": GpuCollector(Nvml(GPU, GPU), CLOCK),
    "Traffic": Traffic(lambda: (1, 2), CLOCK),
}


# The contract


@pytest.fixture(params=COLLECTORS)
def looked(request: pytest.FixtureRequest) -> list:
    """Return what a second look sees: rates have none on the first."""
    collector = COLLECTORS[request.param]
    list(collector.collect())
    time.sleep(0.03)  # a real processor's counters move in steps of 10 ms
    CLOCK.now += 1.0
    found = list(collector.collect())
    assert found
    return found


def test_every_value_is_finite_and_no_quantity_is_negative(looked: list) -> None:
    assert all(math.isfinite(one.value) for one in looked)
    assert all(one.value >= 0 for one in looked if not one.name.endswith("_celsius"))


def test_every_name_ends_in_its_unit(looked: list) -> None:
    pattern = re.compile(rf"[a-z][a-z0-9_]*_({'|'.join(UNITS)})")
    assert [one.name for one in looked if not pattern.fullmatch(one.name)] == []


def test_every_ratio_lies_between_0_and_1(looked: list) -> None:
    assert all(0 <= one.value <= 1 for one in looked if one.name.endswith("_ratio"))


def test_every_reading_carries_the_given_clock(looked: list) -> None:
    assert {one.at for one in looked} == {CLOCK.now}


def test_no_reading_comes_twice(looked: list) -> None:
    keys = [(one.name, one.subject) for one in looked]
    assert len(keys) == len(set(keys))


# Processor


class _FixedProcesses:
    def __init__(self, **groups: Usage) -> None:
        self.groups = groups

    def usage(self) -> dict[str, Usage]:
        return self.groups


def _cpu(**seconds: float) -> SimpleNamespace:
    class Times(tuple):
        idle, iowait, guest = (
            seconds.get("idle", 0),
            seconds.get("iowait", 0),
            seconds.get("guest", 0),
        )

    return Times(seconds.values())


def test_the_share_of_cpu_time_is_what_was_neither_idle_nor_waiting_for_a_disk() -> None:
    times = iter(
        [
            _cpu(user=10.0, idle=50.0, iowait=5.0, guest=2.0),
            _cpu(user=13.0, idle=55.0, iowait=7.0, guest=3.0),
        ]
    )
    collector = CpuCollector(_FixedProcesses(), Clock(), Clock(), lambda: next(times))
    assert list(collector.collect()) == []  # nothing to compare with yet: no reading, not 0
    (reading,) = collector.collect()
    # 3 of 10 seconds; a guest's second is part of the user's already.
    assert reading.value == pytest.approx(0.3)


def test_the_share_of_a_process_is_of_all_cores_and_waits_while_processes_change() -> None:
    processes = _FixedProcesses(server=Usage(1.0, 0, (1,)))
    clock = Clock()
    collector = CpuCollector(processes, clock, clock, lambda: _cpu(user=1.0, idle=1.0))
    list(collector.collect())
    cores = psutil.cpu_count() or 1
    clock.now += 2.0
    processes.groups = {"server": Usage(1.0 + cores * 0.5, 0, (1,))}
    (reading,) = collector.collect()
    assert (reading.name, reading.subject) == ("process_cpu_utilization_ratio", "server")
    assert reading.value == pytest.approx(0.25)
    clock.now += 1.0
    processes.groups = {"server": Usage(0.2, 0, (1, 2))}
    assert list(collector.collect()) == []


def test_a_busy_process_shows_up_in_the_real_numbers() -> None:
    collector = CpuCollector(Processes())
    list(collector.collect())
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    found = {(one.name, one.subject): one.value for one in collector.collect()}
    assert found["process_cpu_utilization_ratio", "server"] > 0.1 / (psutil.cpu_count() or 1)
    assert found["cpu_utilization_ratio", ""] > 0


# Memory


def test_used_memory_is_the_total_less_what_is_free() -> None:
    processes = _FixedProcesses(**{"host cpu": Usage(0.0, 700, (1,))})
    collector = MemoryCollector(processes, Clock(), free=lambda: 30, total=lambda: 100)
    found = {(one.name, one.subject): one.value for one in collector.collect()}
    assert found == {
        ("memory_total_bytes", ""): 100,
        ("memory_used_bytes", ""): 70,
        ("process_resident_bytes", "host cpu"): 700,
    }


def test_free_memory_that_is_not_known_is_left_out() -> None:
    collector = MemoryCollector(_FixedProcesses(), Clock(), free=lambda: None, total=lambda: 100)
    assert [one.name for one in collector.collect()] == ["memory_total_bytes"]


# Processes


def test_a_host_is_a_group_of_its_own_and_what_it_started_belongs_to_it() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    host = subprocess.Popen(
        [sys.executable, "-c", code, "gptcore.host", "--device", "cuda:0"], stdin=subprocess.PIPE
    )
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        while not (inner := psutil.Process(host.pid).children()):
            time.sleep(0.01)
        usage = Processes().usage()
        assert set(usage["host cuda:0"].pids) == {host.pid, inner[0].pid}
        assert {os.getpid(), other.pid} <= set(usage["server"].pids)
        assert usage["server"].resident_bytes > psutil.Process(other.pid).memory_info().rss
    finally:
        for process in (host, other):
            process.communicate(b"\n")


def test_a_process_that_ended_is_left_out_at_once_and_a_new_one_shows_later() -> None:
    clock = Clock()
    processes = Processes(monotonic=clock)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.pid in processes.usage()["server"].pids
    child.communicate(b"\n")
    assert child.pid not in processes.usage()["server"].pids
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.pid not in processes.usage()["server"].pids
    clock.now += 5.0
    assert child.pid in processes.usage()["server"].pids
    child.communicate(b"\n")


# GPUs


def test_every_number_of_every_gpu_is_read_in_base_units() -> None:
    found = list(GpuCollector(Nvml(GPU, GPU), CLOCK).collect())
    assert {(one.name, one.value) for one in found if one.subject == "cuda:1"} == {
        ("gpu_utilization_ratio", 0.37),
        ("gpu_memory_used_bytes", 21 * 2**30),
        ("gpu_memory_total_bytes", 141 * 2**30),
        ("gpu_power_watts", 93.5),
        ("gpu_temperature_celsius", 41),
    }
    assert {one.subject for one in found} == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (Nvml(broken="NVML Shared Library Not Found"), "no NVIDIA driver"),
        (Nvml(), "lists no GPU"),
    ],
)
def test_a_machine_without_a_gpu_gives_no_reading_and_says_why(nvml: Nvml, reason: str) -> None:
    collector = GpuCollector(nvml, CLOCK)
    assert list(collector.collect()) == []
    assert reason in (collector.absence or "")


@pytest.mark.parametrize("missing", ["percent", "milliwatts", "celsius"])
def test_one_number_that_nvml_refuses_drops_only_that_number(missing: str) -> None:
    partial = {name: value for name, value in GPU.items() if name != missing}
    collector = GpuCollector(Nvml(partial, GPU), CLOCK)
    found = list(collector.collect())
    assert len([one for one in found if one.subject == "cuda:0"]) == 4
    assert len([one for one in found if one.subject == "cuda:1"]) == 5
    assert collector.absence is None


def test_a_gpu_that_is_lost_gives_nothing_and_the_other_goes_on() -> None:
    collector = GpuCollector(Nvml({"lost": 1}, GPU), CLOCK)
    assert {one.subject for one in collector.collect()} == {"cuda:1"}


def test_a_driver_that_comes_back_is_found_within_a_minute_and_asked_no_oftener() -> None:
    clock, nvml = Clock(), Nvml(GPU, broken="Driver Not Loaded")
    collector = GpuCollector(nvml, clock, clock)
    for _ in range(10):
        clock.now += 1.0
        assert list(collector.collect()) == []
    assert nvml.inits == 1
    nvml.broken = None
    clock.now += TRY_AGAIN_S
    assert len(list(collector.collect())) == 5
    assert collector.absence is None
