"""Sets of items and of pairs that users keep under a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcore.errors import InvalidInput, StoreError
from gptcore.measure.sets import Sets
from gptcore.measure.tasks import TASK_SETS, named_tasks, shipped_tasks
from gptcore.measure.text_scores import PAIR_SETS, named_pairs

ITEMS = b'{"context": "a", "choices": ["b", "c"], "answer": 0}\n'
PAIRS = b'{"prompt": "a", "reference": "b"}\n'
KINDS = {"items": (TASK_SETS, named_tasks, ITEMS), "pairs": (PAIR_SETS, named_pairs, PAIRS)}

pytestmark = pytest.mark.usefixtures("data_folder")


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_kept_under_its_name_and_found_again(kind: str) -> None:
    sets, named, content = KINDS[kind]
    before = sets.names()
    assert sets.add("mine.v2", content) == "mine.v2"
    assert sets.add("mine.v2", content) == "mine.v2"  # the same again is no other set
    assert sets.names() == (*before, "mine.v2")
    assert len(named("mine.v2")) == 1
    assert [one.name for one in sets.path.iterdir()] == ["mine.v2.jsonl"]
    with pytest.raises(InvalidInput, match=f"another {sets.what} called mine"):
        sets.add("mine.v2", content * 1 + content.replace(b'"a"', b'"x"'))
    assert len(named("mine.v2")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_such_set_is_not_kept(kind: str) -> None:
    sets, _, _ = KINDS[kind]
    with pytest.raises(InvalidInput, match="mine, line 1: no JSON"):
        sets.add("mine", b"hello")
    assert "mine" not in sets.names()


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65, "a b", "é"])
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    for sets, named, content in KINDS.values():
        with pytest.raises(InvalidInput, match=r"cannot be called .*: take 1 to 64 letters"):
            sets.add(name, content)
        with pytest.raises(InvalidInput, match=f"There is no {sets.what} "):
            named(name)
        assert not sets.path.exists()


def test_the_name_of_what_ships_is_taken() -> None:
    assert TASK_SETS.names() == ("shipped",)
    assert named_tasks("shipped") == shipped_tasks()
    with pytest.raises(InvalidInput, match="and not shipped"):
        TASK_SETS.add("shipped", ITEMS)


def test_paths_are_for_the_command_line_only(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_bytes(ITEMS)
    assert named_tasks(str(file), paths=True) == named_tasks(str(tmp_path), paths=True)
    with pytest.raises(InvalidInput, match=r"There is no set of items .*; there are: shipped"):
        named_tasks(str(file))
    for absent in ("absent", "nul\x00", "x" * 5000):
        with pytest.raises(InvalidInput, match="give the path of a JSONL file of at most 64 MiB"):
            named_tasks(absent, paths=True)


def test_a_folder_that_cannot_be_written_is_said(data_folder: Path) -> None:
    sets = Sets("set of items", "file", lambda content, name: None)
    (data_folder / "file").write_text("in the way")
    with pytest.raises(StoreError, match="The set of items mine could not be kept: "):
        sets.add("mine", ITEMS)
