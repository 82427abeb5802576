"""Speed of one variant over a grid: load, first request, prefill, decode and whole request apart.

Every number is kept with all its observations; warm-up is dropped and counted. A rate is held
against what this machine was measured to reach, and one above it is an error of ours that is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from gptcore.measure.energy import EnergyMeter
from gptcore.measure.memory import PeakMemory
from gptcore.measure.peaks import peak_bandwidth, peak_flops
from gptcore.measure.statistics import summary
from gptcore.measure.timing import Cell, Times, once, request_s
from gptcore.recipe import Variant
from gptcore.records import MAX_SEED, RunKind
from gptcore.spec import ModelSpec
from gptcore.work import Desk, Loaded, Work

if TYPE_CHECKING:
    from gptcore.model import GPT

Target = Literal["load", "first", "prefill", "decode", "request"]
TARGETS: tuple[Target, ...] = ("load", "first", "prefill", "decode", "request")
SHORTEST_ENERGY_S = 0.2
"""NVML renews its counter ten times a second or less; a shorter stretch says nothing."""
CEILING_TOLERANCE = 1.03
"""A rate may be this share above the measured peak before it is called an error."""
UNITS = {"_tokens_per_s": "tokens/s", "_s": "s", "_bytes": "bytes", "_j": "J"}


class Bench(Work):
    """Measure one variant."""

    kind: ClassVar[RunKind] = RunKind.BENCH

    variant: Variant
    cells: tuple[Cell, ...] = Field((Cell(),), min_length=1, max_length=64)
    targets: tuple[Target, ...] = Field(TARGETS, min_length=1)
    repetitions: int = Field(
        5, ge=1, le=10_000, title="Repetitions", description="At least so many of each."
    )
    seconds: float = Field(
        1.0, ge=0.0, le=3600.0, title="Seconds", description="At least so long for each cell."
    )
    loads: int = Field(
        2, ge=1, le=100, title="Loads", description="Times the weights are loaded from disk."
    )
    warmup: int = Field(
        1, ge=0, le=100, title="Warm-up", description="Repetitions dropped before each cell."
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Chooses the tokens that are read.")

    @field_validator("targets")
    @classmethod
    def _in_order(cls, value: tuple[Target, ...]) -> tuple[Target, ...]:
        return tuple(one for one in TARGETS if one in value)

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the one variant."""
        return (self.variant,)

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Measure, and return measurements, cells and conditions; see ``Outcome``."""
        for cell in self.cells:
            cell.check(self.variant.spec, self.variant.model)
        done = Outcome(desk)
        self._load(desk, done)
        loaded = desk.load(self.variant)
        for number, cell in enumerate(self.cells):
            desk.phase(f"measuring {cell.label}", number / len(self.cells))
            self._cell(desk, loaded, cell, done)
            desk.partial(done.as_json())
        return done.as_json()

    def _load(self, desk: Desk, done: Outcome) -> None:
        if not {"load", "first"} & set(self.targets):
            return
        loads, firsts = [], []
        for number in range(self.loads):
            desk.phase(f"loading, {number + 1} of {self.loads}")
            desk.unload(self.variant)
            loaded = desk.load(self.variant)
            loads.append(loaded.load_s)
            times = once(loaded.engine.model, self.cells[0], seed=self.seed, check=desk.check)
            firsts.append(times.prefill_s + times.decode_s)
        if "load" in self.targets:
            done.measured(None, "load_s", loads, warmup=0)
        if "first" in self.targets:
            done.measured(self.cells[0], "first_s", firsts, warmup=0)

    def _cell(self, desk: Desk, loaded: Loaded, cell: Cell, done: Outcome) -> None:
        model = loaded.engine.model
        with PeakMemory(desk.device) as memory:
            if {"prefill", "decode"} & set(self.targets):
                self._times(desk, loaded, cell, done)
            if "request" in self.targets:
                whole = self._repeat(
                    lambda: request_s(model, cell, seed=self.seed, check=desk.check)
                )
                done.measured(cell, "request_s", whole, warmup=self.warmup)
        done.cell(cell)["peak_memory_bytes"] = memory.peak_bytes

    def _times(self, desk: Desk, loaded: Loaded, cell: Cell, done: Outcome) -> None:
        times: list[Times] = self._repeat(
            lambda: once(loaded.engine.model, cell, seed=self.seed, check=desk.check)
        )
        # What was let go of and made anew would stand in the energy of both: each has its own.
        spent = {
            "prefill": self._energy(
                desk, loaded.engine.model, cell.model_copy(update={"new_tokens": 1})
            ),
            "decode": self._energy(desk, loaded.engine.model, cell),
        }
        threads = self.variant.placement.resolved_threads
        for target, tokens in (
            ("prefill", cell.prompt_tokens * cell.batch),
            ("decode", (cell.new_tokens - 1) * cell.batch),
        ):
            if target not in self.targets or not tokens:
                continue
            seconds = [getattr(one, f"{target}_s") for one in times]
            done.measured(cell, f"{target}_s", seconds, warmup=self.warmup)
            done.measured(
                cell, f"{target}_tokens_per_s", [tokens / s for s in seconds], warmup=self.warmup
            )
            cost = COSTS[target](Weighed.of(loaded), cell)
            done.cell(cell)[target] = {
                **held_against(cost, min(seconds), self.variant, threads, target),
                "flop": cost.flop,
                "bytes": cost.moved,
                "energy": energy_of(target, spent, tokens, cell),
            }

    def _repeat(self, work: Callable[[], Any]) -> list[Any]:
        for _ in range(self.warmup):
            work()
        found: list[Any] = []
        began = time.perf_counter()
        while len(found) < self.repetitions or time.perf_counter() - began < self.seconds:
            found.append(work())
        return found

    def _energy(self, desk: Desk, model: GPT, cell: Cell) -> dict[str, Any]:
        """Return the joules of one repetition, over a stretch long enough for a counter."""
        count, began = 0, time.perf_counter()
        with EnergyMeter(desk.device) as meter:
            while not count or time.perf_counter() - began < SHORTEST_ENERGY_S:
                once(model, cell, seed=self.seed, check=desk.check)
                count += 1
        joules = meter.energy.joules
        return {"j": None if joules is None else joules / count, "label": meter.energy.label}


class Outcome:
    """What a bench has found so far."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._measurements: list[dict[str, Any]] = []
        self._cells: dict[str, dict[str, Any]] = {}

    def measured(
        self, cell: Cell | None, name: str, observations: Sequence[float], *, warmup: int
    ) -> None:
        """Keep one number with its observations; ``cell`` is None where it belongs to none."""
        found = summary(observations)
        self._measurements.append(
            {
                "name": name,
                "unit": next(unit for ending, unit in UNITS.items() if name.endswith(ending)),
                **(cell.model_dump() if cell else {}),
                "n": found.n,
                "median": found.median,
                "p05": found.p05,
                "p95": found.p95,
                "warmup_dropped": warmup,
                "observations": list(observations),
            }
        )
        self._desk.measured(f"{cell.label} {name}" if cell else name, observations)

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Return what is told of a cell beside its measurements."""
        return self._cells.setdefault(cell.label, cell.model_dump())

    def as_json(self) -> dict[str, Any]:
        """Return ``measurements``, and ``cells`` with memory, energy and shares of the peaks."""
        return {"measurements": list(self._measurements), "cells": list(self._cells.values())}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stretch of work asks of the machine."""

    flop: float
    """An addition and a multiplication are two."""
    moved: float
    """Bytes of weights and cache that must be read at least."""
    steps: int
    """Forward passes that this is the cost of."""
    working_set: int
    """Bytes of weights that each of them reads."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """What of a variant decides the cost of a step."""

    spec: ModelSpec
    step_bytes: int
    """Weight bytes that one decode step reads."""
    kv_bytes_per_token: int

    @classmethod
    def of(cls, loaded: Loaded) -> Weighed:
        """Return it for a variant in memory."""
        return cls(loaded.engine.model.spec, loaded.step_bytes, loaded.variant.kv_bytes_per_token)


def prefill_cost(one: Weighed, cell: Cell) -> Cost:
    """Return what reading the prompts costs: 2 × weights a token, and attention to all before."""
    spec, tokens = one.spec, cell.prompt_tokens
    head = spec.vocabulary * spec.width
    flop = 2.0 * ((spec.matmul_parameters - head) * tokens + head)
    flop += attention_flop(spec, tokens * (tokens + 1) / 2)
    moved = one.step_bytes + cell.batch * tokens * one.kv_bytes_per_token
    return Cost(cell.batch * flop, moved, 1, one.step_bytes)


def decode_cost(one: Weighed, cell: Cell) -> Cost:
    """Return what all steps but the first cost; a batch shares the weights that are read."""
    spec, steps = one.spec, cell.new_tokens - 1
    seen = sum(range(cell.prompt_tokens + 1, cell.prompt_tokens + cell.new_tokens))
    flop = 2.0 * spec.matmul_parameters * steps + attention_flop(spec, seen)
    moved = steps * one.step_bytes + cell.batch * seen * one.kv_bytes_per_token
    return Cost(cell.batch * flop, moved, steps, one.step_bytes)


COSTS: dict[str, Callable[[Weighed, Cell], Cost]] = {
    "prefill": prefill_cost,
    "decode": decode_cost,
}


def attention_flop(spec: ModelSpec, seen: float) -> float:
    """Return the operations of attention over all layers, for ``seen`` pairs of positions."""
    return 4.0 * spec.layers * spec.q_width * seen


def held_against(
    cost: Cost, seconds: float, variant: Variant, threads: int, what: str
) -> dict[str, Any]:
    """Return shares of the measured peaks for the best repetition, and a problem if above one.

    The best repetition is held against the peak, which is the best of many itself.
    """
    device = variant.placement.device
    flop_per_s, bytes_per_s = cost.flop / seconds, cost.moved / seconds
    dtype = arithmetic(variant)
    bandwidth = peak_bandwidth(device, cost.working_set, threads, at_least=bytes_per_s)
    compute = peak_flops(device, dtype, threads, at_least=flop_per_s)
    mbu = bytes_per_s / bandwidth.bytes_per_s
    mfu = flop_per_s / compute.flop_per_s if compute else None
    problems = [
        f"{what} reached {ratio:.0%} of the {name} that was measured on this machine: one of the "
        "two numbers is wrong."
        for name, ratio in (("bytes a second", mbu), (f"{dtype} operations a second", mfu))
        if ratio is not None and ratio > CEILING_TOLERANCE
    ]
    return {
        "seconds": seconds,
        "mbu_ratio": mbu,
        "mfu_ratio": mfu,
        "peak_bandwidth": asdict(bandwidth),
        "peak_flops": asdict(compute) if compute else None,
        "problems": problems,
    }


def arithmetic(variant: Variant) -> str:
    """Return the type in which the variant multiplies, whose peak it is held against."""
    return "int8" if variant.precision == "int8" else variant.placement.precision


def energy_of(
    target: str, spent: Mapping[str, Mapping[str, Any]], tokens: int, cell: Cell
) -> dict[str, Any]:
    """Return joules a token with their label; decode is the whole less the prefill."""
    whole, read = spent["decode"]["j"], spent["prefill"]["j"]
    label = spent[target]["label"]
    joules = read if target == "prefill" or whole is None else max(whole - read, 0.0)
    return {"j_per_token": None if joules is None else joules / tokens, "label": label}
