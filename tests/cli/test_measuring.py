"""``bench`` and ``compare`` as a person and a script use them, on a tiny model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcore.__main__ import main
from gptcore.records import RunKind
from gptcore.store import open_store
from tests.tiny import tiny_checkpoint


@pytest.fixture
def model(data_folder: Path, tmp_path: Path) -> str:
    return str(tiny_checkpoint(tmp_path / "tiny"))


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status, out, err = ran(capsys, *arguments, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


GRID = ("--prompt-tokens", "8,16", "--new-tokens", "4", "--batch", "1,2", "--threads", "1")
QUICK = ("--repetitions", "2", "--seconds", "0", "--loads", "1")


def test_bench_prints_measurements_with_units_and_keeps_them(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, "bench", "--model", model, *GRID, *QUICK)
    for one in found["measurements"]:
        assert {"name", "unit", "n", "median", "p05", "p95", "observations"} <= set(one)
        assert one["name"].endswith(("_s", "_tokens_per_s"))
    decoded = [one for one in found["measurements"] if one["name"] == "decode_s"]
    assert [(one["prompt_tokens"], one["batch"]) for one in decoded] == [
        (8, 1),
        (8, 2),
        (16, 1),
        (16, 2),
    ]
    assert found["provenance"]["threads"] == 1
    with open_store() as store:
        run = store.run(found["run_id"])
        assert run is not None
        assert run.kind is RunKind.BENCH
        assert run.result is not None
        assert run.result["measurements"] == found["measurements"]
        kept = {one.name: one.observations for one in store.measurements(run.id)}
    assert list(kept["pp8 tg4 b2 decode_s"]) == decoded[1]["observations"]


def test_bench_as_text_has_a_line_a_number_and_a_label_on_its_energy(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--targets", "decode", "--no-save")
    status, out, _ = ran(capsys, "bench", "--model", model, *QUICK, *chosen, "--threads", "1")
    assert status == 0
    assert "tokens/s" in out
    assert "MBU" in out
    assert any(label in out for label in ("estimated", "measured", "unavailable"))
    assert "request" not in out
    with open_store() as store:
        assert store.runs(kind="bench") == ()


def test_bench_speaks_llama_benchs_language(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--llama-bench-json", "--prompt-tokens", "8", "--new-tokens", "4", "--threads", "1")
    status, out, _ = ran(capsys, "bench", "--model", model, *QUICK, *chosen)
    assert status == 0
    prefill, decode = sorted(map(json.loads, out.splitlines()), key=lambda one: one["n_gen"])
    assert (prefill["n_prompt"], prefill["n_gen"]) == (8, 0)
    assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 3, 8)
    assert decode["avg_ts"] == pytest.approx(
        sum(3e9 / one for one in decode["samples_ns"]) / len(decode["samples_ns"]), rel=1e-3
    )
    assert len(decode["samples_ns"]) >= 2


def test_compare_names_both_sides_and_says_a_sentence(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("compare", "--model", model, "--against-precision", "bf16", "--threads", "1")
    cell = ("--prompt-tokens", "8", "--new-tokens", "4", "--max-pairs", "16")
    found = as_json(capsys, *arguments, *cell)
    assert [one["precision"] for one in found["sides"]] == ["fp32", "bf16"]
    assert {one["metric"] for one in found["comparisons"]} >= {"prefill_s", "decode_s"}
    for one in found["comparisons"]:
        assert one["low"] <= one["ratio"] <= one["high"]
        assert one["sentence"]
    with open_store() as store:
        run = store.run(found["run_id"])
    assert run is not None
    assert run.result is not None
    assert run.result["comparisons"] == found["comparisons"]


def test_compare_with_nothing_against_measures_the_noise(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = ("--prompt-tokens", "8", "--new-tokens", "4", "--max-pairs", "16", "--threads", "1")
    status, out, _ = ran(capsys, "compare", "--model", model, *cell)
    assert status == 0
    assert "Noise floor" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bench", "--batch", "two"), "--batch is 'two'; it must be a whole number"),
        (("bench", "--batch", "0"), "atch"),
        (("bench", "--targets", "speed"), "argets"),
        (("bench", "--repetitions", "0"), "epetitions"),
        (("bench", "--prompt-tokens", "510", "--new-tokens", "4"), "do not fit into the context"),
        (("bench", "--batch", ",".join(map(str, range(1, 70)))), "69 cells; the most is 64"),
        (("compare", "--min-pairs", "3"), "airs"),
        (("compare", "--max-pairs", "7", "--min-pairs", "9"), "pairs"),
        (("compare", "--against-threads", "2"), "differ in threads (1 and 2)"),
        (("compare", "--against-model", "nobody"), "nobody"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: tuple[str, ...], said: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = arguments
    status, out, err = ran(capsys, command, "--model", model, "--threads", "1", *rest)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
