"""``runs``: what is in the database comes out as it went in, into another database too."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from gptcore.__main__ import main
from gptcore.store import open_store
from tests.store.examples import START, ended, numbers, provenance


@pytest.fixture
def three(data_folder: Path) -> list[str]:
    runs = [
        ended(i, text=f"text {i}", numbers=numbers(), created_at=START + timedelta(days=400))
        for i in range(3)
    ]
    with open_store() as store:
        for one in runs:
            store.add_run(one)
        store.add_variant(runs[0].variant_hash, {"model": "tiny"}, provenance())
        store.annotate(runs[0].id, tags=("kept",), note="=not a formula")
    return [one.id for one in runs]


def test_runs_are_listed_by_filter(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list", "--tag", "kept", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in found["runs"]] == [three[0]]
    assert main(["runs", "list", "--limit", "2"]) == 0
    assert "2 of 3 runs" in capsys.readouterr().out


def test_one_run_is_shown_with_its_notes(
    three: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "show", three[0], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == "text 0"
    assert shown["annotation"]["tags"] == ["kept"]
    assert main(["runs", "show", "nobody"]) == 2
    assert "There is no run" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["csv", "json"])
def test_what_is_exported_comes_back_to_the_byte_in_another_database(
    form: str, three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / f"first.{form}", tmp_path / f"second.{form}"
    assert main(["runs", "export", "--format", form, "--out", str(first)]) == 0
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    assert main(["runs", "import", str(first)]) == 0
    assert main(["runs", "export", "--format", form, "--out", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    with open_store() as store:
        assert store.annotation(three[0]).note == "=not a formula"


def test_importing_twice_adds_nothing(
    three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.json"
    main(["runs", "export", "--out", str(file)])
    capsys.readouterr()
    assert main(["runs", "import", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"new": 0, "known": 3}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"a,b\n1,2\n", b"[1,2]"])
def test_a_foreign_file_is_one_sentence_and_nothing_is_kept(
    content: bytes, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "foreign"
    file.write_bytes(content)
    assert main(["runs", "import", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with open_store() as store:
        assert store.runs() == ()


def test_a_file_that_is_not_there_or_cannot_be_written_is_one_sentence(
    three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "import", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["runs", "export", "--out", str(tmp_path / "no" / "folder")]) == 2
    assert "cannot be written" in capsys.readouterr().err
