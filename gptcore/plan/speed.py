"""Speed: every operation of a step against the roofline of a device, and against what was measured.

An operation takes the longer of its arithmetic at the device's FLOP/s and its bytes at the device's
bytes/s; each block adds what launching its operations costs. Source: Williams, Waterman and
Patterson 2009, "Roofline: an insightful visual performance model", CACM 52(4). We differ by the
overhead, which decides for small models, and by rates that were reached, not promised: a card's
data sheet × a share, or this machine's own measurements.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from gptcore.passes.quantize import int4_bytes, int8_bytes
from gptcore.plan.cards import Card
from gptcore.plan.memory import ACTIVATION_BYTES, CPU_BYTES, INT4_GROUP, PREFILL_TOKENS
from gptcore.plan.peaks import MachinePeaks, Rates
from gptcore.records import Run, RunKind
from gptcore.spec import BYTES, ModelSpec

KERNELS_PER_BLOCK = 14
"""Launches of one block on a GPU: norms, projections, attention, activation, additions."""
LINK_BYTES_PER_S = 450e9
"""NVLink of the H100 in one direction, its data sheet: an assumption for every tensor split."""
LINK_S = 10e-6
"""What one all-reduce takes at the least; 5 to 20 µs are seen."""
BAND = (0.1, 0.9)
"""The band holds so much of the ratios that leaving one out gives."""
LEAST_SETUPS = 4
"""Fewer set-ups say nothing about an error."""
LEAST_TOKENS = 8
LEAST_PROMPT = 16
"""Shorter answers and prompts are mostly what is around them."""
CPU_PIECE = 256
"""Tokens of a prompt that a CPU reads at once, as the engine does."""
MOST_PIECES = 400
"""Of a very long prompt so many tell the rest."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of operation in a step, all its launches together."""

    name: str
    launches: int
    flop: float
    bytes: float
    seconds: float
    bound: str
    """``compute`` or ``memory``: which of both takes longer."""

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flop / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model."""

    operations: tuple[Operation, ...]
    overhead_s: float
    """Launching, sampling, talking to other devices: what is neither arithmetic nor reading."""

    @property
    def seconds(self) -> float:
        """Everything."""
        return self.overhead_s + sum(one.seconds for one in self.operations)

    @property
    def flop(self) -> float:
        """Everything."""
        return sum(one.flop for one in self.operations)

    @property
    def bytes(self) -> float:
        """Everything."""
        return sum(one.bytes for one in self.operations)

    @property
    def bound(self) -> str:
        """What takes most of the step: compute, memory or overhead."""
        parts: dict[str, float] = {"overhead": self.overhead_s}
        for one in self.operations:
            parts[one.bound] = parts.get(one.bound, 0.0) + one.seconds
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class Device:
    """What a roofline is drawn from."""

    title: str
    rates: Rates
    stream_bytes_per_s: float
    sampling_s_per_id: float
    on_cpu: bool


def card_device(card: Card, precision: str, compute_ratio: float, memory_ratio: float) -> Device:
    """Return a card at the shares of its data sheet that are assumed to be reached."""
    work = card.rate(precision) * compute_ratio
    plain = card.rate("fp32" if precision == "fp32" else "fp16") * compute_ratio
    read = card.bytes_per_s * memory_ratio
    rates = Rates(work, read, plain, read, KERNELS_PER_BLOCK * card.overhead_s)
    return Device(card.title, rates, read, 0.0, on_cpu=False)


def machine_device(peaks: MachinePeaks, precision: str) -> Device | None:
    """Return this machine as measured; None for a precision that it does not compute."""
    if precision not in peaks.rates:
        return None
    return Device(
        peaks.device_name,
        peaks.rates[precision],
        peaks.stream_bytes_per_s,
        peaks.sampling_s_per_id,
        on_cpu=peaks.device == "cpu",
    )


def step(
    spec: ModelSpec,
    precision: str,
    device: Device,
    *,
    tokens: int,
    known: int,
    batch: int = 1,
    tensor: int = 1,
) -> Step:
    """Return one pass over ``tokens`` new positions of each text, behind ``known`` others.

    Args:
        spec: the shape.
        precision: of the weights.
        device: what it runs on.
        tokens: new positions of a text; 1 is a decode step.
        known: positions in the cache before them.
        batch: texts at once.
        tensor: devices that share each layer; they talk twice a block.
    """
    size = (CPU_BYTES if device.on_cpu else ACTIVATION_BYTES)[precision]
    rates, rows = device.rates, batch * tokens
    found = []

    def add(name: str, launches: int, flop: float, moved: float, peak: tuple[float, float]) -> None:
        work, read = flop / tensor / peak[0], moved / tensor / peak[1]
        bound = "compute" if work > read else "memory"
        found.append(
            Operation(name, launches, flop / tensor, moved / tensor, max(work, read), bound)
        )

    linear = (rates.flop_per_s, rates.bytes_per_s)
    attending = (rates.attention_flop_per_s, rates.attention_bytes_per_s)
    plain = (rates.attention_flop_per_s, device.stream_bytes_per_s)
    d, L = spec.width, spec.layers
    add("embedding", 1, 0.0, rows * d * size * 2, plain)
    for one in spec.linears:
        heads = one.name == "head"
        many = batch if heads else rows
        weights = layer_bytes(one.rows, one.columns, one.bias, precision, size)
        moved = weights + many * (one.rows + one.columns) * size
        add(
            one.name,
            one.count,
            2.0 * many * one.rows * one.columns * one.count,
            moved * one.count,
            linear,
        )
    seen = known + (tokens + 1) / 2
    add(
        "attention",
        L,
        4.0 * rows * seen * spec.q_width * L,
        L * size * (batch * 2 * (known + tokens) * spec.kv_width + 2 * rows * spec.q_width),
        attending,
    )
    inner = (5 if spec.mlp == "swiglu" else 2) * spec.hidden
    add("activation", L, 8.0 * rows * spec.hidden * L, L * rows * inner * size, plain)
    if spec.position == "rotary":
        turned = spec.q_width + spec.kv_width
        add("rotary", 2 * L, 3.0 * rows * turned * L, L * rows * 5 * turned * size, plain)
    norms = (2 * L) * rows + batch
    add("norms", 2 * L + 1, 8.0 * norms * d, norms * 2 * d * size, plain)
    add("residual", 2 * L, 2.0 * rows * d * L, L * rows * 6 * d * size, plain)
    talk = 0.0
    if tensor > 1:
        sent = 2 * (tensor - 1) / tensor * rows * d * size
        talk = 2 * L * (LINK_S + sent / LINK_BYTES_PER_S)
    overhead = (
        L * rates.overhead_s(spec, rows) + batch * spec.vocabulary * device.sampling_s_per_id + talk
    )
    return Step(tuple(found), overhead)


def layer_bytes(rows: int, columns: int, bias: bool, precision: str, size: int) -> int:
    """Return what a linear layer's weights take at a precision."""
    if precision == "int8":
        return int8_bytes(rows, columns, bias)
    if precision == "int4" and columns % INT4_GROUP == 0:
        return int4_bytes(rows, columns, bias, INT4_GROUP)
    return (rows * columns + rows * bias) * BYTES.get(precision, size)


def prefill(
    spec: ModelSpec, precision: str, device: Device, tokens: int, batch: int = 1, tensor: int = 1
) -> float:
    """Return the seconds of reading prompts, in pieces as this program does."""
    size = max(1, CPU_PIECE // batch) if device.on_cpu else PREFILL_TOKENS
    size = max(size, -(-tokens // MOST_PIECES))
    return sum(
        step(
            spec,
            precision,
            device,
            tokens=min(size, tokens - begin),
            known=begin,
            batch=batch,
            tensor=tensor,
        ).seconds
        for begin in range(0, tokens, size)
    )


def decode(
    spec: ModelSpec, precision: str, device: Device, known: int, batch: int = 1, tensor: int = 1
) -> Step:
    """Return one decode step behind ``known`` positions."""
    return step(spec, precision, device, tokens=1, known=known, batch=batch, tensor=tensor)


@dataclass(frozen=True, slots=True)
class Observed:
    """What one run says of one kind of step."""

    what: Literal["decode", "prefill"]
    tokens: int
    """Positions in the cache in the middle of the answers, or of the prompt."""
    batch: int
    seconds: float
    """Of a token of each text, or of all prompts."""
    drawn: bool
    """Whether tokens were drawn with all samplers, or the likeliest was taken."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What was measured on this machine in one way, and what the roofline says of it."""

    model: str
    precision: str
    threads: int
    what: str
    """``decode`` or ``prefill``."""
    tokens: int
    """See ``Observed``."""
    batch: int
    runs: int
    measured_s: float
    """Median over the runs: of a token of each text, or of all prompts."""
    predicted_s: float

    @property
    def residual(self) -> float:
        """Measured ÷ predicted − 1: above 0 it was slower than predicted."""
        return self.measured_s / self.predicted_s - 1


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well the roofline foretells this machine, and how far that may be carried."""

    setups: tuple[Setup, ...]
    left_out: Mapping[str, int]
    """Runs that were not compared, by reason."""
    median_error: float | None
    """Of |residual|, before any correction."""
    corrected_error: float | None
    """The same where each set-up is corrected by what all *others* say."""
    factors: Mapping[str, float]
    """By precision: what a prediction of a decode step is multiplied with."""
    low: float
    """Measured ÷ corrected prediction at the low end of the band; 1 where nothing is known."""
    high: float


@dataclass(frozen=True, slots=True)
class Made:
    """What a run was made with, as far as it is known."""

    threads: int | None = None
    passes: tuple[str, ...] = ()
    """Names of the passes of its recipe."""
    machine: str | None = None
    """Name of the CPU or GPU; an imported run has another machine's."""


def observed(run: Run) -> tuple[Observed, ...]:
    """Return what a generation or a bench says of decode and prefill; nothing where too short."""
    found = []
    if run.kind is RunKind.GENERATE and (numbers := run.numbers) is not None:
        if numbers.tpot_s and numbers.new_tokens >= LEAST_TOKENS:
            known = numbers.prompt_tokens + numbers.new_tokens // 2
            found.append(Observed("decode", known, 1, numbers.tpot_s, drawn=True))
        if numbers.prefill_tokens_per_s and numbers.prompt_tokens >= LEAST_PROMPT:
            seconds = numbers.prompt_tokens / numbers.prefill_tokens_per_s
            found.append(Observed("prefill", numbers.prompt_tokens, 1, seconds, drawn=False))
    for one in (run.result or {}).get("measurements", ()) if run.kind is RunKind.BENCH else ():
        prompt, new, batch = (one.get(name, 0) for name in ("prompt_tokens", "new_tokens", "batch"))
        if one["name"] == "decode_s" and new >= LEAST_TOKENS:
            seconds = one["median"] / (new - 1)
            found.append(Observed("decode", prompt + new // 2, batch, seconds, drawn=False))
        if one["name"] == "prefill_s" and prompt >= LEAST_PROMPT:
            found.append(Observed("prefill", prompt, batch, one["median"], drawn=False))
    return tuple(found)


def predicted_s(spec: ModelSpec, precision: str, device: Device, one: Observed) -> float:
    """Return the seconds that the roofline says of what was observed."""
    if not one.drawn:
        device = replace(device, sampling_s_per_id=0.0)
    if one.what == "prefill":
        return prefill(spec, precision, device, one.tokens, one.batch)
    return decode(spec, precision, device, one.tokens, one.batch).seconds


def compare(
    runs: Sequence[Run],
    specs: Mapping[str, ModelSpec],
    peaks: MachinePeaks | None,
    made: Callable[[Run], Made] = lambda run: Made(),
) -> Accuracy:
    """Return every set-up in ``runs`` beside its prediction.

    Runs of a model, precision, thread count and batch whose texts are about as long (to a power of
    two) are one set-up; the median of their times counts.

    Args:
        runs: finished generations and benches.
        specs: shapes by model name.
        peaks: this machine's, None where they were not measured.
        made: tells what a run was made with.
    """
    grouped: dict[tuple[object, ...], list[Observed]] = defaultdict(list)
    left: dict[str, int] = defaultdict(int)
    for run in runs:
        seen = observed(run)
        if not seen:
            left[f"fewer than {LEAST_TOKENS} new tokens"] += 1
        elif run.model not in specs:
            left["a model that is not there any more"] += 1
        elif peaks is None:
            left["this machine's peaks are not measured"] += 1
        elif run.device != peaks.device or run.precision not in peaks.rates:
            left["another device or precision than was measured"] += 1
        elif (used := made(run)).threads not in (None, peaks.threads):
            left["another number of threads than the peaks'"] += 1
        elif used.machine not in (None, peaks.device_name):
            left["another machine"] += 1
        elif set(used.passes) - {run.precision}:
            left["passes that the roofline does not know"] += 1
        else:
            for one in seen:
                alike = (one.what, one.batch, one.drawn, round(math.log2(one.tokens)))
                grouped[(run.model, run.precision, *alike)].append(one)
    setups = []
    for key, found in sorted(grouped.items(), key=lambda pair: tuple(map(str, pair[0]))):
        assert peaks is not None
        model, precision = str(key[0]), str(key[1])
        device = machine_device(peaks, precision)
        assert device is not None
        middle = replace(found[0], tokens=round(median(one.tokens for one in found)))
        measured = median(one.seconds / one.tokens for one in found) * middle.tokens
        if middle.what == "decode":  # whose time hardly depends on the text's length
            measured = median(one.seconds for one in found)
        setups.append(
            Setup(model, precision, peaks.threads, middle.what, middle.tokens, middle.batch,
                  len(found), measured, predicted_s(specs[model], precision, device, middle))
        )  # fmt: skip
    return accuracy(tuple(setups), dict(left))


def accuracy(setups: tuple[Setup, ...], left_out: Mapping[str, int]) -> Accuracy:
    """Return errors and the band that leaving one set-up out gives."""
    if not setups:
        return Accuracy((), left_out, None, None, {}, 1.0, 1.0)
    plain = median(abs(one.residual) for one in setups)
    decodes = [one for one in setups if one.what == "decode"]
    factors = {one.precision: _factor(setups, one) for one in decodes}
    if len(setups) < LEAST_SETUPS:
        return Accuracy(setups, left_out, plain, None, factors, 1.0, 1.0)
    ratios = []
    for index, one in enumerate(setups):
        others = setups[:index] + setups[index + 1 :]
        ratios.append(one.measured_s / (one.predicted_s * _factor(others, one)))
    ratios.sort()
    return Accuracy(
        setups,
        left_out,
        plain,
        median(abs(one - 1) for one in ratios),
        factors,
        _quantile(ratios, BAND[0]),
        _quantile(ratios, BAND[1]),
    )


def _factor(setups: Sequence[Setup], like: Setup) -> float:
    """Return what set-ups say a prediction must be multiplied with: those most like it first."""
    alike = [one for one in setups if one.what == like.what]
    own = [one.residual + 1 for one in alike if one.precision == like.precision]
    if len(own) > 1:
        return median(own)
    return median([one.residual + 1 for one in alike or setups])


def _quantile(values: Sequence[float], share: float) -> float:
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
