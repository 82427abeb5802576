"""The page on work in context: both views run, draw what was found, and say what hinders them."""

import json
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.lab import Lab
from gptcore.records import RunState
from pages.parts import in_context_state, permalink
from tests.conftest import ROOT

VIEWS = in_context_state.VIEWS
FEW = {"view": "Few-shot", "shots": [0, 1], "most_items": 50, "kinds": ["facts"]}
RULE = {"view": "Constraint", "rule": "choices", "choices": "yes\nno", "texts": 3, "chat": False}


@pytest.fixture(scope="module")
def lab(lasting_lab: Lab) -> Lab:
    return lasting_lab


def opened(wanted: dict[str, Any] | None = None, **query: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=60)
    query |= {"c": permalink.pack(wanted)} if wanted else {}
    query |= {"threads": "1"}
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    test.switch_page("lab/in_context.py")
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    assert not test.exception, test.exception
    return test


def pressed(test: AppTest) -> AppTest:
    next(one for one in test.button if one.label == "Run").click().run()
    assert not test.exception, test.exception
    return test


def ended(lab: Lab, test: AppTest, view: str) -> AppTest:
    """Wait for the view's run and draw it."""
    assert not said(test)
    run_id = test.session_state[in_context_state.RUNS][view]
    found = lab.wait(run_id, 90).run
    assert found.state is RunState.DONE, found.error
    test.run()
    assert not test.exception, test.exception
    assert not said(test)
    return test


def said(test: AppTest) -> list[str]:
    return [one.value.replace("\\", "") for one in test.error]


def metric(test: AppTest, label: str) -> str:
    return str(next(one.value for one in test.metric if one.label == label))


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_empty_until_run(lab: Lab, view: str) -> None:
    test = opened({"view": view})
    assert not said(test)
    assert any("Press Run" in one.value for one in test.caption)


def test_examples_give_an_accuracy_each_and_raw_answers(lab: Lab) -> None:
    test = ended(lab, pressed(opened(FEW)), "Few-shot")
    table = next(one.value for one in test.dataframe if "95 % interval" in one.value)
    assert list(table["Examples"]) == [0, 1]
    assert all(one.endswith("of 50") for one in table["Right"])
    assert any(one.label == "Raw answers" for one in test.get("download_button"))


def test_texts_follow_the_rule_and_its_cost_stands_there(lab: Lab) -> None:
    test = ended(lab, pressed(opened(RULE)), "Constraint")
    assert metric(test, "Finished texts that follow") == "3 of 3"
    assert metric(test, "Compiling the rule").endswith("s")
    assert metric(test, "Cost a token").endswith("s")
    (held, free) = (one.value for one in test.dataframe)
    assert {one.strip() for one in held["Text"]} <= {"yes", "no"}
    assert list(free["Seed"]) == [0, 1, 2]


@pytest.mark.parametrize(("view", "wanted"), [("Few-shot", FEW), ("Constraint", RULE)])
def test_a_run_of_a_link_is_drawn_with_its_own_settings(
    lab: Lab, view: str, wanted: dict[str, Any]
) -> None:
    first = ended(lab, pressed(opened(wanted)), view)
    again = opened(result=first.session_state[in_context_state.RUNS][view])
    kept = again.session_state[in_context_state.KEY]
    for name, value in wanted.items():
        assert getattr(kept, name) == (tuple(value) if isinstance(value, list) else value), name
    assert not said(again)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rule": "choices", "choices": " \n "}, "is empty"),
        ({"rule": "regex", "regex": "(a"}, "unclosed group"),
        ({"rule": "json_schema", "json_schema": "{"}, "is no JSON"),
        ({"rule": "json_schema", "json_schema": '{"uniqueItems": true}'}, "uniqueItems"),
        ({"rule": "json_schema", "json_schema": '{"typ": "string"}'}, "'typ'"),
        ({"rule": "json_schema", "json_schema": "false"}, "false"),
        ({"prompt": " "}, "prompt is empty"),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_used_is_one_sentence_and_stays(
    lab: Lab, changes: dict[str, Any], sentence: str
) -> None:
    test = pressed(opened({**RULE, **changes}))
    (only,) = said(test)
    assert sentence in only
    assert any("Press Run" in one.value for one in test.caption)
    kept = test.session_state[in_context_state.KEY]
    assert all(getattr(kept, name) == value for name, value in changes.items())


def test_a_rule_that_needs_itself_without_an_end_fails_in_place(lab: Lab) -> None:
    endless = json.dumps({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]})
    test = pressed(opened({**RULE, "rule": "json_schema", "json_schema": endless}))
    run_id = test.session_state[in_context_state.RUNS]["Constraint"]
    assert lab.wait(run_id, 60).run.state is RunState.FAILED
    test.run()
    (only,) = said(test)
    assert "without an end" in only


def test_items_that_are_no_set_cannot_be_read_through_the_address(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"context": "secret", "choices": ["a", "b"], "answer": 0}\n' * 60)
    test = pressed(opened({**FEW, "items": str(file)[-60:], "kinds": []}))
    assert any("There is no set of items" in one for one in said(test))


def test_damaged_links_are_said_and_not_used(lab: Lab) -> None:
    assert any("damaged" in one for one in said(opened(c="!!")))
    assert any("no such run" in one for one in said(opened(result="nobody")))


def test_another_rule_brings_its_own_prompt_unless_one_was_typed(lab: Lab) -> None:
    test = opened({"view": "Constraint"})
    test.segmented_control(key="in_context_rule").set_value("choices").run()
    assert "review" in test.text_area(key="in_context_prompt").value
    test.text_area(key="in_context_prompt").set_value("Mine").run()
    test.segmented_control(key="in_context_rule").set_value("regex").run()
    assert test.text_area(key="in_context_prompt").value == "Mine"
