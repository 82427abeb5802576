"""What holds for every pass that exists, and how passes are found and read. No torch."""

from __future__ import annotations

import json
import sys
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

import gptcore.passes
from gptcore.device import Placement
from gptcore.errors import InvalidInput
from gptcore.passes import registry
from gptcore.passes.base import Coverage, Pass, PassContext, Stage
from gptcore.passes.registry import _leaves, by_name, pass_from_json, passes
from gptcore.spec import GPT2, PRESETS

every_pass = pytest.mark.parametrize("kind", passes().values(), ids=passes())


@every_pass
def test_a_pass_says_what_it_is(kind: type[Pass]) -> None:
    assert kind.name == kind.name.lower()
    assert kind.name.isidentifier()
    assert isinstance(kind.stage, Stage)
    assert kind.title
    assert kind.mechanism
    assert kind.__doc__


@every_pass
def test_every_field_has_a_default_a_title_and_help(kind: type[Pass]) -> None:
    """Form, command line and documentation are read from them."""
    for name, field in kind.model_fields.items():
        assert not field.is_required(), name
        assert field.title, name
        assert field.description, name


@every_pass
def test_json_gives_a_pass_back(kind: type[Pass]) -> None:
    text = json.dumps(kind().as_json())
    assert pass_from_json(json.loads(text)) == kind()


@every_pass
def test_a_pass_is_frozen_and_hashable(kind: type[Pass]) -> None:
    assert hash(kind()) == hash(kind())
    with pytest.raises(ValidationError):
        kind().anything = 1


@every_pass
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_blocks_a_pass_is_said_in_one_sentence(
    kind: type[Pass], device: str, precision: str
) -> None:
    placement = Placement.model_validate({"device": device, "precision": precision})
    said = kind().blocked_by(GPT2["gpt2"], placement)
    assert said is None or (said.endswith(".") and "\n" not in said and len(said) < 200)


@every_pass
@pytest.mark.parametrize("name", PRESETS)
def test_predicted_bytes_are_positive_and_the_peak_is_no_less(kind: type[Pass], name: str) -> None:
    spec, placement = PRESETS[name], Placement(precision="bf16")
    before = spec.weights_bytes("bf16")
    after = kind().weights_bytes_after(spec, placement, before)
    assert after > 0
    assert kind().weights_peak_bytes(spec, placement, before) >= max(before, after)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            {"pass": "int9"},
            f"There is no pass 'int9'; there are: {', '.join(passes())}.",
        ),
        (
            {"pass": "x" * 500},
            f"There is no pass '{'x' * 39}…'; there are: {', '.join(passes())}.",
        ),
        (
            {"pass": "int4", "groups": 32},
            "Pass 'int4' has no parameter 'groups'; it has: method, head, embedding, group.",
        ),
        (
            {"pass": "int8", "group": 32},
            "Pass 'int8' has no parameter 'group'; it has: method, head, embedding, "
            "activation_bits.",
        ),
        (
            {"pass": "int4", "group": 48},
            "Pass 'int4': Group size is 48; there are: 32, 64 or 128.",
        ),
        (
            {"pass": "int4", "group": "many"},
            "Pass 'int4': Group size is many; there are: 32, 64 or 128.",
        ),
        ({"pass": 7}, 'A pass is a JSON object such as {"pass": "int8"}.'),
        ({}, 'A pass is a JSON object such as {"pass": "int8"}.'),
        ("int8", 'A pass is a JSON object such as {"pass": "int8"}.'),
        (None, 'A pass is a JSON object such as {"pass": "int8"}.'),
        ([["pass", "int8"]], 'A pass is a JSON object such as {"pass": "int8"}.'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_pass_is_refused_in_one_sentence(value: Any, sentence: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        pass_from_json(value)
    assert str(refused.value) == sentence


def test_a_second_pass_of_one_name_is_refused() -> None:
    class First(Pass):
        name: ClassVar[str] = "twice"

    class Second(Pass):
        name: ClassVar[str] = "twice"

    with pytest.raises(TypeError, match="two passes are named 'twice'"):
        by_name([First, Second])
    assert by_name([First]) == {"twice": First}


def test_an_added_file_is_an_added_pass(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_only_pass.py").write_text(
        "from typing import ClassVar\n"
        "from gptcore.passes.base import Pass, Stage\n"
        "class Added(Pass):\n"
        "    name: ClassVar[str] = 'added'\n"
        "    stage: ClassVar[Stage] = Stage.SHAPE\n"
    )
    monkeypatch.setattr(gptcore.passes, "__path__", [*gptcore.passes.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_leaves", _only_registered)
    assert list(passes.__wrapped__()) == sorted(["added", *passes()])


def test_an_import_error_in_a_pass_is_let_through(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_pass.py").write_text("import there_is_no_such_library\n")
    monkeypatch.setattr(gptcore.passes, "__path__", [*gptcore.passes.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_library"):
        passes.__wrapped__()


def _only_registered(root: type[Pass]) -> list[type[Pass]]:
    """As the registry's own search, without what other tests of this file define."""
    return [
        child
        for child in _leaves(root)
        if child.__module__.startswith("gptcore.passes.") and child.__module__ in sys.modules
    ]


def test_a_pass_without_apply_is_a_bug_that_is_named() -> None:
    class Silent(Pass):
        name: ClassVar[str] = "silent"

    with pytest.raises(AssertionError, match="Silent"):
        Silent().apply(None, PassContext(placement=Placement()))


def test_coverage_is_converted_by_total() -> None:
    assert Coverage(3, 4).ratio == 0.75
    assert Coverage(0, 4).ratio == 0.0
