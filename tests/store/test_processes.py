"""Several real processes on one SQLite file, as server, hosts and command line are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gptcore.paths import ROOT
from gptcore.records import RunState
from gptcore.store import open_store
from tests.store.examples import numbers, run, tokens

WRITER = """
import sys, time
from gptcore.records import Reading, RunState
from gptcore.store import open_store
from tests.store.examples import run, numbers, tokens
url, who, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open_store(url) as store:
    print("ready", flush=True)
    for i in range(count):
        one = run(id=f"{who}-{i}", owner=str(who))
        store.add_run(one)
        store.add_readings([Reading("x_ratio", 0.5, 1e9 + i, str(who))])
        store.finish_run(run(id=one.id, owner=str(who), state=RunState.DONE, numbers=numbers()),
                         tokens(20))
        if i % 7 == who % 7:
            store._database.checkpoint()
"""
WRITERS, RUNS = 4, 40


def _start(url: str, who: int, count: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, str(who), str(count)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_nothing_is_lost_when_processes_write_and_checkpoint_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'lab.db'}"  # not there yet: they also race to make it
    writers = [_start(url, who, RUNS) for who in range(WRITERS)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * WRITERS
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    with open_store(url) as store:
        assert store.problem_in_pages() is None
        assert store.count_runs() == {"done": WRITERS * RUNS}
        for who in range(WRITERS):
            last = store.run(f"{who}-{RUNS - 1}")
            assert last is not None
            assert last.numbers == numbers()
            assert store.tokens(last.id) == tokens(20)
            line = store.readings(["x_ratio"], 1e9, 1e9 + RUNS)["x_ratio", str(who)]
            assert len(line[0]) == RUNS


def test_a_killed_writer_loses_nothing_that_was_kept_and_blocks_nobody(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'lab.db'}"
    with open_store(url, wait_s=5.0) as store:
        writer = _start(url, 0, 100_000)
        while len(store.runs(state=RunState.DONE, limit=5)) < 5:
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()
        began = time.monotonic()
        store.add_run(run(id="after"))
        assert time.monotonic() - began < 2.0
        counted = store.count_runs()
        assert counted["done"] >= 5
        assert counted.get("queued", 0) <= 2  # at most the one in progress, and ours
        assert store.problem_in_pages() is None


def test_a_store_that_nobody_closes_leaves_a_whole_database(tmp_path: Path) -> None:
    path = tmp_path / "lab.db"
    code = WRITER.replace("with open_store(url) as store:", "store = open_store(url)\nif True:")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code, f"sqlite:///{path}", "0", "3"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    assert not Path(f"{path}-wal").exists()  # closed at the end, which checkpoints under the lock
    with open_store(f"sqlite:///{path}") as store:
        assert store.count_runs() == {"done": 3}


def test_opening_a_store_needs_no_torch_and_no_streamlit() -> None:
    code = (
        "import sys, gptcore.store, gptcore.monitor, gptcore.monitor.prometheus\n"
        "found = {'torch', 'streamlit', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
