"""Finding runs among many, what is said about them, and questions that can change nothing."""

from __future__ import annotations

import sqlite3
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from gptcore.errors import InvalidInput, StoreError
from gptcore.records import Annotation, Choice, RunKind, RunState, Vote
from gptcore.store import Store, history, open_store
from gptcore.store.history import Filter
from tests.store.examples import START, ended, numbers, run


def ids(store: Store, **wanted: object) -> list[str]:
    return [one.id for one in store.history(Filter(**wanted))[0]]  # type: ignore[arg-type]


@pytest.fixture
def three(store: Store) -> list[str]:
    """A done generation, a failed one and a bench, in the order of their making."""
    runs = [
        ended(
            1,
            model="alpha",
            settings={"prompt": "the old clock"},
            created_at=at(1),
            numbers=numbers(),
        ),
        ended(2, RunState.FAILED, model="beta", error="It broke.", created_at=at(2)),
        ended(3, model="alpha", kind=RunKind.BENCH, numbers=None, created_at=at(3)),
    ]
    for one in runs:
        store.add_run(one)
    return [one.id for one in runs]


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def test_runs_come_newest_first_and_are_counted(store: Store, three: list[str]) -> None:
    assert ids(store) == three[::-1]
    page, whole = store.history(limit=2, offset=1)
    assert ([one.id for one in page], whole) == (three[::-1][1:], 3)
    assert page[1].prompt == "the old clock"
    assert page[1].numbers["ttft_s"] == store.run(three[0]).numbers.ttft_s


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        ({"kinds": ("bench",)}, [2]),
        ({"states": ("failed",)}, [1]),
        ({"models": ("alpha",)}, [2, 0]),
        ({"models": ("alpha", "beta"), "kinds": ("generate",)}, [1, 0]),
        ({"search": "OLD cl"}, [0]),
        ({"search": "it broke"}, [1]),
        ({"search": "100%"}, []),
        ({"order": "model", "descending": False}, None),
    ],
)
def test_filters_leave_in_what_they_name(
    wanted: dict[str, object], where: list[int] | None, store: Store, three: list[str]
) -> None:
    found = ids(store, **wanted)
    if where is None:
        assert found[-1] == three[1]  # beta stands behind alpha
    else:
        assert found == [three[index] for index in where]


def test_an_unknown_order_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInput, match="cannot be sorted by 'id; DROP'"):
        store.history(Filter(order="id; DROP"))


def test_what_is_not_known_sorts_last_both_ways(store: Store, three: list[str]) -> None:
    for descending in (True, False):
        found, _ = store.history(Filter(order="ttft_s", descending=descending))
        known = [one.numbers["ttft_s"] is not None for one in found]
        assert known == sorted(known, reverse=True)
        assert set(known) == {True, False}


def test_notes_are_kept_found_and_changed_one_by_one(store: Store, three: list[str]) -> None:
    assert store.annotation(three[0]) == Annotation()
    store.annotate(three[0], tags=("größe", "b"), note='said "so"\\ \x00')
    after = store.annotate(three[0], pinned=True)
    assert after == store.annotation(three[0])
    assert after == Annotation(tags=("b", "größe"), note='said "so"\\ \x00', pinned=True)
    assert ids(store)[0] == three[0]
    assert ids(store, search="SAID") == [three[0]]
    assert ids(store, search="größe") == [three[0]]
    assert ids(store, tags=("b",)) == [three[0]]
    assert ids(store, tags=("b", "c")) == []
    assert store.tags() == ("b", "größe")


def test_a_tag_is_found_whole_and_not_by_a_part(store: Store, three: list[str]) -> None:
    store.annotate(three[0], tags=("fast-enough",))
    assert ids(store, tags=("fast",)) == []


def test_archived_runs_are_hidden_until_asked_for(store: Store, three: list[str]) -> None:
    store.annotate(three[1], archived=True)
    assert three[1] not in ids(store)
    assert three[1] in ids(store, archived=True)
    store.annotate(three[1], archived=False)
    assert three[1] in ids(store)


def test_the_end_of_a_run_leaves_its_notes_alone(store: Store) -> None:
    one = run()
    store.add_run(one)
    store.annotate(one.id, note="watch this")
    store.finish_run(ended(1, id=one.id), ())
    assert store.annotation(one.id).note == "watch this"
    store.delete_run(one.id)
    assert store.annotation(one.id) == Annotation()


def test_a_run_that_is_gone_cannot_be_noted(store: Store) -> None:
    with pytest.raises(StoreError, match="There is no run nobody"):
        store.annotate("nobody", note="x")


def test_a_question_is_answered_with_names_and_rows(store: Store, three: list[str]) -> None:
    answer = store.ask("SELECT model, count(*) AS n FROM runs GROUP BY model ORDER BY model;")
    assert answer.columns == ("model", "n")
    assert answer.rows == (("alpha", 2), ("beta", 1))
    assert not answer.cut


def test_a_question_may_begin_with_a_table_of_its_own(store: Store, three: list[str]) -> None:
    answer = store.ask("WITH alphas AS (SELECT * FROM runs WHERE model = 'alpha')\n"
                       "SELECT count(*) FROM alphas -- both of them")  # fmt: skip
    assert answer.rows == ((2,),)


CHANGES = [
    "DELETE FROM runs",
    "UPDATE runs SET model = 'x'",
    "INSERT INTO rollups VALUES ('a', 'b', 1)",
    "DROP TABLE runs",
    "CREATE TABLE mine (a int)",
    "SELECT 1; DELETE FROM runs",
    "SELECT 1) AS a; DELETE FROM runs; SELECT * FROM (SELECT 1",
    "WITH gone AS (DELETE FROM runs RETURNING id) SELECT * FROM gone",
    "COMMIT",
    "VACUUM",
]


@pytest.mark.parametrize("question", CHANGES)
def test_nothing_but_a_select_is_let_through(question: str, store: Store, three: list[str]) -> None:
    with pytest.raises(InvalidInput) as refused:
        store.ask(question)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)
    assert len(ids(store)) == 3


@pytest.mark.parametrize(
    "question",
    ["PRAGMA journal_mode = DELETE", "ATTACH 'x' AS y", "SELECT load_extension('x')", "", "  -- "],
)
def test_sqlites_own_doors_are_closed(question: str, tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path / 'lab.db'}") as store, pytest.raises(InvalidInput):
        store.ask(question)
    assert not Path("x").exists()


def test_a_wrong_question_says_what_the_database_says(store: Store) -> None:
    with pytest.raises(InvalidInput, match=r"The database says: .*nowhere"):
        store.ask("SELECT * FROM nowhere")


def test_a_long_answer_is_cut_and_says_so(store: Store) -> None:
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1001) "
    answer = store.ask(many + "SELECT i FROM n")
    assert (len(answer.rows), answer.cut) == (history.MAX_ROWS, True)


def test_an_endless_question_is_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_SECONDS", 0.2)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    with pytest.raises(InvalidInput, match=r"took longer than 0.2 s"):
        store.ask(endless + "SELECT count(*) FROM n")


def test_the_connection_itself_is_for_reading_only(tmp_path: Path) -> None:
    """What the authorizer let slip would still meet a file that was opened for reading."""
    path = tmp_path / "lab.db"
    open_store(f"sqlite:///{path}").close()
    real = sqlite3.connect

    class Open(sqlite3.Connection):
        def set_authorizer(self, *_: object) -> None:
            """Let everything through."""

    try:
        history.sqlite3.connect = lambda *a, **k: real(*a, **{**k, "factory": Open})  # type: ignore[assignment]
        with pytest.raises(InvalidInput, match="readonly"):
            history.ask_sqlite(path, "CREATE TABLE mine (a int)")
    finally:
        history.sqlite3.connect = real


@pytest.mark.slow
def test_ten_thousand_runs_are_filtered_at_once(tmp_path: Path) -> None:
    """The bound is generous, since a test machine is shared; about 0.05 s is usual."""
    import time

    with open_store(f"sqlite:///{tmp_path / 'lab.db'}") as store:
        with store._database.writing() as connection:
            from sqlalchemy import insert

            from gptcore.store import rows, tables

            connection.execute(
                insert(tables.runs),
                [
                    rows.run_to_row(ended(i, text=f"text {i} " * 40, model=f"m{i % 7}"), "")
                    for i in range(10_000)
                ],
            )
        began = time.perf_counter()
        page, whole = store.history(Filter(search="text 9999", models=("m3",)))
        assert time.perf_counter() - began < 3.0
        assert (len(page), whole) == (1, 1)


def test_votes_come_back_as_they_were_given(store: Store) -> None:
    votes = [
        Vote(
            left="a ü",
            right="b",
            choice=choice,
            left_tokens=3,
            right_tokens=5,
            prompt_hash="ab",
            at=at(number),
        )
        for number, choice in enumerate(Choice)
    ]
    for vote in reversed(votes):
        store.add_vote(vote)
    assert store.votes() == tuple(votes)
