"""Several sessions at once share one engine: real host, a model deep enough to be met at work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from gptcore.catalogue import Catalogue
from gptcore.host.lock import device_lock
from gptcore.host.sitting import NO_ROOM, Job
from gptcore.host.wire import READING
from gptcore.host.worker import Watcher, Worker
from gptcore.lab import Cell, Lab
from gptcore.measure.bench import Bench
from gptcore.paths import models_dir
from gptcore.recipe import Variant
from gptcore.records import (
    Constraint,
    Request,
    Run,
    RunKind,
    RunState,
    Token,
    new_id,
    now,
)
from tests.host.conftest import add, made_home, until
from tests.tiny import tiny_checkpoint

STEADY = "steady"
"""So deep that texts meet."""
LAYERS = 30
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One for all: what a test began has ended when it ends."""
    with pytest.MonkeyPatch.context() as patch:
        home = made_home(tmp_path_factory.mktemp("together"), patch)
        with Lab.open(monitor=False) as opened:
            add(opened, home / "source" / "tiny")
            add(opened, tiny_checkpoint(home / "source" / STEADY, context=2048, layers=LAYERS))
            yield opened


@pytest.fixture
def steady(lab: Lab) -> Variant:
    return lab.variant(STEADY, threads=1)


def long(seed: int, **fields: Any) -> Request:
    usual = {"prompt": "Once upon", "max_new_tokens": 1900, "ignore_eos": True, "seed": seed}
    return Request(**usual | fields)


def short(seed: int, **fields: Any) -> Request:
    return long(seed, **{"max_new_tokens": 120, **fields})


def writing(lab: Lab, *runs: str) -> bool:
    """Whether all of these are written now."""
    found = [lab.snapshot(one) for one in runs]
    return all(one.tokens and not one.run.state.final for one in found)


def stopped(lab: Lab, *runs: str) -> list[Run]:
    for one in runs:
        lab.cancel(one)
    return [lab.wait(one, PATIENCE_S).run for one in runs]


def test_three_sessions_write_at_once_what_each_writes_alone(lab: Lab, steady: Variant) -> None:
    requests = [
        short(i, prompt=f"The fox {i} said", temperature=1.2, max_new_tokens=300) for i in range(3)
    ]
    before = [lab.wait(lab.generate(steady, one), PATIENCE_S) for one in requests]
    with device_lock("cpu", "test"):  # so that nobody is done before the others come
        runs = [lab.generate(steady, one) for one in requests]
        assert [lab.snapshot(one).place for one in runs[1:]] == [1, 2]
    after = [lab.wait(one, PATIENCE_S) for one in runs]
    for one, other in zip(before, after, strict=True):
        assert other.run.state is RunState.DONE, other.run.error
        assert len(one.tokens) == 300
        assert [t.id for t in other.tokens] == [t.id for t in one.tokens]
        assert other.run.text == one.run.text
        assert "most_others" not in one.run.result
        assert other.run.result["most_others"] == 2
        assert other.run.result["decoder"] == one.run.result["decoder"]
        numbers = other.run.numbers
        assert 0 < numbers.queue_s <= numbers.ttft_s < numbers.e2e_s
        assert numbers.tpot_s == pytest.approx((numbers.e2e_s - numbers.ttft_s) / 299)
        assert numbers.mbu_ratio is None
        assert numbers.peak_memory_bytes > 0
        assert lab._store.run(other.run.id).result == other.run.result
        assert len(lab._store.tokens(other.run.id)) == 300


def test_one_of_several_is_stopped_and_one_fails_and_the_others_go_on(
    lab: Lab, steady: Variant
) -> None:
    first, second = lab.generate(steady, long(1)), lab.generate(steady, long(2))
    until(lambda: writing(lab, first, second))
    endless = Constraint(json_schema='{"$ref": "#"}')
    failing = lab.generate(steady, short(3, constraint=endless, ignore_eos=False))
    failed = lab.wait(failing, PATIENCE_S).run
    assert (failed.state, failed.error_kind) == (RunState.FAILED, "invalid_input")
    lab.cancel(first)
    assert lab.wait(first, PATIENCE_S).run.state is RunState.CANCELLED
    assert writing(lab, second)
    known = len(lab.snapshot(second).tokens)
    until(lambda: len(lab.snapshot(second).tokens) > known)
    stopped(lab, second)


def test_a_measurement_waits_for_the_texts_and_runs_alone(lab: Lab, steady: Variant) -> None:
    cell = Cell(prompt_tokens=16, new_tokens=8)
    bench = Bench(variant=steady, cells=(cell,), targets=("decode",), repetitions=2, seconds=0.0)
    with device_lock("cpu", "test"):
        before = [lab.generate(steady, short(i)) for i in range(3)]
        work = lab.start(bench)
        behind = lab.generate(steady, short(7))
        assert (lab.snapshot(work).place, lab.snapshot(behind).place) == (3, 4)
    seen = {1}
    while not (found := lab.snapshot(behind).run).state.final:
        if lab.snapshot(work).run.state is RunState.RUNNING:
            seen.add(lab.queue()[0])
        time.sleep(0.005)
    measured = lab.wait(work, PATIENCE_S).run
    assert found.state is RunState.DONE, found.error
    assert measured.state is RunState.DONE, measured.error
    texts = [lab.wait(one, PATIENCE_S).run for one in before]
    assert seen == {1}
    assert measured.started_at >= max(one.ended_at for one in texts)
    assert found.started_at >= measured.ended_at
    assert max(one.result["most_others"] for one in texts) == 2
    assert "most_others" not in found.result


def test_another_variant_waits_and_says_its_place(lab: Lab, steady: Variant) -> None:
    runs = [lab.generate(steady, long(i)) for i in range(2)]
    until(lambda: writing(lab, *runs))
    other = lab.generate(lab.variant(STEADY, "bf16", threads=1), short(5))
    behind = lab.generate(steady, short(6))
    assert lab.queue() == (2, 2)
    time.sleep(0.3)
    assert (lab.snapshot(other).place, lab.snapshot(behind).place) == (1, 2)
    assert lab.queue() == (2, 2)
    stopped(lab, *runs)
    assert lab.wait(other, PATIENCE_S).run.state is RunState.DONE
    assert lab.wait(behind, PATIENCE_S).run.state is RunState.DONE


def test_a_killed_host_fails_all_that_it_wrote_and_the_next_run_works(
    lab: Lab, steady: Variant
) -> None:
    runs = [lab.generate(steady, long(i)) for i in range(3)]
    until(lambda: writing(lab, *runs))
    waiting = lab.generate(lab.variant("tiny"), short(4))
    os.kill(lab._host("cpu").pid, signal.SIGKILL)
    for one in runs:
        ended = lab.wait(one, PATIENCE_S).run
        assert (ended.state, ended.error_kind) == (RunState.FAILED, "host_lost")
        assert "signal 9" in ended.error
        assert ended.text
        assert lab._store.run(one).state is RunState.FAILED
    assert lab.wait(waiting, PATIENCE_S).run.state is RunState.DONE


class Heard:
    """A job, and what it was told."""

    def __init__(self, variant: Variant, request: Request) -> None:
        self.phases: list[str] = []
        self.ended: list[Run] = []
        self.stop = False
        run = Run(new_id(), RunKind.GENERATE, RunState.QUEUED, now(), model=variant.model)
        watcher = Watcher(cancelled=lambda: self.stop, on_phase=self._phase)
        self.job = Job(run, request, watcher, time.monotonic(), self._end, self._break)

    def _phase(self, phase: str, progress: float | None) -> None:
        self.phases.append(phase)

    def _end(self, run: Run, tokens: Sequence[Token]) -> None:
        self.ended.append(run)

    def _break(self, error: Exception) -> None:
        raise error


def test_a_text_too_large_to_share_comes_when_the_others_left(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = lab.variant("tiny", threads=1)
    worker = Worker("cpu", Catalogue(models_dir()))
    position_bytes = variant.kv_bytes_per_token
    monkeypatch.setattr("gptcore.host.sitting.CACHE_BYTES", 100 * position_bytes)
    first, large, behind = (
        Heard(variant, short(i, max_new_tokens=count)) for i, count in enumerate((60, 200, 5))
    )
    coming = [behind.job, large.job]
    later = worker.generate_together(variant, first.job, lambda: coming.pop() if coming else None)
    assert later is large.job
    assert coming == [behind.job]  # nobody overtakes it
    assert large.phases == [NO_ROOM]
    assert [one.state for one in first.ended] == [RunState.DONE]
    assert worker.generate_together(variant, later, lambda: None) is None
    assert [one.state for one in large.ended] == [RunState.DONE]
    assert READING in large.phases


def test_texts_wait_for_room_and_say_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = lab.variant("tiny", threads=1)
    worker = Worker("cpu", Catalogue(models_dir()))
    monkeypatch.setattr("gptcore.host.sitting.CACHE_BYTES", 150 * variant.kv_bytes_per_token)
    first, second, third = (
        Heard(variant, short(i, max_new_tokens=count)) for i, count in enumerate((60, 70, 80))
    )
    coming = [third.job, second.job]
    worker.generate_together(variant, first.job, lambda: coming.pop() if coming else None)
    assert all(one.ended[0].state is RunState.DONE for one in (first, second, third))
    assert second.phases == [READING]
    assert third.phases == [NO_ROOM, READING]
    assert third.ended[0].numbers.queue_s >= 0


def test_a_text_too_large_to_share_can_be_stopped_while_it_waits(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = lab.variant("tiny", threads=1)
    worker = Worker("cpu", Catalogue(models_dir()))
    monkeypatch.setattr("gptcore.host.sitting.CACHE_BYTES", 100 * variant.kv_bytes_per_token)
    first, large, behind = (
        Heard(variant, short(i, max_new_tokens=count)) for i, count in enumerate((60, 200, 5))
    )
    coming = [behind.job, large.job]

    def arrived() -> Job | None:
        large.stop = large.phases == [NO_ROOM]
        return coming.pop() if coming else None

    large.job.watcher.on_phase = lambda phase, progress: setattr(large, "stop", phase == NO_ROOM)
    assert worker.generate_together(variant, first.job, arrived) is None
    assert [one.state for one in large.ended] == [RunState.CANCELLED]
    assert [one.state for one in behind.ended] == [RunState.DONE]
