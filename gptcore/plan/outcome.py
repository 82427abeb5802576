"""One plan, computed from one set of assumptions: what page, command and report show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptcore.errors import GptcoreError
from gptcore.plan import capacity as capacities
from gptcore.plan import fits, memory, speed, training
from gptcore.plan.assumptions import Assumptions, source, unit
from gptcore.plan.cards import Card
from gptcore.plan.peaks import MachinePeaks, known_peaks
from gptcore.plan.shapes import formula, quirks, size
from gptcore.spec import BYTES, ModelSpec

Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything about one plan."""

    assumptions: Assumptions
    spec: ModelSpec
    card: Card
    parts: Mapping[str, int]
    notes: tuple[str, ...]
    weights_bytes: int
    kv_bytes_per_token: int
    memory: memory.Memory | None
    memory_problem: str | None
    limits: fits.Limits
    usable_bytes: int
    flop: training.Flop
    training: training.Training
    optimal_tokens: float
    device: speed.Device | None
    """None for this machine before it is measured, or a precision that it lacks."""
    decode: speed.Step | None
    prefill_s: float | None
    capacity: capacities.Capacity | None

    @property
    def fits(self) -> bool:
        """Whether the memory asked for fits on the card."""
        return self.memory is not None and self.memory.total <= self.usable_bytes

    def as_json(self) -> dict[str, Any]:
        """Return the plan as one object whose keys end in their unit."""
        one = self.assumptions
        return {
            "model": one.model,
            "parameters": self.spec.parameters,
            "parameters_by_part": dict(self.parts),
            "formula": formula(self.spec),
            "notes": list(self.notes),
            "precision": one.precision,
            "weights_bytes": self.weights_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "memory": {
                "work": one.work,
                "devices": one.split.devices,
                "bytes_by_part": self.memory.by_part if self.memory else None,
                "total_bytes": self.memory.total if self.memory else None,
                "usable_bytes": self.usable_bytes,
                "fits": self.fits,
                "problem": self.memory_problem,
            },
            "card": {
                "name": self.card.name,
                "title": self.card.title,
                "memory_bytes": self.card.memory_bytes,
                "bytes_per_s": self.card.bytes_per_s,
                "flop_per_s": dict(self.card.flop_per_s),
                "watts": self.card.watts,
                "source": self.card.source,
                "dated": self.card.dated,
            },
            "limits": {
                "longest_context_tokens": self.limits.longest_context,
                "most_batch": self.limits.most_batch,
            },
            "training": {
                "flop": self.training.flop,
                "flop_6nd": self.flop.six_nd,
                "flop_exact": self.flop.exact,
                "tokens": self.training.tokens,
                "device_years": self.training.device_years,
                "seconds": self.training.seconds,
                "cost_usd": self.training.cost_usd,
                "energy_kwh": self.training.energy_kwh,
                "carbon_kg": self.training.carbon_kg,
                "optimal_tokens": self.optimal_tokens,
            },
            "speed": None
            if self.decode is None or self.prefill_s is None
            else {
                "prefill_s": self.prefill_s,
                "prefill_tokens_per_s": one.prompt_tokens / self.prefill_s,
                "tpot_s": self.decode.seconds,
                "decode_tokens_per_s": 1 / self.decode.seconds,
                "bound": self.decode.bound,
            },
            "capacity": asdict(self.capacity) if self.capacity else None,
            "assumptions": {
                name: {"value": value, "unit": unit(name), "source": source(name)}
                for name, value in one.model_dump().items()
            },
        }

    def tables(self) -> list[tuple[str, Rows]]:
        """Return the plan as titled rows of name and value, for a person."""
        one, made = self.assumptions, self.training
        found: list[tuple[str, Rows]] = [
            (f"Size of {one.model}", [(name, f"{count:,}") for name, count in self.parts.items()]),
            (
                f"Memory for {one.work} in {one.precision}, a device of {one.split.devices}",
                [(name, gigabytes(count)) for name, count in self.memory.by_part.items() if count]
                + [("total", gigabytes(self.memory.total))]
                + [("usable", f"{gigabytes(self.usable_bytes)} on {self.card.title}")]
                + [("fits", "yes" if self.fits else "no")]
                if self.memory
                else [("problem", self.memory_problem or "")],
            ),
            (
                f"Limits of {one.model} in {one.precision} on {self.card.title}",
                [
                    ("longest context, one text", f"{self.limits.longest_context:,}"),
                    (f"most texts at {min(one.context, self.spec.context):,} tokens",
                     f"{self.limits.most_batch:,}"),
                ],
            ),
            (
                f"Training on {one.tokens:.3g} tokens",
                [
                    ("operations", f"{made.flop:.3g} FLOP"),
                    ("one device", f"{made.device_years:,.4g} years"),
                    (f"{one.devices:,} devices", f"{made.seconds / 86_400:,.4g} days"),
                    ("cost", f"${made.cost_usd:,.0f}"),
                    ("energy", f"{made.energy_kwh:,.0f} kWh"),
                    ("carbon", f"{made.carbon_kg / 1000:,.4g} t CO2e"),
                    ("compute-optimal tokens", f"{self.optimal_tokens:.3g}"),
                ],
            ),
        ]  # fmt: skip
        if self.decode is not None and self.prefill_s is not None:
            found.append(
                (
                    f"Speed on {self.card.title}, one device's rates",
                    [
                        ("prefill", f"{one.prompt_tokens / self.prefill_s:,.4g} tokens/s"),
                        ("decode", f"{1 / self.decode.seconds:,.4g} tokens/s"),
                        ("decode is bound by", self.decode.bound),
                    ],
                )
            )
        if self.capacity is not None:
            found.append((f"Capacity for {one.requests_per_s:g} requests/s", self._capacity()))
        if self.notes:
            found.append(("Notes", [("", note) for note in self.notes]))
        return found

    def _capacity(self) -> Rows:
        found = self.capacity
        assert found is not None
        if found.replica is None:
            return [("problem", found.problem or "")]
        return [
            ("replicas", f"{found.replicas:,}"),
            ("devices", f"{found.devices:,}"),
            ("texts at once, a replica", f"{found.replica.batch:,}"),
            ("TTFT", f"{found.replica.ttft_s:.3g} s"),
            ("TPOT", f"{found.replica.tpot_s:.3g} s"),
            ("a million tokens", f"${found.usd_per_million_tokens:,.4g}"),
            ("energy, a million tokens", f"{found.kwh_per_million_tokens:,.4g} kWh"),
            ("carbon, a million tokens", f"{found.carbon_kg_per_million_tokens:,.4g} kg CO2e"),
        ]


def outcome(
    assumptions: Assumptions,
    known: Mapping[str, ModelSpec] | None = None,
    *,
    peaks: MachinePeaks | None = None,
    paths: bool = False,
) -> Outcome:
    """Return the plan of these assumptions.

    Args:
        assumptions: everything a person set.
        known: shapes by name beside the presets.
        peaks: this machine's; read from where they are kept, if not given.
        paths: whether the model may be the path of a config.json.

    Raises:
        UnknownModel, InvalidSpec, InvalidInput: the shape cannot be had.
    """
    one = assumptions
    spec = one.spec(known, paths=paths)
    peaks = peaks or known_peaks()
    card = one.chosen_card(fits.machine_card(peaks))
    here = card.kind == "machine"
    context = min(one.context, spec.context)
    notes = list(quirks(one.model))
    if one.context > spec.context:
        notes.append(f"{one.model} reads {spec.context:,} tokens at most; that is planned for.")
    odd = sorted({each.columns for each in spec.linears if each.columns % memory.INT4_GROUP})
    if one.precision == "int4" and odd:
        notes.append(
            f"Layers of {' and '.join(f'{n:,}' for n in odd)} columns are no multiple of "
            f"{memory.INT4_GROUP}, the group that shares a scale: they stay in 16 bits."
        )
    held, problem = None, None
    try:
        held = needed(one, spec, context, here)
    except GptcoreError as error:
        problem = str(error)
    counted = training.flop(spec, one.tokens)
    device = device_of(one, card, peaks)
    step = prompt_s = None
    if device is not None:
        step = speed.decode(
            spec, one.precision, device, one.prompt_tokens + one.new_tokens // 2,
            tensor=one.tensor if problem is None else 1,
        )  # fmt: skip
        prompt_s = speed.prefill(
            spec, one.precision, device, one.prompt_tokens,
            tensor=one.tensor if problem is None else 1,
        )  # fmt: skip
    return Outcome(
        assumptions=one,
        spec=spec,
        card=card,
        parts=size(spec),
        notes=tuple(notes),
        weights_bytes=spec.parameters * BYTES[one.precision]
        if one.precision in BYTES
        else memory.weights_bytes(spec, one.precision, on_cpu=here),
        kv_bytes_per_token=memory.kv_bytes_per_token(spec, one.precision, on_cpu=here),
        memory=held,
        memory_problem=problem,
        limits=fits.limits(card, spec, one.precision, context),
        usable_bytes=fits.usable_bytes(card),
        flop=counted,
        training=cost_of(one, counted),
        optimal_tokens=training.optimal_tokens(spec.parameters),
        device=device,
        decode=step,
        prefill_s=prompt_s,
        capacity=None
        if device is None or problem is not None
        else capacity_of(one, spec, card, device),
    )


def gigabytes(count: float) -> str:
    """Return bytes in units of 10⁹, as cards are sold: ``352 GB``, ``1.32 GB``, ``45 MB``."""
    if count < 1e9:
        return f"{count / 1e6:,.0f} MB"
    digits = 0 if count >= 1e11 else 1 if count >= 1e10 else 2
    return f"{count / 1e9:,.{digits}f} GB"


def needed(one: Assumptions, spec: ModelSpec, context: int, here: bool = False) -> memory.Memory:
    """Return the bytes on the fullest device.

    Raises:
        InvalidInput: a split or a precision that cannot be.
    """
    if one.work == "training":
        return memory.training(
            spec,
            one.precision,
            batch=one.batch,
            context=context,
            split=one.split,
            optimizer=one.optimizer,
            recompute=one.recompute,
        )
    return memory.inference(
        spec, one.precision, batch=one.batch, context=context, split=one.split, on_cpu=here
    )


def operations(one: Assumptions, counted: training.Flop) -> float:
    """Return the FLOPs by the count that was chosen."""
    if one.count == "exact":
        return counted.exact
    published = training.PUBLISHED_FLOP.get(one.model) if one.count == "published" else None
    if published is None:
        return counted.six_nd
    return published * one.tokens / training.GPT3_TOKENS


def cost_of(one: Assumptions, counted: training.Flop) -> training.Training:
    """Return what training costs."""
    return training.cost(
        operations(one, counted),
        one.tokens,
        flop_per_s=one.tflop_per_s * 1e12,
        devices=one.devices,
        usd_per_hour=one.usd_per_hour,
        watts=one.watts,
        pue=one.pue,
        carbon_g_per_kwh=one.carbon_g_per_kwh,
    )


def device_of(one: Assumptions, card: Card, peaks: MachinePeaks | None) -> speed.Device | None:
    """Return what the speed is computed from; None where nobody measured it."""
    if card.kind != "machine":
        return speed.card_device(card, one.precision, one.compute_ratio, one.memory_ratio)
    return None if peaks is None else speed.machine_device(peaks, one.precision)


def capacity_of(
    one: Assumptions, spec: ModelSpec, card: Card, device: speed.Device
) -> capacities.Capacity:
    """Return what the load needs."""
    return capacities.capacity(
        spec,
        one.precision,
        card,
        device,
        requests_per_s=one.requests_per_s,
        prompt_tokens=one.prompt_tokens,
        new_tokens=one.new_tokens,
        ttft_s=one.ttft_s,
        tpot_s=one.tpot_s,
        headroom=one.headroom,
        split=one.split,
        usd_per_hour=one.usd_per_hour,
        watts=one.watts,
        pue=one.pue,
        carbon_g_per_kwh=one.carbon_g_per_kwh,
    )
