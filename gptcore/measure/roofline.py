"""What runs reached of what this machine was measured to reach. Imports no torch.

A stretch of work that does F operations and must move M bytes has the intensity F / M; it cannot be
faster than the lower of two roofs, peak operations a second and intensity × peak bytes a second
(Williams, Waterman, Patterson 2009, CACM 52(4)). Both peaks were measured on this machine, the
bytes for a working set of the size of the model's weights. A run above its roof is an error of
ours: the work was counted wrongly, or the peak was measured while the machine was busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gptcore.measure.bench import CEILING_TOLERANCE, COSTS, arithmetic, attention_flop
from gptcore.measure.peaks import PeakFlops
from gptcore.recipe import Variant
from gptcore.records import Run, RunKind


@dataclass(frozen=True, slots=True)
class Reached:
    """One stretch of work of one run under its two roofs."""

    run_id: str
    kind: str
    at: datetime
    model: str
    precision: str
    device: str
    what: str
    """``prefill`` or ``decode``."""
    cell: str
    """How much was read and written: ``128 in, 32 out, batch 4``."""
    flop: float
    moved: float
    """Bytes."""
    seconds: float
    peak_bytes_per_s: float
    peak_flop_per_s: float | None
    """None: this machine's peak in this arithmetic is not known."""
    dtype: str

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flop / self.moved

    @property
    def flop_per_s(self) -> float:
        """Operations a second that were reached."""
        return self.flop / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Bytes a second that were reached."""
        return self.moved / self.seconds

    @property
    def mbu_ratio(self) -> float:
        """Share of the peak bytes a second."""
        return self.bytes_per_s / self.peak_bytes_per_s

    @property
    def mfu_ratio(self) -> float | None:
        """Share of the peak operations a second."""
        return self.flop_per_s / self.peak_flop_per_s if self.peak_flop_per_s else None

    @property
    def bound(self) -> str:
        """Which of the two roofs is the lower one: ``bytes`` or ``operations``."""
        peak = self.peak_flop_per_s
        return (
            "bytes" if not peak or self.intensity * self.peak_bytes_per_s < peak else "operations"
        )

    @property
    def problem(self) -> str | None:
        """Why it cannot be: a share of a peak above 1, beyond what a clock can be off."""
        for ratio, peak in (
            (self.mbu_ratio, f"{self.peak_bytes_per_s / 1e9:.3g} GB/s"),
            (self.mfu_ratio, f"{(self.peak_flop_per_s or 0) / 1e9:.4g} GFLOP/s in {self.dtype}"),
        ):
            if ratio is not None and ratio > CEILING_TOLERANCE:
                return (
                    f"{self.what.capitalize()} of run {self.run_id} reached {ratio:.0%} of the "
                    f"{peak} that was measured on this machine: an error of ours, one of the two "
                    "numbers is wrong."
                )
        return None


def reached(
    run: Run, variant: Variant | None, peaks: Sequence[PeakFlops] = ()
) -> tuple[Reached, ...]:
    """Return what a run reached; nothing where it does not say how many bytes it moved.

    Args:
        run: a bench, a comparison or a generation that is done.
        variant: of a generation; the others name theirs.
        peaks: in operations a second, of this machine; for generations.
    """
    match run.kind:
        case RunKind.BENCH:
            return tuple(_of_bench(run))
        case RunKind.COMPARE | RunKind.REGRESS:
            return tuple(_of_comparison(run))
        case RunKind.GENERATE if variant:
            return tuple(_of_generation(run, variant, peaks))
        case _:
            return ()


def _of_bench(run: Run) -> Iterator[Reached]:
    for cell in (run.result or {}).get("cells", ()):
        for what in COSTS:
            if held := cell.get(what):
                yield from _held(run, held, run.model, run.precision, what, cell)


def _of_comparison(run: Run) -> Iterator[Reached]:
    result = run.result or {}
    sides = {one["side"]: one for one in result.get("sides", ())}
    for held in result.get("ceilings", ()):
        side = sides[held["side"]]
        yield from _held(run, held, side["model"], side["precision"], held["target"], held["cell"])


def _held(
    run: Run,
    held: Mapping[str, Any],
    model: str,
    precision: str,
    what: str,
    cell: Mapping[str, Any],
) -> Iterator[Reached]:
    """Yield what ``bench.held_against`` told of a stretch; runs of other programs lack it."""
    if "bytes" not in held or not held.get("peak_bandwidth"):
        return
    compute = held["peak_flops"]
    yield Reached(
        **{**_who(run, precision, what, _words(cell)), "model": model},
        flop=held["flop"],
        moved=held["bytes"],
        seconds=held["seconds"],
        peak_bytes_per_s=held["peak_bandwidth"]["bytes_per_s"],
        peak_flop_per_s=compute["flop_per_s"] if compute else None,
        dtype=compute["dtype"] if compute else precision,
    )


def _of_generation(run: Run, variant: Variant, peaks: Sequence[PeakFlops]) -> Iterator[Reached]:
    numbers = run.numbers
    if not numbers or not numbers.mbu_bytes_per_step or not numbers.mbu_peak_bytes_per_s:
        return
    assert numbers.tpot_s is not None
    spec = variant.spec_after
    seen = numbers.prompt_tokens + numbers.new_tokens / 2
    yield Reached(
        **_who(
            run,
            run.precision,
            "decode",
            f"{numbers.prompt_tokens:,} in, {numbers.new_tokens:,} out, batch 1",
        ),
        flop=2.0 * spec.matmul_parameters + attention_flop(spec, seen),
        moved=numbers.mbu_bytes_per_step,
        seconds=numbers.tpot_s,
        peak_bytes_per_s=numbers.mbu_peak_bytes_per_s,
        **_compute(peaks, variant),
    )


def _who(run: Run, precision: str, what: str, cell: str) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "kind": str(run.kind),
        "at": run.created_at,
        "model": run.model,
        "precision": precision,
        "device": run.device,
        "what": what,
        "cell": cell,
    }


def _compute(peaks: Sequence[PeakFlops], variant: Variant) -> dict[str, Any]:
    dtype, placement = arithmetic(variant), variant.placement
    found = [
        one.flop_per_s
        for one in peaks
        if (one.device, one.dtype) == (placement.device, dtype)
        and (placement.device != "cpu" or one.threads == placement.resolved_threads)
    ]
    return {"peak_flop_per_s": max(found, default=None), "dtype": dtype}


def _words(cell: Mapping[str, Any]) -> str:
    return f"{cell['prompt_tokens']:,} in, {cell['new_tokens']:,} out, batch {cell['batch']}"
