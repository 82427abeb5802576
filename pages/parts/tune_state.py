"""What the tune page keeps: a draft of a search in the session, and its place in the address."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from gptcore.lab import Knob, Lab, Limits, Tune
from gptcore.optimize.spaces import Space, space
from gptcore.passes.registry import passes
from gptcore.records import RunKind
from pages.parts import settings
from pages.parts.kept import Kept
from pages.parts.pass_form import limits
from pages.parts.settings import as_in
from pages.parts.shown_run import Shown

STUDY = Shown("tune_run", "study", "search", (RunKind.TUNE,))


class Draft(BaseModel):
    """Everything that decides a search; model and device are the sidebar's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    space: str = "formats"
    """The name of the space that the knobs began with."""
    knobs: tuple[Knob, ...] = ()
    """Empty: those of the space."""
    precision: Literal["", "fp32", "bf16", "fp16"] = ""
    """Empty: that of the space."""
    objectives: tuple[Literal["kl", "tokens_per_s", "stored_bytes", "joules"], ...] = Field(
        ("kl", "stored_bytes"), min_length=1, max_length=3
    )
    limits: Limits = Limits()
    trials: int = as_in(Tune, "trials")
    minutes: float | None = as_in(Tune, "minutes")
    study: str = as_in(Tune, "study")

    def found(self, lab: Lab) -> Space:
        """Return the space for the sidebar's model."""
        entry = settings.entry_of(lab, settings.current().model)
        if entry is None or entry.spec is None:
            return space("formats", passes_spec(lab))
        return space(self.space, entry.spec)

    def searched(self, lab: Lab) -> tuple[Knob, ...]:
        """Return the knobs that are turned."""
        return self.knobs or self.found(lab).knobs

    def work(self, lab: Lab) -> Tune:
        """Return the search.

        Raises:
            UnknownModel, InvalidInput, DeviceAbsent: with the way out.
            ValidationError: the settings do not go together.
        """
        chosen, began = settings.current(), self.found(lab)
        precision = self.precision or began.precision
        return Tune(
            baseline=lab.variant(chosen.model, "fp32", chosen.device, chosen.threads),
            variant=lab.variant(chosen.model, precision, chosen.device, chosen.threads),
            knobs=self.searched(lab),
            start=() if self.knobs else began.start,
            objectives=self.objectives,
            limits=self.limits,
            trials=self.trials,
            minutes=self.minutes,
            study=self.study or f"{chosen.model} {self.space} {'+'.join(self.objectives)}",
        )


def passes_spec(lab: Lab) -> Any:
    """Return a shape to build spaces for, where the chosen model has none."""
    return next(one.spec for one in lab.models() if one.spec is not None)


def knob_of(technique: str, field: str) -> Knob:
    """Return a knob that turns a field over all it may be."""
    if not field:
        return Knob(technique=technique)
    info = passes()[technique].model_fields[field]
    kind = info.annotation
    if get_origin(kind) is Literal:
        return Knob(technique=technique, field=field, choices=get_args(kind))
    if kind is bool:
        return Knob(technique=technique, field=field, choices=(False, True))
    low, high = limits(info)
    return Knob(
        technique=technique,
        field=field,
        low=0.0 if low is None else low,
        high=1.0 if high is None else min(high, 64.0),
    )


def searchable(technique: str) -> list[str]:
    """Return the fields of a pass that a knob can turn."""
    found = []
    for name, info in passes()[technique].model_fields.items():
        if get_origin(info.annotation) is Literal or info.annotation in (bool, int, float):
            found.append(name)
    return found


_kept = Kept(Draft, key="tune", address="t", what="search")
current, change, write_address = _kept.current, _kept.change, _kept.write_address
