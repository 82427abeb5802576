"""Comparisons: in turn, ended by the rule, honest where a side breaks, and right about a delay."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from gptcore.device import Placement
from gptcore.errors import Cancelled
from gptcore.measure import compare as module
from gptcore.measure.compare import Compare, rounds
from gptcore.measure.statistics import StopRule
from gptcore.measure.timing import Cell, Times
from tests.measure.desk import FakeDesk, variant

CELL = Cell(prompt_tokens=8, new_tokens=4)
SHORT = StopRule(half_width=None, min_pairs=6, max_pairs=6)
A, B = variant(0), variant(1)


@pytest.fixture(autouse=True)
def own_cache(data_folder: Path) -> None:
    """Nothing of other tests."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine whose times are drawn instead of measured: drift, noise, and a ratio a model."""
    state: dict[str, Any] = {"ratio": {}, "noise": 0.03, "seed": 0, "calls": []}

    def timed(model: Any, cell: Cell, **kwargs: Any) -> Times:
        kwargs["check"]()
        random = state.setdefault("random", np.random.default_rng(state["seed"]))
        step = len(state["calls"])
        state["calls"].append((id(model), cell))
        drift = 1 + 0.2 * np.sin(step / 25)
        ratio = state["ratio"].get(id(model), 1.0) * (1 + kwargs.get("delay_ratio", 0.0))
        times = 0.01 * drift * ratio * np.exp(random.normal(0, state["noise"], 2))
        return Times(float(times[0]), float(times[1]))

    monkeypatch.setattr(module, "once", timed)
    return state


def compared(result: Any, metric: str = "decode_s", side: str = "B") -> dict[str, Any]:
    (one,) = (c for c in result["comparisons"] if (c["metric"], c["side"]) == (metric, side))
    return one


def test_a_real_comparison_keeps_every_block_in_turn() -> None:
    desk = FakeDesk()
    work = Compare(variants=(A, B), cells=(CELL,), stop=SHORT, block_s=0.0)
    result = work.perform(desk)
    json.dumps(result, allow_nan=False)
    (cell,) = result["cells"]
    order = cell["order"]
    assert len(order) == 12
    for at in range(0, 12, 4):
        assert order[at : at + 4] in ("ABBA", "BAAB")
    for metric in ("prefill_s", "decode_s", "energy_j"):
        assert [len(cell["blocks"][metric][side]) for side in "AB"] == [6, 6]
    assert result["complete"]
    assert result["residency"].startswith("resident")
    assert cell["ended"] == "all 6 pairs of blocks were measured"
    assert compared(result)["verdict"] in ("faster", "slower", "no detectable difference")
    assert desk.loads == ["tiny-0", "tiny-1"]
    ratios = {one["metric"]: one["ratio"] for one in result["amounts"]}
    assert ratios == {"resident_bytes": 1.0, "step_bytes": 1.0}


def test_what_does_not_fit_together_is_loaded_in_turn_and_that_is_said() -> None:
    desk = FakeDesk(room=1)
    result = Compare(variants=(A, B), cells=(CELL,), stop=SHORT, block_s=0.0).perform(desk)
    assert result["residency"].startswith("alternated")
    assert len(desk.loads) > 6
    assert result["complete"]


def test_a_difference_is_found_with_its_size_and_direction(machine: dict[str, Any]) -> None:
    desk = FakeDesk()
    machine["ratio"][id(desk.load(B).engine.model)] = 1.1
    work = Compare(variants=(A, B), cells=(CELL,), block_s=0.0)
    found = compared(work.perform(desk))
    assert found["verdict"] == "slower"
    assert found["low"] < 1.1 < found["high"]
    machine["ratio"][id(desk.load(B).engine.model)] = 0.8
    assert compared(work.perform(desk))["verdict"] == "faster"


def test_nothing_below_the_noise_floor_is_coloured(machine: dict[str, Any]) -> None:
    desk = FakeDesk()
    machine["ratio"][id(desk.load(B).engine.model)] = 1.1
    for floor, coloured in ((1.05, True), (1.3, False)):
        work = Compare(variants=(A, B), cells=(CELL,), block_s=0.0, noise_floor=floor)
        found = compared(work.perform(desk))
        assert (found["verdict"], found["coloured"]) == ("slower", coloured)


def test_the_same_variant_twice_gives_the_noise_floor(machine: dict[str, Any]) -> None:
    result = Compare(variants=(A, A), cells=(CELL,), block_s=0.0).perform(FakeDesk())
    assert compared(result)["verdict"] == "no detectable difference"
    assert 1.0 < result["noise_floor"]["ratio"] < 1.1
    assert result["noise_floor"]["at"]
    other = Compare(variants=(A, B), cells=(CELL,), block_s=0.0).perform(FakeDesk())
    assert other["noise_floor"] is None


def test_an_injected_delay_is_no_noise(machine: dict[str, Any]) -> None:
    work = Compare(variants=(A, A), cells=(CELL,), block_s=0.0, delay_ratio=0.1)
    result = work.perform(FakeDesk())
    assert compared(result)["verdict"] == "slower"
    assert result["noise_floor"] is None


def test_a_grid_is_corrected_for_its_cells(machine: dict[str, Any]) -> None:
    cells = tuple(Cell(prompt_tokens=8, new_tokens=4, batch=b) for b in (1, 2, 3))
    desk = FakeDesk()
    machine["ratio"][id(desk.load(B).engine.model)] = 1.1
    result = Compare(variants=(A, B), cells=cells, block_s=0.0).perform(desk)
    ps = [(one["p"], one["p_holm"]) for one in result["comparisons"]]
    assert len(ps) == 3 * 2 + 3  # two times and the energy, where it is known
    assert all(holm >= p for p, holm in ps)
    assert any(holm > p for p, holm in ps)


def test_three_variants_are_each_held_against_the_first(machine: dict[str, Any]) -> None:
    desk, c = FakeDesk(), variant(2)
    machine["ratio"] = {
        id(desk.load(B).engine.model): 1.2,
        id(desk.load(c).engine.model): 0.8,
    }
    result = Compare(variants=(A, B, c), cells=(CELL,), block_s=0.0).perform(desk)
    assert compared(result, side="B")["verdict"] == "slower"
    assert compared(result, side="C")["verdict"] == "faster"
    assert compared(result, side="C")["sentence"].startswith("C is faster than A: C / A is ")
    order = result["cells"][0]["order"]
    assert all(order[at : at + 3] == order[at + 3 : at + 6][::-1] for at in range(0, 12, 6))


@pytest.mark.parametrize("broken", ["tiny-0", "tiny-1"])
def test_a_side_that_cannot_be_loaded_leaves_the_other_its_numbers(
    broken: str, machine: dict[str, Any]
) -> None:
    desk = FakeDesk(broken={broken: 0})
    result = Compare(variants=(A, B), cells=(CELL,), block_s=0.0).perform(desk)
    found = compared(result)
    assert found["verdict"] == "incomplete"
    assert f"{broken} does not fit" in found["sentence"]
    assert not result["complete"]
    left = "B" if broken == "tiny-0" else "A"
    assert len(result["cells"][0]["blocks"]["decode_s"][left]) == StopRule().min_pairs
    assert f"only {left} can be measured" in result["cells"][0]["ended"]


def test_a_side_that_breaks_in_the_middle_keeps_what_was_measured(machine: dict[str, Any]) -> None:
    desk = FakeDesk(room=1, broken={"tiny-1": 5})
    result = Compare(variants=(A, B), cells=(CELL,), block_s=0.0).perform(desk)
    blocks = result["cells"][0]["blocks"]["decode_s"]
    assert 0 < len(blocks["B"]) < len(blocks["A"])
    assert compared(result)["verdict"] == "incomplete"
    assert "B could not be measured: tiny-1 does not fit." in compared(result)["sentence"]


def test_both_sides_broken_is_an_end_and_no_error() -> None:
    desk = FakeDesk(broken={"tiny-0": 0, "tiny-1": 0})
    result = Compare(variants=(A, B), cells=(CELL,)).perform(desk)
    assert result["cells"][0]["ended"] == "no side can be measured"
    assert result["comparisons"] == []
    assert [one["problem"] for one in result["sides"]] == [
        "tiny-0 does not fit.",
        "tiny-1 does not fit.",
    ]


def test_a_cancelled_comparison_keeps_its_blocks_and_claims_nothing(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TELL_EVERY_S", 0.0)
    desk = FakeDesk(checks=30)
    machine["ratio"][id(desk.load(B).engine.model)] = 2.0
    with pytest.raises(Cancelled):
        Compare(variants=(A, B), cells=(CELL,), block_s=0.0).perform(desk)
    last = desk.partials[-1]
    found = compared(last)
    assert found["verdict"] == "incomplete"
    assert found["ratio"] == pytest.approx(2.0, rel=0.1)
    assert not last["complete"]
    assert last["cells"][0]["ended"] is None


def test_a_cell_longer_than_the_context_of_one_side_is_told(machine: dict[str, Any]) -> None:
    work = Compare(variants=(A, B), cells=(Cell(prompt_tokens=64, new_tokens=8),))
    result = work.perform(FakeDesk())
    assert "do not fit into the context" in result["sides"][0]["problem"]


def test_a_budget_of_seconds_is_shared_by_the_cells(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr(module.time, "monotonic", clock)
    cells = (CELL, Cell(prompt_tokens=9, new_tokens=4))
    stop = StopRule(half_width=None, min_pairs=6, max_pairs=1000, seconds=10)
    result = Compare(variants=(A, B), cells=cells, stop=stop, block_s=0.0).perform(FakeDesk())
    for cell in result["cells"]:
        assert cell["ended"].startswith("the budget of 5 s was used up after 20 pairs")


def test_sides_that_differ_in_threads_need_a_yes_that_names_it() -> None:
    many = B.model_copy(update={"placement": Placement(device="cpu", precision="fp32", threads=2)})
    with pytest.raises(ValidationError, match=r"differ in threads \(1 and 2\)"):
        Compare(variants=(A, many))
    assert Compare(variants=(A, many), accepted=("threads",)).accepted == ("threads",)


def test_two_devices_cannot_be_measured_in_turn() -> None:
    gpu = B.model_copy(update={"placement": Placement(device="cuda:0", precision="fp32")})
    with pytest.raises(ValidationError, match="choose one device"):
        Compare(variants=(A, gpu), accepted=("threads",))


def test_the_rounds_go_back_the_way_they_came_and_start_with_any_side() -> None:
    found = list(islice(rounds(2, seed=1), 200))
    assert all(found[at] == found[at + 1][::-1] for at in range(0, 200, 2))
    firsts = [found[at][0] for at in range(0, 200, 2)]
    assert 30 < sum(firsts) < 70
    assert found == list(islice(rounds(2, seed=1), 200))


def claims(machine: dict[str, Any], seed: int, delay: float) -> dict[str, Any]:
    machine.update(seed=seed, noise=0.06)
    machine.pop("random", None)
    work = Compare(
        variants=(A, A),
        cells=(Cell(prompt_tokens=8, new_tokens=4),),
        block_s=0.0,
        seed=seed,
        delay_ratio=delay,
    )
    return compared(work.perform(FakeDesk()))


@pytest.mark.slow
def test_the_whole_comparison_is_seldom_wrong_on_a_drifting_machine(
    machine: dict[str, Any],
) -> None:
    """The statistics alone are simulated elsewhere; here the order and the stop rule take part."""
    same = [claims(machine, seed, 0.0)["verdict"] for seed in range(40)]
    assert sum(one != "no detectable difference" for one in same) <= 4
    slowed = [claims(machine, seed, 0.1) for seed in range(40)]
    assert sum(one["verdict"] == "slower" for one in slowed) >= 36
    assert sum(one["low"] <= 1.1 <= one["high"] for one in slowed) >= 36
