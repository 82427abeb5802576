"""Train with a real lab: a text, a small model that learns it, a pause, going on, bad names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.lab import Lab, Order, Training, Validated
from gptcore.records import Run, RunKind, RunState
from pages.parts import services
from tests.conftest import ROOT

TEXT = ("The fox ran by the river, and the river ran by the fox. " * 60).encode()


@pytest.fixture
def lab(data_folder: Path) -> Iterator[Lab]:
    with Lab.open(monitor=False) as lab:
        lab.add_text("foxes", TEXT)
        services.set_lab(lab)
        yield lab
        services.set_lab(None)


def small(lab: Lab, **changes: int) -> Order:
    given = {"steps": 8, "batch": 4, "warmup": 2, "validate_every": 4, "validation_windows": 4}
    settings = Training(**{**given, "sample_tokens": 8, **changes})
    return Order(
        text=str(lab.text_file("foxes")), layers=1, width=16, heads=2, context=16, settings=settings
    )


def page(lab: Lab, order: Order | None = None, **query: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=60)
    for name, value in query.items():
        test.query_params[name] = value
    if order is not None:
        test.session_state["train_order"] = order
    test.run()
    test.switch_page("lab/train.py").run()
    assert not test.exception
    return test


def clicked(test: AppTest, label: str) -> AppTest:
    (button,) = (one for one in test.button if one.label == label)
    button.click().run()
    assert not test.exception
    return test


def ended(lab: Lab, state: RunState, count: int = 1) -> Run:
    deadline = time.monotonic() + 120
    while True:
        runs = lab.runs(kind=RunKind.TRAIN)
        if len(runs) >= count and all(one.state.final for one in runs):
            assert runs[0].state is state, runs[0].error
            return runs[0]
        assert time.monotonic() < deadline, runs
        time.sleep(0.1)


def words(test: AppTest) -> str:
    kinds = (test.markdown, test.caption, test.error, test.warning, test.text)
    return "\n".join(str(one.value) for kind in kinds for one in kind).replace("\\", "")


def test_a_text_becomes_a_model_of_the_catalogue(lab: Lab) -> None:
    test = page(lab, small(lab))
    test.text_input(key="train_name").set_value("foxes-model").run()
    clicked(test, "Train")
    run = ended(lab, RunState.DONE)
    assert run.result is not None
    assert run.result["steps"] == 8
    test.run()
    assert "foxes-model is in the catalogue" in words(test).replace("*", "")
    assert {one.label: one.value for one in test.metric}["Step"] == "8"
    written = [one.sample for one in lab.training_events(run) if isinstance(one, Validated)]
    assert any(written)
    entry = lab.catalogue.entry("foxes-model")
    assert (entry.kind, entry.problem) == ("installed", None)
    again = page(lab, training=run.id)
    assert {one.label: one.value for one in again.metric}["Step"] == "8"
    clicked(again, "Use it")
    assert again.session_state["settings"].model == "foxes-model"


def test_a_training_pauses_with_a_checkpoint_and_goes_on_from_it(lab: Lab) -> None:
    run_id = lab.train(small(lab, steps=100_000, warmup=2), "long", threads=1)
    deadline = time.monotonic() + 90
    while not lab.training_events(lab.snapshot(run_id).run):  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    lab.cancel(run_id)
    paused = ended(lab, RunState.CANCELLED)
    assert "can go on from it" in str(paused.error)
    reached = max(one.step for one in lab.training_events(paused))
    again = lab.train_on(run_id)
    while max(one.step for one in lab.training_events(paused)) <= reached:
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    lab.cancel(again)
    ended(lab, RunState.CANCELLED, 2)
    found = lab.snapshot(again)
    assert found is not None
    assert found.run.parent_id == run_id


def test_wrong_orders_are_one_sentence_and_keep_what_was_typed(lab: Lab) -> None:
    test = page(lab, small(lab))
    test.text_input(key="train_name").set_value("gpt2").run()
    clicked(test, "Train")
    assert "is the name of a shape" in words(test)
    test.number_input(key="order_heads").set_value(3).run()
    test.text_input(key="train_name").set_value("fine").run()
    clicked(test, "Train")
    run = ended(lab, RunState.FAILED)
    assert str(run.error).startswith("3 heads do not divide a width of 16")
    test.number_input(key="training_warmup").set_value(50).run()
    assert "leaves none of 8" in words(test)
    assert test.session_state["train_order"].settings.warmup == 2
    assert test.session_state["train_order"].heads == 3


def test_a_student_learns_from_a_teacher_and_stands_beside_its_control(lab: Lab) -> None:
    lab.train(small(lab, steps=40), "teacher", threads=1)
    ended(lab, RunState.DONE)
    test = page(lab, small(lab))
    test.selectbox(key="order_teacher").set_value("teacher").run()
    assert not any(one.key == "order_tokenizer" for one in test.selectbox)
    test.text_input(key="train_name").set_value("student").run()
    clicked(test, "Train")
    student = ended(lab, RunState.DONE, 2)
    assert student.settings["order"]["teacher"] == "teacher"
    test.slider(key="training_teaching_ratio").set_value(0.0).run()
    test.text_input(key="train_name").set_value("control").run()
    clicked(test, "Train")
    control = ended(lab, RunState.DONE, 3)
    test.run()
    test.multiselect(key="train_beside").select(student.id).run()
    assert not test.exception
    table = test.dataframe[0].value
    assert [one.partition(" ")[0] for one in table["Training"]] == ["control", "student"]
    best = [
        min(one.loss for one in lab.training_events(run) if isinstance(one, Validated))
        for run in (control, student)
    ]
    assert list(table["Validation"]) == pytest.approx(best)
    assert table["÷ first"][1] == pytest.approx(best[1] / best[0])


def test_a_model_to_begin_with_brings_its_shape(lab: Lab) -> None:
    lab.train(small(lab), "first", threads=1)
    ended(lab, RunState.DONE)
    test = page(lab, small(lab))
    test.selectbox(key="order_start").set_value("first").run()
    assert "Shape and tokenizer are those of first" in words(test)
    assert not any(one.key == "order_layers" for one in test.number_input)
    clicked(test, "Train")
    again = ended(lab, RunState.DONE, 2)
    assert again.settings["order"]["start"] == "first"
    assert lab.catalogue.entry(again.model).spec == lab.catalogue.entry("first").spec


def test_without_a_text_there_is_nothing_to_learn(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lab, "has_corpus", lambda self: False)
    test = clicked(page(lab), "Train")
    assert "There is nothing to learn from: add a text first." in words(test)
    assert "There is no training abc" in words(page(lab, training="abc"))
