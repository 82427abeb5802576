"""Runs as llama-bench prints them with ``-o jsonl``: one object for each test of each run.

A prefill of P tokens is the test ``n_prompt`` = P; a decode of N tokens after them is ``n_gen`` =
N - 1 at ``n_depth`` = P, since the first token comes from the prefill. Fields that only llama.cpp
has stand at its neutral value, and ``gptlab`` holds the rest: the batch, and with the first test of
a run the whole run, so that nothing is lost on the way back. Programs for llama-bench's files pass
over it.

A file from llama-bench itself is read as one run for each model and setting. It does not say what
made its numbers in our terms, so their provenance is unknown; its own words stay in the run's
origin.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from gptcore.errors import InvalidInput
from gptcore.exchange.json_runs import dumped
from gptcore.exchange.parcel import (
    Arrived,
    Parcel,
    Source,
    clean,
    imported,
    marked,
    parcel_of,
    record_of,
)
from gptcore.records import Measurement, Provenance, Run, RunKind, RunState
from gptcore.spec import ModelSpec

KEY = "gptlab"
NAME = re.compile(r"pp(\d+) tg(\d+) b(\d+) (prefill|decode)_s")
NEUTRAL: Mapping[str, Any] = {
    "build_commit": "unknown",
    "build_number": 0,
    "cpu_info": "",
    "gpu_info": "",
    "backends": "",
    "model_filename": "",
    "model_type": "",
    "model_size": 0,
    "model_n_params": 0,
    "n_batch": 0,
    "n_ubatch": 0,
    "n_threads": 0,
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 0,
    "type_k": "",
    "type_v": "",
    "n_gpu_layers": 0,
    "n_cpu_moe": 0,
    "split_mode": "none",
    "main_gpu": 0,
    "no_kv_offload": False,
    "flash_attn": 0,
    "devices": "auto",
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "use_mmap": False,
    "use_direct_io": False,
    "embeddings": False,
    "no_op_offload": 0,
    "no_host": False,
    "fit_target": 0,
    "fit_min_ctx": 0,
}
TESTED = (
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
)


@dataclass(frozen=True, slots=True)
class Test:
    """One stretch of work and its repetitions."""

    prompt_tokens: int
    """Read before; 0 for a prefill, which reads them itself."""
    tokens: int
    batch: int
    prefill: bool
    seconds: tuple[float, ...]


def write(parcels: Sequence[Parcel]) -> tuple[bytes, int]:
    """Return the file, and how many runs are left out because nothing in them is such a test."""
    written = [lines_of(parcel) for parcel in parcels]
    text = "".join(f"{dumped(line)}\n" for lines in written for line in lines)
    return text.encode(), sum(not lines for lines in written)


def lines_of(parcel: Parcel) -> list[dict[str, Any]]:
    """Return one object for each test of a run."""
    record = record_of(parcel)
    shared = _shared(parcel)
    lines: list[dict[str, Any]] = []
    for test in _tests(parcel):
        rates = [test.tokens * test.batch / one for one in test.seconds]
        nanoseconds = [round(one * 1e9) for one in test.seconds]
        line = {
            **shared,
            "n_prompt": test.tokens if test.prefill else 0,
            "n_gen": 0 if test.prefill else test.tokens,
            "n_depth": test.prompt_tokens,
            "test_time": f"{parcel.run.created_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "avg_ns": int(statistics.fmean(nanoseconds)),  # llama-bench cuts these two off
            "stddev_ns": int(_deviation(nanoseconds)),
            "avg_ts": round(statistics.fmean(rates), 6),
            "stddev_ts": round(_deviation(rates), 6),
            "samples_ns": nanoseconds,
            "samples_ts": [round(one, 6) for one in rates],
            KEY: {"run": parcel.run.id, "batch": test.batch},
        }
        if not lines:
            line[KEY]["record"] = record
        lines.append(clean(line))
    return lines


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _tests(parcel: Parcel) -> Iterator[Test]:
    """Yield the tests of a run: those that a bench measured, or the two of a generation."""
    for one in sorted(parcel.measurements, key=lambda one: one.name):
        found = NAME.fullmatch(one.name)
        if not found or not all(second > 0 for second in one.observations):
            continue
        prompt, new, batch = map(int, found.groups()[:3])
        prefill = found[4] == "prefill"
        tokens = prompt if prefill else new - 1
        if tokens > 0 and batch > 0:
            yield Test(0 if prefill else prompt, tokens, batch, prefill, one.observations)
    numbers = parcel.run.numbers
    if numbers is None:
        return
    if numbers.prompt_tokens and numbers.prefill_tokens_per_s:
        seconds = numbers.prompt_tokens / numbers.prefill_tokens_per_s
        yield Test(0, numbers.prompt_tokens, 1, True, (seconds,))
    if numbers.new_tokens > 1 and numbers.decode_tokens_per_s:
        seconds = (numbers.new_tokens - 1) / numbers.decode_tokens_per_s
        yield Test(numbers.prompt_tokens, numbers.new_tokens - 1, 1, False, (seconds,))


def _shared(parcel: Parcel) -> dict[str, Any]:
    """Return the fields that all tests of a run have in common."""
    run, came = parcel.run, imported(parcel.run)
    if came and came.origin and came.origin.get("from") == Source.LLAMA_BENCH:
        return dict(came.origin["fields"])
    made: Provenance | None = came.provenance if came else parcel.provenance
    variant = (came.variant if came else parcel.variant) or {}
    told: dict[str, Any] = {
        "backends": run.device.partition(":")[0].upper(),
        "model_filename": run.model,
        "model_type": f"{run.model} {run.precision}".strip(),
        "model_n_params": _parameters(variant),
        "n_threads": (variant.get("placement") or {}).get("threads") or 0,
    }
    if made:
        told |= {
            "build_commit": (made.git_commit or made.app_version)[:8],
            "cpu_info": made.cpu or "",
            "gpu_info": made.gpu or "",
            "n_threads": made.threads or told["n_threads"],
        }
    return {**NEUTRAL, **told}


def _parameters(variant: Mapping[str, Any]) -> int:
    try:
        return ModelSpec.model_validate(variant["spec"]).parameters
    except (KeyError, ValidationError):
        return 0


def is_one(document: Any) -> bool:
    """Return whether this is an object that llama-bench, or ``write``, writes."""
    return isinstance(document, Mapping) and {"build_commit", "n_prompt", "avg_ns"} <= set(document)


def read(documents: Sequence[Mapping[str, Any]]) -> Arrived:
    """Return the runs of a file's objects."""
    own = [(at, one) for at, one in enumerate(documents, start=1) if KEY in one]
    foreign = [(at, one) for at, one in enumerate(documents, start=1) if KEY not in one]
    parcels = [*_own(own), *_foreign(foreign)]
    known = {*NEUTRAL, *TESTED}
    return Arrived(
        Source.LLAMA_BENCH,
        tuple(parcels),
        tuple(sorted({name for _, one in foreign for name in one if name not in known})),
    )


def _own(lines: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[Parcel]:
    """Yield the runs that ``write`` wrote, whose lines must be the ones that they would give."""
    at = 0
    while at < len(lines):
        number, line = lines[at]
        extra = line[KEY]
        record = extra.get("record") if isinstance(extra, Mapping) else None
        if not isinstance(record, Mapping):
            raise InvalidInput(
                f"Line {number}: {KEY!r} holds no run, and no line before it does: remove the key "
                "to read the line as one from llama-bench."
            )
        parcel = parcel_of(record, Source.LLAMA_BENCH, f"Line {number}")
        made = lines_of(parcel)
        found = [one for _, one in lines[at : at + len(made)]]
        for there, (one, expected) in enumerate(zip(found, made, strict=False)):
            if one != expected:
                name = next(
                    (key for key in (*expected, *one) if one.get(key) != expected.get(key)), KEY
                )
                raise InvalidInput(
                    f"Line {lines[at + there][0]}: {str(name)[:40]} is not what the run in {KEY!r} "
                    "gives: it was changed; remove the key to read it as llama-bench's own."
                )
        if not made or len(found) < len(made):
            raise InvalidInput(f"Line {number}: lines of its run are missing.")
        yield parcel
        at += len(made)


def _foreign(lines: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[Parcel]:
    """Yield one run for all lines that differ only in the test."""
    groups: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, line in lines:
        shared = {name: value for name, value in line.items() if name not in TESTED}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append((number, line))
    for group in groups.values():
        first = group[0][1]
        measured: dict[str, list[float]] = {}
        combined = 0
        for number, line in group:
            name, tokens = _named(number, line)
            if name is None:
                combined += 1
                continue
            seconds = _seconds(number, line)
            measured.setdefault(f"{name}_s", []).extend(seconds)
            measured.setdefault(f"{name}_tokens_per_s", []).extend(tokens / one for one in seconds)
        digest = hashlib.sha256(json.dumps([line for _, line in group]).encode()).hexdigest()[:12]
        at = _time(group[0][0], first)
        fields = clean({name: one for name, one in first.items() if name not in TESTED})
        if combined:
            fields["tests_that_have_no_name_here"] = combined
        backend = str(first.get("backends", "")).lower()
        run = Run(
            id=digest,
            kind=RunKind.BENCH,
            state=RunState.DONE,
            created_at=at,
            started_at=at,
            model=str(first.get("model_filename") or first.get("model_type") or "")[:10_000],
            device=backend if re.fullmatch(r"[a-z0-9:_-]{1,64}", backend) else "",
        )
        parcel = Parcel(
            run, tuple(Measurement(digest, name, tuple(all_)) for name, all_ in measured.items())
        )
        origin = {"from": Source.LLAMA_BENCH.value, "fields": fields}
        yield parcel_of(
            record_of(marked(parcel, Source.LLAMA_BENCH, origin)),
            Source.LLAMA_BENCH,
            f"Line {group[0][0]}",
        )


def _named(number: int, line: Mapping[str, Any]) -> tuple[str | None, int]:
    counts = [line.get(name, 0) for name in ("n_prompt", "n_gen", "n_depth")]
    if not all(isinstance(one, int) and 0 <= one < 10**9 for one in counts):
        raise InvalidInput(f"Line {number}: n_prompt, n_gen and n_depth must be whole numbers.")
    prompt, new, depth = counts
    if prompt and new:
        return None, 0
    if not prompt and not new:
        raise InvalidInput(f"Line {number} is a test of no tokens: n_prompt and n_gen are 0.")
    if prompt:
        return f"pp{prompt} tg1 b1 prefill" if not depth else None, prompt
    return f"pp{depth} tg{new + 1} b1 decode", new


def _seconds(number: int, line: Mapping[str, Any]) -> list[float]:
    found = line.get("samples_ns") or [line.get("avg_ns")]
    if not isinstance(found, list) or not all(
        isinstance(one, int | float) and 0 < one < 1e18 for one in found
    ):
        raise InvalidInput(f"Line {number}: samples_ns must be a list of nanoseconds above 0.")
    return [one / 1e9 for one in found]


def _time(number: int, line: Mapping[str, Any]) -> datetime:
    try:
        found = datetime.fromisoformat(str(line.get("test_time")))
    except ValueError:
        raise InvalidInput(
            f"Line {number}: test_time is {str(line.get('test_time'))[:40]!r}, which is no time."
        ) from None
    return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)
