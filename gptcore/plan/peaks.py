"""What this machine reaches, as it was measured: read here, measured by ``measure/machine.py``.

Measuring needs torch, so it happens in a process of its own, under the device's lock.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from gptcore.errors import GptcoreError
from gptcore.host.lock import device_lock
from gptcore.paths import ROOT, cache_dir
from gptcore.spec import ModelSpec

MEASURE_TIMEOUT_S = 300.0
VERSION = 2


@dataclass(frozen=True, slots=True)
class Rates:
    """What one precision reaches on a device."""

    flop_per_s: float
    """Of linear layers over many positions."""
    bytes_per_s: float
    """Of linear layers over one position: weights read a second."""
    attention_flop_per_s: float
    attention_bytes_per_s: float
    block_s: float
    """Seconds a block takes beside its arithmetic: one of GPT's kind, too small to have any."""
    together_block_s: float | None = None
    """The same where several positions go through at once; None: as for one."""
    rotary_block_s: float | None = None
    rotary_together_block_s: float | None = None
    """As the two above, of Llama's kind, which has more operations; None: as GPT's."""

    def overhead_s(self, spec: ModelSpec, positions: int) -> float:
        """Return what a block of that model takes beside its arithmetic."""
        alone, together = self.block_s, self.together_block_s
        if spec.position == "rotary":
            alone = self.rotary_block_s or alone
            together = self.rotary_together_block_s or together
        return alone if positions == 1 or together is None else together


@dataclass(frozen=True, slots=True)
class MachinePeaks:
    """The rates of this machine by precision, and what made them."""

    rates: Mapping[str, Rates]
    sampling_s_per_id: float
    """Seconds a token id of the vocabulary costs when a token is drawn."""
    stream_bytes_per_s: float
    """What plain operations on large tensors read and write."""
    device: str
    device_name: str
    threads: int
    torch: str
    measured_at: str
    seconds: float

    @property
    def flop_per_s(self) -> dict[str, float]:
        """By precision."""
        return {name: one.flop_per_s for name, one in self.rates.items()}

    @property
    def bytes_per_s(self) -> float:
        """The best of all precisions."""
        return max(one.bytes_per_s for one in self.rates.values())

    @property
    def overhead_s(self) -> float:
        """Seconds of a block's overhead, the least of all precisions."""
        return min(one.block_s for one in self.rates.values())


def known_peaks(device: str = "cpu") -> MachinePeaks | None:
    """Return what was measured here the last time, or None; a damaged file is none."""
    try:
        found = json.loads(_file(device).read_text())
        if found.pop("version") != VERSION:
            return None
        rates = {name: Rates(**one) for name, one in found.pop("rates").items()}
        return MachinePeaks(rates=rates, **found) if rates else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def measure_peaks(device: str = "cpu", threads: int = 0, *, wait: bool = True) -> MachinePeaks:
    """Measure this machine (about half a minute), keep it, and return it.

    Raises:
        DeviceBusy: the device is taken, and ``wait`` is False.
        GptcoreError: the measuring process failed.
    """
    command = [sys.executable, "-m", "gptcore.measure.machine", device, str(threads)]
    with device_lock(device, "plan --measure", wait=wait):
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ,
                capture_output=True,
                text=True,
                check=False,
                timeout=MEASURE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise GptcoreError(
                f"Measuring {device} took more than {MEASURE_TIMEOUT_S:.0f} s; try again when the "
                "machine has less to do."
            ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise GptcoreError(f"Measuring {device} failed: {last[:300]}")
    found = json.loads(done.stdout)
    keep_peaks(MachinePeaks(rates={k: Rates(**v) for k, v in found.pop("rates").items()}, **found))
    kept = known_peaks(device)
    assert kept is not None
    return kept


def keep_peaks(peaks: MachinePeaks) -> None:
    """Write what was measured, for the next start of the program."""
    file = _file(peaks.device)
    fresh = file.with_suffix(f".{secrets.token_hex(4)}")
    fresh.write_text(json.dumps({"version": VERSION, **asdict(peaks)}, indent=1))
    fresh.replace(file)


def _file(device: str) -> Path:
    return cache_dir() / f"machine-{device.replace(':', '-')}.json"
