"""The bench: what is timed is what it says, everything is kept, and a rate has its ceiling."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore.engine import decode, prefill
from gptcore.errors import Cancelled, ContextOverflow
from gptcore.measure import bench as module
from gptcore.measure import timing
from gptcore.measure.bench import Bench, Weighed, decode_cost, held_against, prefill_cost
from gptcore.measure.peaks import PeakBandwidth, PeakFlops
from gptcore.measure.timing import Cell, once, prompt_ids, read_all, request_s, write_next
from gptcore.model import GPT
from gptcore.spec import SMOLLM2_135M, gpt
from tests.measure.desk import TINY, FakeDesk, variant

CELLS = (Cell(prompt_tokens=8, new_tokens=4), Cell(prompt_tokens=5, new_tokens=3, batch=3))


@pytest.fixture(autouse=True)
def own_cache(data_folder: Path) -> None:
    """Peaks of other tests are not this machine's."""


@pytest.fixture(scope="module")
def model() -> GPT:
    return FakeDesk().load(variant()).engine.model


def test_every_number_keeps_its_observations_and_says_what_was_dropped() -> None:
    desk = FakeDesk()
    work = Bench(variant=variant(), cells=CELLS, repetitions=3, seconds=0.0, warmup=2, loads=2)
    result = work.perform(desk)
    json.dumps(result, allow_nan=False)
    by_name = {(one["name"], one.get("batch")): one for one in result["measurements"]}
    assert {name for name, _ in by_name} == {
        "load_s",
        "first_s",
        "prefill_s",
        "prefill_tokens_per_s",
        "decode_s",
        "decode_tokens_per_s",
        "request_s",
    }
    assert by_name["load_s", None]["n"] == 2
    for one in result["measurements"]:
        assert one["n"] == len(one["observations"])
        assert one["p05"] <= one["median"] <= one["p95"]
    for batch in (1, 3):
        assert by_name["decode_s", batch]["n"] == 3
        assert by_name["decode_s", batch]["warmup_dropped"] == 2
        rates = by_name["decode_tokens_per_s", batch]["observations"]
        seconds = by_name["decode_s", batch]["observations"]
        new = {1: 3, 3: 2}[batch] * batch
        assert rates == pytest.approx([new / one for one in seconds])
    assert len(desk.kept["pp8 tg4 b1 decode_s"]) == 3
    assert desk.loads == ["tiny-0", "tiny-0"]
    assert result["cells"][0]["peak_memory_bytes"] > 0
    assert result["cells"][0]["decode"]["energy"]["label"]


def test_it_repeats_for_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    work = Bench(variant=variant(), repetitions=2, seconds=10.0, warmup=1)
    # Two without a look at the clock, then one after each of nine looks that said 1 s to 9 s.
    assert len(work._repeat(lambda: 0)) == 2 + 9


def test_only_what_was_asked_for_is_measured() -> None:
    desk = FakeDesk()
    work = Bench(variant=variant(), cells=CELLS[:1], targets=("decode",), repetitions=1, seconds=0)
    result = work.perform(desk)
    names = {one["name"] for one in result["measurements"]}
    assert names == {"decode_s", "decode_tokens_per_s"}
    assert "prefill" not in result["cells"][0]


def test_a_cell_that_is_longer_than_the_context_is_refused_before_anything_is_loaded() -> None:
    desk = FakeDesk()
    work = Bench(variant=variant(), cells=(Cell(prompt_tokens=60, new_tokens=5),))
    with pytest.raises(ContextOverflow, match=r"60 \+ 5 tokens do not fit into the context of"):
        work.perform(desk)
    assert desk.loads == []


def test_a_cancelled_bench_keeps_the_cells_that_were_done() -> None:
    desk = FakeDesk()
    work = Bench(variant=variant(), cells=CELLS, targets=("prefill",), repetitions=2, seconds=0)
    work.perform(desk)
    counted = len(desk.phases)
    desk = FakeDesk()
    original = desk.partial

    def stop_after(result: object) -> None:
        original(result)  # type: ignore[arg-type]
        desk.checks = 0

    desk.partial = stop_after  # type: ignore[method-assign]
    with pytest.raises(Cancelled):
        work.perform(desk)
    assert len(desk.partials) == 1
    assert len(desk.partials[0]["cells"]) == 1
    assert len(desk.phases) <= counted


def test_what_is_timed_writes_the_tokens_of_a_full_forward(model: GPT) -> None:
    cell = Cell(prompt_tokens=6, new_tokens=4, batch=2)
    ids = torch.from_numpy(prompt_ids(cell, TINY, seed=3))
    with torch.inference_mode():
        cache = model.new_cache(10, 2)
        latest = read_all(model, ids, cache, lambda: None).argmax(-1)
        written = [latest]
        for _ in range(3):
            latest = write_next(model, latest, cache).argmax(-1)
            written.append(latest)
        whole = ids
        for _ in range(4):
            whole = torch.cat([whole, model(whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(torch.stack(written, 1), whole[:, 6:])


def test_one_sequence_takes_the_way_of_a_request(model: GPT) -> None:
    ids = prompt_ids(Cell(prompt_tokens=6, new_tokens=2), TINY, seed=1)[0].tolist()
    cache, own = model.new_cache(8), model.new_cache(8)
    prefill(model, ids, cache)
    with torch.inference_mode():
        read_all(model, torch.tensor([ids]), own, lambda: None)
        ours = write_next(model, torch.tensor([7]), own)[0]
    assert torch.equal(ours, decode(model, 7, cache))


def test_times_are_those_of_the_clock_and_the_first_token_is_the_prefills(model: GPT) -> None:
    ticks = iter([0.0, 1.0, 1.5])
    times = once(model, CELLS[0], clock=lambda: next(ticks))
    assert (times.prefill_s, times.decode_s) == (1.0, 0.5)
    one = once(model, Cell(prompt_tokens=4, new_tokens=1))
    assert one.decode_s == 0.0
    assert one.prefill_s > 0


def test_a_delay_really_takes_its_time(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-4
        return now[0]

    for name in ("read_all", "write_next"):
        real = getattr(timing, name)

        def slow(*args: object, real: Callable[..., object] = real) -> object:
            now[0] += 1.0
            return real(*args)

        monkeypatch.setattr(timing, name, slow)
    times = once(model, CELLS[0], delay_ratio=0.25, clock=clock)
    assert (times.prefill_s, times.decode_s) == pytest.approx((1.25, 3.75), rel=1e-2)


def test_a_request_draws_every_token_of_every_sequence(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(
        "gptcore.sampling.draw", lambda stage, at: drawn.append(at) or len(drawn) % 7
    )
    assert request_s(model, CELLS[1]) > 0
    assert len(drawn) == 3 * 3


def test_prompts_are_the_same_for_a_seed_and_within_the_vocabulary() -> None:
    cell = Cell(prompt_tokens=200, new_tokens=1, batch=2)
    first, again = (prompt_ids(cell, TINY, seed=5) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, prompt_ids(cell, TINY, seed=6))
    assert first.shape == (2, 200)
    assert 0 <= first.min() <= first.max() < TINY.vocabulary


def counted_flop(model: GPT, cell: Cell) -> tuple[int, int]:
    """Return the operations of prefill and decode as torch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.from_numpy(prompt_ids(cell, model.spec, 0))
    cache = model.new_cache(cell.prompt_tokens + cell.new_tokens, cell.batch)
    found = []
    # In plain operations, since torch does not count those of its fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model(ids, cache, last_only=True)
        found.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            for _ in range(cell.new_tokens - 1):
                model(ids[:, :1], cache)
        found.append(counter.get_total_flops())
    return found[0], found[1]


@pytest.mark.parametrize(
    "spec",
    [
        gpt(2, 32, 2, context=64, vocabulary=300),
        SMOLLM2_135M.model_copy(update={"layers": 2, "vocabulary": 100}),
    ],
    ids=["gpt2", "llama"],
)
def test_the_operations_are_those_that_torch_counts(spec: object) -> None:
    """Prefill: torch computes the masked half of attention too, which is not needed."""
    loaded = FakeDesk().load(variant(spec=spec))  # type: ignore[arg-type]
    cell = Cell(prompt_tokens=8, new_tokens=5, batch=2)
    read, written = counted_flop(loaded.engine.model, cell)
    assert decode_cost(Weighed.of(loaded), cell).flop == written
    upper_half = 4 * loaded.variant.spec.layers * loaded.variant.spec.q_width * (8 * 7 / 2) * 2
    assert prefill_cost(Weighed.of(loaded), cell).flop + upper_half == read


def test_a_batch_reads_the_weights_once_a_step_and_every_cache() -> None:
    loaded = FakeDesk().load(variant())
    one = decode_cost(Weighed.of(loaded), Cell(prompt_tokens=8, new_tokens=5))
    four = decode_cost(Weighed.of(loaded), Cell(prompt_tokens=8, new_tokens=5, batch=4))
    weights = 4 * loaded.step_bytes
    assert (four.moved - weights) == 4 * (one.moved - weights) > 0
    assert four.flop == 4 * one.flop


@pytest.mark.parametrize(("reached", "flagged"), [(0.5, 0), (1.02, 0), (1.2, 1)])
def test_a_rate_above_its_measured_ceiling_is_said_to_be_wrong(
    reached: float, flagged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = FakeDesk().load(variant())
    cost = decode_cost(Weighed.of(loaded), CELLS[0])
    asked = []

    def bandwidth(device: str, size: int, threads: int, *, at_least: float) -> PeakBandwidth:
        asked.append(at_least)
        peak = cost.moved / 2.0 / reached
        return PeakBandwidth(peak, size, device, "cpu", threads, None, "2026-01-01", 5)

    def flops(device: str, dtype: str, threads: int, *, at_least: float) -> PeakFlops:
        return PeakFlops(cost.flop, dtype, device, "cpu", threads, None, "2026-01-01", 5)

    monkeypatch.setattr(module, "peak_bandwidth", bandwidth)
    monkeypatch.setattr(module, "peak_flops", flops)
    held = held_against(cost, 2.0, loaded.variant, 1, "decode")
    assert held["mbu_ratio"] == pytest.approx(reached)
    assert held["mfu_ratio"] == pytest.approx(0.5)
    assert asked == [cost.moved / 2.0]  # what a run reached is given to the peak's measuring
    assert len(held["problems"]) == flagged
