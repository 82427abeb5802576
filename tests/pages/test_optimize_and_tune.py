"""Optimize and Tune with a real lab and a tiny model: a recipe, its proof, a search, bad links."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.lab import Goals, Knob, Lab
from gptcore.passes.quantize import Int8
from gptcore.recipe import Recipe
from gptcore.records import Run, RunKind, RunState
from pages.parts import services
from pages.parts.optimize_state import Draft
from pages.parts.permalink import pack
from pages.parts.tune_state import Draft as Search
from tests.conftest import ROOT
from tests.tiny import tiny_checkpoint

QUICK = Draft(thoroughness="quick", goals=Goals(stored_at_most=0.9))


@pytest.fixture
def lab(data_folder: Path) -> Iterator[Lab]:
    tiny_checkpoint(data_folder / "models" / "tiny", scale=0.1)
    with Lab.open(monitor=False) as lab:
        services.set_lab(lab)
        yield lab
        services.set_lab(None)


def page(file: str, **query: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=60)
    for name, value in {"model": "tiny", "threads": "1", **query}.items():
        test.query_params[name] = value
    test.run()
    test.switch_page(file).run()
    assert not test.exception
    return test


def clicked(test: AppTest, label: str) -> AppTest:
    (button,) = (one for one in test.button if one.label == label)
    button.click().run()
    assert not test.exception
    return test


def ended(lab: Lab, kind: RunKind) -> Run:
    deadline = time.monotonic() + 120
    while True:
        runs = lab.runs(kind=kind)
        if runs and all(one.state.final for one in runs):
            assert runs[0].state is RunState.DONE, runs[0].error
            return runs[0]
        assert time.monotonic() < deadline, runs
        time.sleep(0.1)


def words(test: AppTest) -> str:
    kinds: tuple[Any, ...] = (test.markdown, test.caption, test.error, test.warning, test.text)
    return "\n".join(str(one.value) for kind in kinds for one in kind).replace("\\", "")


def test_two_clicks_make_a_variant_and_its_whole_card(lab: Lab) -> None:
    """The page, then Optimize: 8 bits stand there already."""
    test = page("lab/optimize.py", o=pack(QUICK.model_dump(mode="json")))
    assert "8-bit weights and activations" in words(test)
    clicked(test, "Optimize")
    run = ended(lab, RunKind.OPTIMIZE)
    test.run()
    assert not test.exception
    labels = {one.label: one.value for one in test.metric}
    assert {"Decode", "Response", "On disk", "In memory", "KL", "Perplexity"} <= set(labels)
    assert labels["On disk"].startswith("× 0.")
    assert "Goal: size at most 0.9, measured" in words(test)
    assert any(one.name == "tiny-int8" and not one.problem for one in lab.models())
    again = page("lab/optimize.py", proof=run.id)
    assert {one.label for one in again.metric} >= set(labels) - {"Making it takes"}
    clicked(again, "Use it")
    assert again.session_state["settings"].model == "tiny-int8"
    assert "it runs in int8" in words(again)
    shown = page("lab/optimize.py")
    shown.segmented_control[0].set_value("All variants").run()
    assert not shown.exception
    assert len(shown.dataframe) >= 1


def test_a_pass_is_added_changed_and_removed(lab: Lab) -> None:
    test = page("lab/optimize.py")
    test.selectbox(key="new_pass").set_value("prune").run()
    recipe = test.session_state["optimize"].recipe
    assert [one.name for one in recipe.passes] == ["int8", "prune"] or [
        one.name for one in recipe.passes
    ] == ["prune", "int8"]
    at = [one.name for one in recipe.passes].index("prune")
    test.slider(key=f"pass_{at}_prune_sparsity").set_value(0.3).run()
    assert test.session_state["optimize"].recipe.passes[at].sparsity == 0.3
    test.button(key=f"remove_pass_{at}").click().run()
    assert test.session_state["optimize"].recipe.passes == (Int8(),)
    assert not test.exception


def test_two_quantizers_are_refused_in_a_sentence_and_nothing_is_lost(lab: Lab) -> None:
    test = page("lab/optimize.py")
    test.selectbox(key="new_pass").set_value("int4").run()
    assert not test.exception
    assert "both quantize; choose one" in words(test)
    assert test.session_state["optimize"].recipe == Recipe(passes=(Int8(),))


@pytest.mark.parametrize("link", ["damaged", pack({"recipe": {"passes": [{"pass": "magic"}]}})])
def test_a_damaged_link_is_said_and_the_page_works(lab: Lab, link: str) -> None:
    test = page("lab/optimize.py", o=link)
    assert "link's recipe" in words(test)
    assert test.session_state["optimize"] == Draft()


def test_a_link_to_a_proof_that_is_gone_is_said(lab: Lab) -> None:
    assert "There is no proof abc" in words(page("lab/optimize.py", proof="abc"))
    assert "There is no search abc" in words(page("lab/tune.py", study="abc"))


def test_a_search_runs_and_its_winner_becomes_a_variant(lab: Lab) -> None:
    knob = Knob(technique="prune", field="sparsity", low=0.1, high=0.6)
    method = Knob(technique="prune", field="method", choices=("magnitude",))
    draft = Search(space="pruning", knobs=(method, knob), trials=3, objectives=("kl",))
    test = page("lab/tune.py", t=pack(draft.model_dump(mode="json")))
    clicked(test, "Search")
    run = ended(lab, RunKind.TUNE)
    assert run.result is not None
    test.run()
    assert "Best so far: trial" in words(test)
    clicked(test, "Make it a variant")
    made = ended(lab, RunKind.OPTIMIZE)
    assert made.result is not None
    assert made.result["name"] == "tiny-tuned"


def test_bits_are_searched_by_how_much_damages_count(lab: Lab) -> None:
    """What a person sets on a slider is the knob's range in what is then searched."""
    test = page("lab/tune.py", t=pack(Search(space="bits").model_dump(mode="json")))
    down = next(one for one in test.slider if str(one.key).endswith("*.mlp.down"))
    assert "counts, doublings" in str(down.label)
    assert down.value == (-1.5, 1.5)
    down.set_value((0.0, 1.0)).run()
    assert not test.exception
    knobs = {one.layers: one for one in test.session_state["tune"].knobs}
    assert (knobs["*.mlp.down"].low, knobs["*.mlp.down"].high) == (0.0, 1.0)
    assert knobs["*.mlp.up"].low == -1.5


def test_a_search_of_nothing_is_refused(lab: Lab) -> None:
    test = page("lab/tune.py")
    for key in [one.key for one in test.button if str(one.key).startswith("remove_knob_")][:3]:
        left = [one for one in test.button if str(one.key).startswith("remove_knob_")]
        left[0].click().run()
        assert not test.exception, key
    assert "needs one setting at least" in words(test)


def test_a_variant_is_written_for_other_programs(lab: Lab) -> None:
    test = page("lab/optimize.py", o=pack(QUICK.model_dump(mode="json")))
    clicked(test, "Optimize")
    ended(lab, RunKind.OPTIMIZE)
    test.run()
    test.selectbox(key="export_form").set_value("gguf-q8_0").run()
    clicked(test, "Write it")
    run = ended(lab, RunKind.EXPORT)
    assert run.result is not None
    assert Path(run.result["path"]).stat().st_size == run.result["bytes"]
    test.run()
    assert "gguf-q8_0.gguf" in words(test)
