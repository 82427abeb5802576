"""The lab with a real host process and a real (tiny) model: streams, queue, cancel, kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from gptcore.errors import ContextOverflow, DeviceBusy, DoesNotFit, InvalidInput, UnknownModel
from gptcore.host.lock import device_lock
from gptcore.lab import Lab, Snapshot
from gptcore.records import Request, RunState, Sampling
from gptcore.sampling import stages
from gptcore.store import open_store
from tests.host.conftest import until


def started(lab: Lab, run_id: str) -> Snapshot:
    until(lambda: len(lab.snapshot(run_id).tokens) > 2)
    return lab.snapshot(run_id)


LONG = Request(prompt="Once", max_new_tokens=400, ignore_eos=True, alternatives=2)
SHORT = Request(prompt="Once", max_new_tokens=5, ignore_eos=True)


def test_a_generation_streams_and_is_found_in_the_database(lab: Lab) -> None:
    variant = lab.variant("tiny")
    run_id = lab.generate(variant, LONG)
    seen = [len(started(lab, run_id).tokens)]
    ended = lab.wait(run_id, 30)
    assert ended.run.state is RunState.DONE, ended.run.error
    assert 2 < seen[0] < len(ended.tokens) == 400
    assert ended.run.text == "".join(token.text for token in ended.tokens)
    with Lab.open(monitor=False) as other:  # another process would read the same
        kept = other.snapshot(run_id)
    assert kept.run == ended.run
    assert [t.id for t in kept.tokens] == [t.id for t in ended.tokens]
    numbers = kept.run.numbers
    assert numbers.new_tokens == 400
    assert numbers.ttft_s < numbers.e2e_s
    assert numbers.tpot_s == pytest.approx((numbers.e2e_s - numbers.ttft_s) / 399)
    assert numbers.decode_tokens_per_s == pytest.approx(1 / numbers.tpot_s)
    assert lab.run_provenance(kept.run).weights_hash == variant.weights_id


def test_the_same_seed_gives_the_same_text_in_another_host(lab: Lab) -> None:
    request = Request(prompt="The fox", max_new_tokens=50, seed=9, temperature=1.2)
    first = lab.wait(lab.generate(lab.variant("tiny"), request), 30)
    os.kill(lab._host("cpu").pid, signal.SIGKILL)
    again = lab.wait(lab.generate(lab.variant("tiny"), request), 30)
    assert first.run.text == again.run.text != ""


def test_queued_runs_say_their_place_and_run_in_turn(lab: Lab) -> None:
    variants = (lab.variant("tiny", one) for one in ("fp32", "bf16", "int8"))
    first, second, third = (lab.generate(one, LONG) for one in variants)
    started(lab, first)
    assert (lab.snapshot(second).place, lab.snapshot(third).place) == (1, 2)
    assert lab.queue() == (1, 2)
    lab.cancel(second)
    assert lab.snapshot(second).run.state is RunState.CANCELLED
    assert lab.snapshot(third).place == 1
    lab.cancel(first)
    assert lab.wait(third, 30).run.state is RunState.DONE


def test_a_cancelled_generation_keeps_its_text_and_its_numbers(lab: Lab) -> None:
    run_id = lab.generate(lab.variant("tiny"), LONG)
    started(lab, run_id)
    lab.cancel(run_id)
    ended = lab.wait(run_id, 10)
    assert ended.run.state is RunState.CANCELLED
    assert ended.run.text
    assert ended.run.numbers.finish_reason == "cancelled"
    assert len(ended.tokens) < 400


def test_a_killed_host_fails_its_run_with_the_reason_and_the_next_run_works(lab: Lab) -> None:
    run_id = lab.generate(lab.variant("tiny"), LONG)
    until(lambda: lab.snapshot(run_id).run.text)  # its first tokens may be parts of a letter
    seen = lab.snapshot(run_id).run.text
    os.kill(lab._host("cpu").pid, signal.SIGKILL)
    ended = lab.wait(run_id, 10)
    assert (ended.run.state, ended.run.error_kind) == (RunState.FAILED, "host_lost")
    assert "signal 9" in ended.run.error
    assert ended.run.text.startswith(seen)
    assert lab._store.run(run_id).state is RunState.FAILED
    assert lab.wait(lab.generate(lab.variant("tiny"), SHORT), 30).run.state is RunState.DONE


SERVER = """
import sys, time
from gptcore.lab import Lab
from gptcore.records import Request
lab = Lab.open(monitor=False)
long = Request(prompt="Once", max_new_tokens=400, ignore_eos=True, alternatives=20)
runs = [lab.generate(lab.variant("tiny"), long) for _ in range(30)]
while len(lab.snapshot(runs[0]).tokens) < 3: time.sleep(0.005)
print(runs[0], runs[-1], lab._host("cpu").pid, flush=True)
time.sleep(60)
"""


def test_a_killed_server_ends_its_host_and_its_runs_are_interrupted_at_the_next_start(
    lab: Lab, home: Path
) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    first, last, host_pid = server.stdout.readline().split()
    server.kill()
    server.wait()
    server.stdout.close()
    until(lambda: not running(int(host_pid)), 10)
    with Lab.open(monitor=False) as again:
        states = {again.snapshot(first).run.state, again.snapshot(last).run.state}
        assert again.snapshot(last).run.state is RunState.INTERRUPTED
        assert states <= {RunState.INTERRUPTED, RunState.DONE}
        assert not again.runs(state=RunState.RUNNING)


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_unloading_frees_the_memory(lab: Lab) -> None:
    variant = lab.variant("gpt2")
    lab.wait(lab.generate(variant, SHORT), 60)
    until(lambda: bool(lab.loaded()))
    host = psutil.Process(lab._hosts["cpu"].pid)
    full = host.memory_info().rss
    lab.unload("cpu")
    until(lambda: not lab.loaded())
    weights = variant.spec.weights_bytes("fp32")
    until(lambda: host.memory_info().rss < full - 0.9 * weights)


def test_a_generation_nobody_looks_at_is_cancelled_and_a_reload_in_time_keeps_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcore.lab.ABANDONED_AFTER_S", 0.3)
    blocker = lab.generate(lab.variant("tiny"), LONG)
    kept = lab.generate(lab.variant("tiny"), LONG, session="old")
    left = lab.generate(lab.variant("tiny"), LONG, session="gone")
    lab.watch(kept, "new")
    deadline = time.monotonic() + 0.6
    while time.monotonic() < deadline:
        lab.prune_watchers(lambda session: session == "new")
        time.sleep(0.02)
    assert lab.wait(left, 5).run.state is RunState.CANCELLED
    assert lab.snapshot(blocker).run.state is not RunState.CANCELLED  # it never had a session
    assert lab.snapshot(kept).run.state is not RunState.CANCELLED


def test_next_logits_are_ranked_without_another_forward_pass(lab: Lab) -> None:
    variant = lab.variant("tiny")
    run_id = lab.next_logits(variant, SHORT)
    assert lab.wait(run_id, 30).run.state is RunState.DONE
    logits = lab.next_logits_of(run_id)
    assert logits.logits.shape == (variant.spec.vocabulary,)
    for temperature in (0.01, 0.5, 2.0):
        sampling = Sampling(temperature=temperature, top_k=4)
        rows = lab.rank(variant, logits, sampling, count=10)
        assert [row.rank for row in rows] == list(range(1, 11))
        final = stages(logits.logits, sampling, logits.prompt_ids)[-1].probabilities()
        assert np.allclose([row.probabilities[-1] for row in rows], final[[r.id for r in rows]])
    assert lab.runs(kind="inspect") == ()


def test_a_model_that_does_not_fit_is_refused_before_anything_is_queued(lab: Lab) -> None:
    variant = lab.variant("gpt3-175b")
    fit = lab.fit(variant)
    assert not fit.fits
    assert "698 GB" in fit.sentence
    assert fit.suggestions
    with pytest.raises(DoesNotFit, match="698 GB"):
        lab.generate(variant, SHORT)
    assert lab._host("cpu").pid is None


def test_a_prompt_that_is_too_long_is_refused_at_once(lab: Lab) -> None:
    with pytest.raises(ContextOverflow, match="512"):
        lab.generate(lab.variant("tiny"), Request(prompt="x y " * 600))
    cut = Request(prompt="x y " * 600, overflow="cut", max_new_tokens=3)
    ended = lab.wait(lab.generate(lab.variant("tiny"), cut), 30)
    assert ended.run.numbers.cut_tokens > 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "nonesuch"}, UnknownModel),
        ({"model": "../tiny"}, UnknownModel),
        ({"model": "tiny\x00"}, UnknownModel),
        ({"model": "tiny", "precision": "int3"}, InvalidInput),
    ],
)
def test_what_cannot_be_chosen_is_refused(lab: Lab, arguments: dict, error: type) -> None:
    with pytest.raises(error):
        lab.variant(**arguments)


def test_int8_is_a_pass_of_the_recipe_and_says_what_it_covered(lab: Lab) -> None:
    variant = lab.variant("tiny", "int8")
    assert [one.name for one in variant.recipe.passes] == ["int8"]
    assert variant.hash == lab.variant("tiny", "fp32", recipe=variant.recipe).hash
    assert variant.hash != lab.variant("tiny").hash
    assert lab.wait(lab.generate(variant, SHORT), 30).run.state is RunState.DONE
    until(lambda: any(held.hash == variant.hash for _, held in lab.loaded()))
    (held,) = (held for _, held in lab.loaded() if held.hash == variant.hash)
    coverage = held.coverage["int8"]
    assert coverage["converted_weights"] == coverage["total_weights"] > 0


def test_a_device_held_by_another_process_is_waited_for_and_named(lab: Lab) -> None:
    with device_lock("cpu", "bench"):
        run_id = lab.generate(lab.variant("tiny"), SHORT)
        until(lambda: "bench" in lab.snapshot(run_id).phase)
        assert str(os.getpid()) in lab.snapshot(run_id).phase
    assert lab.wait(run_id, 30).run.state is RunState.DONE


def test_a_taken_device_is_refused_by_name_where_nobody_waits(home: Path) -> None:
    with (
        device_lock("cpu", "bench"),
        pytest.raises(DeviceBusy, match="bench"),
        device_lock("cpu", "generate", wait=False),
    ):
        pass


def test_a_database_that_cannot_be_used_is_left_alone_and_the_lab_goes_on(home: Path) -> None:
    (home / "lab.db").write_bytes(b"not a database at all" * 100)
    before = (home / "lab.db").read_bytes()
    with Lab.open(monitor=False) as lab:
        assert "lab.db" in lab.problems()[0]
        assert not lab.health().ok
        lab.wait(lab.add_model(home / "source" / "tiny", "tiny"), 30)
        assert lab.wait(lab.generate(lab.variant("tiny"), SHORT), 30).run.state is RunState.DONE
    assert (home / "lab.db").read_bytes() == before


def test_the_store_of_the_lab_is_the_one_in_the_data_folder(lab: Lab, home: Path) -> None:
    run_id = lab.generate(lab.variant("tiny"), SHORT)
    lab.wait(run_id, 30)
    store = open_store()
    assert store.run(run_id) is not None
    store.close()
    assert (home / "lab.db").exists()
