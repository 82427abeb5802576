"""What a recipe changed, on every axis at once: speed, memory, size, energy and quality.

Speed is the interleaved comparison of ``measure.compare``, quality the paired report of
``measure.evaluate``; nothing is measured twice or in another way than alone. What is known so far
is shown while the rest is still being measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptcore.artifact import coverage_json
from gptcore.errors import Cancelled, GptcoreError, InvalidInput
from gptcore.measure.calibration import require_other_text
from gptcore.measure.compare import SIDES, Compare
from gptcore.measure.corpora import EVALUATION, EvaluationText, evaluation_text
from gptcore.measure.evaluate import Evaluate, described
from gptcore.measure.perplexity import Windowing
from gptcore.measure.statistics import Quantity, StopRule, compare, counted
from gptcore.measure.tasks import SHIPPED_NAME
from gptcore.measure.timing import Cell
from gptcore.measure.works_quality import Tasks
from gptcore.optimize.damage import of_stream, of_weights
from gptcore.optimize.expect import expected
from gptcore.optimize.part import Part
from gptcore.recipe import Variant
from gptcore.records import RunKind
from gptcore.work import Desk, Work

DAMAGE_TOKENS = 128
"""Of the evaluation text, that both sides' streams are compared on."""
WINDOW = 512
QUICK_CELLS = (Cell(prompt_tokens=128, new_tokens=32),)
FULL_CELLS = (
    Cell(prompt_tokens=128, new_tokens=32),
    Cell(prompt_tokens=512, new_tokens=2),
    Cell(prompt_tokens=64, new_tokens=16, batch=4),
)
PAIRS = 10
"""Of blocks a cell; fewer give wider intervals, which are shown."""
QUICK_PAIRS = 6
"""The fewest of which a permutation test can find anything at 5 %."""
SAME_BITS = 1.5
"""Scales and zeros add so many bits a weight at most to a format's name."""
BITS = re.compile(r"\d+")
BYTES_TITLES = {
    "stored_bytes": "On disk",
    "resident_bytes": "In memory",
    "step_bytes": "Read a token",
}


class Goals(BaseModel):
    """What a variant must reach to be accepted; what is not given is not asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kl_at_most: float | None = Field(
        None, ge=0.0, le=100.0, title="KL at most", description="Mean, in nats a token."
    )
    perplexity_at_most: float | None = Field(
        None, gt=0.0, le=1e6, title="Perplexity at most", description="Times the baseline's."
    )
    decode_speedup_at_least: float | None = Field(
        None, gt=0.0, le=1000.0, title="Decode at least", description="Times as fast."
    )
    prefill_speedup_at_least: float | None = Field(
        None, gt=0.0, le=1000.0, title="Prefill at least", description="Times as fast."
    )
    response_at_most: float | None = Field(
        None,
        gt=0.0,
        le=1000.0,
        title="Response time at most",
        description="Prefill and decode together, times the baseline's.",
    )
    stored_at_most: float | None = Field(
        None, gt=0.0, le=10.0, title="Size at most", description="On disk, times the baseline's."
    )


class Prove(Work):
    """Hold a variant against its baseline on every axis."""

    kind: ClassVar[RunKind] = RunKind.PROVE

    baseline: Variant
    variant: Variant
    cells: tuple[Cell, ...] = Field(FULL_CELLS, min_length=1, max_length=32)
    pairs: int = Field(
        PAIRS,
        ge=QUICK_PAIRS,
        le=1000,
        title="Pairs of blocks",
        description="Measured in each cell, in turn; more give narrower intervals.",
    )
    text: str = Field(
        EVALUATION,
        min_length=1,
        max_length=4096,
        title="Evaluation text",
        description="The name of a text, or the path of a UTF-8 file.",
    )
    tasks: bool = Field(
        True, title="Tasks", description="Ask both sides the multiple-choice items that ship."
    )
    damage: bool = Field(
        True, title="Damage map", description="Compare weights and streams layer by layer."
    )
    goals: Goals = Goals()
    noise_floor: float | None = Field(None, ge=1.0, description="This machine's noise.")
    noise_floor_at: str | None = None

    @model_validator(mode="after")
    def _on_one_device(self) -> Prove:
        one, other = self.baseline.placement, self.variant.placement
        if one.device != other.device:
            raise ValueError(
                f"the baseline is on {one.device} and the variant on {other.device}; a proof has "
                "one device: put both on the same"
            )
        if one.resolved_threads != other.resolved_threads:
            raise ValueError(
                f"the baseline has {one.resolved_threads} threads and the variant "
                f"{other.resolved_threads}: give both the same"
            )
        return self

    def variants_used(self) -> tuple[Variant, ...]:
        """Return the variant, which labels the run, and the baseline."""
        return (self.variant, self.baseline)

    def perform(self, desk: Desk) -> Mapping[str, Any]:
        """Measure every axis, and return them with what each recipe did; see ``Card``.

        Raises:
            InvalidInput: the text cannot be used, or a variant was calibrated with it.
        """
        text = evaluation_text(self.text, paths=True)
        for one in self.variants_used():
            require_other_text(text, one)
        card = Card(self, desk)
        card.describe()
        card.measure_speed(0.05, 0.5)
        card.measure_quality(text, 0.5, 0.7)
        if self.damage:
            card.map_damage(text, 0.7, 0.8)
        if self.tasks:
            card.ask_tasks(0.8, 1.0)
        return card.as_json(final=True)


class Card:
    """A proof as far as it is known."""

    def __init__(self, work: Prove, desk: Desk) -> None:
        self._work = work
        self._desk = desk
        self._known: dict[str, Any] = {}
        self._axes: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def as_json(self, *, final: bool) -> dict[str, Any]:
        """Return what is known: sides, axes, quality, damage, coverage, goals."""
        found = {
            **self._known,
            "axes": list(self._axes),
            "noise_floor": self._work.noise_floor,
            "noise_floor_at": self._work.noise_floor_at,
            "problems": list(self.problems),
            "complete": final and not self.problems,
        }
        goals = goals_met(self._work.goals, found)
        met = [one["met"] for one in goals]
        accepted = all(met) if met and None not in met else None
        return {**found, "goals": goals, "accepted": False if False in met else accepted}

    def describe(self) -> None:
        """Load both sides and tell bytes, coverage, mechanisms and the weights' source."""
        from gptcore.linears import stored_bytes

        sides = []
        for side, variant in enumerate((self._work.baseline, self._work.variant)):
            self._desk.phase(f"loading {SIDES[side]}", 0.02 * side)
            loaded = self._desk.load(variant)
            sides.append(
                {
                    "side": SIDES[side],
                    **described(variant),
                    "threads": variant.placement.resolved_threads,
                    "parameters": loaded.engine.model.spec.parameters,
                    "stored_bytes": stored_bytes(loaded.engine.model),
                    "resident_bytes": loaded.resident_bytes,
                    "step_bytes": loaded.step_bytes,
                    "kv_bytes_per_token": variant.kv_bytes_per_token,
                    "passes_s": sum(loaded.passes_s.values()),
                    "source_precision": loaded.source_precision,
                }
            )
            coverage, parameters = loaded.coverage, variant.spec.parameters
            del loaded  # so that it can be let go of
        a, b = sides
        self._known |= {
            "sides": sides,
            "coverage": coverage_json(coverage),
            "effective_bits": 8 * b["stored_bytes"] / parameters,
            "mechanisms": [
                {
                    "pass": one.name,
                    "title": one.title,
                    "mechanism": one.mechanism,
                    "settings": one.as_json(),
                    "caution": one.caution(self._work.variant.spec, self._work.variant.placement),
                }
                for one in self._work.variant.recipe.passes
            ],
            "void": void(b["source_precision"], self._known_bits(coverage)),
        }
        for metric, title in BYTES_TITLES.items():
            self._add_axis(title, metric, asdict(counted(a[metric], b[metric])), cell=None)
        if a["kv_bytes_per_token"] and b["kv_bytes_per_token"]:
            kv = counted(a["kv_bytes_per_token"], b["kv_bytes_per_token"])
            self._add_axis("Cache a token", "kv_bytes_per_token", asdict(kv), cell=None)
        self._tell()

    @staticmethod
    def _known_bits(coverage: Mapping[str, Any]) -> float | None:
        bits = [one.effective_bits for one in coverage.values() if one.effective_bits]
        return min(bits, default=None)

    def measure_speed(self, begin: float, end: float) -> None:
        """Measure both sides in turn, and what the bytes and operations let expect."""
        work, least = self._work, min(one.spec_after.context for one in self._work.variants_used())
        cells = tuple(one for one in work.cells if one.prompt_tokens + one.new_tokens <= least) or (
            Cell(prompt_tokens=max(1, least // 2), new_tokens=max(2, least // 4)),
        )
        compared = Compare(
            variants=(work.baseline, work.variant),
            cells=cells,
            stop=StopRule(min_pairs=work.pairs, max_pairs=work.pairs),
            noise_floor=work.noise_floor,
            noise_floor_at=work.noise_floor_at,
        )
        kept = list(self._axes)

        def show(result: Mapping[str, Any]) -> None:
            self._axes = kept + self._speed_axes(result)
            self._known["speed"] = {
                name: result[name] for name in ("residency", "cells", "method", "energy_label")
            }
            self._tell()

        part = Part(self._desk, "speed", begin, end, show)
        found = compared.perform(part)
        show(found)
        if not found["complete"]:
            self.problems += [
                f"{one['side']} could not be measured: {one['problem']}"
                for one in found["sides"]
                if one["problem"]
            ]
            return
        self._known["expectations"] = self._expectations(found)
        self._known["break_even"] = self._break_even()
        self._tell()

    def _speed_axes(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        titles = {"prefill_s": "Prefill", "decode_s": "Decode", "energy_j": "Energy"}
        axes = [
            axis(
                titles[one["metric"]],
                one["metric"],
                one,
                cell=one["cell"],
                label=result["energy_label"] if one["metric"] == "energy_j" else "",
            )
            for one in result["comparisons"]
        ]
        for one in result["cells"]:
            blocks = one["blocks"]
            if {"prefill_s", "decode_s"} <= blocks.keys():
                sides = [
                    [
                        p + d
                        for p, d in zip(blocks["prefill_s"][s], blocks["decode_s"][s], strict=True)
                    ]
                    for s in SIDES[:2]
                ]
                if len(sides[0]) < 2 or len(sides[1]) < 2:
                    continue
                cell = {name: one[name] for name in Cell.model_fields}
                both = compare(
                    *sides,
                    quantity=Quantity.TIME,
                    noise_floor=self._work.noise_floor,
                    incomplete="" if one["ended"] else "it was not measured to its end.",
                )
                axes.append(axis("Response", "response_s", asdict(both), cell=cell))
        return axes

    def _expectations(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = []
        a, b = (self._desk.load(one) for one in (self._work.baseline, self._work.variant))
        for one in result["comparisons"]:
            target = one["metric"].removesuffix("_s")
            if target not in ("prefill", "decode") or one["ratio"] is None:
                continue
            told = expected(
                a,
                b,
                Cell.model_validate(one["cell"]),
                target,
                a_s=one["a_median"],
                b_s=one["b_median"],
                ratio=one["ratio"],
            )
            found.append({**asdict(told), "cell": told.cell.model_dump()})
        return found

    def _break_even(self) -> dict[str, Any] | None:
        """Return after how many new tokens the passes' time is earned back, at batch 1."""
        decode = next(
            (
                one
                for one in self._axes
                if one["metric"] == "decode_s"
                and one["cell"]["batch"] == 1
                and one["verdict"] != "incomplete"
            ),
            None,
        )
        if decode is None:
            return None
        one_time_s = self._known["sides"][1]["passes_s"] - self._known["sides"][0]["passes_s"]
        steps = decode["cell"]["new_tokens"] - 1
        saving_s = (decode["a"] - decode["b"]) / steps
        return {
            "one_time_s": one_time_s,
            "saving_s_per_token": saving_s,
            "tokens": one_time_s / saving_s if saving_s > 0 and decode["good"] else None,
        }

    def measure_quality(self, text: EvaluationText, begin: float, end: float) -> None:
        """Measure perplexity and divergence on the text, and the greedy texts of both."""
        work = self._work
        least = min(one.spec_after.context for one in work.variants_used())
        evaluate = Evaluate(
            variant=work.baseline,
            against=work.variant,
            text=work.text,
            windowing=Windowing(window=min(WINDOW, least)),
            prompts=4,
        )

        def show(result: Mapping[str, Any]) -> None:
            self._known["quality"] = quality_of(result)
            self._tell()

        part = Part(self._desk, "quality", begin, end, show)
        try:
            show(evaluate.perform(part))
        except Cancelled:
            raise
        except InvalidInput as error:
            self._apart(evaluate, part, error)
        except GptcoreError as error:
            self.problems.append(f"Quality could not be measured: {error}")

    def _apart(self, evaluate: Evaluate, part: Part, why: InvalidInput) -> None:
        """Measure each side alone, where they do not predict the same tokens."""
        alone = []
        for variant in (self._work.baseline, self._work.variant):
            one = evaluate.model_copy(update={"variant": variant, "against": None})
            alone.append(one.perform(part))
        a, b = alone
        self._known["quality"] = {
            "note": str(why),
            "bits_per_byte": [a["bits_per_byte"], b["bits_per_byte"]],
            "scored_tokens": b["scored_tokens"],
            "text": self._work.text,
        }
        self._tell()

    def map_damage(self, text: EvaluationText, begin: float, end: float) -> None:
        """Compare streams and weights layer by layer, token by token."""
        from gptcore.explain.difference import difference, trace

        work, part = self._work, Part(self._desk, "damage map", begin, end, lambda found: None)
        part.phase("streams", 0.0)
        a = self._desk.load(work.baseline).engine
        ids = a.tokenizer.encode(text.content[: 16 * DAMAGE_TOKENS])[:DAMAGE_TOKENS]
        ids = ids[: min(one.spec_after.context for one in work.variants_used())]
        before, texts = trace(a.model, ids, check=self._desk.check), a.tokenizer.token_text
        tokens = [texts(one) for one in ids]
        del a
        b = self._desk.load(work.variant).engine.model
        found: dict[str, Any] = {"tokens": tokens, "stream": [], "note": ""}
        try:
            apart = difference(before, b, ids, check=self._desk.check)
        except InvalidInput as error:
            self._known["damage"] = found | {"note": str(error)}
            return
        found["stream"] = of_stream(iter(apart.layers))
        found["kl_nats"] = [float(one) for one in apart.kl_nats]
        found["first_divergence"] = apart.first_divergence
        if not apart.layers:
            found["note"] = "The two have not the same number of layers, so none answers another."
        part.phase("weights", 0.5)
        if self._desk.holds(work.baseline):
            a_model = self._desk.load(work.baseline).engine.model
            found |= of_weights(a_model, b, self._desk.check)
        else:
            found["note"] += " Weights were not compared: the sides do not fit together."
        self._known["damage"] = found
        self._tell()

    def ask_tasks(self, begin: float, end: float) -> None:
        """Ask both sides the same items."""
        part = Part(self._desk, "tasks", begin, end, lambda found: None)
        work = Tasks(variants=(self._work.baseline, self._work.variant), items=SHIPPED_NAME)
        try:
            result = work.perform(part)
        except Cancelled:
            raise
        except GptcoreError as error:
            self.problems.append(f"The tasks could not be asked: {error}")
            return
        self._known["tasks"] = {
            name: result[name] for name in ("overall", "kinds", "against") if name in result
        } | {name: one for name, one in result.items() if name in ("flips", "flips_normalised")}
        self._tell()

    def _add_axis(
        self, title: str, metric: str, one: Mapping[str, Any], *, cell: Mapping[str, Any] | None
    ) -> None:
        self._axes.append(axis(title, metric, one, cell=cell))

    def _tell(self) -> None:
        self._desk.partial(self.as_json(final=False))


def axis(
    title: str,
    metric: str,
    one: Mapping[str, Any],
    *,
    cell: Mapping[str, Any] | None,
    label: str = "",
) -> dict[str, Any]:
    """Return one axis of a proof: what it is on both sides, the ratio B ÷ A and what may be said.

    Args:
        title: for a person.
        metric: the name, which ends in the unit.
        one: a ``Comparison`` as JSON.
        cell: of the grid, None where there is none.
        label: how the number was found, where that is not measuring.
    """
    good = str(one["verdict"]) in ("faster", "less")
    return {
        "title": title,
        "metric": metric,
        "cell": dict(cell) if cell else None,
        "a": one["a_median"],
        "b": one["b_median"],
        "ratio": one["ratio"],
        "low": one["low"],
        "high": one["high"],
        "p": one["p"] if one.get("p_holm") is None else one["p_holm"],
        "verdict": str(one["verdict"]),
        "good": good,
        "coloured": one["coloured"],
        "pairs": one["pairs"],
        "reason": one["reason"],
        "label": label,
    }


def quality_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a proof keeps of an evaluation of B against A."""
    kept = (
        "log_ppl_ratio_mean",
        "log_ppl_ratio_se",
        "kl_mean",
        "kl_se",
        "kl_median",
        "kl_p99",
        "kl_p999",
        "delta_p_mean",
        "delta_p_rms",
        "same_top_ratio",
        "greedy",
        "scored_tokens",
        "identity",
        "text",
    )
    mean, error = result["log_ppl_ratio_mean"], result["log_ppl_ratio_se"]
    return {
        **{name: result[name] for name in kept if name in result},
        "perplexity": [result["perplexity"], result["against"]["perplexity"]],
        "bits_per_byte": [result["bits_per_byte"], result["against"]["bits_per_byte"]],
        "perplexity_ratio": math.exp(mean),
        "perplexity_ratio_low": None if error is None else math.exp(mean - 1.96 * error),
        "perplexity_ratio_high": None if error is None else math.exp(mean + 1.96 * error),
    }


def void(source_precision: str, bits: float | None) -> str | None:
    """Return why the comparison proves little, where the weights were as coarse before.

    Args:
        source_precision: such as ``Q4_1 (GGUF)`` or ``fp32``.
        bits: effective bits of the coarsest pass, None where nothing was packed.
    """
    found = BITS.search(source_precision)
    if found is None or bits is None or source_precision.startswith(("fp", "bf")):
        return None
    source = int(found[0])
    if not source - 0.5 <= bits <= source + SAME_BITS:
        return None
    return (
        f"Void for quality: the weights come as {source_precision}, so they had {source} bits "
        f"before the recipe left {bits:.1f}. What little that changes says nothing about weights "
        "that were never quantized."
    )


def goals_met(goals: Goals, card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with what was measured and whether it is met; None where not yet known."""
    measured: dict[str, Callable[[], float | None]] = {
        "kl_at_most": lambda: _quality(card, "kl_mean"),
        "perplexity_at_most": lambda: _quality(card, "perplexity_ratio"),
        "decode_speedup_at_least": lambda: _speedup(card, "decode_s"),
        "prefill_speedup_at_least": lambda: _speedup(card, "prefill_s"),
        "response_at_most": lambda: _ratio(card, "response_s"),
        "stored_at_most": lambda: _ratio(card, "stored_bytes"),
    }
    found = []
    for name, limit in goals.model_dump().items():
        if limit is None:
            continue
        value = measured[name]()
        least = name.endswith("at_least")
        met = None if value is None else (value >= limit if least else value <= limit)
        found.append(
            {
                "goal": name,
                "title": Goals.model_fields[name].title,
                "limit": limit,
                "measured": value,
                "met": met,
            }
        )
    return found


def _quality(card: Mapping[str, Any], name: str) -> float | None:
    found: float | None = card.get("quality", {}).get(name)
    return found


def _ratio(card: Mapping[str, Any], metric: str) -> float | None:
    """Return B ÷ A of the first cell in which a metric was measured to its end."""
    return next(
        (
            one["ratio"]
            for one in card["axes"]
            if one["metric"] == metric and one["verdict"] != "incomplete"
        ),
        None,
    )


def _speedup(card: Mapping[str, Any], metric: str) -> float | None:
    ratio = _ratio(card, metric)
    return 1 / ratio if ratio else None
