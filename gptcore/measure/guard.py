"""Which conditions differ between runs, so that nobody compares a machine and thinks it a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptcore.errors import InvalidInput
from gptcore.records import Provenance, Run

CONDITIONS = (
    "cpu",
    "gpu",
    "cores",
    "threads",
    "power",
    "platform",
    "app_version",
    "git_commit",
    "python",
    "torch",
)
"""What must be the same, or be accepted by name; ``text`` is one too, where runs have one."""
UNKNOWN = "unknown"


def differing_conditions(
    runs: Sequence[tuple[Run, Provenance | None]],
) -> dict[str, tuple[str, ...]]:
    """Return the conditions in which runs differ, by name, with each run's value.

    An unknown value differs from every known one, and from another unknown one: nobody can say
    that they are the same. That a GPU or power state is unknown to all of one processor does not
    count.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in CONDITIONS:
        values = tuple(_said(getattr(made, name, None)) for _, made in runs)
        unknown = [made is None for _, made in runs]
        if len(set(values)) > 1 or any(unknown):
            found[name] = values
    texts = tuple(_said(text_of(run)) for run, _ in runs)
    if len(set(texts)) > 1:
        found["text"] = texts
    return found


def text_of(run: Run) -> str | None:
    """Return what identifies the text that a run worked on, None where it had none."""
    identity = (run.result or {}).get("identity")
    if isinstance(identity, Mapping) and "text_hash" in identity:
        return str(identity["text_hash"])
    text = run.settings.get("text")
    return str(text) if text is not None else None


def require_same_conditions(
    runs: Sequence[tuple[Run, Provenance | None]], accepted: Sequence[str]
) -> None:
    """Raise InvalidInput where runs differ in a condition that was not accepted by name."""
    differing = differing_conditions(runs)
    for name, values in differing.items():
        if name not in accepted:
            shown = " and ".join(dict.fromkeys(values))
            raise InvalidInput(
                f"The runs differ in {name} ({shown}): what differs between them may come from "
                f"that. Accept {name} by name to compare them all the same."
            )


def differing_settings(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    """Return what differs in what the runs were asked for, by dotted name, with each run's value.

    A setting that a run does not have is None.
    """
    flat = [
        {
            "kind": str(run.kind),
            "model": run.model,
            "precision": run.precision,
            "device": run.device,
            **_flat(run.settings),
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for one in flat for name in one))
    table = {name: tuple(one.get(name) for one in flat) for name in names}
    return {name: values for name, values in table.items() if len(set(map(repr, values))) > 1}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
        pairs = {str(index): one for index, one in enumerate(value)}.items()
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, one in pairs:
        found |= _flat(one, f"{prefix}.{name}" if prefix else str(name))
    return found


def _said(value: Any) -> str:
    return UNKNOWN if value is None else str(value)
