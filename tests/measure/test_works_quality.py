"""Items and texts as works of a host: their results, what is told meanwhile, and their end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gptcore.errors import Cancelled, ContextOverflow, DoesNotFit, InvalidInput
from gptcore.host.works import WORKS, work_from_json
from gptcore.measure import works_quality as module
from gptcore.measure.tasks import compare_answers, evaluate_tasks, load_tasks
from gptcore.measure.text_scores import compare_pairs, score_pairs
from gptcore.measure.works_quality import Tasks, Texts
from gptcore.recipe import Variant
from gptcore.records import RunKind
from gptcore.spec import gpt
from tests.measure.desk import FakeDesk, variant

pytestmark = pytest.mark.usefixtures("data_folder")


@pytest.fixture
def items(tmp_path: Path) -> str:
    lines = [
        {
            "context": f"Item {number} of it",
            "choices": [chr(97 + (number + step) % 26) + " x" for step in (0, 5, 11)],
            "answer": number % 2,
            "kind": f"kind {number % 3}",
        }
        for number in range(24)
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    lines: list[dict[str, Any]] = [
        {"prompt": f"Pair {number}", "references": ["a b c", f"{number} d"][: 1 + number % 2]}
        for number in range(6)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def tasks(items: str, *variants: Variant, **more: Any) -> Tasks:
    return Tasks(items=items, variants=variants or (variant(),), **more)


def texts(pairs: str, *variants: Variant, **more: Any) -> Texts:
    return Texts(pairs=pairs, variants=variants or (variant(),), max_new_tokens=6, **more)


def as_json(found: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(found, allow_nan=False))


def test_one_variant_is_asked_all_items(items: str) -> None:
    desk = FakeDesk()
    found = as_json(tasks(items, examples=1, seed=4).perform(desk))
    engine = desk.load(variant()).engine
    report, answers = evaluate_tasks(
        engine.model, engine.tokenizer, load_tasks(Path(items)), examples=1, seed=4
    )
    assert found["overall"]["accuracy"]["right"] == report.overall.accuracy.right
    assert [one["kind"] for one in found["kinds"]] == ["kind 0", "kind 1", "kind 2"]
    assert found["overall"]["accuracy"]["n"] == 24
    assert (found["model"], found["examples"], found["seed"]) == ("tiny-0", 1, 4)
    assert found["items_hash"] == report.items_hash
    assert found["against"] is None
    assert "flips" not in found
    assert desk.kept == {"right_logprob_nats": tuple(one.right_logprob for one in answers)}
    assert desk.phases[-1] == ("asking with tiny-0", 1.0)


def test_two_variants_are_asked_the_same_and_their_answers_paired(items: str) -> None:
    desk = FakeDesk(room=1)
    found = as_json(tasks(items, variant(), variant(1)).perform(desk))
    asked = load_tasks(Path(items))
    both = []
    for one in (variant(), variant(1)):
        engine = FakeDesk().load(one).engine
        both.append(evaluate_tasks(engine.model, engine.tokenizer, asked)[1])
    flips = compare_answers(*both)
    assert flips.only_a + flips.only_b > 3  # two random models do not answer alike
    assert found["flips"]["only_a"] == flips.only_a
    assert found["flips"]["p"] == flips.p
    assert found["flips"]["verdict"] == flips.verdict
    assert found["flips_normalised"]["normalised"] is True
    assert (found["model"], found["against"]["model"]) == ("tiny-0", "tiny-1")
    assert desk.loads == ["tiny-0", "tiny-1"]
    assert len(found["flipped"]) == flips.only_a + flips.only_b
    for one in found["flipped"]:
        assert (one["right"] == one["b"]) is one["better"] is (one["right"] != one["a"])
    assert sum(one["better"] for one in found["flipped"]) == flips.only_b
    assert [share for _, share in desk.phases if share is not None][-1] == 1.0
    assert set(desk.kept) == {"right_logprob_nats", "against_right_logprob_nats"}


def test_three_variants_are_asked_once_each_and_held_against_the_first(items: str) -> None:
    desk = FakeDesk(room=1)
    found = as_json(tasks(items, variant(), variant(1), variant(2)).perform(desk))
    assert desk.loads == ["tiny-0", "tiny-1", "tiny-2"]
    for seed, one in ((1, found), (2, found["further"][0])):
        pair = as_json(tasks(items, variant(), variant(seed)).perform(FakeDesk()))
        assert pair["flips"]["only_a"] + pair["flips"]["only_b"] > 3
        for name in ("against", "flips", "flips_normalised", "flipped"):
            assert one[name] == pair[name]
    assert len(found["further"]) == 1
    assert "c_right_logprob_nats" in desk.kept


def test_three_variants_write_once_each_and_are_held_against_the_first(pairs: str) -> None:
    desk = FakeDesk(room=1)
    found = as_json(texts(pairs, variant(), variant(1), variant(2)).perform(desk))
    assert desk.loads == ["tiny-0", "tiny-1", "tiny-2"]
    for seed, one in ((1, found), (2, found["further"][0])):
        pair = as_json(texts(pairs, variant(), variant(seed)).perform(FakeDesk()))
        assert one["against"] == pair["against"]
        assert one["differences"] == pair["differences"]
        assert [text["outputs"][seed] for text in found["texts"]] == [
            text["outputs"][1] for text in pair["texts"]
        ]


def test_a_variant_against_itself_flips_nothing(items: str) -> None:
    found = tasks(items, variant(), variant()).perform(FakeDesk())
    assert (found["flips"]["only_a"], found["flips"]["only_b"]) == (0, 0)
    assert found["flips"]["logprob_difference_mean"] == 0
    assert found["flipped"] == []


def test_only_the_kinds_asked_for_are_asked(items: str) -> None:
    found = tasks(items, kinds=("kind 1",)).perform(FakeDesk())
    assert found["overall"]["accuracy"]["n"] == 8
    with pytest.raises(InvalidInput, match="There is no kind 'kind 9'; there are: kind 0, kind 1"):
        tasks(items, kinds=("kind 9",)).perform(FakeDesk())


def test_what_ships_is_asked_where_nothing_else_is_named() -> None:
    one = variant(spec=gpt(2, 32, 2, context=256, vocabulary=300))
    found = Tasks(variants=(one,), kinds=("cloze",)).perform(FakeDesk())
    assert found["items"] == "shipped"
    assert found["overall"]["accuracy"]["n"] >= 60
    # Random weights know nothing: the interval of 76 items reaches down to chance.
    assert found["overall"]["accuracy"]["low"] <= found["overall"]["chance_ratio"]


def test_what_a_is_worth_is_kept_when_b_cannot_be_loaded_or_it_is_stopped(items: str) -> None:
    desk = FakeDesk(broken={"tiny-1": 0})
    with pytest.raises(DoesNotFit):
        tasks(items, variant(), variant(1)).perform(desk)
    assert desk.partials[-1]["overall"]["accuracy"]["n"] == 24
    whole = FakeDesk(checks=10_000)
    tasks(items, variant(), variant(1)).perform(whole)
    assert whole.checks is not None
    desk = FakeDesk(checks=10_000 - whole.checks - 2)
    with pytest.raises(Cancelled):
        tasks(items, variant(), variant(1)).perform(desk)
    assert desk.partials[-1]["against"] is None


def test_a_variant_writes_for_each_prompt_and_is_scored(pairs: str) -> None:
    desk = FakeDesk()
    found = as_json(texts(pairs).perform(desk))
    outputs = [one["outputs"][0] for one in found["texts"]]
    references = [one["references"] for one in found["texts"]]
    assert len(outputs) == found["n"] == 6
    assert any(outputs)
    expected = {one.name: one.value for one in score_pairs(outputs, references).scores}
    assert {one["name"]: one["value"] for one in found["scores"]} == expected
    assert found["cut_off"] == 6  # random weights do not end a text
    assert found["against"] is None
    assert found == as_json(texts(pairs).perform(FakeDesk()))  # written greedily


def test_two_variants_write_and_their_scores_are_paired(pairs: str) -> None:
    found = as_json(texts(pairs, variant(), variant(1)).perform(FakeDesk(room=1)))
    a, b = zip(*(one["outputs"] for one in found["texts"]), strict=True)
    assert a != b
    references = [one["references"] for one in found["texts"]]
    expected = compare_pairs(a, b, references)
    assert [one["difference"] for one in found["differences"]] == [
        one.difference for one in expected
    ]
    assert [one["verdict"] for one in found["differences"]] == [one.verdict for one in expected]
    assert found["against"]["model"] == "tiny-1"


def test_a_result_keeps_a_bounded_number_of_texts(
    pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHOWN", 4)
    found = texts(pairs).perform(FakeDesk())
    assert len(found["texts"]) == 4
    assert found["n"] == 6


def test_an_answer_ends_before_a_stop_string(pairs: str) -> None:
    whole = texts(pairs).perform(FakeDesk())["texts"]
    stop = next(text[1] for one in whole if len(text := one["outputs"][0]) > 2)
    cut = texts(pairs, stop=(stop,)).perform(FakeDesk())["texts"]
    assert not any(stop in one["outputs"][0] for one in cut)
    assert whole != cut


def test_a_prompt_that_does_not_fit_names_its_pair(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "a" * length, "reference": "b"} for length in (5, 100)]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ContextOverflow, match="Pair 2: The prompt has 100 tokens"):
        texts(str(file)).perform(FakeDesk())
    with pytest.raises(InvalidInput, match="Pair 1: This model knows no chat"):
        texts(str(file), chat=True).perform(FakeDesk())


@pytest.mark.parametrize("checks", [0, 3, 20])
def test_writing_can_be_stopped_at_any_token(pairs: str, checks: int) -> None:
    desk = FakeDesk(checks=checks)
    with pytest.raises(Cancelled):
        texts(pairs).perform(desk)
    assert not desk.partials


def test_variants_on_two_devices_and_wrong_fields_are_refused(items: str) -> None:
    other = variant(1).model_copy(
        update={"placement": variant().placement.model_copy(update={"device": "cuda:0"})}
    )
    with pytest.raises(ValidationError, match="the variants are on cpu and cuda:0"):
        tasks(items, variant(), other)
    for kind, more, said in (
        (RunKind.TASKS, {"examples": 33}, "Examples is 33; the most is 32."),
        (RunKind.TASKS, {"variants": []}, "Variants"),
        (RunKind.TEXTS, {"pairs": "x", "stop": [""]}, "A stop string has 0 characters"),
        (RunKind.TEXTS, {}, "Pairs is missing."),
    ):
        value = {"variants": [variant().model_dump(mode="json")]} | more
        with pytest.raises(InvalidInput, match=said):
            work_from_json(kind, value)


def test_both_are_works_of_their_kind_that_come_back_from_json(items: str) -> None:
    for one in (
        tasks(items, variant(), variant(1), kinds=("kind 1",)),
        texts("mine", stop=("\n",)),
    ):
        assert WORKS[one.kind] is type(one)
        assert work_from_json(one.kind, json.loads(one.model_dump_json())) == one
        assert one.variants_used() == one.variants
