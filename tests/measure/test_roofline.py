"""Every run under the roofs that were measured: shares that agree, and errors of ours flagged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcore.measure.bench import Bench
from gptcore.measure.compare import Compare
from gptcore.measure.peaks import PeakFlops, known_flops
from gptcore.measure.roofline import Reached, reached
from gptcore.measure.timing import Cell
from gptcore.records import Numbers, Run, RunKind, RunState, now
from gptcore.work import Work
from tests.measure.desk import FakeDesk, variant

CELL = Cell(prompt_tokens=8, new_tokens=4)
A, B = variant(0), variant(1)


@pytest.fixture(autouse=True)
def own_cache(data_folder: Path) -> None:
    """Nothing of other tests."""


def run_of(kind: RunKind, **fields: Any) -> Run:
    values = {"id": "r0", "kind": kind, "state": RunState.DONE, "created_at": now()}
    return Run(**{**values, "model": "tiny-0", "precision": "fp32", "device": "cpu", **fields})


def done(work: Work) -> Run:
    return run_of(work.kind, settings=work.model_dump(), result=work.perform(FakeDesk()))


def test_a_bench_stands_where_its_shares_say() -> None:
    run = done(Bench(variant=A, cells=(CELL,), repetitions=2, seconds=0, loads=1))
    found = reached(run, None)
    assert [one.what for one in found] == ["prefill", "decode"]
    for one in found:
        held = run.result["cells"][0][one.what]
        assert one.mbu_ratio == pytest.approx(held["mbu_ratio"])
        assert one.mfu_ratio == pytest.approx(held["mfu_ratio"])
        assert one.flop_per_s == pytest.approx(one.intensity * one.bytes_per_s)
        assert one.cell == "8 in, 4 out, batch 1"
    prefill, decode = found
    assert prefill.intensity > 2 * decode.intensity  # it uses each weight for eight tokens


def test_a_comparison_gives_a_point_a_side_and_stretch() -> None:
    stop = {"min_pairs": 6, "max_pairs": 6}
    run = done(Compare(variants=(A, B), cells=(CELL,), stop=stop, block_s=0.0))
    found = reached(run, None)
    assert [(one.model, one.what) for one in found] == [
        ("tiny-0", "prefill"),
        ("tiny-0", "decode"),
        ("tiny-1", "prefill"),
        ("tiny-1", "decode"),
    ]
    best = min(run.result["cells"][0]["blocks"]["decode_s"]["A"])
    assert found[1].seconds == best
    assert {one.peak_flop_per_s for one in found} == {known_flops()[0].flop_per_s}


def test_a_generation_uses_its_own_bytes_and_this_machines_operations() -> None:
    numbers = Numbers(10, 5, "length", 0, 0, 0.1, 0.01, 1, 1, 1, None, 0.5, 1000, 200_000.0)
    peak = PeakFlops(1e9, "fp32", "cpu", "x", 1, None, "2026-01-01", 5)
    other = replace(peak, threads=7, flop_per_s=9e9)
    (one,) = reached(run_of(RunKind.GENERATE, numbers=numbers), A, (other, peak))
    assert one.mbu_ratio == pytest.approx(0.5)
    assert one.peak_flop_per_s == 1e9
    assert one.flop > 2 * A.spec.matmul_parameters
    assert reached(run_of(RunKind.GENERATE, numbers=numbers), None) == ()
    silent = replace(numbers, mbu_bytes_per_step=None)
    assert reached(run_of(RunKind.GENERATE, numbers=silent), A) == ()


def example(**fields: Any) -> Reached:
    values = {
        "run_id": "r7",
        "kind": "bench",
        "at": now(),
        "model": "m",
        "precision": "fp32",
        "device": "cpu",
        "what": "decode",
        "cell": "c",
        "flop": 2e9,
        "moved": 1e9,
        "seconds": 1.0,
        "peak_bytes_per_s": 2e9,
        "peak_flop_per_s": 100e9,
        "dtype": "fp32",
    }
    return Reached(**{**values, **fields})


def test_what_is_above_a_roof_is_called_an_error_of_ours() -> None:
    assert example().problem is None
    assert example(seconds=0.495).problem is None  # 101 %: within what a clock can be off
    said = example(seconds=0.4).problem
    assert said == (
        "Decode of run r7 reached 125% of the 2 GB/s that was measured on this machine: an error "
        "of ours, one of the two numbers is wrong."
    )
    assert "of the 1.5 GFLOP/s in fp32" in (example(peak_flop_per_s=1.5e9).problem or "")


def test_the_lower_roof_is_the_one_that_binds() -> None:
    assert example().bound == "bytes"
    assert example(peak_flop_per_s=3e9).bound == "operations"
    assert example(peak_flop_per_s=None).bound == "bytes"
    assert example(peak_flop_per_s=None).mfu_ratio is None


@pytest.mark.parametrize("kind", [RunKind.EVALUATE, RunKind.PULL, RunKind.BENCH, RunKind.COMPARE])
def test_a_run_without_bytes_is_no_point(kind: RunKind) -> None:
    assert reached(run_of(kind), A) == ()
    assert reached(run_of(kind, result={"cells": [{"decode": {"seconds": 1}}]}), A) == ()
