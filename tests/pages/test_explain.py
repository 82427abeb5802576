"""The explain page: every view looks, draws what it found, and says what hinders it."""

import json
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.explain.work import Explain
from gptcore.lab import Lab
from gptcore.records import RunState
from pages.parts import explain_charts, explain_state, permalink
from tests.conftest import ROOT

TEXT = "Once <b>upon</b> a time there was a small fox"
VIEWS = tuple(explain_state.VIEWS)


@pytest.fixture(scope="module")
def lab(lasting_lab: Lab) -> Lab:
    return lasting_lab


def opened(wanted: dict[str, Any] | None = None, **query: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=60)
    query |= {"e": permalink.pack(wanted)} if wanted else {}
    query |= {"threads": "1"}
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    test.switch_page("lab/explain.py")
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    assert not test.exception, test.exception
    return test


def pressed(test: AppTest, label: str = "Look") -> AppTest:
    next(one for one in test.button if one.label == label).click().run()
    assert not test.exception, test.exception
    return test


def ended(lab: Lab, test: AppTest, view: str) -> AppTest:
    """Wait for the view's look and draw it."""
    assert not said(test)
    run_id = (
        test.session_state[explain_state.STEP][0]
        if view == "Step"
        else test.session_state[explain_state.RUNS][view]
    )
    assert lab.wait(run_id, 90).run.state is RunState.DONE, lab.wait(run_id).run.error
    test.run()
    assert not test.exception, test.exception
    assert not said(test)
    return test


def said(test: AppTest) -> list[str]:
    return [one.value.replace("\\", "") for one in test.error]


def headings(test: AppTest) -> str:
    return " ".join(one.value for one in test.markdown)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_empty_then_looks_and_is_drawn(lab: Lab, view: str) -> None:
    test = opened({"view": view, "prompt": TEXT, "passage": TEXT}, model="tiny")
    assert any("Nothing is looked at yet" in one.value for one in test.caption)
    test = ended(lab, pressed(test), view)
    assert not any("Nothing is looked at yet" in one.value for one in test.caption)
    assert headings(test)


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "Step"])
def test_a_look_of_a_link_is_drawn_with_its_own_text(lab: Lab, view: str) -> None:
    test = ended(lab, pressed(opened({"view": view, "prompt": TEXT, "passage": TEXT},
                                     model="tiny")), view)  # fmt: skip
    run_id = test.query_params["look"]
    again = opened(look=str(run_id[0] if isinstance(run_id, list) else run_id), model="tiny")
    wanted = again.session_state[explain_state.KEY]
    assert wanted.view == view
    assert wanted.text == TEXT
    assert headings(again) == headings(test)


def test_a_slider_moves_the_numbers_without_another_forward_pass(lab: Lab) -> None:
    test = ended(lab, pressed(opened({"prompt": TEXT}, model="tiny", top_k="5")), "Step")
    kept = test.session_state[explain_state.STEP]

    def metric(name: str) -> str:
        return str(next(one.value for one in test.metric if one.label == name))

    assert metric("Can be drawn") == "5"
    test.slider(key="temperature").set_value(0.0).run()
    assert metric("Entropy") == "0 bits"
    assert metric("Can be drawn") == "1"
    assert test.session_state[explain_state.STEP] == kept
    assert not test.exception


def test_another_head_is_looked_at_when_its_number_changes(lab: Lab) -> None:
    test = ended(lab, pressed(opened({"view": "Attention", "prompt": TEXT}, model="tiny")),
                 "Attention")  # fmt: skip
    before = test.session_state[explain_state.RUNS]["Attention"]
    next(one for one in test.number_input if one.label == "Head").set_value(3).run()
    ended(lab, test, "Attention")
    after = test.session_state[explain_state.RUNS]["Attention"]
    assert after != before
    assert lab.snapshot(after).run.result["head"] == 3
    assert "Layer 0, head 3" in headings(test)


def test_another_prediction_is_explained_when_it_is_chosen(lab: Lab) -> None:
    test = ended(lab, pressed(opened({"view": "Attribution", "prompt": TEXT}, model="tiny")),
                 "Attribution")  # fmt: skip
    chosen = next(one for one in test.selectbox if one.label.startswith("What is explained"))
    run_id = test.session_state[explain_state.RUNS]["Attribution"]
    second = lab.snapshot(run_id).run.result["candidates"][1]["id"]
    chosen.set_value(second).run()
    ended(lab, test, "Attribution")
    run_id = test.session_state[explain_state.RUNS]["Attribution"]
    assert lab.snapshot(run_id).run.result["target"]["id"] == second


def test_a_long_text_is_windowed_and_the_page_says_so(lab: Lab) -> None:
    test = ended(lab, pressed(opened({"view": "Lens", "prompt": TEXT * 20}, model="tiny")), "Lens")
    assert any("were left out" in one.value for one in test.info)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"prompt": "  "}, "The text is empty"),
        ({"prompt": "a\x00b"}, "NUL"),
        ({"view": "Lens", "prompt": "  "}, "The text is empty"),
        ({"view": "Lens", "prompt": "a\x00b"}, "NUL"),
        ({"view": "Difference", "passage": ""}, "The text is empty"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_sentence(
    lab: Lab, wanted: dict[str, Any], sentence: str
) -> None:
    test = pressed(opened(wanted, model="tiny"))
    (one,) = said(test)
    assert sentence in one
    assert explain_state.RUNS not in test.session_state


def test_a_text_too_short_fails_with_its_sentence_in_place(lab: Lab) -> None:
    test = pressed(opened({"view": "Lens", "prompt": "a"}, model="tiny"))
    run_id = test.session_state[explain_state.RUNS]["Lens"]
    lab.wait(run_id, 60)
    test.run()
    assert any("at least 2 are needed" in one for one in said(test))


def test_damaged_links_are_said_and_not_used(lab: Lab) -> None:
    assert any("damaged" in one for one in said(opened(e="not packed", model="tiny")))
    assert any("not used" in one for one in said(opened({"layer": -1}, model="tiny")))
    assert any("There is no look" in one for one in said(opened(look="0" * 12, model="tiny")))


def test_two_models_with_other_tokens_are_refused_in_place(lab: Lab) -> None:
    test = pressed(opened({"view": "Difference", "other_model": "gpt2", "passage": TEXT,
                           "other_precision": "fp32"}, model="tiny"))  # fmt: skip
    run_id = test.session_state[explain_state.RUNS]["Difference"]
    assert lab.wait(run_id, 90).run.state is RunState.FAILED
    test.run()
    assert any("other tokens" in one for one in said(test))


def test_labels_hold_no_markup() -> None:
    assert explain_charts.label(" <b>x") == "&lt;b&gt;x"
    assert explain_charts.label(' "a&"') == '"a&amp;"'
    assert explain_charts.label("\n\n") == "↵↵"
    assert explain_charts.label("") == "∅"
    assert explain_charts.label(" a") == "a"
    assert len(explain_charts.label("x" * 100)) == explain_charts.LABEL_CHARS


def test_every_what_of_the_work_has_a_view() -> None:
    offered = {what for what in explain_state.VIEWS.values() if what}
    known = Explain.model_fields["what"].annotation
    assert offered | {"constraint"} == set(known.__args__), "In context shows the constraint"


def test_the_ranking_of_layers_becomes_a_recipe(lab: Lab) -> None:
    test = ended(lab, pressed(opened({"view": "Heads"})), "Heads")
    (recipe,) = (one.value for one in test.code)
    (asked,) = json.loads(recipe)
    assert asked["pass"] == "drop_layers"
    run_id = test.session_state[explain_state.RUNS]["Heads"]
    found = lab.snapshot(run_id)
    blocks = [one for one in found.run.result["parts"] if one["part"] == "block"]
    assert asked["chosen"] == [min(blocks, key=lambda one: one["kl_nats"])["layer"]]
    pressed(test, "Optimize with it")
    assert "Optimize" in [one.value for one in test.title]
    (one,) = test.session_state["optimize"].recipe.passes
    assert one.chosen == tuple(asked["chosen"])


def test_two_variants_of_a_proof_are_held_against_each_other(lab: Lab) -> None:
    first, second = lab.variant("tiny", threads=1), lab.variant("tiny", "int8", threads=1)
    work = Explain(what="difference", variant=first, other=second, prompt=TEXT)
    run_id = lab.start(work)
    assert lab.wait(run_id, 90).run.state is RunState.DONE
    again = opened(look=run_id)
    assert again.session_state[explain_state.KEY].view == "Difference"
    assert not said(again)


def test_a_run_of_the_page_in_context_is_no_look(lab: Lab) -> None:
    held = {"constraint": {"choices": ["a", "b"]}, "texts": 1}
    work = Explain(
        what="constraint", variant=lab.variant("tiny", threads=1), prompt=TEXT, held=held
    )
    run_id = lab.start(work)
    lab.wait(run_id, 60)
    (only,) = said(opened(look=run_id))
    assert "no look" in only
