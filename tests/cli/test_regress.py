"""``regress`` as a team's CI uses it: the exit status says whether it became slower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptcore.__main__ import main
from gptcore.records import RunKind
from gptcore.store import open_store
from tests.tiny import tiny_checkpoint

CELL = ("--prompt-tokens", "16", "--new-tokens", "8")
FEW = ("--min-pairs", "8", "--max-pairs", "8")


@pytest.fixture
def baseline(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    model = tiny_checkpoint(tmp_path / "tiny")
    quick = ("--repetitions", "2", "--seconds", "0", "--loads", "1", "--targets", "decode")
    measured = ("bench", "--model", str(model), "--threads", "1", *CELL, *quick, "--json")
    assert main(measured) == 0
    return str(json.loads(capsys.readouterr().out)["run_id"])


def test_a_large_delay_ends_with_1_and_is_kept_as_a_run(
    baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ("--delay-ratio", "1", "--json")
    assert main(["regress", "--baseline", baseline, *FEW, *slow]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["regressed"]
    assert {one["verdict"] for one in found["slower"]} == {"slower"}
    assert found["cells"][0]["prompt_tokens"] == 16
    with open_store() as store:
        run = store.run(found["run_id"])
        assert run is not None
        assert run.kind is RunKind.REGRESS
        assert run.settings["baseline"] == baseline


def test_no_delay_ends_with_0_as_a_sentence(
    baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tolerating half as much again: on a busy machine eight pairs may lie apart by chance."""
    calm = ("--tolerate", "0.5", "--no-save")
    assert main(["regress", "--baseline", baseline, *FEW, *calm]) == 0
    assert "No slowdown was found." in capsys.readouterr().out


def test_without_a_name_the_run_marked_as_baseline_counts(
    baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["regress", *FEW]) == 2
    assert "No run is held as the baseline" in capsys.readouterr().err
    with open_store() as store:
        store.annotate(baseline, baseline=True)
    assert main(["regress", *FEW, "--tolerate", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == baseline


def test_another_precision_is_held_against_the_baselines(
    baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("--precision", "int8", "--tolerate", "9", "--prompt-tokens", "4", "--json")
    assert main(["regress", "--baseline", baseline, *FEW, *other]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["precision"] for one in found["sides"]] == ["fp32", "int8"]
    cell = found["cells"][0]
    assert (cell["prompt_tokens"], cell["new_tokens"]) == (4, 32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--baseline", "nothing"), "no run nothing"),
        (("--threads", "2"), "differ in threads (1 and 2): accept threads"),
        (("--prompt-tokens", "many"), "must be a whole number"),
        (("--tolerate", "-1"), "tolerated"),
    ],
)
def test_what_cannot_be_asked_ends_with_2_and_a_sentence(
    baseline: str, options: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = options if "--baseline" in options else ("--baseline", baseline, *options)
    assert main(["regress", *named]) == 2
    assert said.lower() in capsys.readouterr().err.lower()


def test_a_baseline_whose_weights_are_gone_is_refused(
    baseline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "tiny", scale=0.4)
    assert main(["regress", "--baseline", baseline]) == 2
    said = capsys.readouterr().err
    assert "not those that the baseline measured" in said
