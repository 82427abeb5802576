"""Two to four variants on the same work, measured in turn: who is faster, and how sure is it.

The first variant is the baseline. Blocks are measured A B B A (with four variants A B C D D C B A,
the first half drawn by the seed), so that a drift of the machine meets every side alike. The rule
by which it ends is fixed before the first block. The first variant twice is an A/A run: what it
finds is this machine's noise.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from gptcore.errors import Cancelled, GptcoreError
from gptcore.measure.bench import COSTS, Weighed, held_against
from gptcore.measure.energy import EnergyMeter
from gptcore.measure.statistics import (
    METHOD,
    Comparison,
    Quantity,
    StopRule,
    block_value,
    compare,
    counted,
    holm,
    noise_floor,
    quantity_of,
)
from gptcore.measure.timing import Cell, Times, once
from gptcore.recipe import Variant
from gptcore.records import MAX_SEED, RunKind
from gptcore.work import Desk, Loaded, Work

SIDES = "ABCD"
TELL_EVERY_S = 0.5
"""How often the blocks so far are shown while they are measured."""


class Compare(Work):
    """Measure two to four variants against the first of them."""

    kind: ClassVar[RunKind] = RunKind.COMPARE

    variants: tuple[Variant, ...] = Field(min_length=2, max_length=len(SIDES))
    cells: tuple[Cell, ...] = Field((Cell(),), min_length=1, max_length=64)
    stop: StopRule = StopRule()
    block_s: float = Field(
        0.2,
        ge=0.0,
        le=600.0,
        title="Block length",
        description="Seconds that a block is repeated for at least; its median counts.",
    )
    warmup: int = Field(1, ge=0, le=100, title="Warm-up", description="Blocks dropped a side.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Chooses tokens and order.")
    noise_floor: float | None = Field(
        None, ge=1.0, description="This machine's noise: no smaller ratio is coloured."
    )
    noise_floor_at: str | None = None
    delay_ratio: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Idle work of this share, added to all sides but A: it has to be found.",
    )
    accepted: tuple[str, ...] = Field(
        (), description="Conditions in which the sides may differ, by name, such as threads."
    )

    @field_validator("cells")
    @classmethod
    def _each_once(cls, value: tuple[Cell, ...]) -> tuple[Cell, ...]:
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _comparable(self) -> Compare:
        devices = sorted({one.placement.device for one in self.variants})
        if len(devices) > 1:
            raise ValueError(
                f"the variants are on {' and '.join(devices)}, which cannot be measured in turn "
                "by one process: choose one device for all"
            )
        threads = sorted({one.placement.resolved_threads for one in self.variants})
        if len(threads) > 1 and "threads" not in self.accepted:
            raise ValueError(
                f"the variants differ in threads ({' and '.join(map(str, threads))}): accept "
                "threads as a difference, or give all the same"
            )
        return self

    @property
    def is_noise(self) -> bool:
        """Whether all sides are the same variant, so that what is found is noise."""
        return len({one.hash for one in self.variants}) == 1

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the variants, the baseline first."""
        return self.variants

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Measure, and return sides, cells with blocks and comparisons, and how it was done."""
        with contextlib.closing(self._sides(desk)) as bench:
            bench.load()
            cells = []
            for number, cell in enumerate(self.cells):
                measured = _CellBlocks(cell, len(self.variants))
                cells.append(measured)
                self._measure(desk, bench, measured, number, cells)
            found = self._result(bench, cells, final=True)
            return found | {"ceilings": self._ceilings(bench, cells)}

    def _ceilings(self, bench: Sides, cells: Sequence[_CellBlocks]) -> list[dict[str, Any]]:
        """Return the shares of this machine's peaks that each side's best blocks reached."""
        found = []
        for one in cells:
            for side, variant in enumerate(self.variants):
                weighed = bench.weighed(side)
                for target, cost_of in COSTS.items():
                    seconds = one.blocks.get(f"{target}_s", {side: []})[side]
                    if not seconds or weighed is None:
                        continue
                    cost, threads = cost_of(weighed, one.cell), variant.placement.resolved_threads
                    held = held_against(cost, min(seconds), variant, threads, target)
                    found.append(
                        {
                            "side": SIDES[side],
                            "cell": one.cell.model_dump(),
                            "target": target,
                            **held,
                            "flop": cost.flop,
                            "bytes": cost.moved,
                        }
                    )
        return found

    def _sides(self, desk: Desk) -> Sides:
        return Sides(self, desk)

    def _measure(
        self, desk: Desk, bench: Sides, blocks: _CellBlocks, number: int, cells: list[_CellBlocks]
    ) -> None:
        for side, variant in enumerate(self.variants):
            try:
                blocks.cell.check(variant.spec, variant.model)
            except GptcoreError as error:
                bench.problems[side] = str(error)
        for _ in range(self.warmup):
            for side in range(len(self.variants)):
                bench.block(side, blocks.cell)
        told, began = 0.0, time.monotonic()
        budget = self.stop.seconds / len(self.cells) if self.stop.seconds else None
        stop = self.stop.model_copy(update={"seconds": budget})
        for order in rounds(len(self.variants), self.seed):
            for side in order:
                if (found := bench.block(side, blocks.cell)) is not None:
                    blocks.add(side, *found)
            seconds = time.monotonic() - began
            blocks.ended = blocks.stopped(stop, seconds, bench.alive)
            if blocks.ended or seconds - told > TELL_EVERY_S:
                told = seconds
                share = min(1.0, blocks.rounds / stop.max_pairs)
                if budget:
                    share = max(share, min(1.0, seconds / budget))
                desk.phase(f"measuring {blocks.cell.label}", (number + share) / len(self.cells))
                desk.partial(self._result(bench, cells, final=False))
            if blocks.ended:
                return

    def _result(self, bench: Sides, cells: Sequence[_CellBlocks], *, final: bool) -> dict[str, Any]:
        incomplete = "" if final else "it was not measured to its end."
        found: list[tuple[_CellBlocks, int, str, Comparison]] = [
            (one, side, metric, self._compared(one, side, metric, bench, incomplete))
            for one in cells
            for metric in one.metrics
            for side in range(1, len(self.variants))
        ]
        corrected = holm([comparison for *_, comparison in found])
        if len(found) == 1:
            corrected = (found[0][3],)
        told = [
            {
                "cell": one.cell.model_dump(),
                "side": SIDES[side],
                "metric": metric,
                **asdict(comparison),
                "half_width": comparison.half_width,
                "sentence": comparison.told_of(SIDES[side]),
            }
            for (one, side, metric, _), comparison in zip(found, corrected, strict=True)
        ]
        result: dict[str, Any] = {
            "sides": bench.described(),
            "residency": bench.residency,
            "cells": [one.as_json() for one in cells],
            "comparisons": told,
            "amounts": bench.amounts(),
            "method": METHOD,
            "stop": self.stop.model_dump(),
            "energy_label": bench.energy_label,
            "noise_floor": None,
            "noise_floor_used": self.noise_floor,
            "noise_floor_used_at": self.noise_floor_at,
            "complete": final and not bench.problems,
        }
        if self.is_noise and final and not self.delay_ratio:
            result["noise_floor"] = asdict(
                noise_floor(
                    [
                        (one.values(0, metric), one.values(1, metric))
                        for one in cells
                        for metric in one.metrics
                        if metric != "energy_j"
                    ]
                )
            )
        return result

    def _compared(
        self, one: _CellBlocks, side: int, metric: str, bench: Sides, incomplete: str
    ) -> Comparison:
        for broken in (0, side):
            if broken in bench.problems:
                incomplete = f"{SIDES[broken]} could not be measured: {bench.problems[broken]}"
        return compare(
            one.values(0, metric),
            one.values(side, metric),
            quantity=quantity_of(metric),
            noise_floor=self.noise_floor,
            least_pairs=self.stop.min_pairs if not self.stop.seconds else 0,
            incomplete=incomplete,
            seed=self.seed,
        )


def rounds(sides: int, seed: int = 0) -> Iterator[tuple[int, ...]]:
    """Yield, without end, orders in which each side has one block.

    Every second order is the one before it backwards, so that a drift that is a straight line
    cancels within two of them; the first of each two is drawn by the seed.
    """
    random = np.random.default_rng(seed)
    while True:
        order = tuple(int(one) for one in random.permutation(sides))
        yield order
        yield order[::-1]


@dataclass(slots=True)
class _CellBlocks:
    """The blocks of one cell, by metric and side."""

    cell: Cell
    sides: int
    ended: str | None = None
    blocks: dict[str, list[list[float]]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.blocks)

    @property
    def rounds(self) -> int:
        """Blocks of the side that has most."""
        return max((len(one) for sides in self.blocks.values() for one in sides), default=0)

    def values(self, side: int, metric: str) -> list[float]:
        return self.blocks[metric][side]

    def add(self, side: int, times: Sequence[Times], joules: float | None) -> None:
        self.order.append(side)
        found = {"prefill_s": block_value([one.prefill_s for one in times])}
        if self.cell.new_tokens > 1:
            found["decode_s"] = block_value([one.decode_s for one in times])
        if joules:
            found["energy_j"] = joules
        for metric, value in found.items():
            self.blocks.setdefault(metric, [[] for _ in range(self.sides)])[side].append(value)

    def stopped(self, stop: StopRule, seconds: float, alive: Sequence[int]) -> str | None:
        """Return why the cell ends now: the slowest to converge of all sides decides.

        The decode decides, or the prefill where there is none; the others end with it.
        """
        metric = "decode_s" if "decode_s" in self.blocks else "prefill_s"
        if not self.blocks or not alive:
            return "no side can be measured"
        others = [side for side in alive if side != 0]
        if 0 not in alive or not others:
            left = SIDES[alive[0]]
            enough = self.rounds >= stop.min_pairs
            return f"only {left} can be measured, and was, {self.rounds} times" if enough else None
        reasons = [
            stop.ended(self.values(0, metric), self.values(side, metric), seconds)
            for side in others
        ]
        return reasons[-1] if all(reasons) else None

    def as_json(self) -> dict[str, Any]:
        return {
            **self.cell.model_dump(),
            "ended": self.ended,
            "order": "".join(SIDES[side] for side in self.order),
            "blocks": {
                metric: dict(zip(SIDES, values, strict=False))
                for metric, values in self.blocks.items()
            },
        }


class Sides:
    """The variants at the desk, with what became of each."""

    def __init__(self, work: Compare, desk: Desk) -> None:
        self.problems: dict[int, str] = {}
        self.residency = ""
        self.energy_label = "unavailable"
        self._work = work
        self._desk = desk
        self._facts: dict[int, dict[str, Any]] = {}

    @property
    def alive(self) -> list[int]:
        """The sides that can be measured."""
        return [side for side in range(len(self._work.variants)) if side not in self.problems]

    def load(self) -> None:
        """Load all, and see whether they stay in memory together."""
        for side in range(len(self._work.variants)):
            self._desk.phase(f"loading {SIDES[side]}")
            self._loaded(side)
        held = all(self._desk.holds(self._work.variants[side]) for side in self.alive)
        self.residency = (
            "resident: all sides stayed in memory"
            if held
            else "alternated: the sides do not fit into memory together, and each was loaded "
            "again before its blocks, outside of what is timed"
        )

    def block(self, side: int, cell: Cell) -> tuple[list[Times], float | None] | None:
        """Measure one block of a side: its repetitions and the joules of one of them.

        None where the side cannot be measured; why stands in ``problems``.
        """
        if side in self.problems or (loaded := self._loaded(side)) is None:
            return None
        times: list[Times] = []
        began = time.perf_counter()
        try:
            with EnergyMeter(self._desk.device) as meter:
                while not times or time.perf_counter() - began < self._work.block_s:
                    times.append(self._once(loaded, side, cell))
        except Cancelled:
            raise
        except (GptcoreError, MemoryError, RuntimeError) as error:
            self.problems[side] = str(error)
            return None
        self.energy_label = meter.energy.label
        joules = meter.energy.joules
        return times, None if joules is None else joules / len(times)

    def _once(self, loaded: Loaded, side: int, cell: Cell) -> Times:
        return once(
            loaded.engine.model,
            cell,
            seed=self._work.seed,
            delay_ratio=self._work.delay_ratio if side else 0.0,
            check=self._desk.check,
        )

    def _loaded(self, side: int) -> Loaded | None:
        try:
            loaded = self._desk.load(self._work.variants[side])
        except Cancelled:
            raise
        except GptcoreError as error:
            self.problems[side] = str(error)
            return None
        self._facts.setdefault(
            side,
            {
                "load_s": loaded.load_s,
                "resident_bytes": loaded.resident_bytes,
                "step_bytes": loaded.step_bytes,
                "coverage": {name: one.ratio for name, one in loaded.coverage.items()},
            },
        )
        return loaded

    def close(self) -> None:
        """Let go of what was made for the sides alone: nothing, as the desk keeps the variants."""

    def described(self) -> list[dict[str, Any]]:
        """Return who is who, with what is known of each."""
        return [
            {
                "side": SIDES[side],
                "model": variant.model,
                "precision": variant.precision,
                "recipe": str(variant.recipe),
                "device": variant.placement.device,
                "threads": variant.placement.resolved_threads,
                "variant_hash": variant.hash,
                "problem": self.problems.get(side),
                **self._facts.get(side, {}),
            }
            for side, variant in enumerate(self._work.variants)
        ]

    def weighed(self, side: int) -> Weighed | None:
        """Return what decides the cost of a side's step, None where it was never loaded."""
        if side not in self._facts:
            return None
        variant, bytes_read = self._work.variants[side], self._facts[side]["step_bytes"]
        return Weighed(variant.spec_after, bytes_read, variant.kv_bytes_per_token)

    def amounts(self) -> list[dict[str, Any]]:
        """Return what needs no measuring: bytes, of each side against the first."""
        found = []
        for metric in ("resident_bytes", "step_bytes"):
            base = self._facts.get(0, {}).get(metric)
            for side, facts in self._facts.items():
                if side and base and facts[metric]:
                    one = counted(base, facts[metric], Quantity.AMOUNT)
                    found.append({"side": SIDES[side], "metric": metric, **asdict(one)})
        return found
