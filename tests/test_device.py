"""Devices: cautions, absence with its reason, threads, and memory as a container has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
from pydantic import ValidationError

from gptcore import device
from gptcore.device import (
    Device,
    Placement,
    cores,
    cpu_flags,
    cpu_name,
    devices,
    free_bytes,
    memory_limit_bytes,
    require_device,
)
from gptcore.errors import DeviceAbsent
from tests.conftest import ROOT

GIB = 2**30


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml:
    """Answers as ``pynvml`` does with these GPUs; a number that a GPU lacks is refused."""

    NVMLError = NVMLError
    V100: ClassVar[dict[str, Any]] = {"name": "V100", "uuid": "GPU-v", "cc": (7, 0), "gib": 32}
    H200: ClassVar[dict[str, Any]] = {"name": "H200", "uuid": "GPU-h", "cc": (9, 0), "gib": 141}

    def __init__(self, *gpus: dict[str, Any]) -> None:
        self.gpus = gpus
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if index >= len(self.gpus):
            raise NVMLError("Invalid Argument")
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        for gpu in self.gpus:
            if gpu["uuid"] == uuid:
                return gpu
        raise NVMLError("Not Found")

    def nvmlDeviceGetName(self, gpu: dict[str, Any]) -> str:
        return self._number(gpu, "name")

    def nvmlDeviceGetCudaComputeCapability(self, gpu: dict[str, Any]) -> tuple[int, int]:
        return self._number(gpu, "cc")

    def nvmlDeviceGetMemoryInfo(self, gpu: dict[str, Any]) -> Any:
        total = self._number(gpu, "gib") * GIB
        return SimpleNamespace(total=total, free=total - GIB)

    def _number(self, gpu: dict[str, Any], name: str) -> Any:
        if name not in gpu:
            raise NVMLError("Not Supported")
        return gpu[name]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put these GPUs into this machine, with a CUDA build of torch."""

    def put(*gpus: dict[str, Any], torch: str = "2.13.0+cu130") -> FakeNvml:
        fake = FakeNvml(*gpus)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(device, "torch_version", lambda: torch)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return fake

    return put


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Be in a container with these files."""

    def be_in(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        monkeypatch.setattr(device, "CGROUP", tmp_path)

    return be_in


# The CPU


def test_the_cpu_is_the_first_device_and_always_usable() -> None:
    first = devices()[0]
    assert first.id == "cpu"
    assert first.absent is None
    assert first.name == f"{cpu_name() or 'CPU'}, {cores()} cores"
    assert first.total_bytes == memory_limit_bytes()


def test_fp16_on_a_cpu_is_warned_of_and_fp32_is_not() -> None:
    cpu = require_device("cpu")
    assert "prefill is several times slower" in (cpu.caution("fp16") or "")
    assert cpu.caution("fp32") is None


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ({"avx2", "avx512_vnni"}, True),
        ({"avx2", "avx512_bf16"}, False),
        ({"amx_bf16"}, False),
        ({"asimd", "bf16"}, False),
        ({"asimd"}, True),
        (set(), False),
    ],
)
def test_bf16_is_warned_of_exactly_where_the_cpu_is_known_to_lack_it(
    flags: set[str], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said where the system does not tell its flags."""
    monkeypatch.setattr(device, "cpu_flags", lambda: frozenset(flags))
    assert (devices()[0].caution("bf16") is not None) is warned


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        ("model name\t: X\nflags\t\t: fpu avx2 avx512_bf16\n", {"fpu", "avx2", "avx512_bf16"}),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("nothing of the kind\n", set()),
    ],
)
def test_flags_are_read_as_x86_and_as_arm_write_them(
    cpuinfo: str, flags: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(device, "Path", lambda name: tmp_path / "cpuinfo")
    assert cpu_flags.__wrapped__() == flags


# Absent devices


def test_every_kind_of_device_is_shown_absent_ones_with_a_reason(nvml: Any) -> None:
    nvml()
    found = {one.id: one for one in devices()}
    assert list(found) == ["cpu", "cuda:0", "mps"]
    for one in found.values():
        if one.absent:
            assert one.absent.endswith(".")
            with pytest.raises(DeviceAbsent) as refused:
                require_device(one.id)
            assert str(refused.value).startswith(f"{one.id} cannot be used: {one.absent} Use: cpu")


def test_no_driver_is_no_gpu(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = nvml(FakeNvml.H200)

    def refuse() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setattr(fake, "nvmlInit", refuse)
    (gpu,) = (one for one in devices() if one.id.startswith("cuda"))
    assert gpu.absent == "no NVIDIA driver was found."
    assert free_bytes("cuda:0") is None


def test_a_cpu_build_of_torch_is_said_beside_the_gpu_that_it_cannot_use(nvml: Any) -> None:
    nvml(FakeNvml.H200, torch="2.13.0+cpu")
    gpu = devices()[1]
    assert (gpu.id, gpu.name, gpu.total_bytes) == ("cuda:0", "H200", 141 * GIB)
    assert "is a CPU build; install a CUDA build" in (gpu.absent or "")
    with pytest.raises(DeviceAbsent, match="CPU build"):
        require_device("cuda:0")


@pytest.mark.parametrize(
    ("system", "machine", "there"),
    [("Darwin", "arm64", True), ("Darwin", "x86_64", False), ("Linux", "aarch64", False)],
)
def test_mps_is_there_on_a_mac_with_apple_silicon_only(
    system: str, machine: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.platform, "system", lambda: system)
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    mps = device._mps()
    assert (mps.absent is None) is there
    assert (mps.total_bytes is not None) is there


@pytest.mark.parametrize("name", ["tpu", "cuda", "cuda:7", "CPU", "", "cpu\n", "cuda:٣"])
def test_an_unknown_device_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(DeviceAbsent, match=r"^There is no device .* here; use one of: cpu"):
        require_device(name)


# GPUs


def test_every_gpu_is_listed_with_its_memory_and_what_it_does_badly(nvml: Any) -> None:
    fake = nvml(FakeNvml.V100, FakeNvml.H200)
    first, second = (one for one in devices() if one.id.startswith("cuda"))
    assert (first.id, first.name, first.total_bytes) == ("cuda:0", "V100", 32 * GIB)
    assert (second.id, second.name, second.total_bytes) == ("cuda:1", "H200", 141 * GIB)
    assert "no bf16" in (first.caution("bf16") or "")
    assert second.cautions == ()
    assert free_bytes("cuda:1") == 140 * GIB
    assert free_bytes("cuda:2") is None
    assert require_device("cuda:1") == second
    assert fake.open == 0


def test_a_gpu_that_lacks_a_number_is_listed_without_it(nvml: Any) -> None:
    nvml({"uuid": "GPU-x"})
    gpu = devices()[1]
    assert gpu == Device("cuda:0", "NVIDIA GPU")
    assert free_bytes("cuda:0") is None


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["H200"]),
        ("1,0", ["H200", "V100"]),
        ("GPU-h", ["H200"]),
        ("0,9,1", ["V100"]),
        ("0,-1,1", ["V100"]),
    ],
)
def test_gpus_have_the_numbers_that_torch_gives_them(
    visible: str, names: list[str], nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml(FakeNvml.V100, FakeNvml.H200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [one for one in devices() if one.id.startswith("cuda")]
    assert [one.name for one in found] == names
    assert [one.id for one in found] == [f"cuda:{index}" for index in range(len(names))]
    sizes = {"V100": 31 * GIB, "H200": 140 * GIB}
    assert [free_bytes(one.id) for one in found] == [sizes[name] for name in names]


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_hidden_gpus_are_said_to_be_hidden(
    visible: str, nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would fail with them, and people set this to make sure that it does."""
    nvml(FakeNvml.H200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices()[1].absent == "CUDA_VISIBLE_DEVICES hides every GPU."


# Threads and memory


def test_zero_threads_are_all_cores_and_others_are_themselves() -> None:
    assert Placement().resolved_threads == cores() >= 1
    assert Placement(threads=3).resolved_threads == 3


@pytest.mark.parametrize(
    ("usable", "physical", "found"),
    [(8, 4, 4), (2, 4, 2), (8, None, 8), (1, 64, 1), (96, 48, 48)],
)
def test_cores_are_physical_ones_that_this_process_may_use(
    usable: int, physical: int | None, found: int, cgroup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup({})
    monkeypatch.setattr(
        device.os, "sched_getaffinity", lambda pid: set(range(usable)), raising=False
    )
    monkeypatch.setattr(device.psutil, "cpu_count", lambda logical: physical)
    assert cores() == found


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({}, 64),
    ],
    ids=str,
)
def test_a_container_counts_the_cores_of_its_quota(
    files: dict[str, str], found: int, cgroup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 threads on a quota of 2 cores are stopped most of the time."""
    cgroup(files)
    everything = set(range(64))
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: everything, raising=False)
    monkeypatch.setattr(device.psutil, "cpu_count", lambda logical: 64)
    assert cores() == found


V2 = {
    "memory.max": str(4 * GIB),
    "memory.current": str(3 * GIB),
    "memory.stat": f"anon 5\nactive_file 9\ninactive_file {2 * GIB}\nslab 7",
}
V1 = {
    "memory/memory.limit_in_bytes": str(4 * GIB),
    "memory/memory.usage_in_bytes": str(3 * GIB),
    "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["version 2", "version 1"])
def test_a_container_has_its_own_memory_less_what_it_uses(
    files: dict[str, str], cgroup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the machine's: a model that took it would be killed. Dropped caches are free."""
    cgroup(files)
    machine = SimpleNamespace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: machine)
    assert memory_limit_bytes() == 4 * GIB
    assert free_bytes("cpu") == 3 * GIB
    machine.available = GIB
    assert free_bytes("cpu") == GIB


def test_without_a_limit_the_memory_is_the_machines(cgroup: Any) -> None:
    cgroup({"memory.max": "max", "memory.current": str(GIB)})
    assert memory_limit_bytes() == psutil.virtual_memory().total
    assert free_bytes("cpu") == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_an_overfull_container_has_nothing_free(cgroup: Any) -> None:
    cgroup({"memory.max": str(GIB), "memory.current": str(2 * GIB)})
    assert free_bytes("cpu") == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "tpu"},
        {"device": "cuda:100"},
        {"device": "cpu\n"},
        {"precision": "int8"},
        {"threads": -1},
        {"threads": 1025},
        {"threads": 1.5},
        {"cores": 2},
    ],
    ids=str,
)
def test_a_placement_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Placement.model_validate(wrong)


def test_asking_for_devices_needs_no_torch() -> None:
    code = (
        "import sys; from gptcore.device import devices; from gptcore.provenance import provenance;"
        "devices(), provenance(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
