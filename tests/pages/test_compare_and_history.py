"""Compare and History with a real lab and a tiny model: a verdict, texts, notes, questions."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.lab import Cell, Compare, Lab, Optimize, StopRule
from gptcore.recipe import recipe_from_text
from gptcore.records import Choice, Request, RunKind, RunState
from pages.parts import services
from pages.parts.compare_state import Side, Wanted
from pages.parts.permalink import pack, unpacked
from tests.conftest import ROOT
from tests.tiny import tiny_checkpoint

WANTED = Wanted(
    sides=(Side(model="tiny"), Side(model="tiny", precision="bf16")),
    prompt="The fox",
    max_new_tokens=6,
    prompt_tokens=(8,),
    new_tokens=4,
    max_pairs=6,
)


def page(file: str, **query: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=60)
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    test.switch_page(file).run()
    assert not test.exception
    return test


def compare(**query: str) -> AppTest:
    return page("lab/compare.py", c=pack(WANTED.model_dump(mode="json")), threads="1", **query)


def clicked(test: AppTest, label: str) -> AppTest:
    (button,) = (one for one in test.button if one.label == label)
    button.click().run()
    assert not test.exception
    return test


def errors(test: AppTest) -> list[str]:
    return [one.value.replace("\\", "") for one in test.error]


def measured(lab: Lab, count: int = 1) -> str:
    deadline = time.monotonic() + 60
    while True:
        runs = lab.runs(kind=RunKind.COMPARE)
        if len(runs) >= count and all(one.state.final for one in runs):
            assert runs[0].state is RunState.DONE, runs[0].error
            return runs[0].id
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_measuring_gives_a_verdict_under_a_link_that_keeps_it(lab: Lab) -> None:
    test = clicked(compare(), "Measure")
    assert errors(test) == []
    run_id = measured(lab)
    test.run()
    again = compare(result=run_id)
    assert again.query_params["result"] in (run_id, [run_id])
    words = [one.value for one in again.subheader]
    assert any(
        word in text for text in words for word in ("Faster", "Slower", "No detectable difference")
    )
    assert {"Prefill time", "Decode time"} <= {one.label for one in again.metric}


def test_a_result_is_the_same_after_a_hundred_more_runs_and_a_restart(data_folder: Path) -> None:
    tiny_checkpoint(data_folder / "models" / "tiny")
    with Lab.open(monitor=False) as lab:
        work = Compare(
            variants=(lab.variant("tiny", threads=1), lab.variant("tiny", "bf16", threads=1)),
            cells=(Cell(prompt_tokens=8, new_tokens=4),),
            stop=StopRule(max_pairs=6, min_pairs=6),
            block_s=0.0,
        )
        run_id = lab.compare(work)
        first = lab.wait(run_id, 60).run
        request = Request(prompt="The fox", max_new_tokens=1)
        for _ in range(100):
            last = lab.generate(lab.variant("tiny", threads=1), request)
        lab.wait(last, 120)
    with Lab.open(monitor=False) as lab:
        again = lab.snapshot(run_id)
        assert again is not None
        assert again.run.result == json.loads(json.dumps(first.result))
        assert lab.comparison_page(again.run) == lab.comparison_page(first)
        services.set_lab(lab)
        shown = [one.value for one in compare(result=run_id).metric]
        services.set_lab(None)
    told = [one for one in first.result["comparisons"] if one["side"] == "B"]
    assert [f"{one['ratio']:.3f} ×" for one in told] == shown[: len(told)]


def test_the_noise_is_measured_and_stands_on_its_badge(lab: Lab) -> None:
    test = compare()
    assert any("Noise not measured" in one.value for one in test.markdown)
    clicked(test, "Measure the noise")
    measured(lab)
    test.run()
    floor = lab.noise_floor("cpu")
    assert floor is not None
    assert any(f"{floor['at'][:10]}" in one.value for one in test.markdown)
    run_id = lab.compare(
        Compare(
            variants=(lab.variant("tiny", threads=1), lab.variant("tiny", "bf16", threads=1)),
            cells=(Cell(prompt_tokens=8, new_tokens=4),),
            stop=StopRule(max_pairs=6, min_pairs=6),
            block_s=0.0,
        )
    )
    assert lab.wait(run_id, 60).run.result["noise_floor_used"] == floor["ratio"]


def test_all_sides_write_and_where_they_part_is_said(lab: Lab) -> None:
    test = compare()
    test.session_state["compare_view"] = "Texts"
    test.run()
    clicked(test, "Write on all sides")
    runs = test.session_state["compare_texts"]
    assert len(runs) == 2
    for run_id in runs:
        assert lab.wait(run_id, 60).run.state is RunState.DONE
    test.run()
    said = [one.value for one in test.caption]
    assert any("Token for token the text of A" in one or "Leaves A's text" in one for one in said)


def test_a_vote_is_blind_kept_and_rated(lab: Lab) -> None:
    test = compare()
    test.session_state["compare_view"] = "Blind vote"
    test.run()
    assert any("No vote says anything" in one.value for one in test.caption)
    clicked(test, "Write on all sides")
    for run_id in test.session_state["compare_texts"]:
        lab.wait(run_id, 60)
    test.run()
    named = [one.value for one in test.caption if "tiny fp32" in one.value.replace("\\", "")]
    assert named == []
    clicked(test, "Left is better")
    (vote,) = lab._store.votes()
    assert {vote.left, vote.right} == {"tiny fp32 cpu", "tiny bf16 cpu"}
    assert (vote.choice, vote.left_tokens) == (Choice.LEFT, 6)
    assert not any(one.label == "Left is better" for one in test.button)
    assert any(vote.left in one.value.replace("\\", "") for one in test.caption)
    (table,) = test.dataframe
    assert table.value["Variant"].tolist() == [vote.left, vote.right]


def test_an_empty_prompt_is_said_and_nothing_is_lost(lab: Lab) -> None:
    empty = WANTED.model_copy(update={"prompt": "  "})
    test = page("lab/compare.py", c=pack(empty.model_dump(mode="json")))
    test.session_state["compare_view"] = "Texts"
    test.run()
    clicked(test, "Write on all sides")
    assert errors(test) == ["The prompt is empty: type some text."]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"c": "AAAAAAAA"}, "damaged"),
        ({"c": "eNqNj8sKwkA"}, "damaged"),
        ({"c": pack({"sides": []})}, "was not used"),
        ({"c": pack([1, 2])}, "was not used"),
    ],
)
def test_a_link_that_is_damaged_is_said_and_the_page_works(
    query: dict[str, str], said: str, lab: Lab
) -> None:
    test = page("lab/compare.py", **query)
    assert any(said in one for one in errors(test))
    assert any(one.label == "Measure" for one in test.button)


@pytest.mark.parametrize("result", ["nobody", "<b>x</b>", "../../etc"])
def test_a_link_to_a_result_that_is_gone_says_so(result: str, lab: Lab) -> None:
    test = compare(result=result)
    assert any("There is no comparison" in one.value for one in test.warning)


def test_a_model_that_is_gone_is_one_sentence(lab: Lab) -> None:
    gone = WANTED.model_copy(update={"sides": (Side(model="gone"), Side(model="tiny"))})
    test = page("lab/compare.py", c=pack(gone.model_dump(mode="json")))
    clicked(test, "Measure")
    (said,) = errors(test)
    assert "gone" in said


def test_sides_are_added_and_taken_away(lab: Lab) -> None:
    test = clicked(compare(), "Add a side")
    assert len([one for one in test.selectbox if one.label == "Precision"]) == 1 + 3
    test.button(key="remove_2").click().run()
    assert not test.exception
    assert len([one for one in test.selectbox if one.label == "Precision"]) == 1 + 2


def test_an_older_link_with_one_prompt_length_is_read(lab: Lab) -> None:
    older = {**WANTED.model_dump(mode="json"), "prompt_tokens": 8}
    test = page("lab/compare.py", c=pack(older), threads="1")
    assert test.session_state["compare"] == WANTED


def kept_in_the_address(test: AppTest) -> Wanted:
    packed = test.query_params["c"]
    return Wanted.model_validate_json(unpacked(packed[0] if isinstance(packed, list) else packed))


def typed(test: AppTest, key: str, text: str) -> None:
    """Type what is not offered, which AppTest knows nothing of."""
    box = test.selectbox(key=key)
    box.options = [*box.options, text]
    box.set_value(text).run()
    assert not test.exception


def test_each_side_has_its_own_recipe_and_samplers_and_the_link_keeps_them(lab: Lab) -> None:
    test = compare()
    typed(test, "side_1_recipe", "prune(sparsity=0.3), int4(group_size=32)")
    test.selectbox(key="side_1_precision").set_value("bf16").run()
    test.number_input(key="side_1_temperature").set_value(0.7).run()
    test.number_input(key="side_1_top_k").set_value(5).run()
    assert not test.exception
    assert errors(test) == []
    first, second = kept_in_the_address(test).sides
    assert first == WANTED.sides[0]
    assert (second.recipe, second.drawn) == (
        "prune(sparsity=0.3), int4(group_size=32)",
        "temperature 0.7, top-k 5",
    )
    test.session_state["compare_view"] = "Texts"
    test.run()
    clicked(test, "Write on all sides")
    one, other = (lab.wait(run_id, 60).run for run_id in test.session_state["compare_texts"])
    assert (one.settings["temperature"], other.settings["temperature"]) == (0.0, 0.7)
    assert (one.settings["top_k"], other.settings["top_k"]) == (0, 5)
    assert [each.name for each in lab.measured_variant(other.id)[1].recipe.passes] == [
        "prune",
        "int4",
    ]
    test.run()
    said = [each.value.replace("\\", "") for each in test.caption]
    assert any("prune(sparsity=0.3), int4(group_size=32)" in each for each in said)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("int4(", "The recipe int4( cannot be read"),
        ("int4(group=7)", "Pass 'int4'"),
        ("magic", "There is no pass 'magic'"),
        ("int8, int4", "both quantize; choose one"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_sentence_and_changes_nothing(
    lab: Lab, recipe: str, sentence: str
) -> None:
    test = compare()
    typed(test, "side_1_recipe", recipe)
    (said,) = errors(test)
    assert sentence.replace("'", "") in said.replace("'", "")
    assert test.session_state["compare"] == WANTED


def test_what_a_side_cannot_do_stands_under_it(lab: Lab) -> None:
    sides = (Side(model="tiny"), Side(model="tiny", precision="int8", recipe="int4"))
    wanted = WANTED.model_copy(update={"sides": sides})
    test = page("lab/compare.py", c=pack(wanted.model_dump(mode="json")), threads="1")
    assert any("both quantize; choose one" in one.value for one in test.caption)
    clicked(test, "Measure")
    (said,) = errors(test)
    assert "both quantize; choose one" in said
    assert lab.runs(kind=RunKind.COMPARE) == ()


def test_the_recipe_of_a_finished_variant_can_be_chosen_for_another_side(lab: Lab) -> None:
    variant = lab.variant("tiny", threads=1, recipe=recipe_from_text("prune(sparsity=0.25)"))
    made = lab.wait(lab.start(Optimize(variant=variant, name="thin")), 60).run
    assert made.state is RunState.DONE, made.error
    test = compare()
    assert test.selectbox(key="side_1_recipe").options == ["prune(sparsity=0.25) · thin"]
    test.selectbox(key="side_1_model").set_value("thin").run()
    assert not test.exception
    assert test.selectbox(key="side_1_precision").disabled
    assert not any(":red[" in one.value for one in test.caption)


def test_different_threads_need_a_yes_that_names_them(lab: Lab) -> None:
    sides = (Side(model="tiny", threads=1), Side(model="tiny", precision="bf16", threads=2))
    wanted = WANTED.model_copy(update={"sides": sides})
    test = page("lab/compare.py", c=pack(wanted.model_dump(mode="json")), threads="1")
    clicked(test, "Measure")
    (said,) = errors(test)
    assert "differ in threads (1 and 2)" in said
    test.toggle(key="compare_may_differ").set_value(True).run()
    assert kept_in_the_address(test).may_differ == ("threads",)
    clicked(test, "Measure")
    assert errors(test) == []
    found = lab.snapshot(measured(lab))
    assert found is not None
    assert [one["threads"] for one in found.run.result["sides"]] == [1, 2]


def test_a_grid_of_batches_and_prompt_lengths_is_measured_and_kept_in_the_link(lab: Lab) -> None:
    test = compare()
    test.multiselect(key="compare_batches").set_value([1, 4]).run()
    test.multiselect(key="compare_prompt_tokens").set_value([4, 8]).run()
    assert not test.exception
    assert kept_in_the_address(test).batches == (1, 4)
    assert kept_in_the_address(test).prompt_tokens == (4, 8)
    clicked(test, "Measure")
    assert errors(test) == []
    run_id = measured(lab)
    again = page("lab/compare.py", result=run_id, threads="1")
    assert kept_in_the_address(again).cells == kept_in_the_address(test).cells
    assert [
        (one["prompt_tokens"], one["batch"]) for one in lab.snapshot(run_id).run.result["cells"]
    ] == [(4, 1), (4, 4), (8, 1), (8, 4)]
    assert any("Where each side wins" in one.value for one in again.markdown)
    (number,) = (one for one in again.segmented_control if one.label == "Number")
    number.set_value("prefill_s").run()
    assert not again.exception
    assert kept_in_the_address(again).metric == "prefill_s"


def test_the_stop_rule_is_fixed_beforehand_and_stands_in_the_link(lab: Lab) -> None:
    test = compare()
    test.number_input(key="compare_half_width").set_value(0.5).run()
    test.number_input(key="compare_seconds").set_value(30.0).run()
    assert not test.exception
    wanted = kept_in_the_address(test)
    assert (wanted.half_width, wanted.seconds) == (0.5, 30.0)
    clicked(test, "Measure")
    assert errors(test) == []
    found = lab.snapshot(measured(lab))
    assert found is not None
    rule = found.run.settings["stop"]
    assert (rule["half_width"], rule["seconds"], rule["max_pairs"]) == (0.5, 30.0, WANTED.max_pairs)
    test.number_input(key="compare_seconds").set_value(None).run()
    assert kept_in_the_address(test).seconds is None


def test_a_length_beyond_the_context_is_refused_before_anything_is_measured(lab: Lab) -> None:
    wanted = WANTED.model_copy(update={"prompt_tokens": (8, 100_000)})
    test = page("lab/compare.py", c=pack(wanted.model_dump(mode="json")), threads="1")
    clicked(test, "Measure")
    (said,) = errors(test)
    assert "100,000 + 4 tokens do not fit into the context of tiny" in said
    assert lab.runs(kind=RunKind.COMPARE) == ()


def test_a_link_to_a_result_brings_back_the_sides_as_they_were(lab: Lab) -> None:
    sides = (
        Side(model="tiny", precision="int8", device="cpu", threads=1),
        Side(model="tiny", recipe="prune(sparsity=0.3)", device="cpu", threads=1),
    )
    wanted = WANTED.model_copy(update={"sides": sides})
    test = page("lab/compare.py", c=pack(wanted.model_dump(mode="json")), threads="1")
    clicked(test, "Measure")
    assert errors(test) == []
    again = page("lab/compare.py", result=measured(lab))
    assert again.session_state["compare"].sides == sides


def test_texts_are_laid_over_as_a_link_asks(lab: Lab) -> None:
    wanted = WANTED.model_copy(update={"view": "Texts", "differences": True, "sides": (
        Side(model="tiny"), Side(model="tiny", temperature=2.0),
    )})  # fmt: skip
    test = page("lab/compare.py", c=pack(wanted.model_dump(mode="json")), threads="1")
    clicked(test, "Write on all sides")
    runs = test.session_state["compare_texts"]
    one, other = (lab.wait(run_id, 60).run.text for run_id in runs)
    assert one != other
    test.run()
    assert not test.exception
    laid = "".join(each.proto.body for each in test.get("html"))
    assert "<ins" in laid
    assert "outline" in laid  # the token with which it leaves A's
    test.toggle(key="compare_differences").set_value(False).run()
    assert kept_in_the_address(test).differences is False


def quality(lab: Lab, **fields: object) -> AppTest:
    """The quality view of a comparison, measured to its end."""
    wanted = WANTED.model_copy(update={"max_tokens": 200, "window": 32, **fields})
    packed = pack(wanted.model_dump(mode="json"))
    test = page("lab/compare.py", c=packed, threads="1")
    test.session_state["compare_view"] = "Quality"
    test.run()
    clicked(test, "Measure quality")
    for run_id in test.session_state["compare_quality"]:
        lab.wait(run_id, 60)
    return test.run()


def test_quality_of_each_side_stands_beside_a(lab: Lab) -> None:
    sides = (*WANTED.sides, Side(model="tiny", precision="int8"))
    test = quality(lab, sides=sides)
    assert errors(test) == []
    assert len(test.session_state["compare_quality"]) == 1  # A is measured once
    (frame,) = test.dataframe
    assert [name[0] for name in frame.value["Side"]] == ["A", "B", "C"]
    assert list(frame.value["KL mean"].isna()) == [True, False, False]
    runs = ",".join(test.session_state["compare_quality"])
    again = compare(quality=runs)
    assert again.dataframe[0].value.equals(frame.value)


def test_tasks_are_asked_of_one_side_alone(lab: Lab) -> None:
    lab.add_items("foxes", b'{"context": "The fox", "choices": ["runs", "reads"], "answer": 0}')
    test = quality(lab, quality="Tasks", items="foxes", alone=True)
    assert errors(test) == []
    (frame,) = test.dataframe
    assert list(frame.value["Kind"]) == ["all (1)", "own (1)"]
    assert [name for name in frame.value if name.startswith("B")] == []


def test_texts_are_held_against_references(lab: Lab) -> None:
    lab.add_pairs("foxes", b'{"prompt": "The fox", "reference": "runs to the river"}')
    test = quality(lab, quality="Texts", pairs="foxes", answer_tokens=4)
    assert errors(test) == []
    (frame,) = test.dataframe
    assert "BLEU" in list(frame.value["Score"])
    assert "B against A" in frame.value


def test_texts_of_three_sides_are_held_against_the_references_in_one_run(lab: Lab) -> None:
    lab.add_pairs("foxes", b'{"prompt": "The fox", "reference": "runs to the river"}')
    sides = (*WANTED.sides, Side(model="tiny", precision="int8"))
    test = quality(lab, sides=sides, quality="Texts", pairs="foxes", answer_tokens=4)
    assert errors(test) == []
    (frame,) = test.dataframe
    assert {"B against A", "C against A"} <= set(frame.value)
    assert {one.value[:2] for one in test.text} >= {"A:", "B:", "C:"}


@pytest.mark.parametrize(
    "fields", [{"text": "/etc/passwd"}, {"quality": "Tasks", "items": "../../etc/passwd"}]
)
def test_a_link_names_texts_and_no_paths(lab: Lab, fields: dict[str, str]) -> None:
    wanted = WANTED.model_copy(update=fields)
    test = page("lab/compare.py", c=pack(wanted.model_dump(mode="json")), threads="1")
    test.session_state["compare_view"] = "Quality"
    test.run()
    clicked(test, "Measure quality")
    assert any("There is no" in one and "passwd" in one for one in errors(test))
    assert lab.runs(kind=RunKind.EVALUATE) == lab.runs(kind=RunKind.TASKS) == ()


def test_the_history_is_empty_at_first_and_says_what_to_do(lab: Lab) -> None:
    test = page("operate/history.py")
    assert any("No run yet" in one.value for one in test.caption)


def test_a_run_is_opened_noted_and_done_again(lab: Lab) -> None:
    request = Request(prompt="Once <b>upon</b>", seed=3, max_new_tokens=6, ignore_eos=True)
    run_id = lab.generate(lab.variant("tiny", threads=1), request)
    assert lab.wait(run_id, 60).run.state is RunState.DONE
    test = page("operate/history.py", id=run_id)
    (note,) = (one for one in test.text_input if one.label == "Note")
    note.input("slow | fast <i>").run()
    (pin,) = (one for one in test.toggle if one.label == "Pinned")
    pin.set_value(True).run()
    said = lab.annotation(run_id)
    assert (said.note, said.pinned) == ("slow | fast <i>", True)
    clicked(test, "Run again")
    (newest, _) = lab.runs(kind=RunKind.GENERATE)
    assert newest.parent_id == run_id
    first, second = lab.wait(run_id, 60), lab.wait(newest.id, 60)
    assert first.run.text == second.run.text


def test_a_comparison_is_done_again_from_its_settings(lab: Lab) -> None:
    work = Compare(
        variants=(lab.variant("tiny", threads=1),) * 2,
        cells=(Cell(prompt_tokens=8, new_tokens=4),),
        stop=StopRule(max_pairs=6, min_pairs=6),
        block_s=0.0,
    )
    run_id = lab.compare(work)
    lab.wait(run_id, 60)
    test = page("operate/history.py", id=run_id)
    clicked(test, "Run again")
    measured(lab, 2)
    newest = lab.runs(kind=RunKind.COMPARE)[0]
    assert newest.parent_id == run_id
    assert lab.snapshot(newest.id).run.result["complete"]


def test_two_comparisons_asked_for_at_once_are_measured_one_after_the_other(lab: Lab) -> None:
    work = Compare(
        variants=(lab.variant("tiny", threads=1),) * 2,
        cells=(Cell(prompt_tokens=8, new_tokens=4),),
        stop=StopRule(max_pairs=6, min_pairs=6),
        block_s=0.0,
    )
    asked = [lab.compare(work) for _ in range(2)]
    first, second = (lab.wait(one, 60).run for one in asked)
    assert (first.state, second.state) == (RunState.DONE, RunState.DONE)
    assert first.ended_at <= second.started_at


def test_a_baseline_is_marked_and_held_against(lab: Lab) -> None:
    work = Compare(
        variants=(lab.variant("tiny", threads=1),) * 2,
        cells=(Cell(prompt_tokens=8, new_tokens=4),),
        stop=StopRule(max_pairs=6, min_pairs=6),
        block_s=0.0,
    )
    run_id = lab.compare(work)
    lab.wait(run_id, 60)
    test = page("operate/history.py", id=run_id)
    (marked,) = (one for one in test.toggle if one.label == "Baseline")
    marked.set_value(True).run()
    assert lab.baselines() == (run_id,)
    assert any("Is it slower now?" in one.label for one in test.button)
    new = lab.start(lab.regression(run_id, lab.variant("tiny", "bf16", threads=1)))
    found = lab.wait(new, 60).run
    assert found.result["baseline"] == run_id
    assert isinstance(found.result["regressed"], bool)
    shown = page("lab/compare.py", result=new, threads="1")
    assert any(f"A is the baseline, run {run_id}" in one.value for one in shown.caption)


def test_every_run_stands_under_the_machines_ceilings(lab: Lab) -> None:
    test = page("operate/history.py")
    test.session_state["history_tab"] = "Ceilings"
    test.run()
    assert any("No run says yet" in one.value for one in test.caption)
    work = Compare(
        variants=(lab.variant("tiny", threads=1),) * 2,
        cells=(Cell(prompt_tokens=8, new_tokens=4),),
        stop=StopRule(max_pairs=6, min_pairs=6),
        block_s=0.0,
    )
    run_id = lab.compare(work)
    lab.wait(run_id, 60)
    test.run()
    assert not test.exception
    (frame,) = test.dataframe
    assert set(frame.value["Run"]) == {run_id}
    assert len(frame.value) == 4  # two sides, prefill and decode
    assert all(frame.value["MBU"] > 0)


def test_a_question_is_asked_and_a_change_is_refused(lab: Lab) -> None:
    test = page("operate/history.py")
    test.session_state["history_tab"] = "SQL"
    test.run()
    (field,) = (one for one in test.text_area if one.label.startswith("SELECT"))
    field.input("SELECT 6 * 7 AS answer")
    clicked(test, "Ask")
    assert [frame.value["answer"].tolist() for frame in test.dataframe] == [[42]]
    (field,) = (one for one in test.text_area if one.label.startswith("SELECT"))
    field.input("DELETE FROM runs")
    clicked(test, "Ask")
    assert any("Only SELECT can be asked" in one for one in errors(test))
