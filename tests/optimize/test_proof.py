"""The proof card on real small models, and the arithmetic behind what it says."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gptcore.catalogue import Catalogue
from gptcore.device import Placement
from gptcore.host.worker import Watcher, Worker
from gptcore.measure.timing import Cell
from gptcore.optimize.damage import BINS, histogram, of_weights, snr_db
from gptcore.optimize.estimate import Estimate, predicted
from gptcore.optimize.expect import expected
from gptcore.optimize.make import Optimize
from gptcore.optimize.pareto import Point, front
from gptcore.optimize.proof import Goals, Prove, goals_met, void
from gptcore.optimize.ready import READY
from gptcore.passes.drop_layers import DropLayers
from gptcore.passes.prune import Prune
from gptcore.passes.quantize import Int4, Int8
from gptcore.recipe import Calibration, Recipe, Variant
from gptcore.records import Run, RunState, new_id, now
from gptcore.spec import PRESETS, SMOLLM2_135M, gpt
from gptcore.work import Work
from tests.tiny import tiny_checkpoint

QUICK = {"cells": (Cell(prompt_tokens=16, new_tokens=4),), "pairs": 6}


@pytest.fixture
def catalogue(data_folder: Path) -> Catalogue:
    models = data_folder / "models"
    tiny_checkpoint(models / "tiny", context=512, scale=0.1)
    return Catalogue(models)


def performed(catalogue: Catalogue, work: Work, watcher: Watcher | None = None) -> Run:
    run = Run(id=new_id(), kind=work.kind, state=RunState.RUNNING, created_at=now())
    return Worker("cpu", catalogue).perform(run, work, watcher or Watcher())


def pair(catalogue: Catalogue, *passes: Any) -> tuple[Variant, Variant]:
    text = Calibration(sequences=8, tokens=128)
    return (
        catalogue.variant("tiny", threads=1),
        catalogue.variant("tiny", threads=1, recipe=Recipe(passes=passes, calibration=text)),
    )


def test_a_card_has_every_axis_of_both_sides(catalogue: Catalogue) -> None:
    a, b = pair(catalogue, Int8())
    told: list[dict[str, Any]] = []
    watcher = Watcher(on_partial=lambda found: told.append(dict(found)))
    run = performed(catalogue, Prove(baseline=a, variant=b, tasks=False, **QUICK), watcher)
    assert run.state is RunState.DONE, run.error
    card = run.result
    assert card is not None
    assert card["complete"]
    metrics = {one["metric"] for one in card["axes"]}
    assert {"stored_bytes", "resident_bytes", "step_bytes", "kv_bytes_per_token"} <= metrics
    assert {"prefill_s", "decode_s", "response_s"} <= metrics
    for one in card["axes"]:
        assert one["ratio"] == pytest.approx(one["b"] / one["a"], rel=0.6)
        assert one["low"] <= one["ratio"] <= one["high"]
    size = next(one for one in card["axes"] if one["metric"] == "stored_bytes")
    assert size["verdict"] == "less"
    assert size["low"] == size["high"] == size["ratio"] < 0.5
    assert card["coverage"]["int8"]["ratio"] == 1
    assert 0 < card["quality"]["kl_mean"] < 0.05
    assert card["damage"]["layers"][0]["snr_db"] > 30
    assert len(card["damage"]["stream"]) == 3
    assert {one["target"] for one in card["expectations"]} == {"prefill", "decode"}
    assert all(one["rule"].endswith(".") for one in card["expectations"])
    assert not told[0]["complete"], "what is known so far is shown and called incomplete"
    assert len(told) > 3


def test_a_variant_that_is_the_same_has_no_divergence_at_all(catalogue: Catalogue) -> None:
    """Pruning nothing changes no number, so every distance is exactly zero."""
    a, b = pair(catalogue, Prune(sparsity=0.0))
    run = performed(catalogue, Prove(baseline=a, variant=b, tasks=False, **QUICK))
    card = run.result
    assert card is not None, run.error
    assert card["quality"]["kl_mean"] == 0
    assert card["quality"]["perplexity_ratio"] == 1
    assert card["damage"]["first_divergence"] is None
    assert all(one["snr_db"] is None for one in card["damage"]["layers"])


def test_dropped_layers_leave_no_layer_to_answer_another(catalogue: Catalogue) -> None:
    a, b = pair(catalogue, DropLayers(layers=1))
    run = performed(catalogue, Prove(baseline=a, variant=b, tasks=False, **QUICK))
    card = run.result
    assert card is not None, run.error
    assert "not the same number of layers" in card["damage"]["note"]
    assert card["damage"]["stream"] == []
    assert card["sides"][1]["parameters"] < card["sides"][0]["parameters"]


def test_goals_decide_whether_a_variant_is_accepted(catalogue: Catalogue) -> None:
    a, b = pair(catalogue, Int8())
    for limit, accepted in ((0.9, True), (0.01, False)):
        work = Prove(
            baseline=a,
            variant=b,
            tasks=False,
            damage=False,
            goals=Goals(stored_at_most=limit),
            **QUICK,
        )
        card = performed(catalogue, work).result
        assert card is not None
        assert card["accepted"] is accepted


def test_a_goal_that_could_not_be_measured_is_neither_met_nor_missed() -> None:
    goals = Goals(kl_at_most=0.1, stored_at_most=0.5)
    told = goals_met(goals, {"axes": [], "quality": {"kl_mean": 0.05}})
    assert [one["met"] for one in told] == [True, None]


def test_the_text_that_calibrated_cannot_be_the_one_to_evaluate_on(catalogue: Catalogue) -> None:
    a, b = pair(catalogue, DropLayers(layers=1))
    wanted = Calibration(text="calibration", hash="sha256:" + "0" * 64)
    other = b.model_copy(update={"recipe": b.recipe.model_copy(update={"calibration": wanted})})
    run = performed(catalogue, Prove(baseline=a, variant=other, **QUICK))
    assert run.state is RunState.FAILED
    assert "is not the one of this recipe" in str(run.error)


def test_two_devices_or_threads_are_refused() -> None:
    spec = PRESETS["gpt2"]
    a = Variant(model="gpt2", spec=spec, weights_id="random:0", placement={"threads": 1})
    b = a.model_copy(update={"placement": a.placement.model_copy(update={"threads": 2})})
    with pytest.raises(ValueError, match="give both the same"):
        Prove(baseline=a, variant=b)


@pytest.mark.parametrize(
    ("source", "bits", "is_void"),
    [
        ("Q4_1 (GGUF)", 4.5, True),
        ("Q4_1 (GGUF)", 8.1, False),
        ("Q4_1 (GGUF)", 3.4, False),
        ("Q8_0 (GGUF)", 8.0, True),
        ("fp32", 4.5, False),
        ("bf16", 16.0, False),
        ("Q4_1 (GGUF)", None, False),
    ],
)
def test_a_comparison_is_void_where_the_weights_were_as_coarse(
    source: str, bits: float | None, is_void: bool
) -> None:
    assert (void(source, bits) is not None) is is_void


def test_the_rule_names_what_bounds_a_side(catalogue: Catalogue) -> None:
    """Peaks are given: a side at a tenth of its roof is bound by starting operations."""
    a, b = pair(catalogue, Int8())
    worker = Worker("cpu", catalogue)
    one, other = worker.load(a, Watcher()), worker.load(b, Watcher())
    roofs = {id(one): 1.0, id(other): 0.25}

    def told(a_s: float, b_s: float) -> Any:
        return expected(
            one,
            other,
            Cell(),
            "decode",
            a_s=a_s,
            b_s=b_s,
            ratio=b_s / a_s,
            roof=lambda loaded, cell, target, took_s: roofs[id(loaded)],
        )

    assert told(1.1, 0.28).agrees
    assert "as the bytes and operations say" in told(1.1, 0.28).rule
    slow = told(1.2, 1.0)
    assert not slow.agrees
    assert slow.expected_ratio == 0.25
    assert "B works at 25% of what this machine allows and A at 83%" in slow.rule
    assert "use the machine better" in told(10.0, 0.3).rule
    assert "that limit is wrong" in told(0.5, 0.3).rule


def test_signal_to_noise_is_that_of_known_noise() -> None:
    assert snr_db(100.0, 1.0) == pytest.approx(20)
    assert snr_db(1.0, 0.0) is None
    weights = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    told = histogram(weights, weights.round())
    assert len(told["before"]) == len(told["after"]) == BINS
    assert sum(told["before"]) > 4990, "four standard deviations hold nearly all"
    assert sum(one > 0 for one in told["after"]) <= 9


def test_damage_of_weights_counts_the_zeros_of_pruning(catalogue: Catalogue) -> None:
    a, b = pair(catalogue, Prune(method="magnitude", sparsity=0.5))
    worker = Worker("cpu", catalogue)
    models = [worker.load(one, Watcher()).engine.model for one in (a, b)]
    found = of_weights(*models, lambda: None)
    blocks = [one for one in found["layers"] if one["layer"].startswith("blocks")]
    assert len(blocks) == 14
    for one in blocks:
        assert one["zeros_ratio"] == pytest.approx(0.5, abs=0.02)
        assert 3 < one["snr_db"] < 20


def test_a_variant_is_made_kept_and_proven_in_one_run(catalogue: Catalogue) -> None:
    a, b = pair(catalogue, Int8())
    proof = Prove(baseline=a, variant=b, tasks=False, **QUICK)
    run = performed(catalogue, Optimize(variant=b, name="small", proof=proof))
    assert run.state is RunState.DONE, run.error
    result = run.result
    assert result is not None
    assert result["coverage_ratio"] == 1
    assert result["proof"]["break_even"] is not None
    entry = catalogue.entry("small")
    assert (entry.kind, entry.problem) == ("variant", None)
    assert entry.stored_bytes == result["stored_bytes"]
    again = performed(catalogue, Optimize(variant=b, name="again"))
    assert again.result is not None
    assert again.result["weights_sha256"] == result["weights_sha256"]
    refused = performed(catalogue, Optimize(variant=b, name="small"))
    assert (refused.state, refused.result) == (RunState.FAILED, None)
    assert "There is already a model 'small'" in str(refused.error)
    replaced = performed(catalogue, Optimize(variant=b, name="small", replace=True))
    assert replaced.state is RunState.DONE


@pytest.mark.parametrize("name", ["gpt2", "../out", ".hidden", "a b"])
def test_a_name_that_cannot_be_is_refused_before_any_work(name: str, catalogue: Catalogue) -> None:
    _, b = pair(catalogue, Int8())
    run = performed(catalogue, Optimize(variant=b, name=name))
    assert run.state is RunState.FAILED
    assert "is no name for a variant" in str(run.error)


def test_a_stop_in_the_middle_of_a_pass_keeps_nothing(catalogue: Catalogue) -> None:
    _, b = pair(catalogue, Prune(sparsity=0.5))
    phases: list[str] = []
    watcher = Watcher(
        cancelled=lambda: any("applying" in one for one in phases),
        on_phase=lambda phase, progress: phases.append(phase),
    )
    run = performed(catalogue, Optimize(variant=b, name="never"), watcher)
    assert run.state is RunState.CANCELLED
    assert [one.name for one in catalogue.folder.iterdir()] == ["tiny"]


def test_an_empty_recipe_is_refused(catalogue: Catalogue) -> None:
    a, _ = pair(catalogue, Int8())
    with pytest.raises(ValueError, match="the recipe is empty"):
        Optimize(variant=a)


def test_bytes_and_shape_are_predicted(catalogue: Catalogue) -> None:
    a, b = pair(catalogue, DropLayers(layers=1), Int8())
    loaded = Worker("cpu", catalogue).load(b, Watcher())
    exact = b.spec_after.weights_bytes("fp32")
    assert predicted(b).weights_bytes_after < 0.6 * exact
    assert predicted(b).parameters_after == loaded.engine.model.spec.parameters
    assert predicted(a).weights_bytes_after == predicted(a).weights_bytes


def test_an_estimate_tries_every_pass_and_adds_up(catalogue: Catalogue) -> None:
    _, b = pair(catalogue, DropLayers(layers=1), Int8())
    run = performed(catalogue, Estimate(variant=b))
    assert run.result is not None, run.error
    found = run.result["passes_s"]
    assert set(found) == {"drop_layers", "int8"}
    assert run.result["seconds"] == pytest.approx(sum(found.values()))
    assert run.result["peak_bytes"] is not None


def test_an_estimate_of_memory_grows_with_the_blocks_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a fifth of what the whole model took, whose weights are far above the noise."""
    spec = gpt(12, 512, 8, context=128, vocabulary=512)
    catalogue = Catalogue(tmp_path)
    variant = Variant(
        model="gpt2",
        spec=spec,
        weights_id="random:0",
        placement=Placement(precision="bf16"),
        recipe=Recipe(passes=(Int4(),)),
    )
    tried = performed(catalogue, Estimate(variant=variant)).result
    assert tried is not None
    before = psutil.Process().memory_info().rss
    loaded = Worker("cpu", catalogue).load(variant, Watcher())
    assert loaded.passes_peak_bytes is not None
    taken = loaded.passes_peak_bytes - before
    assert taken > 0.8 * spec.weights_bytes("bf16")
    assert tried["peak_bytes"] == pytest.approx(taken, rel=0.2)


def test_the_front_is_exact() -> None:
    """Against every pair compared by hand, for a hundred drawn sets with many equal values."""
    draw = random.Random(0)
    for _ in range(100):
        points = [
            Point(
                str(n),
                "m",
                "r",
                "b",
                draw.randint(1, 4),
                draw.randint(1, 4),
                draw.randint(1, 4),
                None,
            )
            for n in range(12)
        ]
        beaten = {
            one.run_id
            for one, other in itertools.permutations(points, 2)
            if other.speedup >= one.speedup
            and other.kl_nats <= one.kl_nats
            and other.size_ratio <= one.size_ratio
            and (other.speedup, other.kl_nats, other.size_ratio)
            != (one.speedup, one.kl_nats, one.size_ratio)
        }
        assert front(points) == {one.run_id for one in points} - beaten
        assert front(points)


def test_every_ready_recipe_can_run_on_smollm2_here() -> None:
    for one in READY:
        variant = Variant(
            model="smollm2-135m",
            spec=SMOLLM2_135M,
            weights_id="random:0",
            placement={"precision": one.precision},
            recipe=one.recipe,
        )
        assert variant.blocked_by is None, one.name
    assert any(one.goals != Goals() for one in READY)
