"""Runs that differ in more than what they compare need a yes that names it."""

from __future__ import annotations

import pytest

from gptcore.errors import InvalidInput
from gptcore.measure.guard import (
    CONDITIONS,
    differing_conditions,
    differing_settings,
    require_same_conditions,
)
from gptcore.records import Provenance
from tests.store.examples import provenance, run


def test_every_condition_is_a_field_of_the_provenance() -> None:
    assert set(CONDITIONS) <= set(Provenance.__dataclass_fields__)


def test_runs_of_one_machine_and_program_may_be_compared() -> None:
    pair = [(run(), provenance()), (run(model="other"), provenance(weights_hash="sha256:11"))]
    assert differing_conditions(pair) == {}
    require_same_conditions(pair, ())


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_must_be_accepted_by_its_name(name: str) -> None:
    pair = [(run(), provenance(**{name: "1"})), (run(), provenance(**{name: "2"}))]
    with pytest.raises(InvalidInput, match=rf"differ in {name} \(1 and 2\)"):
        require_same_conditions(pair, [other for other in CONDITIONS if other != name])
    require_same_conditions(pair, [name])


def test_an_unknown_provenance_is_like_no_other() -> None:
    pair = [(run(), None), (run(), None)]
    assert set(differing_conditions(pair)) == set(CONDITIONS)


def test_what_all_do_not_know_does_not_differ_on_one_machine() -> None:
    pair = [(run(), provenance(gpu=None, power=None))] * 2
    assert differing_conditions(pair) == {}


def test_another_text_is_a_condition_too() -> None:
    first = run(result={"identity": {"text_hash": "aa"}})
    second = run(result={"identity": {"text_hash": "bb"}})
    differing = differing_conditions([(first, provenance()), (second, provenance())])
    assert differing == {"text": ("aa", "bb")}
    named = [run(settings={"text": "one"}), run(settings={"text": "one"})]
    assert differing_conditions([(one, provenance()) for one in named]) == {}


def test_only_what_differs_in_the_settings_is_told() -> None:
    first = run(settings={"seed": 1, "cells": [{"batch": 1}], "stop": ["a"]})
    second = run(settings={"seed": 1, "cells": [{"batch": 4}], "stop": ["a"], "more": True})
    assert differing_settings([first, second]) == {
        "cells.0.batch": (1, 4),
        "more": (None, True),
    }
    assert differing_settings([first, first]) == {}
    # One and True are the same to Python, and not to a person.
    assert differing_settings([run(settings={"a": 1}), run(settings={"a": True})]) == {
        "a": (1, True)
    }
