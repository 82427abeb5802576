"""The results of vLLM's and GuideLLM's benchmarks of a server, under our names.

``MAPPING`` says which of their fields is which of our measurements. They agree in the words and not
always in the meaning: GuideLLM calls "inter-token latency" what is time per output token here, and
its time per output token counts the first token. A field that is not in the table keeps its name
and its value in the run's origin, where it is short. Of GuideLLM's requests that did not succeed
only the number is read.

Sources: vLLM's ``vllm/benchmarks/serve.py`` (``--save-result``, ``--save-detailed``) and GuideLLM's
``guidellm/schemas`` (``benchmarks.json``).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any

from gptcore.errors import InvalidInput
from gptcore.exchange.parcel import (
    Arrived,
    Parcel,
    Source,
    clean,
    marked,
    parcel_of,
    record_of,
)
from gptcore.records import Measurement, Run, RunKind, RunState

MS = 1e-3
KEPT_CHARS = 2000
"""A field without a name here is kept up to this length as JSON."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """One of their fields and what it is here."""

    source: Source
    theirs: str
    """A path with dots; ``*`` stands for a statistic: mean, median, std, or p and a percentage."""
    ours: str
    factor: float = 1.0
    """Ours is theirs times this."""
    note: str = ""


VLLM = Source.VLLM
GUIDELLM = Source.GUIDELLM
MAPPING: tuple[Mapped, ...] = (
    Mapped(VLLM, "model_id", "model"),
    Mapped(VLLM, "date", "created_at", note="local time of their machine, read as UTC"),
    Mapped(VLLM, "duration", "duration_s"),
    Mapped(VLLM, "completed", "completed_requests"),
    Mapped(VLLM, "failed", "failed_requests"),
    Mapped(VLLM, "total_input_tokens", "prompt_tokens"),
    Mapped(VLLM, "total_output_tokens", "new_tokens"),
    Mapped(VLLM, "request_throughput", "requests_per_s"),
    Mapped(VLLM, "request_goodput", "goodput_requests_per_s"),
    Mapped(VLLM, "output_throughput", "output_tokens_per_s"),
    Mapped(VLLM, "total_token_throughput", "total_tokens_per_s"),
    Mapped(VLLM, "ttfts", "ttft_s", note="one a request, failed ones left out"),
    Mapped(VLLM, "itls", "itl_s", note="pooled over requests; a gap may bring several tokens"),
    Mapped(VLLM, "*_ttft_ms", "ttft_*_s", MS),
    Mapped(VLLM, "*_tpot_ms", "tpot_*_s", MS),
    Mapped(VLLM, "*_itl_ms", "itl_*_s", MS),
    Mapped(VLLM, "*_e2el_ms", "e2e_*_s", MS, "from sending, not from the scheduled arrival"),
    Mapped(GUIDELLM, "start_time", "created_at"),
    Mapped(GUIDELLM, "end_time", "ended_at"),
    Mapped(GUIDELLM, "duration", "duration_s"),
    Mapped(GUIDELLM, "metrics.request_totals.successful", "completed_requests"),
    Mapped(GUIDELLM, "metrics.request_totals.errored", "failed_requests"),
    Mapped(GUIDELLM, "metrics.request_totals.incomplete", "incomplete_requests"),
    Mapped(GUIDELLM, "metrics.prompt_token_count.successful.total_sum", "prompt_tokens"),
    Mapped(GUIDELLM, "metrics.output_token_count.successful.total_sum", "new_tokens"),
    Mapped(GUIDELLM, "metrics.requests_per_second.successful.mean", "requests_per_s"),
    Mapped(GUIDELLM, "metrics.prompt_tokens_per_second.successful.mean", "input_tokens_per_s"),
    Mapped(GUIDELLM, "metrics.output_tokens_per_second.successful.mean", "output_tokens_per_s"),
    Mapped(GUIDELLM, "metrics.tokens_per_second.successful.mean", "total_tokens_per_s"),
    Mapped(GUIDELLM, "metrics.time_to_first_token_ms.successful.*", "ttft_*_s", MS),
    Mapped(
        GUIDELLM,
        "metrics.inter_token_latency_ms.successful.*",
        "tpot_*_s",
        MS,
        "(E2E - TTFT) / (n - 1) of each request, which is time per output token here",
    ),
    Mapped(GUIDELLM, "metrics.request_latency.successful.*", "e2e_*_s"),
    Mapped(GUIDELLM, "requests.successful.time_to_first_token_ms", "ttft_s", MS),
    Mapped(
        GUIDELLM,
        "requests.successful.inter_token_latency_ms",
        "tpot_s",
        MS,
        "(E2E - TTFT) / (n - 1) of each request, which is time per output token here",
    ),
    Mapped(GUIDELLM, "requests.successful.request_latency", "e2e_s"),
)
STATISTIC = r"(mean|median|std|p\d+(?:\.\d+)?)"
GUIDELLM_STATISTICS = {"mean": "mean", "median": "median", "std_dev": "std"} | {
    f"percentiles.{theirs}": ours
    for theirs, ours in (
        ("p001", "p0.1"),
        ("p01", "p1"),
        ("p05", "p5"),
        ("p10", "p10"),
        ("p25", "p25"),
        ("p75", "p75"),
        ("p90", "p90"),
        ("p95", "p95"),
        ("p99", "p99"),
        ("p999", "p99.9"),
    )
}


def is_vllm(document: Any) -> bool:
    """Return whether this is a result that ``vllm bench serve`` saves."""
    return isinstance(document, Mapping) and {
        "model_id",
        "duration",
        "completed",
        "request_throughput",
    } <= set(document)


def is_guidellm(document: Any) -> bool:
    """Return whether this is a report of GuideLLM."""
    return (
        isinstance(document, Mapping)
        and isinstance(document.get("benchmarks"), list)
        and all(isinstance(one, Mapping) and "metrics" in one for one in document["benchmarks"])
    )


def read_vllm(documents: Sequence[Mapping[str, Any]]) -> Arrived:
    """Return one run for each result; there are several where results were appended."""
    parcels, unmapped = [], set()
    for at, document in enumerate(documents, start=1):
        where = f"Result {at} of the file"
        failed = [bool(one) for one in _list(document.get("errors"))]
        measured = dict(_measured(VLLM, document, where))
        for theirs, ours in (("ttfts", "ttft_s"), ("itls", "itl_s")):
            if values := _per_request(document.get(theirs), failed):
                measured[ours] = values
        try:
            made_at = datetime.strptime(str(document.get("date")), "%Y%m%d-%H%M%S")
        except ValueError:
            raise InvalidInput(
                f"{where}: date is {str(document.get('date'))[:40]!r}, not like 20260131-235959."
            ) from None
        rest = _unmapped(VLLM, document)
        unmapped |= set(rest)
        parcels.append(
            _parcel(
                VLLM,
                where,
                document,
                model=str(document["model_id"]),
                at=made_at.replace(tzinfo=UTC),
                measured=measured,
                rest=rest,
            )
        )
    return Arrived(VLLM, tuple(parcels), tuple(sorted(unmapped)))


def read_guidellm(document: Mapping[str, Any]) -> Arrived:
    """Return one run for each benchmark of a report, which is one rate or concurrency."""
    parcels, unmapped = [], set()
    for at, one in enumerate(document["benchmarks"], start=1):
        where = f"Benchmark {at} of the file"
        measured = dict(_measured(GUIDELLM, one, where))
        requests = _list(_at(one, "requests.successful"))
        for mapped in MAPPING:
            if mapped.source is GUIDELLM and mapped.theirs.startswith("requests."):
                name = mapped.theirs.rpartition(".")[2]
                values = [
                    request[name] * mapped.factor
                    for request in requests
                    if isinstance(request, Mapping) and _positive(request.get(name))
                ]
                if values:
                    measured[mapped.ours] = values
        rest = _unmapped(GUIDELLM, one)
        unmapped |= set(rest)
        parcels.append(
            _parcel(
                GUIDELLM,
                where,
                [document.get("args"), one],
                model=_model(document, one),
                at=_moment(_at(one, "start_time"), where),
                ended=_moment(_at(one, "end_time"), where),
                measured=measured,
                rest={**rest, "args": document.get("args"), "metadata": document.get("metadata")},
            )
        )
    if not parcels:
        raise InvalidInput("The report holds no benchmark.")
    return Arrived(GUIDELLM, tuple(parcels), tuple(sorted(unmapped)))


def _parcel(
    source: Source,
    where: str,
    identity: Any,
    *,
    model: str,
    at: datetime,
    measured: Mapping[str, Sequence[float]],
    rest: Mapping[str, Any],
    ended: datetime | None = None,
) -> Parcel:
    if not measured:
        raise InvalidInput(f"{where} holds none of the numbers that are known here.")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    fields = {
        name: value
        for name, value in clean(rest).items()
        if value is not None and len(json.dumps(value)) <= KEPT_CHARS
    }
    run = Run(
        id=digest,
        kind=RunKind.BENCH,
        state=RunState.DONE,
        created_at=at,
        started_at=at,
        ended_at=ended,
        model=model,
    )
    parcel = Parcel(
        run, tuple(Measurement(digest, name, tuple(one)) for name, one in measured.items())
    )
    origin = {"from": source.value, "fields": fields}
    return parcel_of(record_of(marked(parcel, source, origin)), source, where)


def _measured(
    source: Source, document: Mapping[str, Any], where: str
) -> Iterator[tuple[str, list[float]]]:
    """Yield the measurements of one value each that the table names."""
    for path, value in _paths(document):
        found = _mapped(source, path)
        if found and _is_number(value) and found[1] not in ("created_at", "ended_at"):
            if not math.isfinite(value):
                raise InvalidInput(f"{where}: {path} is {value}; it must be finite.")
            yield found[1], [value * found[0].factor]


@lru_cache(maxsize=4096)
def _mapped(source: Source, path: str) -> tuple[Mapped, str] | None:
    """Return the table's line for one of their fields, and our name; None if there is none."""
    path = _renamed(source, path)
    for one in MAPPING:
        if one.source is source and (found := _pattern(one).fullmatch(path)):
            return one, one.ours.replace("*", found[1]) if found.groups() else one.ours
    return None


def _unmapped(source: Source, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of which nothing is in the table; each metric counts as a field."""
    named = dict(document)
    metrics = named.pop("metrics", None) if source is GUIDELLM else None
    named |= {f"metrics.{name}": value for name, value in (metrics or {}).items()}
    theirs = [one.theirs for one in MAPPING if one.source is source]
    return {
        name: value
        for name, value in named.items()
        if not _mapped(source, name) and not any(one.startswith(f"{name}.") for one in theirs)
    }


def _renamed(source: Source, path: str) -> str:
    """Return a path with the statistic at its end called as here."""
    if source is GUIDELLM:
        for theirs, ours in GUIDELLM_STATISTICS.items():
            if path.endswith(f".successful.{theirs}"):
                return f"{path.removesuffix(theirs)}{ours}"
    return path


@cache
def _pattern(one: Mapped) -> re.Pattern[str]:
    return re.compile(re.escape(one.theirs).replace(r"\*", STATISTIC))


def _paths(document: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no mapping, with the names that lead to it."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _at(document: Any, path: str) -> Any:
    for name in path.split("."):
        document = document.get(name) if isinstance(document, Mapping) else None
    return document


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _per_request(values: Any, failed: Sequence[bool]) -> list[float]:
    """Return the numbers of the requests that did not fail, lists within pooled."""
    found: list[float] = []
    for at, value in enumerate(_list(values)):
        if at < len(failed) and failed[at]:
            continue
        each: Iterable[Any] = value if isinstance(value, list) else [value]
        found += [float(one) for one in each if _positive(one)]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _moment(seconds: Any, where: str) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        raise InvalidInput(
            f"{where}: a time is {str(seconds)[:40]!r}; it must be seconds since 1970."
        ) from None


def _model(document: Mapping[str, Any], benchmark: Mapping[str, Any]) -> str:
    for holder, path in (
        (benchmark, "config.backend.model"),
        (benchmark, "benchmarker.backend.model"),
        (document, "config.backend.model"),
        (document, "scenario.spec.backend.model"),
        (document, "args.model"),
        (benchmark, "args.model"),
    ):
        found = _at(holder, path)
        if isinstance(found, str) and found:
            return found[:10_000]
    return ""
