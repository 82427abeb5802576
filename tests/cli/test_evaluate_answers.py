"""``eval tasks`` and ``eval texts``: what a person brings is asked, scored, refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcore.__main__ import main
from gptcore.errors import InvalidInput
from gptcore.measure.corpora import calibration_text
from gptcore.measure.evaluate import Evaluate
from gptcore.recipe import Calibration, Recipe
from gptcore.records import RunKind
from gptcore.store import open_store
from tests.measure.desk import FakeDesk, variant
from tests.tiny import tiny_checkpoint

ITEMS = "\n".join(
    json.dumps({"context": f"{n} foxes and", "choices": ["a river", "books"], "answer": n % 2})
    for n in range(12)
)
PAIRS = "\n".join(
    json.dumps({"prompt": f"The fox number {n}", "reference": f"said {n} to the river"})
    for n in range(4)
)


@pytest.fixture
def model(data_folder: Path, tmp_path: Path) -> str:
    (tmp_path / "items.jsonl").write_text(ITEMS)
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    return str(tiny_checkpoint(tmp_path / "tiny"))


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_own_items_are_asked_with_examples_and_kept_as_a_run(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("eval", "tasks", "--model", model, "--threads", "1")
    own = ("--items", str(tmp_path / "items.jsonl"))
    none, three = (as_json(capsys, *asked, *own, "--examples", k) for k in ("0", "3"))
    for found, examples in ((none, 0), (three, 3)):
        accuracy = found["overall"]["accuracy"]
        assert (found["examples"], accuracy["n"]) == (examples, 12)
        assert accuracy["low"] <= accuracy["ratio"] <= accuracy["high"]
        assert found["against"] is None
    logs = [found["overall"]["right_logprob_mean"] for found in (none, three)]
    assert logs[0] != logs[1]  # the examples stood before the items
    with open_store() as store:
        run = store.run(three["run_id"])
        assert run is not None
        assert run.kind is RunKind.TASKS


def test_two_variants_answer_the_same_items(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("eval", "tasks", "--model", model, "--threads", "1", "--no-save")
    own = ("--items", str(tmp_path / "items.jsonl"), "--against-precision", "bf16")
    assert main([*asked, *own]) == 0
    said = capsys.readouterr().out
    assert "B against A" in said
    assert "chance 50.0%" in said


def test_texts_are_written_and_scored_with_intervals_and_signatures(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("eval", "texts", "--model", model, "--threads", "1", "--max-new-tokens", "6")
    found = as_json(capsys, *asked, "--pairs", str(tmp_path / "pairs.jsonl"))
    assert {one["name"] for one in found["scores"]} >= {"bleu", "chrf", "rouge1", "meteor"}
    assert all(one["signature"] for one in found["scores"])
    assert [one["prompt"] for one in found["texts"]] == [f"The fox number {n}" for n in range(4)]
    assert main([*asked, "--pairs", str(tmp_path / "pairs.jsonl"), "--no-save"]) == 0
    assert "sacrebleu|" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tasks", "--items", "nowhere.jsonl"), "no set of items at 'nowhere.jsonl'"),
        (("tasks", "--kinds", "no-such"), "no-such"),
        (("tasks", "--examples", "99"), "32"),
        (("texts", "--pairs", "nowhere.jsonl"), "no set of pairs at 'nowhere.jsonl'"),
    ],
)
def test_what_cannot_be_asked_ends_with_2_and_a_sentence(
    model: str, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    what, *options = arguments
    assert main(["eval", what, "--model", model, "--threads", "1", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_text_to_calibrate_with_is_no_text_to_evaluate_on(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("eval", "perplexity", "--model", model, "--threads", "1", "--window", "32")
    assert main([*asked, "--text", "calibration"]) == 2
    assert "looks better on it than it is" in capsys.readouterr().err


def test_a_variant_is_not_evaluated_on_the_text_that_it_was_calibrated_with(
    data_folder: Path, tmp_path: Path
) -> None:
    """The text is a person's own, so that only the recipe tells that it was used."""
    own = tmp_path / "own.txt"
    own.write_text(" ".join(f"The fox number {n} said {n * n} to the river." for n in range(400)))
    known = Calibration(text=str(own), hash=calibration_text(str(own), paths=True).hash)
    plain = variant(0)
    learnt = plain.model_copy(update={"recipe": Recipe(calibration=known)})
    windowing = {"window": 32, "max_tokens": 200}
    for sides in ({"variant": learnt}, {"variant": plain, "against": learnt}):
        work = Evaluate(**sides, text=str(own), windowing=windowing, prompts=0)
        with pytest.raises(InvalidInput, match="looks better on it than it is"):
            work.perform(FakeDesk())
    found = Evaluate(variant=plain, text=str(own), windowing=windowing, prompts=0)
    assert found.perform(FakeDesk())["scored_tokens"] > 0
