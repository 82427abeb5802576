"""The measured bandwidth: positive, plausible, remembered, and measured again when it must be."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gptcore.device import cpu_name, torch_version
from gptcore.measure import peaks
from gptcore.measure.peaks import LARGEST_BYTES, PeakBandwidth, peak_bandwidth, peak_flops
from gptcore.paths import cache_dir

MIB = 2**20


class Meter:
    """Stands for the machine: answers what it is told, and counts how often it was asked."""

    def __init__(self, *bytes_per_s: float) -> None:
        self.answers = list(bytes_per_s)
        self.sizes: list[int] = []

    def __call__(self, device: str, size: int) -> tuple[float, int]:
        self.sizes.append(size)
        return self.answers.pop(0), 7


@pytest.fixture
def meter(data_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Replace the measuring by these answers, with an empty cache."""

    def answering(*bytes_per_s: float) -> Meter:
        fake = Meter(*bytes_per_s)
        monkeypatch.setattr(peaks, "_measure", fake)
        return fake

    return answering


def test_a_real_measurement_is_a_plausible_speed_of_this_machine(data_folder: Path) -> None:
    """Between a memory stick of 2000 and the cache of any CPU: a wrong unit is off by 1000."""
    found = peak_bandwidth("cpu", 32 * MIB, 1)
    assert 0.2e9 < found.bytes_per_s < 2e12
    assert found.repetitions >= 4
    assert found.working_set_bytes == 32 * MIB
    assert (found.device, found.threads, found.torch) == ("cpu", 1, torch_version())
    assert found.device_name == (cpu_name() or "CPU")
    age = datetime.now(UTC) - datetime.fromisoformat(found.measured_at)
    assert timedelta(seconds=-1) <= age < timedelta(minutes=1)
    assert peak_bandwidth("cpu", 32 * MIB, 1) == found


def test_a_peak_is_measured_once_and_then_remembered(meter) -> None:
    asked = meter(1e9)
    first = peak_bandwidth("cpu", 5 * MIB, 2)
    assert peak_bandwidth("cpu", 5 * MIB, 2) == first
    assert first.bytes_per_s == 1e9
    assert asked.sizes == [8 * MIB]


@pytest.mark.parametrize(
    ("asked_for", "size"),
    [
        (1, MIB),
        (MIB, MIB),
        (MIB + 1, 2 * MIB),
        (540_000_000, 1024 * MIB),
        (10**12, LARGEST_BYTES),
    ],
)
def test_the_working_set_is_a_power_of_two_up_to_a_gibibyte(
    asked_for: int, size: int, meter
) -> None:
    asked = meter(1e9)
    assert peak_bandwidth("cpu", asked_for, 1).working_set_bytes == size
    assert asked.sizes == [size]


def test_another_size_thread_count_torch_or_processor_is_measured_by_itself(
    meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = meter(1e9, 2e9, 3e9, 4e9, 5e9)
    assert peak_bandwidth("cpu", MIB, 1).bytes_per_s == 1e9
    assert peak_bandwidth("cpu", 2 * MIB, 1).bytes_per_s == 2e9
    assert peak_bandwidth("cpu", MIB, 2).bytes_per_s == 3e9
    monkeypatch.setattr(peaks, "torch_version", lambda: "9.9")
    assert peak_bandwidth("cpu", MIB, 1).bytes_per_s == 4e9
    monkeypatch.setattr(peaks, "cpu_name", lambda: "another processor")
    assert peak_bandwidth("cpu", MIB, 1).bytes_per_s == 5e9
    assert asked.answers == []
    monkeypatch.undo()


def test_a_run_that_beats_the_peak_has_it_measured_again(meter) -> None:
    meter(1e9, 3e9)
    peak_bandwidth("cpu", MIB, 1)
    assert peak_bandwidth("cpu", MIB, 1, at_least=0.9e9).bytes_per_s == 1e9
    assert peak_bandwidth("cpu", MIB, 1, at_least=2e9).bytes_per_s == 3e9
    assert peak_bandwidth("cpu", MIB, 1).bytes_per_s == 3e9


def test_a_worse_second_measurement_does_not_lower_the_peak(meter) -> None:
    meter(2e9, 1e9)
    first = peak_bandwidth("cpu", MIB, 1)
    assert peak_bandwidth("cpu", MIB, 1, at_least=3e9) == first


def test_other_peaks_stay_when_one_is_added(meter) -> None:
    meter(1e9, 2e9)
    one = peak_bandwidth("cpu", MIB, 1)
    two = peak_bandwidth("cpu", MIB, 2)
    known = json.loads((cache_dir() / "peaks.json").read_text())
    assert sorted(known.values(), key=lambda peak: peak["threads"]) == [asdict(one), asdict(two)]
    assert PeakBandwidth(**asdict(one)) == one


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"a": 1}', "\x00\x01", '{"KEY": {"bytes_per_s": 1}}', '{"KEY": 7}'],
)
def test_a_damaged_cache_is_measured_again(damage: str, meter) -> None:
    """It is only a cache: a crash in the middle of writing must not end every later run."""
    meter(1e9, 2e9)
    peak_bandwidth("cpu", MIB, 1)
    file = cache_dir() / "peaks.json"
    (key,) = json.loads(file.read_text())
    file.write_text(damage.replace("KEY", key))
    assert peak_bandwidth("cpu", MIB, 1).bytes_per_s == 2e9
    assert list(json.loads(file.read_text())) == [key]
    assert peak_bandwidth("cpu", MIB, 1).bytes_per_s == 2e9


def test_a_cache_that_cannot_be_written_costs_only_the_next_measurement(
    meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    meter(1e9, 2e9)
    monkeypatch.setattr(Path, "write_text", full)
    assert peak_bandwidth("cpu", MIB, 1).bytes_per_s == 1e9
    assert peak_bandwidth("cpu", MIB, 1).bytes_per_s == 2e9


def test_operations_a_second_are_measured_by_type_and_remembered(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"fp32": 1e11, "bf16": 2e11}
    asked = []

    def measured(device: str, dtype: str) -> tuple[float, int]:
        asked.append(dtype)
        if dtype not in answers:
            raise RuntimeError("no such product here")
        return answers[dtype], 5

    monkeypatch.setattr(peaks, "_measure_flops", measured)
    assert peak_flops("cpu", "fp32", 1).flop_per_s == 1e11
    assert peak_flops("cpu", "bf16", 1).flop_per_s == 2e11
    assert peak_flops("cpu", "fp32", 1, at_least=0.5e11).flop_per_s == 1e11
    assert asked == ["fp32", "bf16"]
    assert peak_flops("cpu", "int8", 1) is None
    answers["fp32"] = 3e11
    assert peak_flops("cpu", "fp32", 1, at_least=2e11).flop_per_s == 3e11
    assert peak_flops("cpu", "fp32", 1).flop_per_s == 3e11


def test_real_products_are_done_as_often_as_they_say(data_folder: Path) -> None:
    best, repetitions = peaks._measure_flops("cpu", "fp32")
    assert repetitions >= peaks.REPETITIONS
    assert 1e8 < best < 1e15
