"""The command line: real processes for what a process is, and ``main`` itself for the rest."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptcore.__main__ import MAX_ARGUMENTS, STOPPED, UNREAD, _drawable, main
from gptcore.catalogue import SHIPPED, ModelEntry
from gptcore.device import devices
from gptcore.host.lock import device_lock
from gptcore.records import MAX_PROMPT_CHARS, MAX_SEED, RunState
from gptcore.spec import PRESETS
from gptcore.store import open_store
from tests.conftest import ROOT
from tests.tiny import tiny_checkpoint

COMMAND = (sys.executable, "-m", "gptcore")
PROMISED = {
    "text",
    "token_ids",
    "prompt_tokens",
    "new_tokens",
    "finish_reason",
    "load_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "mbu_ratio",
}
"""The keys of ``generate --json`` that scripts and teams rely on."""
MORE = {
    "queue_s",
    "mbu_bytes_per_step",
    "mbu_peak_bytes_per_s",
    "cut_tokens",
    "decoder",
    "guessed_tokens",
    "accepted_tokens",
    "reused_tokens",
    "model",
    "precision",
    "device",
    "threads",
    "seed",
    "variant",
    "run_id",
}
MODEL_KEYS = {
    "name",
    "title",
    "kind",
    "parameters",
    "parameters_by_part",
    "context_tokens",
    "stored_bytes",
    "source_precision",
    "ships",
    "licence",
    "provenance",
    "chat",
    "note",
    "problem",
    "path",
    "spec",
    "variant",
}


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))

    @property
    def refusal(self) -> str:
        """The one sentence on standard error."""
        assert self.status == 2
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        assert len(lines[0]) < 500
        return lines[0]


Cli = Callable[..., Said]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder outside the catalogue."""
    return tiny_checkpoint(tmp_path_factory.mktemp("a folder") / "tiny")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can write for minutes."""
    return tiny_checkpoint(tmp_path_factory.mktemp("endless") / "tiny", context=200_000)


@pytest.fixture
def cli(data_folder: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    """``main`` in this process."""

    def run(*arguments: str | Path) -> Said:
        capfd.readouterr()
        try:
            status = main([str(one) for one in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return Said(status, *capfd.readouterr())

    return run


@pytest.fixture
def cli_process(data_folder: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """``python -m gptcore`` in a process of its own, ended with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=ROOT,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen[bytes], given: str | None = None) -> Said:
    """Return what a process said to its end; bytes, so that no line end is translated."""
    out, err = process.communicate(given and given.encode(), timeout=60)
    return Said(process.returncode, (out or b"").decode(), err.decode())


def writing(model: Path, *more: str | Path) -> Sequence[str | Path]:
    return ("generate", "--model", model, "--threads", "1", "--prompt", "the fox", *more)


def runs() -> Sequence[Any]:
    """Return what the database of this test holds."""
    store = open_store()
    try:
        return store.runs()
    finally:
        store.close()


# In processes of their own


def test_the_same_seed_gives_the_same_bytes_in_every_process(
    tiny: Path, cli: Cli, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Two processes and this one; 40 tokens at temperature 1.5 are never alike by luck."""
    hot = writing(tiny, "--temperature", "1.5", "--max-new-tokens", "40", "--ignore-eos")
    first = ended(cli_process(*hot, "--seed", "7"))
    second = ended(cli_process(*hot, "--seed", "7", "--json"))
    assert (first.status, first.err) == (0, "")
    assert first.out == second.json["text"] + "\n"
    assert second.json["new_tokens"] == 40
    third = cli(*hot, "--seed", "7", "--json").json
    assert (third["text"], third["token_ids"]) == (second.json["text"], second.json["token_ids"])
    other = cli(*hot, "--seed", "8", "--json").json
    assert other["token_ids"] != third["token_ids"]


def test_models_are_pulled_listed_and_shown_by_processes(
    tiny: Path, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    pulled = ended(cli_process("models", "pull", tiny, "--name", "mine", "--json")).json
    assert set(pulled) == MODEL_KEYS
    assert pulled["name"] == "mine"
    assert pulled["kind"] == "installed"
    shown = ended(cli_process("models", "show", "mine", "--json")).json
    assert shown == pulled
    listed = ended(cli_process("models", "list", "--json")).json
    assert set(listed) == {"models"}
    names = [one["name"] for one in listed["models"] if not one["ships"]]
    assert names == ["mine", *PRESETS]
    assert all(set(one) == MODEL_KEYS for one in listed["models"])
    assert listed["models"][0] == shown
    again = ended(cli_process("models", "pull", tiny, "--name", "mine"))
    assert again.refusal.startswith("There is already a model 'mine'")


REFUSE_AND_MEASURE = """
import sys
from gptcore.__main__ import main
from gptcore.measure.memory import PeakMemory

with PeakMemory() as memory:
    status = main(sys.argv[1:])
print(memory.peak_bytes)
sys.exit(status)
"""


def test_175b_is_refused_with_both_numbers_and_allocates_nothing(data_folder: Path) -> None:
    asked = ("generate", "--model", "gpt3-175b", "--prompt", "hi")
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_AND_MEASURE, *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"gpt3-175b in fp32 does not fit on cpu: its 174,604,259,328 parameters take 698 GB "
        r"\(650\.5 GiB\), [\d.]+ GiB with cache and working space, and [\d.,]+ [GM]iB are free\. "
        r"What would fit: gpt.* in .*\.\n",
        done.stderr,
    )
    assert int(done.stdout) < 2**30  # Python and torch take 0.3 GiB; the model would take 650
    assert runs() == ()


def test_ctrl_c_ends_at_once_and_keeps_what_was_written(
    endless: Path, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = cli_process(*writing(endless, "--max-new-tokens", "100000", "--ignore-eos"))
    assert process.stdout is not None
    written = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    before = time.monotonic()
    written += process.stdout.read()
    said = ended(process)
    assert time.monotonic() - before < 10
    assert (said.status, said.err) == (STOPPED, "Stopped.\n")
    (run,) = runs()
    assert run.state is RunState.CANCELLED
    assert written.decode() == run.text + "\n"
    assert len(written) >= 20
    assert run.numbers.new_tokens > 0


@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.7])
def test_ctrl_c_before_anything_runs_leaves_no_traceback(
    after_s: float, endless: Path, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """While Python starts, while the program is imported, while torch is."""
    process = cli_process(*writing(endless, "--max-new-tokens", "100000", "--ignore-eos"))
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    said = ended(process)
    assert said.status in (STOPPED, -signal.SIGINT, 1)
    # Before the first line of ours runs, Python itself may say KeyboardInterrupt.
    assert "gptcore" not in said.err
    assert said.err in ("", "Stopped.\n") or "KeyboardInterrupt" in said.err


def test_output_into_a_closed_pipe_ends_the_work_without_a_word(
    endless: Path, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """As in ``| head -1``: nothing on standard error, and the run is kept as cancelled."""
    process = cli_process(*writing(endless, "--max-new-tokens", "100000", "--ignore-eos"))
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    said = ended(process)
    assert (said.status, said.err) == (UNREAD, "")
    (run,) = runs()
    assert run.state is RunState.CANCELLED


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_a_list_that_nobody_reads_ends_without_a_word(
    json_too: tuple[str, ...], cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        said = ended(cli_process("models", "list", *json_too, stdout=writer))
    finally:
        os.close(writer)
    assert (said.status, said.err) == (UNREAD, "")


def test_a_taken_device_is_named_and_waited_for(
    tiny: Path, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    short = writing(tiny, "--max-new-tokens", "2", "--json")
    with device_lock("cpu", "a measurement"):
        refused = ended(cli_process(*short)).refusal
        assert re.fullmatch(
            rf"cpu is taken by process {os.getpid()} \(a measurement, since [^)]+\): try again "
            r"later\. Or wait for it, with --wait\.",
            refused,
        )
        assert runs() == ()
        waiting = cli_process(*short, "--wait")
        assert waiting.stderr is not None
        line = waiting.stderr.readline().decode()
        assert line.startswith(f"waiting: cpu has process {os.getpid()} (a measurement, since ")
        assert waiting.poll() is None
    found = ended(waiting).json
    assert found["new_tokens"] == 2
    assert found["queue_s"] > 0
    assert found["e2e_s"] > found["queue_s"]


def test_ctrl_c_while_waiting_for_a_device_ends_the_wait(
    tiny: Path, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    with device_lock("cpu", "a measurement"):
        waiting = cli_process(*writing(tiny, "--wait"))
        assert waiting.stderr is not None
        assert waiting.stderr.readline().startswith(b"waiting")
        waiting.send_signal(signal.SIGINT)
        said = ended(waiting)
    assert (said.status, said.out, said.err) == (STOPPED, "", "Stopped.\n")


def test_ten_million_characters_on_standard_input_are_refused(
    tiny: Path, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = cli_process("generate", "--model", tiny, "--prompt", "-", stdin=subprocess.PIPE)
    said = ended(process, "a" * 10_000_000)
    assert said.refusal == (
        f"The prompt has 10,000,000 characters; the most is {MAX_PROMPT_CHARS:,}: shorten it."
    )


def test_a_hundred_thousand_stop_strings_are_refused_in_seconds(
    tiny: Path, cli_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    before = time.monotonic()
    said = ended(cli_process(*writing(tiny), *["--stop=x"] * 100_000))
    assert time.monotonic() - before < 20
    assert (
        said.refusal == f"There are 100,007 arguments; the most is {MAX_ARGUMENTS:,}: give fewer."
    )


# In this process


def test_generate_has_the_promised_keys(tiny: Path, cli: Cli) -> None:
    found = cli(
        *writing(tiny, "--max-new-tokens", "5", "--ignore-eos", "--seed", "3", "--json")
    ).json
    assert set(found) == PROMISED | MORE
    assert found["finish_reason"] == "length"
    assert found["new_tokens"] == len(found["token_ids"]) == 5
    assert (found["seed"], found["threads"], found["device"]) == (3, 1, "cpu")
    assert 0 < found["load_s"] < found["ttft_s"] < found["e2e_s"]
    assert found["e2e_s"] == pytest.approx(found["ttft_s"] + 4 * found["tpot_s"])
    assert found["decode_tokens_per_s"] == pytest.approx(1 / found["tpot_s"])
    bytes_per_s = found["mbu_bytes_per_step"] / found["tpot_s"]
    assert found["mbu_ratio"] == pytest.approx(bytes_per_s / found["mbu_peak_bytes_per_s"])
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The system adds up a process's pages by batches: its two counts may part by some.
    assert 10_000_000 < found["peak_memory_bytes"] <= usage * 1024 + 2**20
    (run,) = runs()
    assert run.id == found["run_id"]
    assert (run.text, run.variant_hash) == (found["text"], found["variant"])


def test_plain_output_is_the_text_and_a_line_end(tiny: Path, cli: Cli) -> None:
    arguments = writing(tiny, "--max-new-tokens", "12", "--seed", "5", "--no-save")
    plain = cli(*arguments)
    assert plain == Said(0, cli(*arguments, "--json").json["text"] + "\n", "")


def test_forced_ids_open_the_answer(tiny: Path, cli: Cli) -> None:
    """With the ids and the seed of an earlier answer it goes on as that did."""
    arguments = writing(tiny, "--seed", "11", "--ignore-eos", "--temperature", "1.5", "--json")
    whole = cli(*arguments, "--max-new-tokens", "12").json
    ids = whole["token_ids"]
    trunk = ",".join(map(str, ids[:5]))
    branch = cli(*arguments, "--max-new-tokens", "7", "--forced-ids", trunk).json
    assert branch["token_ids"] == ids
    assert branch["text"] == whole["text"]
    assert branch["new_tokens"] == 7
    other = f"{trunk},{(ids[5] + 1) % 320}"
    turned = cli(*arguments, "--max-new-tokens", "1", "--forced-ids", other).json
    assert turned["token_ids"][:6] == [*ids[:5], (ids[5] + 1) % 320]


def test_a_model_may_be_any_folder(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Absolute, relative, in the home folder, through a link, with a space and an accent."""
    (tmp_path / "mon modèle").symlink_to(tiny)
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("HOME", str(tiny.parent))
    found = set()
    for path in (tiny, "tiny", "./tiny", "~/tiny", tmp_path / "mon modèle"):
        said = cli(*writing(path, "--max-new-tokens", "3", "--seed", "1", "--no-save", "--json"))
        found.add((said.json["variant"], said.json["text"]))
        assert said.json["model"] == str(path)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("precision", "recipe"),
    [
        ("int8", ("--recipe", '[{"pass": "int8"}]')),
        ("int4", ("--precision", "bf16", "--recipe", '[{"pass": "int4"}]')),
    ],
)
def test_a_precision_is_short_for_a_recipe(
    precision: str, recipe: tuple[str, ...], tiny: Path, cli: Cli
) -> None:
    few = writing(tiny, "--max-new-tokens", "6", "--seed", "4", "--no-save", "--json")
    by_precision = cli(*few, "--precision", precision).json
    by_recipe = cli(*few, *recipe).json
    assert by_precision["precision"] == by_recipe["precision"] == precision
    assert by_precision["variant"] == by_recipe["variant"]
    assert by_precision["token_ids"] == by_recipe["token_ids"]
    assert by_precision["variant"] != cli(*few).json["variant"]


def test_a_chat_reads_the_template_and_a_prompt_does_not(tiny: Path, cli: Cli) -> None:
    few = ("--max-new-tokens", "2", "--seed", "1", "--json", "--no-save")
    plain = cli(*writing(tiny, *few)).json
    chat = cli(*writing(tiny, *few, "--chat")).json
    messages = json.dumps([{"role": "user", "content": "the fox"}])
    same = cli("generate", "--model", tiny, "--threads", "1", "--messages", messages, *few).json
    assert chat["prompt_tokens"] == same["prompt_tokens"] > plain["prompt_tokens"]
    assert chat["token_ids"] == same["token_ids"]


def test_a_stop_string_ends_the_text_before_it(tiny: Path, cli: Cli) -> None:
    arguments = writing(tiny, "--seed", "2", "--max-new-tokens", "40", "--ignore-eos", "--json")
    whole = cli(*arguments).json["text"]
    stop = next(one for one in whole[10:] if one.isalnum() and one not in whole[:10])
    cut = cli(*arguments, "--stop", stop).json
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole[: whole.index(stop)]


def test_nothing_is_kept_with_no_save(tiny: Path, cli: Cli) -> None:
    assert (
        cli(*writing(tiny, "--max-new-tokens", "2", "--no-save", "--json")).json["run_id"] is None
    )
    assert runs() == ()


def test_a_database_that_cannot_be_used_costs_no_text(
    tiny: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "lab.db"
    broken.write_text("this is no database")
    monkeypatch.setenv("GPTLAB_DATABASE_URL", f"sqlite:///{broken}")
    said = cli(*writing(tiny, "--max-new-tokens", "4", "--ignore-eos", "--json"))
    assert said.json["new_tokens"] == 4
    assert said.json["run_id"] is None
    assert said.err.startswith("This run could not be kept: ")
    assert said.err.count("\n") == 1
    assert broken.read_text() == "this is no database"


def test_devices_are_listed_absent_ones_with_their_reason(cli: Cli) -> None:
    found = cli("devices", "--json").json["devices"]
    keys = {"id", "name", "absent", "total_bytes", "free_bytes", "cautions"}
    assert all(set(one) == keys for one in found)
    assert found[0]["id"] == "cpu"
    assert 0 < found[0]["free_bytes"] <= found[0]["total_bytes"]
    assert "fp16" in found[0]["cautions"]
    plain = cli("devices").out
    for one in devices():
        assert re.search(rf"^{one.id} +{re.escape(one.name)}", plain, re.MULTILINE)
        if one.absent:
            assert f": absent, {one.absent}" in plain
        for _, caution in one.cautions:
            assert caution in plain


def test_models_are_listed_one_a_line(cli: Cli) -> None:
    lines = cli("models", "list").out.splitlines()
    names = [SHIPPED.name, *PRESETS]
    assert [line.split()[0] for line in lines] == names
    assert "174,604,259,328" in lines[names.index("gpt3-175b")]
    assert "models pull smollm2-135m" in lines[-1]


def test_a_model_is_shown_line_by_line(cli: Cli) -> None:
    said = cli("models", "show", "gpt3-13b").out
    whole = cli("models", "show", "gpt3-13b", "--json").json
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert {name: json.loads(text) for name, text in lines.items()} == whole
    assert whole["parameters"] == 12_952_938_780 == sum(whole["parameters_by_part"].values())
    assert whole["context_tokens"] == 2048
    assert "40 heads" in whole["note"]


REFUSALS = {
    "unknown model": (("--model", "nobody"), r"There is no model 'nobody' in the catalogue; .*"),
    "no such folder": (("--model", "./no/where"), r"There is no model folder .*'\./no/where'.*"),
    "NUL in a path": (("--model", "a\x00/b"), r"There is no model folder .*"),
    "very long path": (("--model", "x/" * 5000), r"There is no model folder .*…'.*"),
    "a folder of something else": (("--model", "/"), r".*config\.json.*"),
    "not installed": (("--model", "smollm2-135m"), r"smollm2-135m.* models pull smollm2-135m.*"),
    "temperature 3": (("--temperature", "3"), r"Temperature is 3\.0; the most is 2\."),
    "temperature -1": (("--temperature", "-1"), r"Temperature is -1\.0; the least is 0\."),
    "temperature NaN": (("--temperature", "nan"), r"Temperature is nan; it must be a number\."),
    "temperature infinite": (("--temperature", "inf"), r"Temperature is inf; .*"),
    "temperature warm": (("--temperature", "warm"), r"argument --temperature: invalid float .*"),
    "top-p 0": (("--top-p", "0"), r"Top-p is 0\.0; it must be above 0\."),
    "seed 2**70": (("--seed", str(2**70)), rf"Seed is {2**70}; the most is {MAX_SEED:,}\."),
    "seed -1": (("--seed", "-1"), r"Seed is -1; the least is 0\."),
    "seed of 5,000 digits": (("--seed", "9" * 5000), r"argument --seed: invalid int value: .*"),
    "limit 10**9": (("--max-new-tokens", str(10**9)), r"New tokens is 1000000000; the most .*"),
    "limit 0": (("--max-new-tokens", "0"), r"New tokens is 0; the least is 1\."),
    "empty prompt": (("--prompt", ""), r"The prompt is empty: type some text\."),
    "NUL in the prompt": (("--prompt", "a\x00b"), r"The prompt holds a NUL .* position 1.*"),
    "half a pair": (("--prompt", "a\ud800"), r"The prompt holds half of a surrogate pair.*"),
    "prompt and messages": (
        ("--messages", '[{"role": "user", "content": "b"}]'),
        r"Give a prompt or messages, not both\.",
    ),
    "messages no JSON": (("--messages", "["), r"--messages is no JSON \(.*\); write a list .*"),
    "messages no list": (("--messages", "5"), r"Messages is 5; it must be a list\."),
    "unknown role": (
        ("--messages", '[{"role": "x", "content": "b"}]'),
        r"Role is x; there are: 'system', 'user' or 'assistant'\.",
    ),
    "empty stop": (("--stop", ""), r"A stop string has 0 characters; 1 to 200 are allowed\."),
    "17 stops": (("--stop=x",) * 17, r"Stop strings: there are 17; the most is 16\."),
    "forced id no number": (("--forced-ids", "1,x"), r"Forced ids is x; it must be a whole .*"),
    "forced id too high": (("--forced-ids", "9999"), r"Token id 9999 is not in the vocab.*320\."),
    "forced id below 0": (("--forced-ids", "-5"), r"Token id -5 is not in the vocabulary.*"),
    "too many forced ids": (
        ("--forced-ids", ",".join(["1"] * 600)),
        r"The prompt has 60\d tokens and this model reads at most 512.*",
    ),
    "threads -1": (("--threads", "-1"), r"Threads is -1; the least is 0\."),
    "threads 5000": (("--threads", "5000"), r"Threads is 5000; the most is 1,024\."),
    "unknown precision": (("--precision", "int3"), r"argument --precision: invalid choice.*int8.*"),
    "unknown device": (("--device", "tpu"), r"There is no device 'tpu' here; use one of: cpu.*"),
    "absent device": (("--device", "cuda:64"), r"There is no device 'cuda:64' here; .*"),
    "recipe no JSON": (("--recipe", "[int8"), r"The recipe is no JSON \(.*\); .*\[{\"pass\": .*"),
    "recipe no calls": (("--recipe", "int8 or so"), r"The recipe 'int8 or so' cannot be read; .*"),
    "recipe too deep": (
        ("--recipe", "[" * 100_000),
        r"The recipe is no JSON \(.*recursion.*\); .*",
    ),
    "recipe of big number": (("--recipe", "9" * 5000), r"The recipe '9+…' cannot be read; .*"),
    "recipe no list": (("--recipe", "{}"), r'The "passes" of a recipe are a list such as .*'),
    "unknown pass": (("--recipe", '[{"pass": "p"}]'), r"There is no pass 'p'; there are: .*"),
    "unknown parameter": (
        ("--recipe", '[{"pass": "int8", "bits": 3}]'),
        r"Pass 'int8' has no parameter 'bits'; it has: method, head, embedding, activation_bits\.",
    ),
    "two quantizers": (
        ("--precision", "int8", "--recipe", '[{"pass": "int4"}]'),
        r"Precision int8 and the recipe \(int4\) both quantize; choose one\.",
    ),
    "pass and precision apart": (
        ("--recipe", '[{"pass": "int4", "group": 32}]'),
        r"4-bit weights cannot run here: its operation takes bf16 .* choose bf16 under it\.",
    ),
    "group too wide": (
        ("--precision", "bf16", "--recipe", '[{"pass": "int4", "group": 128}]'),
        r"4-bit weights cannot run here: groups of 128 do not divide its layers of 32 and 64 .*",
    ),
    "prompt too long": (("--prompt", "the fox " * 400), r"The prompt has .* most 512.*shorten.*"),
    "unknown option": (("--speed", "9"), r"unrecognized arguments: --speed 9 \(help: .*\)"),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_kept(
    arguments: tuple[str, ...], sentence: str, tiny: Path, cli: Cli
) -> None:
    for json_too in ((), ("--json",)):
        said = cli(*writing(tiny, *json_too), *arguments)
        assert re.fullmatch(sentence, said.refusal), said.err
    assert runs() == ()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), r"the following arguments are required: COMMAND .*"),
        (("models",), r"the following arguments are required: VERB .*"),
        (("fly",), r"argument COMMAND: invalid choice: 'fly' .*"),
        (("models", "show", "../../etc"), r"There is no model '\.\./\.\./etc' in the catalogue.*"),
        (("models", "show", "a\x00b"), r"There is no model .* in the catalogue.*"),
        (("models", "pull", "no/such/hub/name"), r"'no/such/hub/name' is no folder .*"),
        (("models", "pull", "/", "--name", "../out"), r"'\.\./out' is no name for a model: .*"),
    ],
)
def test_a_wrong_command_is_refused_in_one_sentence(
    arguments: tuple[str, ...], sentence: str, cli: Cli
) -> None:
    assert re.fullmatch(sentence, cli(*arguments).refusal)


def test_a_model_with_a_problem_is_listed_with_it_in_one_line(cli: Cli, data_folder: Path) -> None:
    (data_folder / "models" / "broken").mkdir(parents=True)
    (data_folder / "models" / "broken" / "config.json").write_text("{")
    lines = cli("models", "list").out.splitlines()
    assert len(lines) == 2 + len(PRESETS)
    assert sum(line.startswith("broken") for line in lines) == 1
    entries = cli("models", "list", "--json").json["models"]
    (entry,) = (one for one in entries if one["name"] == "broken")
    assert entry["problem"]
    assert entry["parameters"] is None


def test_help_and_version_end_well(cli: Cli) -> None:
    assert cli("--version").status == 0
    said = cli("generate", "--help")
    assert said.status == 0
    for option in (
        "--model",
        "--precision",
        "--device",
        "--threads",
        "--recipe",
        "--seed",
        "--json",
    ):
        assert option in said.out


def test_a_terminal_is_not_steered_by_a_model() -> None:
    assert _drawable("a\x1b[2Jb\x07c\x9bd\r\n\te") == "a�[2Jb�c�d�\n\te"


def test_every_field_of_an_entry_is_in_its_json(cli: Cli) -> None:
    assert set(ModelEntry.__dataclass_fields__) <= MODEL_KEYS
