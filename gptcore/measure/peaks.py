"""What this machine can do, measured: bytes read a second, and operations a second.

The first is the ceiling of a decode step. A matrix-vector product over a matrix as large as the
model's weights reads every byte once and computes next to nothing, which is what a decode step of
one stream does; on a CPU it is read by our own library too, which only adds up, since torch's
product was seen to reach two thirds of that. The best of many repetitions is the peak. The size
matters: a small model lives in the cache, and must be held against the cache's speed.

The second is the ceiling of a prefill: the best of many products of two square matrices, by the
type of the numbers that are multiplied.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from gptcore.device import cpu_name, torch_version
from gptcore.kernels.library import library, unavailable
from gptcore.paths import cache_dir

LARGEST_BYTES = 2**30
SECONDS = 0.2
REPETITIONS = 5

P = TypeVar("P", "PeakBandwidth", "PeakFlops")


@dataclass(frozen=True, slots=True)
class PeakBandwidth:
    """What was measured, on what, and when."""

    bytes_per_s: float
    working_set_bytes: int
    device: str
    device_name: str
    threads: int
    torch: str | None
    measured_at: str
    repetitions: int


@dataclass(frozen=True, slots=True)
class PeakFlops:
    """What was measured, on what, and when; an addition and a multiplication are two."""

    flop_per_s: float
    dtype: str
    device: str
    device_name: str
    threads: int
    torch: str | None
    measured_at: str
    repetitions: int


def peak_flops(device: str, dtype: str, threads: int, *, at_least: float = 0.0) -> PeakFlops | None:
    """Return the measured peak for numbers of ``dtype``, or None where torch cannot multiply them.

    It is measured again in the cases that ``peak_bandwidth`` names.

    Args:
        device: ``cpu``, ``mps`` or ``cuda:N``.
        dtype: ``fp32``, ``bf16``, ``fp16``, or ``int8`` (sums in 32 bits).
        threads: CPU threads; torch must have been told already.
        at_least: operations a second that a run has already reached.
    """
    name = _device_name(device)
    file = cache_dir() / "peak_flops.json"
    known = _remembered(file, PeakFlops)
    key = f"{device}|{name}|{threads}|{torch_version()}|{dtype}"
    before = known.get(key)
    if before and before.flop_per_s >= at_least:
        return before
    try:
        best, repetitions = _measure_flops(device, dtype)
    except (RuntimeError, NotImplementedError):
        return None
    if before and before.flop_per_s >= best:
        return before
    peak = PeakFlops(
        flop_per_s=best,
        dtype=dtype,
        device=device,
        device_name=name,
        threads=threads,
        torch=torch_version(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        repetitions=repetitions,
    )
    _remember(file, known | {key: peak})
    return peak


def peak_bandwidth(
    device: str, working_set_bytes: int, threads: int, *, at_least: float = 0.0
) -> PeakBandwidth:
    """Return the measured peak for that working set, from the cache where it is still valid.

    It is measured again when processor or GPU, threads or torch have changed, or when a run beat
    it: then it was measured while the machine was busy, and the better of the two is kept.

    Args:
        device: ``cpu``, ``mps`` or ``cuda:N``.
        working_set_bytes: bytes read a step; rounded up to a power of two, at most 1 GiB.
        threads: CPU threads.
        at_least: bytes a second that a run has already reached.
    """
    size = min(LARGEST_BYTES, 1 << max(20, (working_set_bytes - 1).bit_length()))
    name = _device_name(device)
    file = cache_dir() / "peaks.json"
    known = _remembered(file, PeakBandwidth)
    key = f"{device}|{name}|{threads}|{torch_version()}|{size}"
    before = known.get(key)
    if before and before.bytes_per_s >= at_least:
        return before
    best, repetitions = _measure(device, size)
    if before and before.bytes_per_s >= best:
        return before
    peak = PeakBandwidth(
        bytes_per_s=best,
        working_set_bytes=size,
        device=device,
        device_name=name,
        threads=threads,
        torch=torch_version(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        repetitions=repetitions,
    )
    _remember(file, known | {key: peak})
    return peak


def known_flops() -> tuple[PeakFlops, ...]:
    """Return the peaks that were measured on this machine so far; measures nothing."""
    return tuple(_remembered(cache_dir() / "peak_flops.json", PeakFlops).values())


def _remembered(file: Path, kind: type[P]) -> dict[str, P]:
    """Return the peaks in a file; those that are damaged are measured again."""
    try:
        peaks = json.loads(file.read_text()).items()
    except (OSError, ValueError, AttributeError):
        return {}
    found = {}
    for key, value in peaks:
        with contextlib.suppress(TypeError):
            found[key] = kind(**value)
    return found


def _remember(file: Path, peaks: Mapping[str, PeakBandwidth | PeakFlops]) -> None:
    text = json.dumps({key: asdict(peak) for key, peak in peaks.items()}, indent=1)
    with contextlib.suppress(OSError):  # a full disk only makes the next time slower
        fresh = file.with_suffix(f".{secrets.token_hex(4)}")
        fresh.write_text(text)
        fresh.replace(file)


def _measure(device: str, size: int) -> tuple[float, int]:
    import torch

    from gptcore.kernels.linear import Arena

    columns = 4096
    dtype = torch.float32
    rows = size // (columns * dtype.itemsize)
    native = device == "cpu" and unavailable() is None
    if native:  # on large pages, as the weights are that it packs
        matrix = Arena().take(size).view(dtype).view(rows, columns).fill_(1)
    else:
        matrix = torch.ones(rows, columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)
    best, repetitions = _best(lambda: torch.mv(matrix, vector), device)
    if native:
        threads = torch.get_num_threads()
        added, more = _best(
            lambda: library().gpt_added_up(matrix.data_ptr(), size, threads), device
        )
        best, repetitions = min(best, added), repetitions + more
    return size / best, repetitions


def _measure_flops(device: str, dtype: str) -> tuple[float, int]:
    import torch

    side = 1024 if device == "cpu" else 8192
    kind = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "int8": torch.int8,
    }[dtype]
    a = torch.ones(side, side, dtype=kind, device=device)
    b = torch.ones(side, side, dtype=kind, device=device)
    product = torch._int_mm if kind is torch.int8 else torch.mm
    best, repetitions = _best(lambda: product(a, b), device)
    return 2 * side**3 / best, repetitions


def _best(work: Callable[[], object], device: str) -> tuple[float, int]:
    """Return the least seconds of at least REPETITIONS tries after one to warm up."""
    import torch

    best, repetitions, deadline = float("inf"), 0, time.perf_counter() + SECONDS
    with torch.inference_mode():
        while repetitions <= REPETITIONS or time.perf_counter() < deadline:
            started = time.perf_counter()
            work()
            synchronise(device)
            if repetitions:  # the first touches the pages and warms up
                best = min(best, time.perf_counter() - started)
            repetitions += 1
    return best, repetitions - 1


def synchronise(device: str) -> None:
    """Wait until ``device`` has done what it was given."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return cpu_name() or "CPU"
