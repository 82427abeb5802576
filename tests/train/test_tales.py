"""The model that ships: making it, and what its card says of it."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from gptcore import weights
from gptcore.catalogue import SHIPPED, open_catalogue
from gptcore.cli.corpus import learn_tales
from gptcore.corpus.shards import corpus_dir, texts
from gptcore.device import Placement
from gptcore.engine import Engine
from gptcore.errors import Cancelled, InvalidInput
from gptcore.lab import Lab
from gptcore.records import Request
from gptcore.tokenizer import load_tokenizer
from gptcore.train import tales
from gptcore.train.order import Order, within
from gptcore.train.settings import Training

pytestmark = [pytest.mark.usefixtures("data_folder"), pytest.mark.usefixtures("one_thread")]
SMALL = Order(
    tokenizer="bpe",
    vocabulary=400,
    layers=1,
    width=16,
    heads=2,
    context=64,
    settings=Training(batch=8, learning_rate=3e-3, warmup=5, validation_windows=4),
)


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of one shard, and orders that a second or two carry out."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "0001.jsonl.xz").hardlink_to(corpus_dir() / "0001.jsonl.xz")
    monkeypatch.setattr(tales, "ORDER", SMALL)
    monkeypatch.setattr(tales, "PASSES", {1.0: 0.2, 0.25: 0.4})
    monkeypatch.setattr(tales, "SAMPLE_TOKENS", 5)
    monkeypatch.setattr(tales, "OPENINGS", ("Once", "A tree"))
    return corpus


def options(corpus: Path, tmp_path: Path) -> list[str]:
    return ["--corpus", str(corpus), "--to", str(tmp_path / "made"), "--threads", "1"]


def test_one_command_makes_model_and_card_and_says_how_near_it_came(
    few: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gptcore.__main__ import main

    before = tmp_path / "before"
    before.mkdir()
    (before / tales.JUDGED).write_text('{"test_bits_per_byte": 2.0}')
    monkeypatch.setattr("gptcore.cli.corpus.SHIPPED", before)
    assert main(["corpus", "learn", "--json", *options(few, tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    made = Path(said["model"])
    judged = tales.read_judged(made)
    assert judged is not None
    assert [one["share"] for one in judged["learned"]] == [1.0, 0.25]
    whole, quarter = judged["learned"]
    assert 0.1 < quarter["train_tokens"] / whole["train_tokens"] < 0.4
    assert said["ratio"] == judged["test_bits_per_byte"] / 2.0
    card = (made / "README.md").read_text()
    assert f"**{judged['test_bits_per_byte']:.3f} bits per byte**" in card
    assert "| 1/4 |" in card
    assert "1. Once" in card
    assert judged["teacher"] is None  # it is not installed here
    again = open_catalogue().add(made, "mine", lambda ratio: None)
    assert open_catalogue().entry(again).licence == "apache-2.0"


def test_a_stopped_making_goes_on(few: Path, tmp_path: Path) -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        tales.learn(str(few), tmp_path / "work", 1.0, breathe=stop)
    stopped, _ = tales.learn(str(few), tmp_path / "work", 1.0)
    whole, _ = tales.learn(str(few), tmp_path / "other", 1.0)
    assert stopped.validation_bits_per_byte == whole.validation_bits_per_byte


def test_a_smaller_share_is_a_part_of_a_larger_one() -> None:
    some = [one.text for one in texts(corpus_dir())][:600]
    quarter = {one for one in some if within(one, 1 / 4)}
    assert {one for one in some if within(one, 1 / 16)} < quarter
    assert 100 < len(quarter) < 200
    assert all(within(one, 1.0) for one in some)


def test_what_ships_is_listed_first_and_stays(data_folder: Path) -> None:
    lab = Lab.open()
    first = lab.models()[0]
    assert (first.name, first.ships, first.problem) == (SHIPPED.name, True, None)
    assert "bits per byte" in (lab.model_card(first.name) or "")
    with pytest.raises(InvalidInput, match="came with the program"):
        lab.delete_model(first.name)
    assert SHIPPED.is_dir()
    with pytest.raises(InvalidInput, match="already a model"):
        lab.catalogue.add(SHIPPED, SHIPPED.name, lambda ratio: None)


def test_its_logits_are_those_of_transformers() -> None:
    ids = load_tokenizer(SHIPPED).encode("Once upon a time, a small fox found a door.")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    ours = weights.build(weights.describe(SHIPPED), Placement(precision="fp32", threads=1))
    given = torch.tensor([ids])
    with torch.inference_mode():
        assert torch.allclose(ours(given), theirs(given).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_it_is_as_good_as_its_card_says() -> None:
    judged = tales.read_judged(SHIPPED)
    assert judged is not None
    checkpoint = weights.describe(SHIPPED)
    assert checkpoint.spec.parameters == judged["parameters"]
    model = weights.build(checkpoint, Placement(precision="fp32", threads=1))
    held_out = [one.text for one in texts(corpus_dir(), "test")][:60]
    nats, tokens = tales.cost_of_stream(model, load_tokenizer(SHIPPED), held_out)
    bits = nats / math.log(2) / sum(len(one.encode()) for one in held_out)
    assert bits == pytest.approx(judged["test_bits_per_byte"], rel=0.1)
    assert tokens > 5_000


def test_it_writes_words_and_sentences() -> None:
    checkpoint = weights.describe(SHIPPED)
    model = weights.build(checkpoint, Placement(precision="fp32", threads=1))
    engine = Engine(model, load_tokenizer(SHIPPED))
    known = {word for one in texts(corpus_dir()) for word in one.text.lower().split()}
    request = Request(prompt="Once upon a time", temperature=0.7, seed=3, max_new_tokens=120)
    text = "".join(token.text for token in engine.start(request))
    words = text.lower().split()
    assert len(words) > 40
    assert text.count(".") >= 3
    assert sum(word in known for word in words) > 0.9 * len(words)


def test_it_is_small_enough_to_ship() -> None:
    files = list(SHIPPED.iterdir())
    assert sum(file.stat().st_size for file in files) <= 26e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in files
    }


def test_the_command_says_what_it_lacks(tmp_path: Path) -> None:
    from argparse import Namespace

    with pytest.raises(InvalidInput, match="There is no corpus"):
        learn_tales(
            Namespace(
                corpus=str(tmp_path), to=tmp_path / "made", work=tmp_path / "work", threads=1,
                teacher="smollm2-135m", whole_only=True, json=True,
            )
        )  # fmt: skip
