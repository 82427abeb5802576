"""A slowdown against a baseline: found where there is one, and nowhere else."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from gptcore.errors import Cancelled, InvalidInput
from gptcore.host import regress as module
from gptcore.host.regress import Regress, cells_of, has_program, regression
from gptcore.measure import compare
from gptcore.measure.timing import Cell, Times
from gptcore.paths import ROOT
from gptcore.provenance import provenance
from gptcore.records import Numbers, Run, RunKind, RunState, now
from tests.measure.desk import FakeDesk, variant

CELL = Cell(prompt_tokens=8, new_tokens=4)
QUICK = {"stop": {"min_pairs": 6, "max_pairs": 6}, "block_s": 0.0}
TEN = {"min_pairs": 10, "max_pairs": 10}
A, B = variant(0), variant(1)
HERE = replace(provenance(A.weights_id, 1), git_commit="0123456789ab")


@pytest.fixture(autouse=True)
def own_cache(data_folder: Path) -> None:
    """Nothing of other tests."""


def run_of(kind: RunKind = RunKind.BENCH, **fields: Any) -> Run:
    settings = {"cells": [CELL.model_dump()]} if kind is RunKind.BENCH else {}
    return Run(
        **{
            "id": "b0",
            "kind": kind,
            "state": RunState.DONE,
            "created_at": now(),
            "settings": settings,
            **fields,
        }
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine that drifts by 20 % and whose times spread by 6 %."""
    state: dict[str, Any] = {"step": 0, "random": np.random.default_rng(0)}

    def timed(model: Any, cell: Cell, **kwargs: Any) -> Times:
        state["step"] += 1
        drift = 1 + 0.2 * np.sin(state["step"] / 25)
        noise = np.exp(state["random"].normal(0, 0.06, 2))
        times = 0.01 * drift * (1 + kwargs["delay_ratio"]) * noise
        return Times(float(times[0]), float(times[1]))

    monkeypatch.setattr(compare, "once", timed)
    return state


def found(seed: int, **fields: Any) -> dict[str, Any]:
    work = Regress(variants=(A, A), cells=(CELL,), block_s=0.0, seed=seed, baseline="b0", **fields)
    return dict(work.perform(FakeDesk()))


@pytest.mark.slow
def test_a_slowdown_of_10_percent_is_found_and_none_is_made_up(machine: dict[str, Any]) -> None:
    """Half of the hundred that is promised, for the time; the bounds are halved with it."""
    assert sum(found(seed)["regressed"] for seed in range(50)) <= 5
    assert sum(found(seed, delay_ratio=0.1)["regressed"] for seed in range(50)) >= 45


def test_what_became_slower_is_named_and_what_is_tolerated_is_not(machine: dict[str, Any]) -> None:
    slow = found(0, delay_ratio=0.3)
    assert {one["metric"] for one in slow["slower"]} == {"prefill_s", "decode_s"}
    assert slow["regressed"]
    assert "program of today" in slow["programs"]
    assert not found(0, delay_ratio=0.3, tolerated=0.5)["regressed"]
    assert not found(0, delay_ratio=0.3, noise_floor=2.0)["regressed"]


def test_the_baselines_cells_are_measured_again() -> None:
    work = regression(run_of(), A, HERE, B, HERE, **QUICK)
    assert work.cells == (CELL,)
    assert work.variants == (A, B)
    assert work.program is None
    other = Cell(prompt_tokens=3, new_tokens=2)
    assert regression(run_of(), A, HERE, B, HERE, cells=(other,)).cells == (other,)


def test_a_generation_is_a_baseline_of_its_size_and_a_look_is_none() -> None:
    numbers = Numbers(12, 7, "length", 0, 0, 0.1, 0.1, 1, 1, 1, None, None)
    (cell,) = cells_of(run_of(RunKind.GENERATE, numbers=numbers))
    assert (cell.prompt_tokens, cell.new_tokens, cell.batch) == (12, 7, 1)
    with pytest.raises(InvalidInput, match="of the kind explain and measured no speed"):
        cells_of(run_of(RunKind.EXPLAIN))


@pytest.mark.parametrize("name", ["cpu", "torch", "power", "platform"])
def test_another_machine_needs_a_yes_that_names_it(name: str) -> None:
    made = replace(HERE, **{name: "another"})
    with pytest.raises(InvalidInput, match=rf"{name} was another.*Accept {name} by name"):
        regression(run_of(), A, made, B, HERE)
    assert regression(run_of(), A, made, B, HERE, accepted=(name,)).accepted == (name,)


def test_an_unknown_machine_needs_a_yes_for_each_condition() -> None:
    with pytest.raises(InvalidInput, match="cpu was unknown"):
        regression(run_of(), A, None, B, HERE)


def test_other_threads_need_a_yes_too() -> None:
    placement = B.placement.model_copy(update={"threads": 2})
    many = B.model_copy(update={"placement": placement})
    with pytest.raises(ValidationError, match=r"differ in threads \(1 and 2\)"):
        regression(run_of(), A, HERE, many, HERE)
    assert regression(run_of(), A, HERE, many, HERE, accepted=("threads",))


@pytest.mark.parametrize("commit", ["0123456789ab+", "ffffffffffff", None])
def test_a_program_that_git_cannot_give_back_needs_a_yes(commit: str | None) -> None:
    made, here = replace(HERE, git_commit=commit), replace(HERE, git_commit="abcabcabcabc")
    with pytest.raises(InvalidInput, match="git cannot give back"):
        regression(run_of(), A, made, B, here)
    assert regression(run_of(), A, made, B, here, accepted=("git_commit",)).program is None


@pytest.fixture
def old_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository whose one commit holds this program, but many times as slow."""
    source = tmp_path / "checkout"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "gptcore", "data/texts"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    timing = source / "gptcore/measure/timing.py"
    slowed = timing.read_text().replace("began) * ratio", "began) * (ratio + 20)")
    assert slowed != timing.read_text()
    timing.write_text(slowed)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "old")):
        subprocess.run(["git", *command], cwd=source, check=True)
    monkeypatch.setattr(module, "ROOT", source)
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=source, capture_output=True, check=True
    )
    return head.stdout.decode().strip()


@pytest.mark.slow
def test_the_program_of_the_baselines_commit_measures_its_side(
    old_program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_program(old_program)
    made, here = replace(HERE, git_commit=old_program), replace(HERE, git_commit="today")
    cell = Cell(prompt_tokens=32, new_tokens=16)
    work = regression(run_of(), A, made, A, here, cells=(cell,), stop=TEN, block_s=0.0)
    assert work.program == old_program
    monkeypatch.setattr(module._Programs, "load", _today_from_here(module._Programs.load))
    result = work.perform(FakeDesk())
    (decode,) = (one for one in result["comparisons"] if one["metric"] == "decode_s")
    assert decode["verdict"] == "faster"
    assert decode["ratio"] < 0.5
    assert not result["regressed"]
    assert old_program in result["programs"]
    assert result["noise_floor"] is None
    assert [one["problem"] for one in result["sides"]] == [None, None]
    assert result["sides"][0]["resident_bytes"] == result["sides"][1]["resident_bytes"]


def _today_from_here(load: Any) -> Any:
    """Let the side of today run from this checkout, though git's is another."""

    def loaded(self: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            unpacked = module.unpacked

            def then_here(commit: str, folder: Path) -> Path:
                tree = unpacked(commit, folder)
                patch.setattr(module, "ROOT", ROOT)
                return tree

            patch.setattr(module, "unpacked", then_here)
            load(self)

    return loaded


@pytest.mark.slow
def test_a_program_that_dies_is_told_and_a_cancellation_ends_both(
    old_program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = variant(0).model_copy(update={"weights_id": "sha256:gone", "model": "gone"})
    work = Regress(variants=(broken, A), cells=(CELL,), baseline="b0", program=old_program, **QUICK)
    result = work.perform(FakeDesk())
    assert "gone" in result["sides"][0]["problem"]
    assert not result["complete"]
    assert not result["regressed"]
    with pytest.raises(Cancelled):
        work.model_copy(update={"variants": (A, A)}).perform(FakeDesk(checks=0))
