"""``eval few-shot`` and ``constrain``: what they promise, what they refuse, what they keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcore.__main__ import main
from gptcore.records import RunKind, RunState
from gptcore.store import open_store
from tests.tiny import tiny_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "owl"]},
        "legs": {"type": "integer", "minimum": 2, "maximum": 4},
        "tame": {"type": "boolean"},
    },
    "required": ["kind", "legs", "tame"],
    "additionalProperties": False,
}
RULES = {
    "choices": ("--choice", "yes", "--choice", "no", "--choice", "it depends"),
    "regex": ("--regex", r"[A-C]-\d{2,3}"),
    "schema": ("--json-schema", "FILE"),
}
Said = tuple[int, str, str]
Cli = Callable[..., Said]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("in context") / "tiny")


@pytest.fixture
def cli(data_folder: Path, capfd: pytest.CaptureFixture[str], tiny: Path) -> Cli:
    """Run a command on the tiny model, in this process."""

    def run(*arguments: str | Path) -> Said:
        capfd.readouterr()
        words = 2 if arguments[0] == "eval" else 1
        given = (*arguments[:words], "--model", tiny, "--threads", "1", *arguments[words:])
        try:
            status = main([str(one) for one in given])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    return file


def found(said: Said) -> dict[str, Any]:
    assert said[0] == 0, said[2]
    return json.loads(said[1], parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_200_hot_texts_of_200_follow(cli: Cli, schema: Path, rule: str) -> None:
    """Judged by jsonschema and regex, not by the library that guides."""
    words = [str(schema) if one == "FILE" else one for one in RULES[rule]]
    made = found(
        cli("constrain", "--prompt", "A pet:", *words, "--texts", "200", "--temperature", "1.5",
            "--max-new-tokens", "120", "--json")
    )  # fmt: skip
    assert made["followed"] == made["finished"] == len(made["texts"]) == 200
    assert len({one["text"] for one in made["texts"]}) > 2
    assert not any(one["follows"] for one in made["free"])
    assert made["compile_s"] > 0
    assert 0 < made["mask_s"] < made["step_s"]


def test_the_cost_of_a_rule_is_printed_and_the_run_is_kept(cli: Cli) -> None:
    status, out, _ = cli("constrain", "--prompt", "A pet:", *RULES["regex"], "--texts", "2")
    assert status == 0
    assert "2 of 2 finished texts follow the regular expression" in out
    assert "ms a token" in out
    (run,) = open_store().runs(kind=RunKind.EXPLAIN)
    assert run.state is RunState.DONE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--regex", "(a"), "unclosed group"),
        (("--json-schema", "nowhere.json"), "cannot be read"),
        (("--json-schema", "FILE", "--regex", "a"), "not allowed with"),
        ((), "is required"),
        (("--choice", " "), "A choice is empty"),
        (("--choice", "a", "--texts", "0"), "0"),
        (("--choice", "a", "--temperature", "3"), "3"),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_used_is_one_sentence(
    cli: Cli, schema: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = [str(schema) if one == "FILE" else one for one in arguments]
    status, out, err = cli("constrain", "--prompt", "A pet:", *given)
    assert status == 2
    assert not out
    assert said in err.splitlines()[-1]


def test_a_schema_with_an_unsupported_keyword_names_it(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "array", "uniqueItems": True}))
    status, _, err = cli("constrain", "--prompt", "A pet:", "--json-schema", file)
    assert status == 2
    assert "uniqueItems" in err


def test_few_shot_tells_each_k_with_its_interval_and_raw_answers(cli: Cli) -> None:
    made = found(
        cli(
            "eval", "few-shot", "--kinds", "facts", "--shots", "0,1", "--most-items", "50", "--json"
        )
    )
    assert [one["shots"] for one in made["shots"]] == [0, 1]
    assert all(one["low"] <= one["ratio"] <= one["high"] for one in made["shots"])
    assert len(made["answers"]) == made["n"] == 50
    assert made["answers"][0]["answers"]["1"]["prompt"].count("\n\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shots", "a"), "no list of numbers"),
        (("--shots", "99"), "0 to 32"),
        (("--most-items", "3"), "50"),
        (("--items", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--kinds", "nothing"), "nothing"),
    ],
    ids=str,
)
def test_bad_orders_of_few_shot_are_one_sentence(
    cli: Cli, arguments: tuple[str, ...], said: str
) -> None:
    status, out, err = cli("eval", "few-shot", *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
