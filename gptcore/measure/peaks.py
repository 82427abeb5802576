"""The bytes a second that this machine can read, measured: the ceiling of a decode step.

A matrix-vector product over a matrix as large as the model's weights reads every byte once and
computes next to nothing, which is what a decode step of one stream does. The best of many
repetitions is the peak. The size matters: a small model lives in the cache, and must be held
against the cache's speed.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from gptcore.device import cpu_name, torch_version
from gptcore.paths import cache_dir

LARGEST_BYTES = 2**30
SECONDS = 0.2
REPETITIONS = 5


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
    known = _remembered(file)
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


def _remembered(file: Path) -> dict[str, PeakBandwidth]:
    """Return the peaks in a file; those that are damaged are measured again."""
    try:
        peaks = json.loads(file.read_text()).items()
    except (OSError, ValueError, AttributeError):
        return {}
    found = {}
    for key, value in peaks:
        with contextlib.suppress(TypeError):
            found[key] = PeakBandwidth(**value)
    return found


def _remember(file: Path, peaks: Mapping[str, PeakBandwidth]) -> None:
    text = json.dumps({key: asdict(peak) for key, peak in peaks.items()}, indent=1)
    with contextlib.suppress(OSError):  # a full disk only makes the next time slower
        fresh = file.with_suffix(f".{secrets.token_hex(4)}")
        fresh.write_text(text)
        fresh.replace(file)


def _measure(device: str, size: int) -> tuple[float, int]:
    import torch

    columns = 4096
    dtype = torch.float32
    rows = size // (columns * dtype.itemsize)
    matrix = torch.ones(rows, columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)
    best, repetitions, deadline = float("inf"), 0, time.perf_counter() + SECONDS
    with torch.inference_mode():
        while repetitions < REPETITIONS or time.perf_counter() < deadline:
            started = time.perf_counter()
            torch.mv(matrix, vector)
            _synchronise(device)
            if repetitions:  # the first touches the pages and warms up
                best = min(best, time.perf_counter() - started)
            repetitions += 1
    return size / best, repetitions - 1


def _synchronise(device: str) -> None:
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
