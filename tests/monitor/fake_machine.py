"""A machine that tests command: its clock, its GPUs, and a store that can fail."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from gptcore.errors import StoreError
from gptcore.records import Reading


class Clock:
    """Time that goes on only when it is told to; one for wall and one for monotonic time."""

    def __init__(self, now: float = 1_800_000_000.25) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class NVMLError(Exception):
    pass


class Nvml:
    """Answers like pynvml for GPUs given as dicts; a missing number raises as NVML does."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *gpus: dict[str, float], broken: str | None = None) -> None:
        self.gpus = list(gpus)
        self.broken = broken
        self.inits = 0

    def nvmlInit(self) -> None:
        self.inits += 1
        if self.broken:
            raise NVMLError(self.broken)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, float]:
        if self.gpus[index].get("lost"):
            raise NVMLError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetUtilizationRates(self, gpu: dict[str, float]) -> Any:
        return SimpleNamespace(gpu=self._look(gpu, "percent"))

    def nvmlDeviceGetMemoryInfo(self, gpu: dict[str, float]) -> Any:
        return SimpleNamespace(used=self._look(gpu, "used"), total=self._look(gpu, "total"))

    def nvmlDeviceGetPowerUsage(self, gpu: dict[str, float]) -> float:
        return self._look(gpu, "milliwatts")

    def nvmlDeviceGetTemperature(self, gpu: dict[str, float], sensor: int) -> float:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._look(gpu, "celsius")

    def _look(self, gpu: dict[str, float], name: str) -> float:
        if name not in gpu:
            raise NVMLError("Not Supported")
        return gpu[name]


GPU = {"percent": 37, "used": 21 * 2**30, "total": 141 * 2**30, "milliwatts": 93_500, "celsius": 41}


class ListStore:
    """Keeps readings in a list; fails while ``problem`` says why."""

    def __init__(self) -> None:
        self.kept: list[Reading] = []
        self.rolled_up: list[float] = []
        self.problem: str | None = None

    def add_readings(self, readings: Sequence[Reading]) -> None:
        self._fail()
        self.kept.extend(readings)

    def readings(self, names: Sequence[str], start: float, end: float, points: int) -> Any:
        self._fail()
        lines: dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {}
        for one in self.kept:
            if one.name in names and start <= one.at <= end:
                times, values = lines.get((one.name, one.subject), ((), ()))
                lines[one.name, one.subject] = ((*times, one.at), (*values, one.value))
        return lines

    def roll_up(self, at: float) -> None:
        self._fail()
        self.rolled_up.append(at)

    def _fail(self) -> None:
        if self.problem:
            raise StoreError(self.problem)


class Counter:
    """A collector that counts its looks; raises while ``error`` is set."""

    def __init__(self, clock: Clock, name: str = "looks_count") -> None:
        self.clock = clock
        self.name = name
        self.looks = 0
        self.error: Exception | None = None

    def collect(self) -> list[Reading]:
        if self.error:
            raise self.error
        self.looks += 1
        return [Reading(self.name, float(self.looks), self.clock())]
