"""One plan as the command, the address, the CSV and the report show it."""

import csv
import io
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gptcore.__main__ import main
from gptcore.errors import InvalidInput
from gptcore.plan.assumptions import Assumptions, make, on_card, read, source
from gptcore.plan.cards import CARDS
from gptcore.plan.outcome import outcome
from gptcore.plan.report import as_csv, as_html
from tests.conftest import ROOT


@pytest.mark.usefixtures("data_folder")
def test_the_command_prints_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "gpt3-175b", "--precision", "fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 174_604_259_328
    assert found["weights_bytes"] == 698_417_037_312
    assert set(found["training"]) >= {"flop", "device_years", "cost_usd"}
    assert found["training"]["device_years"] == pytest.approx(355.4, abs=0.1)
    assert main(["plan", "--model", "gpt3-175b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_bytes_per_token"] == 4_718_592


@pytest.mark.usefixtures("data_folder")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "gpt9"], "There is no model"),
        (["--card", "voodoo2"], "h200"),
        (["--batch", "0"], "Batch is 0; the least is 1"),
        (["--tokens", "1e30"], "the most is"),
        (["--tokens", "nan"], "must be"),
        (["--model", "custom", "--heads", "7"], "do not divide a width"),
    ],
)
def test_a_bad_assumption_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.usefixtures("data_folder")
def test_a_card_brings_its_power_unless_one_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    def watts(*more: str) -> float:
        assert main(["plan", "--card", "h100", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return float(found["assumptions"]["watts"]["value"])

    assert watts() == CARDS["h100"].watts
    assert watts("--watts", "123") == 123


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from gptcore.__main__ import main; "
        "main(['plan']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("data_folder")
@pytest.mark.parametrize("name", [*CARDS, "own", "machine"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_every_card_gives_a_plan(name: str, precision: str) -> None:
    found = outcome(Assumptions(model="gpt3-1.3b", card=name, precision=precision))
    assert (found.decode is None) == (name == "machine")
    assert json.loads(json.dumps(found.as_json()))["card"]["name"] == name
    assert found.tables()


@pytest.mark.usefixtures("data_folder")
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 1_000_000, "context": 16_777_216},
        {"work": "training", "precision": "int8"},
        {"tensor": 7},
        {"pipeline": 1000},
        {"requests_per_s": 1e7},
        {"prompt_tokens": 100_000},
        {"model": "custom", "layers": 1, "width": 1, "heads": 1, "window": 1, "vocabulary": 1},
    ],
)
def test_extremes_are_planned_or_explained(changes: dict[str, object]) -> None:
    found = outcome(make(changes))
    assert json.dumps(found.as_json(), allow_nan=False)
    assert found.memory is not None or found.memory_problem


def test_an_address_restores_every_assumption_and_names_what_it_refuses() -> None:
    base = Assumptions(model="gpt2", card="h200", batch=7, tokens=1.5e12, zero=3)
    query = {name: [str(value)] for name, value in base.model_dump().items()}
    assert read(query) == (base, [])
    found, problems = read({**query, "batch": ["-3"], "card": ["voodoo2"], "other": ["1"]})
    assert (found.batch, found.card, found.model) == (1, "v100-32gb", "gpt2")
    assert len(problems) == 2
    assert any("1 is used instead" in said for said in problems)


def test_every_assumption_about_the_world_has_a_source() -> None:
    for name in ("tokens", "tflop_per_s", "usd_per_hour", "watts", "pue", "carbon_g_per_kwh",
                 "compute_ratio", "memory_ratio", "headroom"):  # fmt: skip
        assert source(name), name


def test_a_card_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no card"):
        on_card(Assumptions(), "floppy")


@pytest.mark.usefixtures("data_folder")
def test_the_csv_holds_every_number_once() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(outcome(Assumptions(model="gpt3-1.3b"))))))
    by_name = {(row["section"], row["name"]): row["value"] for row in rows}
    assert len(by_name) == len(rows)
    assert by_name["size", "total"] == "1315723264"
    assert {name for section, name in by_name if section == "assumption"} == set(
        Assumptions.model_fields
    )


@pytest.mark.usefixtures("data_folder")
def test_a_name_cannot_become_a_formula_or_markup(tmp_path: Path) -> None:
    evil = "=<script>alert(1)</script>"
    spec = Assumptions(model="gpt2").spec()
    found = outcome(Assumptions(model=evil), {evil: spec})
    assert f"'{evil}" in as_csv(found)
    page = as_html(found, datetime(2026, 1, 2, tzinfo=UTC), "javascript:alert(1)")
    assert "<script" not in page
    assert "javascript:" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.usefixtures("data_folder")
def test_the_report_is_one_page_that_asks_no_other_host() -> None:
    page = as_html(
        outcome(Assumptions()), datetime(2026, 1, 2, tzinfo=UTC), "http://x/plan?a=1&b=2"
    )
    assert "174,604,259,328" in page
    assert "355.4 years" in page
    assert "a=1&amp;b=2" in page
    assert "src=" not in page
    assert "@import" not in page
    assert all(
        (field.title or name) in page.replace("&amp;", "&")
        for name, field in Assumptions.model_fields.items()
    )
