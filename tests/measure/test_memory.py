"""Peak memory as the system counts it, and weight bytes as the tensors have them."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from gptcore.device import Placement
from gptcore.measure.memory import INTERVAL_S, MappedWeights, PeakMemory, weight_bytes
from gptcore.model import GPT
from gptcore.spec import ModelSpec, gpt
from gptcore.weights import build_random
from tests.conftest import ROOT

MIB = 2**20
TIED = gpt(2, 64, 4, context=32, vocabulary=211)
UNTIED = TIED.model_copy(update={"tied_head": False})
ROTARY = ModelSpec(
    family="qwen3",
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    width=48,
    hidden=96,
    context=64,
    vocabulary=97,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
    qk_norm=True,
)


COMES_AND_GOES = f"""
import time, numpy, psutil
from gptcore.measure.memory import INTERVAL_S, PeakMemory
before = psutil.Process().memory_info().rss
with PeakMemory() as memory:
    block = numpy.ones(200 * {MIB}, dtype=numpy.uint8)
    time.sleep(5 * INTERVAL_S)
    del block
    time.sleep(5 * INTERVAL_S)
print(before, memory.peak_bytes, psutil.Process().memory_info().rss)
"""
"""For a process of its own: beside other tests' threads, memory comes and goes by itself."""


def test_200_mb_that_come_and_go_are_seen() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMES_AND_GOES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, peak, after = map(int, done.stdout.split())
    assert peak - before > 195 * MIB
    assert peak - after > 195 * MIB
    assert peak - before < 260 * MIB


def test_what_happens_after_the_block_is_not_seen() -> None:
    with PeakMemory() as memory:
        pass
    peak = memory.peak_bytes
    block = np.ones(100 * MIB, dtype=np.uint8)
    time.sleep(5 * INTERVAL_S)
    assert memory.peak_bytes == peak
    assert block.nbytes == 100 * MIB


def test_without_an_allocation_the_peak_is_what_is_resident() -> None:
    resident = psutil.Process().memory_info().rss
    with PeakMemory() as memory:
        time.sleep(3 * INTERVAL_S)
    assert memory.peak_bytes == pytest.approx(resident, rel=0.05)


def test_it_looks_a_hundred_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    monkeypatch.setattr(PeakMemory, "_look", lambda self: looks.append(time.monotonic()))
    before = time.monotonic()
    with PeakMemory():
        time.sleep(0.5)
    most = (time.monotonic() - before) / INTERVAL_S + 2
    assert INTERVAL_S <= 0.01
    assert 10 < len(looks) <= most  # a busy machine may skip some


def test_the_watching_thread_ends_with_the_block_also_after_an_error() -> None:
    with PeakMemory():
        assert "peak-memory" in {one.name for one in threading.enumerate()}
    with pytest.raises(ZeroDivisionError), PeakMemory():
        _ = 1 / 0
    assert "peak-memory" not in {one.name for one in threading.enumerate()}


def test_a_gpu_is_asked_for_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    with PeakMemory("cuda:1") as memory:
        assert "peak-memory" not in {one.name for one in threading.enumerate()}
    assert asked == ["cuda:1"]
    assert memory.peak_bytes == 12345


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("spec", [TIED, UNTIED, ROTARY], ids=["tied", "untied", "rotary"])
def test_weight_bytes_are_those_of_the_tensors(spec: ModelSpec, precision: str) -> None:
    """Also those of the arithmetic on the shape, and those of the storages, counted once."""
    model = build_random(spec, Placement.model_validate({"precision": precision}))
    storages = {one.untyped_storage().data_ptr(): one.nbytes for one in model.parameters()}
    whole, step = weight_bytes(model)
    assert whole == sum(storages.values()) == spec.weights_bytes(precision)
    assert step == whole - not_read_in_a_step(model)


def not_read_in_a_step(model: GPT) -> int:
    """A step reads one row of an embedding, unless the head is that same table."""
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding)]
    return sum(
        one.weight.nbytes for one in tables if one.weight.data_ptr() != model.head.weight.data_ptr()
    )


def test_a_module_that_packs_says_its_bytes() -> None:
    class Packed(nn.Module):
        packed_bytes = 1000

    assert weight_bytes(nn.Sequential(Packed(), nn.Linear(4, 2), Packed())) == (2040, 2040)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_the_pages_of_a_mapped_file_are_let_go_of_and_come_back(tmp_path: Path) -> None:
    size = 32 * 2**20
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(range(256)) * (size // 256))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as held:
        resident = psutil.Process().memory_info
        before = resident().rss
        assert sum(held[::4096]) == 0
        assert resident().rss > before + size // 2
        MappedWeights().drop()
        assert resident().rss < before + size // 2
        assert held[255] == 255
        held[7] = 42
        MappedWeights().drop()
        assert held[7] == 42  # a mapping that was written to is left alone


def test_a_part_of_a_watch_sees_its_own_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = [100]
    whole = PeakMemory()
    monkeypatch.setattr(
        whole, "_process", SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=resident[0]))
    )
    with whole:
        resident[0] = 500
        until = whole.part()
        until.end()
        resident[0] = 200
        part = whole.part()
        part.end()
        resident[0] = 900
    assert (until.peak_bytes, part.peak_bytes, whole.peak_bytes) == (500, 200, 900)
