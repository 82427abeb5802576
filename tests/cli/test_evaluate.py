"""``python -m gptcore eval perplexity``: promised keys, the text of a person, refusals."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcore.__main__ import main
from gptcore.host import worker
from gptcore.host.worker import Worker
from gptcore.measure import evaluate as module
from gptcore.records import RunKind, RunState
from gptcore.store import open_store
from gptcore.work import Loaded
from tests.tiny import tiny_checkpoint

PROMISED = {"perplexity", "bits_per_byte", "scored_tokens", "identity"}
PROMISED_AGAINST = {
    "kl_mean",
    "kl_p99",
    "same_top_ratio",
    "log_ppl_ratio_mean",
    "log_ppl_ratio_se",
}
SHORT = ("--window", "32", "--max-tokens", "320", "--threads", "1", "--prompts", "2")
SHORT = (*SHORT, "--new-tokens", "4")
Said = tuple[int, str, str]
Cli = Callable[..., Said]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("a folder") / "tiny")


@pytest.fixture
def cli(data_folder: Path, capfd: pytest.CaptureFixture[str], tiny: Path) -> Cli:
    """``eval perplexity`` on the tiny model, in this process."""

    def run(*arguments: str | Path) -> Said:
        capfd.readouterr()
        given = ("eval", "perplexity", "--model", tiny, *SHORT, *arguments)
        try:
            status = main([str(one) for one in given])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capfd.readouterr()

    return run


def found(said: Said) -> dict[str, Any]:
    assert said[0] == 0, said[2]
    return json.loads(said[1], parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_one_variant_gives_the_promised_keys_and_is_kept(cli: Cli, tiny: Path) -> None:
    one = found(cli("--stride", "16", "--json"))
    assert set(one) >= PROMISED
    assert "against" not in one
    assert one["scored_tokens"] == 319
    assert one["identity"]["stride"] == 16
    assert one["source_precision"] == "fp32"
    store = open_store()
    try:
        (run,) = store.runs()
        kept = {one.name for one in store.measurements(run.id)}
    finally:
        store.close()
    assert (run.kind, run.state, run.model) == (RunKind.EVALUATE, RunState.DONE, str(tiny))
    assert run.result is not None
    assert run.result["perplexity"] == one["perplexity"]
    assert kept == {"nll_nats_per_token"}


def test_against_a_precision_gives_the_paired_report(cli: Cli) -> None:
    both = found(cli("--against-precision", "int8", "--json"))
    assert set(both) >= PROMISED | PROMISED_AGAINST
    assert (both["precision"], both["against"]["precision"]) == ("fp32", "int8")
    assert both["kl_mean"] > 0
    assert both["greedy"]["prompts"] == 2


def test_against_a_recipe_and_against_a_model_are_understood(cli: Cli, tmp_path: Path) -> None:
    by_recipe = found(cli("--against-recipe", '[{"pass": "int8"}]', "--json", "--no-save"))
    by_name = found(cli("--against-precision", "int8", "--json", "--no-save"))
    assert by_recipe["against"]["variant"] == by_name["against"]["variant"]
    assert by_recipe["kl_mean"] == by_name["kl_mean"]
    other = tiny_checkpoint(tmp_path / "other", scale=0.3)
    by_model = found(cli("--against-model", other, "--json", "--no-save"))
    assert by_model["against"]["model"] == str(other)
    assert by_model["kl_mean"] > by_name["kl_mean"]


def test_the_same_against_itself_is_zero(cli: Cli) -> None:
    both = found(cli("--against-precision", "fp32", "--json", "--no-save"))
    assert both["kl_mean"] == both["log_ppl_ratio_mean"] == both["log_ppl_ratio_se"] == 0.0


def test_a_person_reads_the_same_numbers(cli: Cli) -> None:
    both = found(cli("--against-precision", "int8", "--json", "--no-save"))
    status, out, err = cli("--against-precision", "int8", "--no-save")
    assert (status, err) == (0, "")
    shown = dict(line.split(None, 1) for line in out.splitlines())
    assert shown["A"].endswith("fp32, baseline, cpu, weights stored as fp32")
    assert f"{both['perplexity']:,.4f} ± " in out
    assert f"{both['log_ppl_ratio_mean']:+.5f} ± " in out
    assert f"mean {both['kl_mean']:.4g}" in out
    assert "10 of 32 tokens, stride 32, nothing before each" in out


def test_a_users_file_is_read(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Once upon a time there was a fox. " * 20)
    one = found(cli("--text", file, "--json", "--no-save"))
    assert one["text"] == "mine.txt"
    assert one["perplexity"] != found(cli("--json", "--no-save"))["perplexity"]


def test_two_that_do_not_fit_together_take_turns_and_leave_the_memory(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ("--against-precision", "bf16", "--json", "--no-save")
    together = found(cli(*other))
    models: list[weakref.ref[Any]] = []
    build = Worker._built

    def built(self: Worker, *given: Any) -> Loaded:
        gc.collect()
        assert [one for one in models if one() is not None] == []
        loaded = build(self, *given)
        models.append(weakref.ref(loaded.engine.model))
        return loaded

    monkeypatch.setattr(worker, "MAX_LOADED", 1)
    monkeypatch.setattr(worker.Worker, "_built", built)
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 4 * 31 * 320 * 4)  # 4 of 10 windows
    in_turns = found(cli(*other))
    assert in_turns["alternated"] is True
    assert {**in_turns, "alternated": False} == together
    assert len(models) == 8


REFUSED = {
    "no file": (("--text", "nowhere.txt"), "There is no text file 'nowhere.txt'"),
    "calibration": (("--text", "calibration"), "is the calibration text"),
    "stride": (("--stride", "33"), "The stride of 33 is longer than the window of 32"),
    "window": (("--window", "1"), "Window is 1; the least is 2."),
    "context": (("--window", "513"), "longer than the context of"),
    "no word": (("--window", "many"), "invalid int value: 'many'"),
    "precision": (("--against-precision", "int3"), "invalid choice: 'int3'"),
    "recipe": (("--against-recipe", "int8("), "The recipe 'int8(' cannot be read"),
    "model": (("--against-model", "nobody"), "nobody"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_sentence_and_nothing_is_kept(case: str, cli: Cli) -> None:
    given, said = REFUSED[case]
    status, out, err = cli(*given, "--json")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert any(part in err for part in said.split("|")), err
    store = open_store()
    try:
        assert store.runs() == ()
    finally:
        store.close()
