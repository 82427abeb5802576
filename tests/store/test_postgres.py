"""PostgreSQL itself, beside the contract that it shares with SQLite."""

import os

import pytest
from sqlalchemy import create_engine, text

from gptcore.errors import StoreError
from gptcore.store import open_store
from gptcore.store.database import KNOWN_VERSION, parsed
from tests.store.conftest import POSTGRES


@pytest.mark.postgres
def test_a_real_postgresql_answers_the_check() -> None:
    with open_store(os.environ[POSTGRES]) as store:
        assert store.check().startswith(f"PostgreSQL, schema {int(KNOWN_VERSION)}")


@pytest.mark.postgres
def test_tables_of_other_programs_in_the_same_database_are_left_alone() -> None:
    engine = create_engine(parsed(os.environ[POSTGRES]))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
        connection.execute(text("CREATE TABLE theirs (x int)"))
    with open_store(os.environ[POSTGRES]) as store:
        store.check()
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
        connection.execute(text("CREATE TABLE runs (x int)"))
    engine.dispose()
    with pytest.raises(StoreError, match="belongs to another program"):
        open_store(os.environ[POSTGRES])


def test_a_server_that_does_not_answer_is_a_sentence_without_the_password() -> None:
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        open_store("postgresql://somebody:secret@127.0.0.1:1/lab")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
