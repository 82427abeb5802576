"""One model over several processes, against the same model in one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from gptcore.errors import InvalidInput
from gptcore.parallel import share_of
from gptcore.processes import started
from tests.conftest import ROOT
from tests.kernels.shapes import SPECS
from tests.tiny import tiny_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SUMS = 1e-5
"""fp32 sums in another order, in standard deviations of the logits; 3e-6 seen."""
COMPARED = """
import copy, sys, torch
from gptcore.model import local
from gptcore.parallel import split
from gptcore.processes import joined
from tests.kernels.shapes import SPECS, random_model, some_ids

torch.set_num_threads(1)
found = {}
with joined("cpu") as (processes, device), torch.inference_mode():
    for name in sys.argv[2:]:
        whole, ids = random_model(SPECS[name]), torch.tensor([some_ids(SPECS[name], 40)])
        mine = split(copy.deepcopy(whole), device)
        cache = mine.new_cache(40)
        parts = [mine(ids[:, :30], cache), *(mine(ids[:, i : i + 1], cache) for i in range(30, 40))]
        wanted = whole(ids)
        found[name] = {
            "full": float((mine(ids) - wanted).abs().max() / wanted.std()),
            "cached": float((torch.cat(parts, 1) - wanted).abs().max() / wanted.std()),
            "held": sum(local(p).numel() for p in mine.parameters())
            / sum(p.numel() for p in whole.parameters()),
            "cache": tuple(cache.k.shape),
        }
    if processes.first:
        torch.save(found, sys.argv[1])
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small model in a catalogue of its own."""
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    monkeypatch.setenv("GPTLAB_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("GPTLAB_KERNELS", "off")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tiny_checkpoint(tmp_path / "models" / "tiny").name


def generate(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptcore", "generate", "--prompt", "Once upon", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@contextlib.contextmanager
def writing(model: str) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """Begin a text in two processes, and give out the first and the other once it is written."""
    command = [sys.executable, "-m", "gptcore", "generate", "--model", model, "--prompt", "Once"]
    command += ["--max-new-tokens", "400", "--ignore-eos", "--processes", "2"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.read(10)
        (other,) = psutil.Process(child.pid).children()
        yield child, other
    finally:
        child.kill()


@pytest.mark.slow
def test_two_processes_give_the_logits_of_one(tmp_path: Path) -> None:
    script, names = tmp_path / "compared.py", ("llama, odd sizes", "gpt2")
    script.write_text(COMPARED)
    done = subprocess.run(
        [*TORCHRUN, str(script), str(tmp_path / "found.pt"), *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert set(found) == set(names)
    for name, one in found.items():
        assert one["full"] < SUMS, name
        assert one["cached"] < SUMS, name
        assert one["held"] < 0.6, name
        assert one["cache"][2] == SPECS[name].kv_heads // 2


@pytest.mark.slow
def test_the_command_writes_the_same_text_in_two_processes(tiny: str) -> None:
    words = ["--model", tiny, "--temperature", "1.2", "--max-new-tokens", "20", "--json"]
    words += ["--seed", "5", "--ignore-eos"]
    alone, both = (
        json.loads(generate(*words, *more).stdout) for more in ([], ["--processes", "2"])
    )
    assert both["token_ids"] == alone["token_ids"]
    assert both["mbu_bytes_per_step"] < 0.6 * alone["mbu_bytes_per_step"]


@pytest.mark.slow
def test_the_end_of_a_process_is_a_sentence(tiny: str) -> None:
    with writing(tiny) as (child, other):
        other.kill()
        said = child.communicate(timeout=120)[1].decode()
    assert child.returncode == 2, said
    assert "Process 2 of 2 ended with status -9" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_what_is_packed_is_not_split(tiny: str) -> None:
    done = generate("--model", tiny, "--precision", "int8", "--processes", "2")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not split over processes: choose fp32, bf16 or fp16" in done.stderr


@pytest.mark.slow
def test_stop_ends_all_of_them(tiny: str) -> None:
    with writing(tiny) as (child, other):
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=60)[1].decode()
    assert child.returncode == 130, said
    until = time.monotonic() + 20
    while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_share_has_its_part_of_heads_and_neurons() -> None:
    spec = SPECS["llama"].model_copy(update={"heads": 8, "kv_heads": 4, "hidden": 320})
    own = share_of(spec, 4)
    assert (own.heads, own.kv_heads, own.hidden, own.width) == (2, 1, 80, spec.width)
    assert share_of(spec, 1) == spec


@pytest.mark.parametrize(
    ("heads", "processes", "way_out"),
    [((9, 3), 2, "take 3"), ((12, 12), 5, "take 2 or 3 or 4"), ((5, 1), 2, "stays in one")],
)
def test_uneven_shares_are_refused_with_the_way_out(
    heads: tuple[int, int], processes: int, way_out: str
) -> None:
    update = {"heads": heads[0], "kv_heads": heads[1], "hidden": 384}
    with pytest.raises(InvalidInput, match=way_out):
        share_of(SPECS["llama"].model_copy(update=update), processes)


@pytest.mark.parametrize("count", [0, -1, 65])
def test_so_many_processes_are_refused(count: int) -> None:
    with pytest.raises(InvalidInput, match="1 to 64 can be"), started(count, ()):
        pass
