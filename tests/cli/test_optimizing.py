"""``optimize`` and ``prove`` as a script uses them, on a tiny model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcore.__main__ import main
from tests.tiny import tiny_checkpoint

PROOF = ("--quick", "--pairs", "6", "--threads", "1")


@pytest.fixture
def model(data_folder: Path, tmp_path: Path) -> str:
    return str(tiny_checkpoint(tmp_path / "tiny", scale=0.1))


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_a_variant_is_written_read_and_proven(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "small")
    given = ("--model", model, "--threads", "1", "--recipe", "int8", "--out", out, "--json")
    status, printed, err = ran(capsys, "optimize", *given)
    assert status == 0, err
    made: dict[str, Any] = json.loads(printed)
    assert made["artifact"] == out
    keys = {"seconds", "stored_bytes", "resident_bytes", "effective_bits", "coverage_ratio"}
    assert keys | {"skipped", "weights_sha256"} <= made.keys()
    status, printed, err = ran(capsys, "prove", model, out, *PROOF, "--json")
    assert status == 0, err
    card = json.loads(printed)
    assert [one["model"] for one in card["sides"]] == [model, out]
    assert {"ratio", "low", "high", "verdict"} <= card["axes"][0].keys()
    assert card["permalink"].endswith(card["run_id"])
    assert card["quality"]["kl_mean"] > 0
    status, printed, _ = ran(
        capsys, "generate", "--model", out, "--prompt", "Once", "--max-new-tokens", "4", "--json"
    )
    assert status == 0
    assert json.loads(printed)["precision"] == "int8"


def test_a_goal_that_is_missed_ends_with_1(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--model", model, "--recipe", "int8", *PROOF, "--stored-at-most")
    status, out, err = ran(capsys, "optimize", *given, "0.01")
    assert status == 1
    assert err.startswith("Goals were not met: Size at most 0.01, measured ")
    assert "not met" in out
    assert ran(capsys, "optimize", *given, "0.9")[0] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("optimize",), "recipe is empty"),
        (("optimize", "--recipe", "int4"), "choose bf16"),
        (("optimize", "--recipe", "int8", "--name", "gpt2"), "is no name for a variant"),
        (("prove",), "the same variant"),
        (("prove", "--recipe", "prune(sparsity=1.0)"), "sparsity"),
    ],
)
def test_wrong_input_is_one_sentence(
    given: tuple[str, ...], said: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = ran(capsys, *given, "--model", model)
    assert (status, out) == (2, "")
    assert said.lower() in err.lower()
    assert len(err.splitlines()) == 1
