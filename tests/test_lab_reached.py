"""Every run under the roofs: each is looked at once, whenever it ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from gptcore import lab as lab_module
from gptcore.lab import Lab
from gptcore.measure.bench import Bench
from gptcore.measure.peaks import PeakFlops
from gptcore.measure.timing import Cell
from gptcore.records import Run, RunState, now
from tests.measure.desk import FakeDesk, variant

WORK = Bench(
    variant=variant(0),
    cells=(Cell(prompt_tokens=8, new_tokens=4),),
    repetitions=2,
    seconds=0,
    loads=1,
)


@pytest.fixture
def lab(data_folder: Path) -> Iterator[Lab]:
    with Lab.open(monitor=False) as lab:
        yield lab


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the runs that were looked at."""
    ids: list[str] = []

    def counted(run: Run, *others: Any) -> Any:
        ids.append(run.id)
        return real(run, *others)

    real = lab_module.reached
    monkeypatch.setattr(lab_module, "reached", counted)
    return ids


def bench(id: str, **changes: Any) -> Run:
    run = Run(
        id=id,
        kind=WORK.kind,
        state=RunState.DONE,
        created_at=now(),
        model="tiny-0",
        precision="fp32",
        device="cpu",
        settings=WORK.model_dump(mode="json"),
        result=dict(WORK.perform(FakeDesk())),
    )
    return replace(run, **changes)


def ids(lab: Lab) -> list[str]:
    return sorted({one.run_id for one in lab.reached()[0]})


def test_all_runs_are_there_and_each_is_looked_at_once(lab: Lab, looked: list[str]) -> None:
    wanted = [f"{number:012x}" for number in range(700)]
    run = bench(wanted[0])
    for number, id in enumerate(wanted):
        lab._store.add_run(replace(run, id=id, created_at=now() - timedelta(days=number)))
    assert ids(lab) == wanted
    assert len(looked) == 700
    assert ids(lab) == wanted
    assert len(looked) == 700


def test_a_run_that_ends_after_the_look_is_there_with_the_next(lab: Lab, looked: list[str]) -> None:
    long = bench("a" * 12, state=RunState.RUNNING, created_at=now() - timedelta(hours=5))
    lab._store.add_run(long)
    assert lab.reached() == ((), 0)
    lab._store.finish_run(replace(long, state=RunState.DONE), ())
    lab._store.add_run(bench("b" * 12))
    assert ids(lab) == ["a" * 12, "b" * 12]
    assert sorted(looked) == ["a" * 12, "b" * 12]


def test_peaks_that_were_measured_again_are_what_all_runs_are_held_against(
    lab: Lab, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab._store.add_run(bench("a" * 12))
    assert ids(lab) == ["a" * 12]
    peak = PeakFlops(1e9, "fp32", "cpu", "a processor", 1, None, "2026-01-01", 5)
    monkeypatch.setattr(lab_module, "known_flops", lambda: (peak,))
    assert ids(lab) == ["a" * 12]
    assert looked == ["a" * 12] * 2
