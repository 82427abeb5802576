"""The search over recipes, on a tiny model: studies that go on, limits, and what is called best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from gptcore.catalogue import Catalogue
from gptcore.host.worker import Watcher, Worker
from gptcore.optimize.bits import BitScan, weighed
from gptcore.optimize.spaces import space
from gptcore.optimize.tune import Knob, Limits, Tune, storage_file
from gptcore.passes.mixed_bits import MixedBits
from gptcore.passes.sensitivity import Damage
from gptcore.recipe import Recipe
from gptcore.records import Run, RunState, new_id, now
from tests.tiny import tiny_checkpoint

SPARSITY = Knob(technique="prune", field="sparsity", low=0.1, high=0.9)
METHOD = Knob(technique="prune", field="method", choices=("magnitude",))


SCAN = BitScan(effective_bits=5.0, group=32)
"""As many bits as 4 in groups of 32 take: the tiny model's columns come in 32."""


@pytest.fixture
def catalogue(data_folder: Path) -> Catalogue:
    tiny_checkpoint(data_folder / "models" / "tiny", scale=0.1)
    return Catalogue(data_folder / "models")


def work(catalogue: Catalogue, **changes: Any) -> Tune:
    base = catalogue.variant("tiny", threads=1)
    given: dict[str, Any] = {
        "baseline": base,
        "variant": base,
        "knobs": (METHOD, SPARSITY),
        "trials": 6,
        "tokens": 256,
        **changes,
    }
    return Tune(**given)


def performed(catalogue: Catalogue, tune: Tune, watcher: Watcher | None = None) -> Run:
    run = Run(id=new_id(), kind=tune.kind, state=RunState.RUNNING, created_at=now())
    return Worker("cpu", catalogue).perform(run, tune, watcher or Watcher())


def found(run: Run) -> dict[str, Any]:
    assert run.state is RunState.DONE, run.error
    assert run.result is not None
    return dict(run.result)


def test_a_search_finds_that_pruning_less_hurts_less(catalogue: Catalogue) -> None:
    told = found(performed(catalogue, work(catalogue, objectives=("kl",), trials=8)))
    trials = told["trials"]
    assert len(trials) == 8
    by_sparsity = sorted(trials, key=lambda one: one["settings"]["prune.sparsity"])
    assert told["winner"]["number"] == by_sparsity[0]["number"]
    assert told["winner"]["values"]["kl"] == min(one["values"]["kl"] for one in trials)
    assert Recipe.model_validate(told["winner"]["recipe"]).passes[0].name == "prune"


def test_the_front_holds_what_no_trial_beats(catalogue: Catalogue) -> None:
    """Compared by hand: sparser is smaller and worse, so most trials are on it."""
    told = found(performed(catalogue, work(catalogue)))
    values = {
        one["number"]: (one["values"]["kl"], one["values"]["stored_bytes"])
        for one in told["trials"]
    }
    beaten = {
        one
        for one, mine in values.items()
        for other in values.values()
        if other != mine and other[0] <= mine[0] and other[1] <= mine[1]
    }
    assert set(told["front"]) == set(values) - beaten
    assert len(told["front"]) > 1


def test_a_study_goes_on_where_it_ended_and_other_programs_open_it(catalogue: Catalogue) -> None:
    first = found(performed(catalogue, work(catalogue, study="mine", trials=3)))
    again = found(performed(catalogue, work(catalogue, study="mine", trials=5)))
    assert [one["number"] for one in again["trials"]] == [0, 1, 2, 3, 4]
    assert again["trials"][:3] == first["trials"]
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{storage_file()}")
    assert len(study.trials) == 5


def test_what_was_stopped_keeps_its_trials_and_loses_one_at_most(catalogue: Catalogue) -> None:
    phases: list[str] = []
    watcher = Watcher(
        cancelled=lambda: any(one.startswith("trial 3") for one in phases),
        on_phase=lambda phase, progress: phases.append(phase),
    )
    run = performed(catalogue, work(catalogue, study="mine"), watcher)
    assert run.state is RunState.CANCELLED
    assert run.result is not None
    assert len(run.result["trials"]) == 2
    told = found(performed(catalogue, work(catalogue, study="mine")))
    assert len(told["trials"]) == 6
    assert len({one["number"] for one in told["trials"]}) == 6


def test_a_trial_beyond_a_limit_is_never_best(catalogue: Catalogue) -> None:
    """The smallest file would win, were it not too far from the baseline."""
    free = found(performed(catalogue, work(catalogue, objectives=("stored_bytes",), study="a")))
    limit = sorted(one["values"]["kl"] for one in free["trials"])[1]
    limits = Limits(kl_at_most=limit)
    told = found(
        performed(
            catalogue, work(catalogue, objectives=("stored_bytes",), study="b", limits=limits)
        )
    )
    assert free["winner"]["values"]["kl"] > limit
    winner = told["winner"]
    assert winner is None or winner["values"]["kl"] <= limit
    for one in told["trials"]:
        assert one["within_limits"] == (one["values"]["kl"] <= limit)


def test_speed_is_measured_again_in_turn_before_one_is_best(catalogue: Catalogue) -> None:
    told = found(performed(catalogue, work(catalogue, objectives=("tokens_per_s",), trials=2)))
    confirmed = told["confirmed"]
    assert list(confirmed["trials"]) == ["B"]
    assert confirmed["comparisons"][0]["pairs"] == 8


def test_settings_that_cannot_run_are_told_and_passed_over(catalogue: Catalogue) -> None:
    knob = Knob(technique="drop_layers", field="layers", choices=(0, 7))
    told = found(performed(catalogue, work(catalogue, knobs=(knob,), trials=6)))
    problems = [one for one in told["trials"] if one["problem"]]
    assert problems
    assert all("cannot go" in one["problem"] for one in problems)
    assert told["winner"]["settings"] == {"drop_layers.layers": 0}


def test_a_study_of_other_objectives_is_refused(catalogue: Catalogue) -> None:
    found(performed(catalogue, work(catalogue, study="mine", trials=1)))
    run = performed(catalogue, work(catalogue, study="mine", objectives=("kl",)))
    assert run.state is RunState.FAILED
    assert "has other objectives" in str(run.error)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"technique": "magic"}, "no pass 'magic'"),
        ({"technique": "int4", "field": "bits"}, "no field 'bits'"),
        ({"technique": "int4", "field": "group"}, "neither choices nor a range"),
        ({"technique": "prune", "field": "sparsity", "low": 0.9, "high": 0.1}, "is empty"),
        ({"technique": "int4", "layers": "*.down", "choices": (4,)}, "bits of their own"),
    ],
)
def test_a_knob_that_turns_nothing_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Knob(**wrong)


def bits(catalogue: Catalogue, **changes: Any) -> Tune:
    """Return a search of the bits of each layer."""
    searched = space("bits", catalogue.variant("tiny", threads=1).spec)
    given = {"knobs": searched.knobs, "start": searched.start, "scan": SCAN, "trials": 4}
    trials = catalogue.variant("tiny", precision="bf16", threads=1)
    return work(catalogue, variant=trials, objectives=("kl",), study="bits", **given | changes)


def dealt(trial: dict[str, Any]) -> MixedBits:
    (one,) = Recipe.model_validate(trial["recipe"]).passes
    assert isinstance(one, MixedBits)
    return one


def test_a_search_of_bits_begins_with_the_scan_and_keeps_to_its_bytes(
    catalogue: Catalogue,
) -> None:
    """Weights of a few doublings change the order of the layers, so trials differ."""
    told = found(performed(catalogue, bits(catalogue)))
    uniform, trials = told["uniform"], told["trials"]
    assert dealt(uniform) == MixedBits(bits=4, group=32)
    assert set(trials[0]["settings"].values()) == {0.0}
    recipes = {json.dumps(one["recipe"]) for one in trials}
    assert len(recipes) > 1
    for one in trials:
        assert one["problem"] is None
        assert one["values"]["stored_bytes"] <= uniform["values"]["stored_bytes"]
    assert told["winner"]["values"]["kl"] == min(one["values"]["kl"] for one in trials)


def test_a_study_of_bits_that_goes_on_is_not_scanned_again(catalogue: Catalogue) -> None:
    phases: list[str] = []
    watcher = Watcher(on_phase=lambda phase, progress: phases.append(phase))
    first = found(performed(catalogue, bits(catalogue, trials=1), watcher))
    assert "scanning the layers" in phases
    phases.clear()
    again = found(performed(catalogue, bits(catalogue, trials=2), watcher))
    assert "scanning the layers" not in phases
    assert again["trials"][0] == first["trials"][0]
    other = bits(catalogue, trials=3, scan=SCAN.model_copy(update={"tokens": 512}))
    found(performed(catalogue, other, watcher))
    assert "scanning the layers" in phases


def test_damages_are_doubled_where_a_pattern_fits() -> None:
    damages = (Damage("blocks.0.mlp.down", 3, 0.5), Damage("head", 3, 0.25))
    weights = {"*.mlp.down": 1.0, "blocks.0.*": 2.0, "head": -1.0}
    assert [one.kl for one in weighed(damages, weights)] == [4.0, 0.125]


def test_what_counts_more_gets_no_fewer_bits(catalogue: Catalogue) -> None:
    spec = catalogue.variant("tiny", threads=1).spec
    first, last = "blocks.0.mlp.gate", "blocks.1.mlp.gate"
    damages = [
        Damage(name, bits, size * 4.0 ** (3 - bits))
        for name, size in ((first, 1.0), (last, 100.0), ("blocks.0.mlp.up", 0.1))
        for bits in (3, 4, 8)
    ]
    for_one = SCAN.model_copy(update={"effective_bits": 4.5})  # three of 3 bits take 4 each
    as_scanned = for_one.deal(damages, spec, {})
    turned = for_one.deal(damages, spec, {"blocks.0.*": 12.0})
    assert as_scanned.bits_of(first) < as_scanned.bits_of(last)
    assert turned.bits_of(first) > turned.bits_of(last)


@pytest.mark.parametrize(
    ("scan", "uniform"),
    [
        (BitScan(), MixedBits(bits=4, group=64)),
        (BitScan(effective_bits=4.49), MixedBits(bits=3, group=64)),
        (BitScan(effective_bits=8.0, group=32), MixedBits(bits=8, group=32)),
        (BitScan(effective_bits=3.0), None),
    ],
)
def test_uniform_bits_are_as_many_as_they_may_take(
    scan: BitScan, uniform: MixedBits | None
) -> None:
    assert scan.uniform() == uniform


def test_layers_with_choices_beside_layers_with_weights_are_refused(catalogue: Catalogue) -> None:
    knobs = (
        Knob(technique="mixed_bits", layers="*.mlp.down", choices=(4, 8)),
        Knob(technique="mixed_bits", layers="head", low=-1.0, high=1.0),
    )
    with pytest.raises(ValueError, match="bits are dealt out to all layers or to none"):
        work(catalogue, knobs=knobs)
