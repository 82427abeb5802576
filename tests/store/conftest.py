"""Every test that takes ``store`` runs on SQLite, and on PostgreSQL where a server is given."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from gptcore.store import Store, open_store
from gptcore.store.database import parsed

POSTGRES = "GPTLAB_TEST_POSTGRES_URL"


BACK_ENDS: list[Any] = ["sqlite"]
if POSTGRES in os.environ:
    BACK_ENDS.append(pytest.param("postgres", marks=pytest.mark.postgres))


@pytest.fixture(params=BACK_ENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'lab.db'}"
    engine = create_engine(parsed(os.environ[POSTGRES]))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return os.environ[POSTGRES]


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """Give an empty store."""
    with open_store(url) as opened:
        yield opened
