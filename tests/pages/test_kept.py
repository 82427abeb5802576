"""What a page keeps in session and address, and the piece of work that it shows."""

from __future__ import annotations

import random
import string

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.lab import Lab
from gptcore.records import Request
from pages.parts import permalink
from pages.parts.optimize_state import Draft
from tests.conftest import ROOT


def script() -> None:
    """A page with one text, which takes every change from a field of the session."""
    import streamlit as st
    from pydantic import BaseModel, ConfigDict, Field

    from pages.parts import settings
    from pages.parts.kept import Kept

    class Note(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        text: str = Field("", max_length=30_000, title="Text")

    started = {"start": lambda: Note(text="mine")} if st.session_state.get("own") else {}
    kept = Kept(Note, key="note", address="n", what="note", **started)
    if "change" in st.session_state:
        st.session_state["taken"] = kept.change(**st.session_state["change"])
    st.text(kept.current().text)
    for problem in settings.said():
        st.error(problem)
    kept.write_address()


def noted(**change: object) -> AppTest:
    test = AppTest.from_function(script)
    if change:
        test.session_state["change"] = change
    return test


def told(test: AppTest, name: str = "n") -> str | None:
    found = test.query_params.get(name)
    return found[0] if isinstance(found, list) else found


def test_what_everybody_starts_with_needs_no_place_in_the_address() -> None:
    assert told(noted().run()) is None
    own = noted()
    own.session_state["own"] = True
    assert told(own.run()) == permalink.pack({"text": "mine"})


def test_a_change_stands_in_the_address_and_a_link_brings_it_back() -> None:
    first = noted(text="a fox").run()
    again = noted()
    again.query_params["n"] = str(told(first))
    assert again.run().text[0].value == "a fox"
    assert not again.error


def test_a_value_too_long_for_an_address_is_kept_and_leaves_the_address() -> None:
    letters = random.Random(0).choices(string.ascii_letters + string.digits, k=30_000)
    test = noted(text="short").run()
    assert told(test)
    test.session_state["change"] = {"text": "".join(letters)}
    test.run()
    assert told(test) is None
    assert test.text[0].value == "".join(letters)


def test_a_refused_change_is_one_sentence_and_changes_nothing() -> None:
    test = noted(text="short").run()
    test.session_state["change"] = {"text": "x" * 30_001}
    test.run()
    assert [one.value for one in test.error] == [
        "Text has 30,001 characters; the most is 30,000: shorten it."
    ]
    assert test.session_state["taken"] is False
    assert test.text[0].value == "short"


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("AAAA", "The link's note is damaged and was not used."),
        (permalink.pack({"text": 3}), "The link's note was not used: Text is 3"),
        (permalink.pack({"author": "x"}), "The link's note was not used: There is no Author"),
    ],
)
def test_a_bad_link_is_one_sentence_and_the_page_starts_as_for_a_newcomer(
    link: str, said: str
) -> None:
    test = noted()
    test.query_params["n"] = link
    test.run()
    (problem,) = test.error
    assert problem.value.startswith(said)
    assert test.text[0].value == ""


def opened(file: str, test: AppTest | None = None, **query: str) -> AppTest:
    """Enter a page, in a new session or in that of ``test``."""
    if test is None:
        test = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=60).run()
    test.switch_page(file)
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    assert not test.exception
    return test


def test_a_recipe_of_a_link_survives_the_way_to_another_page(lab: Lab) -> None:
    link = permalink.pack(Draft(thoroughness="quick").model_dump(mode="json"))
    test = opened("lab/optimize.py", o=link)
    test.query_params.clear()
    opened("lab/tune.py", test)
    opened("lab/optimize.py", test)
    assert test.session_state["optimize"] == Draft(thoroughness="quick")
    assert told(test, "o") == link


def test_a_link_to_another_result_is_followed_in_a_session_that_shows_one(lab: Lab) -> None:
    """As from History to Compare."""
    test = opened("lab/compare.py", result="first")
    assert any("no comparison first" in one.value for one in test.warning)
    opened("operate/history.py", test)
    opened("lab/compare.py", test, result="second")
    assert any("no comparison second" in one.value for one in test.warning)
    next(one for one in test.button if one.label == "Close").click().run()
    assert not test.warning
    assert "result" not in test.query_params


def test_a_run_of_another_kind_is_not_shown_as_a_proof(lab: Lab) -> None:
    run_id = lab.generate(lab.variant("tiny", threads=1), Request(prompt="a", max_new_tokens=1))
    lab.wait(run_id, 60)
    test = opened("lab/optimize.py", proof=run_id)
    assert any(f"There is no proof {run_id}" in one.value for one in test.warning)
