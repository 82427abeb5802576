"""Every page's script with a real lab: drawn without an exception, empty and after a run."""

import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.errors import StoreError
from gptcore.lab import Lab
from gptcore.records import Request, RunState
from pages.parts import services
from tests.conftest import ROOT

FILES = {
    "A laboratory for GPT models": "",
    "Playground": "lab/playground.py",
    "Compare": "lab/compare.py",
    "Optimize": "lab/optimize.py",
    "Tune": "lab/tune.py",
    "Train": "lab/train.py",
    "Models": "lab/models.py",
    "Plan": "plan/plan.py",
    "Live": "operate/live.py",
    "History": "operate/history.py",
}


@pytest.fixture
def finished(lab: Lab) -> str:
    """The id of a finished run."""
    request = Request(prompt="Once <b>upon</b> a time", seed=3, max_new_tokens=8, ignore_eos=True)
    run_id = lab.generate(lab.variant("tiny", threads=1), request)
    assert lab.wait(run_id, 60).run.state is RunState.DONE
    return run_id


def opened(title: str, **query: str) -> AppTest:
    """Open a page with settings in its address."""
    test = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=60)
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    if FILES[title]:
        test.switch_page(FILES[title]).run()
    assert not test.exception
    return test


def errors(test: AppTest) -> list[str]:
    return [one.value.replace("\\", "") for one in test.error]


def metric(test: AppTest, label: str) -> str:
    return str(next(one.value for one in test.metric if one.label == label))


@pytest.mark.parametrize("title", FILES)
def test_a_page_is_drawn_with_nothing_there(lab: Lab, title: str) -> None:
    test = opened(title)
    assert title in [one.value for one in test.title]
    assert not test.error


@pytest.mark.parametrize("title", FILES)
def test_a_page_is_drawn_after_a_run(lab: Lab, finished: str, title: str) -> None:
    test = opened(title, run=finished)
    assert title in [one.value for one in test.title]
    assert not test.error


@pytest.mark.parametrize("title", FILES)
def test_a_database_that_cannot_be_used_is_said_and_every_page_works(
    data_folder: Path, title: str
) -> None:
    (data_folder / "lab.db").write_bytes(b"this is no database" * 100)
    with Lab.open(monitor=False) as lab:
        services.set_lab(lab)
        test = opened(title)
        services.set_lab(None)
    if title.startswith("A laboratory"):
        assert any("lab.db" in one.value.replace("\\", "") for one in test.warning)


def test_generate_writes_and_its_numbers_stay(lab: Lab) -> None:
    test = opened(
        "Playground",
        model="tiny",
        mode="completion",
        max_new_tokens="6",
        ignore_eos="1",
        threads="1",
    )
    test.text_area(key="prompt").set_value("Once").run()
    next(one for one in test.button if one.label == "Generate").click().run()
    run_id = str(test.session_state["run"])
    assert lab.wait(run_id, 60).run.state is RunState.DONE
    test.run()
    assert metric(test, "Tokens") == "6"
    assert metric(test, "TTFT").endswith("s")
    assert test.text_area(key="prompt").value == "Once"


def test_a_fresh_session_with_the_run_in_its_address_shows_it(lab: Lab, finished: str) -> None:
    test = opened("Playground", run=finished)
    assert metric(test, "Tokens") == "8"
    assert test.text_area(key="prompt").value == "Once <b>upon</b> a time"
    assert test.session_state["run"] == finished


def test_the_slider_ranks_again_without_another_look(lab: Lab) -> None:
    test = opened("Playground", model="tiny", mode="completion", threads="1", prompt="Once")
    next(one for one in test.button if one.label == "Look").click().run()
    asked = test.session_state["ranking"].run_id
    lab.wait(asked, 60)
    began = time.perf_counter()
    test.slider(key="temperature").set_value(0.0).run()
    assert time.perf_counter() - began < 5
    assert test.session_state["ranking"].run_id == asked
    assert test.session_state["settings"].temperature == 0.0
    assert not test.exception


@pytest.mark.parametrize("prompt", ["", " \n ", "a\x00b", "x" * 400_001])
def test_a_bad_prompt_is_one_sentence_and_stays(lab: Lab, prompt: str) -> None:
    test = opened("Playground", model="tiny", mode="completion", threads="1")
    test.text_area(key="prompt").set_value(prompt).run()
    next(one for one in test.button if one.label == "Generate").click().run()
    assert not test.exception
    (said,) = errors(test)
    assert said.startswith("The prompt")
    assert test.session_state["settings"].prompt == prompt
    assert "run" not in test.query_params


def test_a_size_that_does_not_fit_names_what_would_and_allocates_nothing(lab: Lab) -> None:
    test = opened("Playground", model="gpt3-175b", mode="completion", prompt="Once")
    (said,) = errors(test)
    assert "698 GB" in said
    assert "What would fit" in said
    next(one for one in test.button if one.label == "Generate").click().run()
    assert len(errors(test)) == 2
    assert not lab.loaded()


def test_choosing_int8_shows_the_pass_in_the_recipe(lab: Lab) -> None:
    test = opened("Playground", model="gpt2", precision="int8")
    assert any(one.value == "**Recipe** · int8" for one in test.markdown)


def test_absent_devices_are_shown_with_their_reason(lab: Lab) -> None:
    absent = [one for one in lab.devices() if one.absent]
    assert absent
    shown = " ".join(one.value.replace("\\", "") for one in opened("Playground").caption)
    assert all((one.absent or "") in shown for one in absent)


def test_a_model_name_in_the_address_cannot_leave_the_catalogue(lab: Lab) -> None:
    test = opened("Playground", model="../../etc")
    assert any("There is no model ../../etc" in said for said in errors(test))
    assert test.session_state["settings"].model == "tiny"


def test_a_model_that_knows_no_chat_continues_texts(lab: Lab) -> None:
    assert opened("Playground", model="gpt2").session_state["settings"].mode == "completion"
    test = opened("Playground", model="tiny", mode="chat")
    test.selectbox(key="model").select("gpt2").run()
    assert test.session_state["settings"].mode == "completion"
    assert not test.error


@pytest.mark.parametrize("title", FILES)
def test_a_database_that_fails_in_the_middle_of_a_session_is_one_sentence(
    lab: Lab, finished: str, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = opened(title, run=finished)

    def locked(*_: object, **__: object) -> None:
        raise StoreError("The database lab.db is locked by another program: wait.")

    for name in ("runs", "run", "tokens", "readings", "latencies", "rates", "add_run", "variant"):
        monkeypatch.setattr(lab._store, name, locked)
    test.run()
    assert not test.exception
    monkeypatch.undo()
    test.run()
    assert not test.exception
    assert not errors(test)
