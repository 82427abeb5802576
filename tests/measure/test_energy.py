"""Energy with its label: counters where they can be read, an estimate where not."""

from pathlib import Path

import pytest

from gptcore.errors import InvalidInput
from gptcore.measure.energy import WATTS_A_CORE, EnergyMeter


def rapl(folder: Path, *microjoules: int, limit: int = 1_000_000_000) -> None:
    """Show packages as Linux does, with a part of the first that must not count twice."""
    for number, value in enumerate(microjoules):
        package = folder / f"intel-rapl:{number}"
        package.mkdir(parents=True, exist_ok=True)
        (package / "energy_uj").write_text(f"{value}\n")
        (package / "max_energy_range_uj").write_text(f"{limit}\n")
    part = folder / "intel-rapl:0:0"
    part.mkdir(exist_ok=True)
    (part / "energy_uj").write_text("5\n")
    (part / "max_energy_range_uj").write_text(f"{limit}\n")


def test_rapl_is_read_package_by_package_and_may_start_again(tmp_path: Path) -> None:
    rapl(tmp_path, 999_000_000, 5_000_000)
    with EnergyMeter("cpu", powercap=tmp_path) as meter:
        rapl(tmp_path, 1_000_000, 9_000_000)
    assert meter.energy.joules == pytest.approx(2 + 4)
    assert meter.energy.label.startswith("measured: RAPL")


def test_without_a_counter_the_estimate_shows_its_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTLAB_WATTS_PER_CORE", raising=False)
    seconds = iter([3.0, 5.5])
    with EnergyMeter("cpu", powercap=tmp_path, cpu_seconds=lambda: next(seconds)) as meter:
        pass
    assert meter.energy.joules == pytest.approx(2.5 * WATTS_A_CORE)
    assert meter.energy.label == "estimated: processor seconds × 10 W a core"


def test_the_watts_of_the_estimate_can_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTLAB_WATTS_PER_CORE", "4.5")
    seconds = iter([0.0, 2.0])
    with EnergyMeter("cpu", powercap=tmp_path, cpu_seconds=lambda: next(seconds)) as meter:
        pass
    assert meter.energy.joules == pytest.approx(9.0)
    assert "4.5 W" in meter.energy.label


@pytest.mark.parametrize("said", ["lots", "-1", "nan", "1e9"])
def test_watts_that_are_none_are_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTLAB_WATTS_PER_CORE", said)
    with pytest.raises(InvalidInput, match="must be a number of watts"):
        EnergyMeter("cpu")


def test_a_gpu_is_measured_by_its_own_counter_or_not_at_all() -> None:
    joules = iter([100.0, 160.0])
    with EnergyMeter("cuda:0", gpu_joules=lambda device: next(joules)) as meter:
        pass
    assert (meter.energy.joules, meter.energy.label) == (60.0, "measured: NVML, the whole card")
    with EnergyMeter("cuda:0", gpu_joules=lambda device: None) as meter:
        pass
    assert meter.energy.joules is None
    assert meter.energy.label.startswith("unavailable")


def test_an_unknown_device_is_unavailable_and_no_zero() -> None:
    with EnergyMeter("mps") as meter:
        pass
    assert meter.energy.joules is None
    assert meter.energy.label.startswith("unavailable")
