"""The works that a host can be given, by kind of run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from gptcore.errors import InvalidInput
from gptcore.explain.work import Explain
from gptcore.host.regress import Regress
from gptcore.measure.apart import Apart
from gptcore.measure.bench import Bench
from gptcore.measure.compare import Compare
from gptcore.measure.evaluate import Evaluate
from gptcore.measure.few_shot import FewShot
from gptcore.measure.works_quality import Tasks, Texts
from gptcore.optimize.carry import Export
from gptcore.optimize.estimate import Estimate
from gptcore.optimize.make import Optimize
from gptcore.optimize.proof import Prove
from gptcore.optimize.tune import Tune
from gptcore.records import RunKind
from gptcore.sentences import sentence
from gptcore.work import Work

WORKS: Mapping[RunKind, type[Work]] = {
    one.kind: one
    for one in (
        Apart,
        Bench,
        Compare,
        Estimate,
        Evaluate,
        Explain,
        Export,
        FewShot,
        Optimize,
        Prove,
        Regress,
        Tasks,
        Texts,
        Tune,
    )
}


def work_from_json(kind: RunKind, value: Mapping[str, Any]) -> Work:
    """Return the work of ``kind`` whose ``model_dump`` is ``value``.

    Raises:
        InvalidInput: a field is unknown, missing or out of its range.
    """
    try:
        return WORKS[kind].model_validate(value)
    except ValidationError as error:
        raise InvalidInput(sentence(error, WORKS[kind])) from None
