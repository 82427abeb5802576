"""The rates of a machine: measured in a process of its own, kept, read again, never believed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore.errors import DeviceBusy, GptcoreError
from gptcore.host.lock import device_lock
from gptcore.plan import peaks
from gptcore.plan.peaks import MachinePeaks, Rates, keep_peaks, known_peaks, measure_peaks

PEAKS = MachinePeaks(
    rates={"fp32": Rates(1e11, 1e10, 5e10, 1e10, 1e-4)},
    sampling_s_per_id=1e-7,
    stream_bytes_per_s=5e9,
    device="cpu",
    device_name="a machine",
    threads=1,
    torch="2",
    measured_at="2026-01-01T00:00:00+00:00",
    seconds=1.0,
)


@pytest.mark.usefixtures("data_folder")
def test_what_is_kept_is_read_again() -> None:
    assert known_peaks() is None
    keep_peaks(PEAKS)
    assert known_peaks() == PEAKS
    assert known_peaks("cuda:0") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 99}', '{"version": 1}'])
def test_a_damaged_or_foreign_file_is_none(data_folder: Path, text: str) -> None:
    keep_peaks(PEAKS)
    (file,) = (data_folder / "cache").glob("machine-*.json")
    file.write_text(text)
    assert known_peaks() is None


@pytest.mark.usefixtures("data_folder")
def test_a_device_that_is_taken_is_not_measured() -> None:
    code = (
        "import sys; from gptcore.plan.peaks import measure_peaks\n"
        "from gptcore.errors import DeviceBusy\n"
        "try: measure_peaks(wait=False)\n"
        "except DeviceBusy: sys.exit(7)"
    )
    with device_lock("cpu", "a test"):
        done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 7
    assert issubclass(DeviceBusy, GptcoreError)


@pytest.mark.usefixtures("data_folder")
def test_a_failed_measurement_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: no room")

    monkeypatch.setattr(peaks.subprocess, "run", fails)
    with pytest.raises(GptcoreError, match="MemoryError: no room"):
        measure_peaks()
    assert known_peaks() is None


@pytest.mark.slow
@pytest.mark.usefixtures("data_folder")
def test_this_machine_is_measured_and_remembered() -> None:
    found = measure_peaks(threads=1)
    assert found == known_peaks()
    assert {"fp32", "bf16"} <= set(found.rates)
    for one in found.rates.values():
        assert 1e8 < one.bytes_per_s < 1e13
        assert 1e8 < one.flop_per_s < 1e15
        assert 1e-6 < one.block_s < 0.1
    assert json.loads(json.dumps(found.flop_per_s)) == found.flop_per_s
