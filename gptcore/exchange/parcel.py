"""A run as it travels: with its measurements, and with what made it.

A run that came from a file carries a mark in its result, ``imported``: from which kind of file, and
the variant and provenance that the file told, None where it told none. They are not this machine's,
so they are kept with the run and not among the variants of the store.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from gptcore.errors import InvalidInput
from gptcore.records import (
    Annotation,
    Measurement,
    Numbers,
    Provenance,
    Run,
    RunKind,
    RunState,
)
from gptcore.sentences import detail

MARK = "imported"
MAX_INTEGER = 2**31 - 1
MAX_BYTE_COUNT = 2**63 - 1
"""What the columns of the database hold."""


class Source(StrEnum):
    """Which kind of file a run came from."""

    CSV = "csv"
    JSON = "json"
    LLAMA_BENCH = "llama-bench"
    VLLM = "vllm"
    GUIDELLM = "guidellm"


@dataclass(frozen=True, slots=True)
class Parcel:
    """One run with all that is sent along."""

    run: Run
    measurements: tuple[Measurement, ...] = ()
    annotation: Annotation = field(default_factory=Annotation)
    """Its tags and its note travel; pinned, archived and baseline belong to one laboratory."""
    variant: Mapping[str, Any] | None = None
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """Where a run came from."""

    source: Source
    variant: Mapping[str, Any] | None
    provenance: Provenance | None
    """What made it, None where the file does not say."""
    origin: Mapping[str, Any] | None = None
    """For the file of another program: its name under ``from``, and under ``fields`` what has no
    name here."""


def imported(run: Run) -> Imported | None:
    """Return where a run came from, or None for one that was made here."""
    mark = (run.result or {}).get(MARK)
    if mark is None:
        return None
    made = mark["provenance"]
    return Imported(
        source=Source(mark["source"]),
        variant=mark["variant"],
        provenance=None if made is None else Provenance(**made),
        origin=mark["origin"],
    )


def marked(parcel: Parcel, source: Source, origin: Mapping[str, Any] | None) -> Parcel:
    """Return the parcel with its run marked as imported."""
    mark = {
        "source": source.value,
        "variant": parcel.variant,
        "provenance": parcel.provenance and asdict(parcel.provenance),
        "origin": origin,
    }
    return replace(
        parcel, run=replace(parcel.run, result={**(parcel.run.result or {}), MARK: mark})
    )


def record_of(parcel: Parcel) -> dict[str, Any]:
    """Return a parcel as JSON-able values, the same whether its run was made here or imported."""
    run, came = parcel.run, imported(parcel.run)
    result = {name: value for name, value in (run.result or {}).items() if name != MARK}
    made = came.provenance if came else parcel.provenance
    record = {
        "id": run.id,
        "kind": run.kind.value,
        "state": run.state.value,
        "created_at": _moment(run.created_at),
        "model": run.model,
        "precision": run.precision,
        "device": run.device,
        "started_at": _moment(run.started_at),
        "ended_at": _moment(run.ended_at),
        "variant_hash": run.variant_hash,
        "parent_id": run.parent_id,
        "error_kind": run.error_kind,
        "error": run.error,
        "numbers": run.numbers and asdict(run.numbers),
        "measurements": [
            {"name": one.name, "observations": [float(value) for value in one.observations]}
            for one in sorted(parcel.measurements, key=lambda one: one.name)
        ],
        "tags": list(parcel.annotation.tags),
        "note": parcel.annotation.note,
        "provenance": made and asdict(made),
        "settings": dict(run.settings),
        "result": result or None,
        "variant": came.variant if came else parcel.variant,
        "origin": came.origin if came else None,
        "text": run.text,
    }
    cleaned: dict[str, Any] = clean(record)
    return cleaned


def clean(value: Any) -> Any:
    """Return JSON-able values that JSON can hold and that come back from it as they are.

    NaN and infinity become words, and two halves of a surrogate pair become the one character
    that they are to every reader of JSON.
    """
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case str() if not value.isascii() and re.search("[\ud800-\udfff]", value):
            units = value.encode("utf-16-le", "surrogatepass")
            return units.decode("utf-16-le", "surrogatepass")
        case Mapping():
            return {clean(name): clean(one) for name, one in value.items()}
        case list() | tuple():
            return [clean(one) for one in value]
        case _:
            return value


def parcel_of(record: Mapping[str, Any], source: Source, where: str) -> Parcel:
    """Return the parcel of a record, its run marked as imported.

    Args:
        record: what ``record_of`` made.
        source: the kind of file.
        where: names the record for a person.

    Raises:
        InvalidInput: a field is missing, unknown, or not what it must be.
    """
    try:
        kept = _Record.model_validate(record)
    except ValidationError as error:
        raise InvalidInput(f"{where}: {detail(error.errors()[0], _Record)}") from None
    run = Run(
        **{
            one.name: getattr(kept, one.name)
            for one in fields(Run)
            if one.name in _Record.model_fields
        }
    )
    parcel = Parcel(
        run=run,
        measurements=tuple(
            Measurement(kept.id, one.name, one.observations) for one in kept.measurements
        ),
        annotation=Annotation(tags=kept.tags, note=kept.note),
        variant=kept.variant,
        provenance=kept.provenance,
    )
    return marked(parcel, source, kept.origin)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text is expected, not {str(value)[:40]}")
    return value


Text = Annotated[str, PlainValidator(_text)]
"""Any text, halves of surrogate pairs too, which a plain field refuses."""
Json = dict[Text, Any]
Number = Annotated[float, Field(allow_inf_nan=True)]


def _run_id(value: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", value):
        raise ValueError(
            f"the id of a run is {value[:40]!r}; it must be 1 to 64 letters, digits, - and _"
        )
    return value


RunId = Annotated[str, AfterValidator(_run_id)]
Short = Annotated[str, Field(max_length=64)]


class _Measured(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=128)
    observations: tuple[Number, ...] = Field(min_length=1)


class _Record(BaseModel):
    """What a file holds of a run; what an older file does not know has a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: RunId
    kind: RunKind
    state: RunState
    created_at: AwareDatetime
    model: Text = ""
    precision: Short = ""
    device: Short = ""
    started_at: AwareDatetime | None = None
    ended_at: AwareDatetime | None = None
    variant_hash: Short | None = None
    parent_id: RunId | None = None
    error_kind: Short | None = None
    error: Text | None = None
    numbers: Numbers | None = None
    measurements: tuple[_Measured, ...] = ()
    tags: tuple[Text, ...] = ()
    note: Text = ""
    provenance: Provenance | None = None
    settings: Json = Field(default_factory=dict)
    result: Json | None = None
    variant: Json | None = None
    origin: Json | None = None
    text: Text = ""

    @field_validator("kind", "state", mode="before")
    @classmethod
    def _one_of(cls, value: Any, info: ValidationInfo) -> Any:
        known = RunKind if info.field_name == "kind" else RunState
        if value not in list(known):
            raise ValueError(
                f"the {info.field_name} of the run is {str(value)[:40]!r}; there are: "
                f"{', '.join(known)}"
            )
        return value

    @field_validator("created_at", "started_at", "ended_at")
    @classmethod
    def _in_utc(cls, moment: datetime | None) -> datetime | None:
        return moment and moment.astimezone(UTC)

    @field_validator("state")
    @classmethod
    def _over(cls, state: RunState) -> RunState:
        if not state.final:
            raise ValueError(f"the run is {state.value}: only a run that ended can be brought in")
        return state

    @field_validator("numbers", "provenance", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        known = {one.name for part in (Numbers, Provenance) for one in fields(part)}
        if isinstance(value, Mapping) and (foreign := sorted(set(value) - known)):
            raise ValueError(f"there is no {foreign[0]!r}; a newer version may have written it")
        return value

    @field_validator("numbers", "provenance")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            for name, number in asdict(value).items():
                most = MAX_BYTE_COUNT if "bytes" in name else MAX_INTEGER
                if isinstance(number, int) and abs(number) > most:
                    raise ValueError(f"{name} is {number}; the most is {most:,}")
        return value

    @field_validator("measurements")
    @classmethod
    def _once_each(cls, value: tuple[_Measured, ...]) -> tuple[_Measured, ...]:
        names = [one.name for one in value]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the measurement {twice!r} is there twice")
        return value

    @field_validator("result")
    @classmethod
    def _unmarked(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and MARK in value:
            raise ValueError(f"the result must hold no {MARK!r}: that is what an import adds")
        return value


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat()


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a file held."""

    source: Source
    parcels: tuple[Parcel, ...]
    unmapped: tuple[str, ...] = field(default=())
    """Fields of another program's file that have no name here."""
