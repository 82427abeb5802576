"""The migrations and the tables say the same, and the log of a busy database stays small."""

import sqlite3
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, insert

from gptcore.records import Numbers, Reading, Run
from gptcore.store import Store, database, open_store, rows, tables
from tests.store.examples import T0, run


def test_the_migrations_lead_to_the_tables_of_today(store: Store) -> None:
    with store._database.reading() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": tables.VERSION_TABLE}
        )
        assert compare_metadata(context, tables.metadata) == []
        assert context.get_current_revision() == database.KNOWN_VERSION


def test_the_known_version_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [database.KNOWN_VERSION]


def test_every_field_of_a_run_and_its_numbers_has_a_column() -> None:
    columns = set(tables.runs.columns.keys())
    assert set(Run.__dataclass_fields__) - {"numbers"} <= columns
    assert set(Numbers.__dataclass_fields__) <= columns


def test_opening_an_up_to_date_database_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "lab.db"
    open_store(f"sqlite:///{path}").close()
    before = path.read_bytes()
    open_store(f"sqlite:///{path}").close()
    assert path.read_bytes() == before


def test_sqlite_writes_ahead_and_checkpoints_only_when_told(tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path / 'lab.db'}") as store:
        with store._database._writer.connect() as connection:
            pragmas = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "synchronous", "wal_autocheckpoint", "foreign_keys")
            ]
        assert pragmas == ["wal", 1, 0, 1]


def test_the_log_does_not_grow_without_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(database, "CHECKPOINT_PAUSE_S", 0.0)
    monkeypatch.setattr(database, "CHECKPOINT_BYTES", 100_000)
    path = tmp_path / "lab.db"
    with open_store(f"sqlite:///{path}") as store:
        for i in range(400):
            store.add_readings([Reading(f"x{k}_ratio", 0.5, T0 + i) for k in range(20)])
        # 400 commits of 3 pages or more would be 4.8 MB.
        assert Path(f"{path}-wal").stat().st_size < 400_000
        times, _ = store.readings(["x7_ratio"], T0, T0 + 400)["x7_ratio", ""]
        assert len(times) == 400


def test_a_query_for_latencies_reads_one_index_and_no_row(tmp_path: Path) -> None:
    path = tmp_path / "lab.db"
    with open_store(f"sqlite:///{path}") as store:
        query = store._ended(0.0, 1.0, "ttft_s", "tpot_s", "e2e_s", "state")
        compiled = query.compile(compile_kwargs={"literal_binds": True})
    plan = sqlite3.connect(path).execute(f"EXPLAIN QUERY PLAN {compiled}").fetchall()
    assert "COVERING INDEX runs_latency (kind=? AND ended_at>?" in str(plan)


def test_runs_of_the_first_schema_are_there_in_todays(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'lab.db'}"
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    old = run(text="kept")
    row = rows.run_to_row(old, "") | {"machine": ""}
    del row["result"]
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(insert(tables.runs), row)
    engine.dispose()
    with open_store(url) as store:
        assert store.run(old.id) == old


def test_the_result_of_a_run_comes_back_as_it_went_in(store: Store) -> None:
    found = {"ratio": 1.25, "cells": [{"n": 3, "name": "é"}], "none": None}
    one = run(result=found)
    store.add_run(one)
    assert store.run(one.id).result == found
    store.update_run(one.id, result=None)
    assert store.run(one.id).result is None
