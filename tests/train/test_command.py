"""``python -m gptcore train``: from a text to a model of the catalogue, and what it refuses."""

import json
from pathlib import Path

import pytest

from gptcore.__main__ import main
from gptcore.train import checkpoint
from gptcore.train.order import read_order
from tests.train.small import small_text

SHAPE = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--threads", "1"]
STEPS = ["--steps", "4", "--batch", "4", "--warmup", "1", "--validate-every", "2"]


@pytest.fixture
def text(data_folder: Path, tmp_path: Path) -> str:
    return str(small_text(tmp_path))


def test_it_trains_and_adds_the_model_to_the_catalogue(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "training")
    command = ["train", "--text", text, "--to", folder, *SHAPE, *STEPS]
    assert main([*command, "--add", "mine", "--tensorboard", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ended"] == "steps"
    assert found["name"] == "mine"
    assert found["steps"] == 4
    assert list((tmp_path / "training" / "events").iterdir())
    generated = ["generate", "--model", "mine", "--prompt", "the fox", "--max-new-tokens", "3"]
    assert main([*generated, "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 3


def test_a_resume_needs_no_options_again(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "training"
    assert main(["train", "--text", text, "--to", str(folder), *SHAPE, *STEPS]) == 0
    before = capsys.readouterr().out
    assert main(["train", "--resume", "--to", str(folder), "--threads", "1"]) == 0
    assert "4 steps" in before
    assert "4 steps" in capsys.readouterr().out
    assert checkpoint.steps(folder) == [4] or 4 in checkpoint.steps(folder)
    assert read_order(folder).text == text


def test_a_training_without_a_folder_gets_one_of_its_own(
    text: str, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["train", "--text", text, *SHAPE, *STEPS]) == 0
    names = [one.name for one in sorted((data_folder / "trainings").iterdir())]
    assert names == ["0001", "0002"]
    assert "0002" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resume"], "Say which training goes on"),
        (["--resume", "--to", "none"], "There is no training in none"),
        (["--text", "none.txt"], "none.txt cannot be read: No such file"),
        (["--heads", "3"], "3 heads do not divide a width of 16"),
        (["--batch", "0"], "Batch is 0; the least is 1."),
        (["--steps", "many"], "Steps is many; it must be a whole number."),
        (["--tokenizer", "words"], "words is no tokenizer"),
        (["--context", "50000"], "it needs at least 100,001"),
        (["--start", "none"], "There is no model 'none'"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--device", "cuda:9"], "There is no device 'cuda:9'"),
        (["--corpus", "nowhere"], "There is no corpus in nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = [] if "--corpus" in options else ["--text", text]
    assert main(["train", *source, *SHAPE, *STEPS, *options]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert len(errors.strip().splitlines()) == 1
