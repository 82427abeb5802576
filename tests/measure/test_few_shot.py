"""Accuracy over the number of examples: paired, with intervals, and every answer word for word."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gptcore.errors import Cancelled, InvalidInput
from gptcore.host.works import WORKS
from gptcore.measure import few_shot
from gptcore.measure.few_shot import FewShot
from gptcore.measure.tasks import evaluate_tasks, load_tasks, prompts
from gptcore.records import RunKind
from gptcore.spec import gpt
from tests.measure.desk import FakeDesk, variant

ROOMY = gpt(1, 16, 2, context=2048, vocabulary=300)
A = variant(1, ROOMY)


@pytest.fixture
def items(tmp_path: Path) -> str:
    """Sixty short items of two kinds."""
    lines = [
        {"context": f"{at} is", "choices": ["odd", "even"], "answer": 1 - at % 2,
         "kind": "low" if at < 30 else "high"}
        for at in range(60)
    ]  # fmt: skip
    file = tmp_path / "parity.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def performed(desk: FakeDesk | None = None, **fields: Any) -> dict[str, Any]:
    work = FewShot(variant=A, **fields)
    return json.loads(json.dumps(work.perform(desk or FakeDesk())))


def test_each_number_of_examples_gives_what_asking_so_gives(items: str) -> None:
    desk = FakeDesk()
    found = performed(desk, items=items, shots=(0, 2), seed=4)
    engine = desk.load(A).engine
    for one in found["shots"]:
        report, _ = evaluate_tasks(
            engine.model, engine.tokenizer, load_tasks(Path(items)), examples=one["shots"], seed=4
        )
        assert one["right"] == report.overall.accuracy.right
        assert (one["low"], one["high"]) == (
            report.overall.accuracy.low,
            report.overall.accuracy.high,
        )
        assert one["low"] <= one["ratio"] <= one["high"]
        assert set(one["kinds"]) == {"low", "high"}
    assert found["n"] == 60
    assert found["shots"][0]["verdict"] is None
    assert 0 <= found["shots"][1]["p"] <= 1


def test_the_description_stands_before_the_examples_and_these_before_the_question(
    items: str,
) -> None:
    known = load_tasks(Path(items))
    (with_both, *_) = prompts(known, 2, 0, "Odd or even?")
    (examples, *_) = prompts(known, 2, 0)
    assert with_both == f"Odd or even?\n\n{examples}"
    assert examples.count("\n\n") == 2
    found = performed(items=items, shots=(0, 1), description="Odd or even?")
    for one in found["answers"]:
        assert one["answers"]["0"]["prompt"] == f"Odd or even?\n\n{one['question']}"
        head, example, question = one["answers"]["1"]["prompt"].split("\n\n")
        assert head == "Odd or even?"
        assert question == one["question"]
        assert not example.startswith(question)


def test_the_description_changes_what_the_model_says(items: str) -> None:
    desk = FakeDesk()
    plain, told = (
        performed(desk, items=items, shots=(0,), description=text) for text in ("", "Odd or even?")
    )
    scores = [
        [one["answers"]["0"]["logprobs"] for one in found["answers"]] for found in (plain, told)
    ]
    assert scores[0] != scores[1]


def test_raw_answers_agree_with_the_accuracy(items: str) -> None:
    found = performed(items=items, shots=(0, 1))
    for one in found["shots"]:
        correct = sum(raw["answers"][str(one["shots"])]["correct"] for raw in found["answers"])
        assert correct == one["right"]


def test_more_questions_than_wanted_are_spread_over_all() -> None:
    work = FewShot(variant=A, most_items=60)
    questions = work.questions()
    assert len(questions) == len(set(questions)) == 60
    assert len({one.kind for one in questions}) == 5
    assert FewShot(variant=A, kinds=("facts",), most_items=50).questions()


def test_raw_answers_stop_where_they_would_be_too_much(
    items: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_shot, "MAX_KEPT_CHARS", 100)
    found = performed(items=items, shots=(0,))
    assert 0 < len(found["answers"]) < 60
    assert found["n"] == 60


def test_too_few_items_are_refused(tmp_path: Path, items: str) -> None:
    with pytest.raises(InvalidInput, match="There are 30 items and at least 50"):
        performed(items=items, kinds=("low",))
    with pytest.raises(InvalidInput, match="32 examples were asked for, and kind"):
        performed(items=items, shots=(32,))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shots": ()}, "at least 1"),
        ({"shots": (0, 0)}, "twice"),
        ({"shots": (33,)}, "0 to 32"),
        ({"description": "a\x00"}, "NUL"),
        ({"most_items": 49}, "50"),
    ],
)
def test_bad_orders_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FewShot(variant=A, **fields)


def test_it_can_be_stopped_and_keeps_what_it_knows(items: str) -> None:
    desk = FakeDesk(checks=200)
    with pytest.raises(Cancelled):
        performed(desk, items=items, shots=(0, 1, 2, 4, 8))
    assert 1 <= len(desk.partials) < 5


def test_the_host_knows_it() -> None:
    assert WORKS[RunKind.FEW_SHOT] is FewShot
    assert FewShot(variant=A, shots=(4, 0)).shots == (0, 4)
