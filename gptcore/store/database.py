"""A database that several processes write at once, and what its failures mean in a sentence.

SQLite 3.40.1, which Python 3.11 links on Debian, can lose a commit when one connection commits
while another one's checkpoint resets the write-ahead log (fixed in 3.51.3). So every write and
every checkpoint, in any process, holds one file lock beside the database, and a process has one
writing connection. Reading needs no lock: that is what the write-ahead log is for.
"""

from __future__ import annotations

import errno
import importlib.util
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import filelock
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gptcore.errors import StoreError
from gptcore.store.tables import VERSION_TABLE, metadata

KNOWN_VERSION = "0002"
"""The newest migration; a test holds it equal to the newest file in ``migrations``."""
MIGRATIONS = Path(__file__).parent / "migrations"

OPENING_LOCK = 7_116_112_108
"""PostgreSQL's number for "somebody opens a laboratory's database here"; any constant would do."""

CHECKPOINT_BYTES = 4 << 20
"""A log of this size is copied into the database: about a minute of monitoring."""
CHECKPOINT_PAUSE_S = 10.0
"""A reader can keep a log from shrinking; this keeps us from trying after every write."""
LOG_LIMIT_BYTES = 16 << 20
"""What SQLite cuts the log to once it starts over."""
FOREIGN_WAIT_S = 5.0
"""How long a program that does not know our file lock (a database browser) may hold a write."""
CHECKED_AT_OPENING_BYTES = 64 << 20
"""Up to this size every page is looked at on opening; 64 MiB take about a tenth of a second."""


class Database:
    """Connections to one database: ``reading()`` at will, ``writing()`` one at a time.

    Args:
        url: an SQLAlchemy URL of SQLite (a file) or PostgreSQL.
        wait_s: how long a write waits for other writers before it is refused.

    Raises:
        StoreError: the URL is of another kind, or the database cannot be used.
    """

    def __init__(self, url: str, *, wait_s: float = 15.0) -> None:
        self.url = parsed(url)
        self.wait_s = wait_s
        self.path = _file_of(self.url)
        self.shown = str(self.path) if self.path else self.url.render_as_string(hide_password=True)
        self._thread_lock = threading.Lock()
        self._file_lock: filelock.BaseFileLock | None = None
        self._checkpointed_at = 0.0
        if self.path is None:
            self._writer = self._reader = _postgres_engine(self.url)
        else:
            self._file_lock = filelock.FileLock(
                f"{self.path}.lock",
                thread_local=False,
                poll_interval=0.002,
                preserve_lock_file=True,
            )
            foreign_wait_s = min(FOREIGN_WAIT_S, wait_s)
            self._writer = _sqlite_engine(self.url, foreign_wait_s, writes=True)
            self._reader = _sqlite_engine(self.url, foreign_wait_s, writes=False)
        # The last connection to close checkpoints too, and an interpreter that ends closes them:
        # a forgotten close() must hold the lock as well.
        self._finalizer = weakref.finalize(
            self, _dispose, self._writer, self._reader, self._file_lock
        )
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite, whose writers need the file lock."""
        return self.path is not None

    def close(self) -> None:
        """Close all connections; closing twice does no harm."""
        self._finalizer()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection that sees one state of the database throughout.

        Raises:
            StoreError: the database cannot be read.
        """
        with self._sentences():
            self._require_open()
            with self._reader.begin() as connection:
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Give a connection inside a transaction, while no other process writes.

        Raises:
            StoreError: the database cannot be written; nothing was.
        """
        with self._sentences(), self._alone():
            self._require_open()
            with self._writer.begin() as connection:
                yield connection
            self._checkpoint_if_due()

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the database file now (SQLite only)."""
        if self.is_sqlite:
            with self._sentences(), self._alone():
                self._checkpoint()

    def version(self) -> str | None:
        """Return the schema's number as the database has it; None in an empty one."""
        with self.reading() as connection:
            return _version(connection)

    def problem_in_pages(self) -> str | None:
        """Look at every page of a SQLite file; return what is wrong, or None."""
        if not self.is_sqlite:
            return None
        with self.reading() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        return None if found == "ok" else str(found)

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise StoreError(f"The database {self.shown} was closed: open it again.")
        if self.path is not None and not self.path.exists():
            # SQLite would go on with a file that has no name any more, or make a new empty one.
            raise StoreError(
                f"The database {self.shown} is gone: it was moved or deleted while in use. "
                "Put it back, or start again to have a new one."
            )

    def _open(self) -> None:
        with self._sentences(), self._alone():
            if self.is_sqlite:
                # By a connection that cannot write, which leaves a file that is not ours alone:
                # the writing one would switch it to a write-ahead log.
                with self._reader.begin() as connection:
                    self._refuse_damage(connection)
                    self._refuse_unknown(connection)
            with self._writer.begin() as connection:
                if not self.is_sqlite:  # of two programs that start at once the second waits
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({OPENING_LOCK})"))
                    self._refuse_unknown(connection)
                if _version(connection) != KNOWN_VERSION:
                    self._migrate(connection)

    def _refuse_damage(self, connection: Connection) -> None:
        assert self.path is not None
        if self.path.stat().st_size <= CHECKED_AT_OPENING_BYTES:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if found != "ok":
                raise StoreError(_damaged(self.shown))

    def _refuse_unknown(self, connection: Connection) -> None:
        version = _version(connection)
        if version is None and (foreign := self._foreign(connection)):
            raise StoreError(
                f"The database {self.shown} belongs to another program (it has a table "
                f"{foreign!r}): set GPTLAB_DATABASE_URL to another one."
            )
        if version is not None and _number(version) > _number(KNOWN_VERSION):
            raise StoreError(
                f"The database {self.shown} was written by a newer version (schema "
                f"{_number(version)}, this program knows {_number(KNOWN_VERSION)}): "
                "update the program or set GPTLAB_DATABASE_URL to another file."
            )

    def _foreign(self, connection: Connection) -> str | None:
        """Return a table that stands in the way; a PostgreSQL may well have tables of others."""
        there = set(inspect(connection).get_table_names())
        ours = set(metadata.tables)
        return min(there if self.is_sqlite else there & ours, default=None)

    def _migrate(self, connection: Connection) -> None:
        # Imported here: a database that is up to date, the usual case, needs no Alembic.
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of this process's threads, then that of all processes."""
        if not self._thread_lock.acquire(timeout=self.wait_s):
            raise StoreError(self._locked())
        try:
            with self._file_locked():
                yield
        finally:
            self._thread_lock.release()

    @contextmanager
    def _file_locked(self) -> Iterator[None]:
        if self._file_lock is None:
            with nullcontext():
                yield
            return
        try:
            self._file_lock.acquire(timeout=self.wait_s)
        except filelock.Timeout:
            raise StoreError(self._locked()) from None
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StoreError(self._read_only()) from error
            raise StoreError(
                f"The database {self.shown} cannot be locked ({error.strerror or error}): make "
                "its folder writable or set GPTLAB_DATABASE_URL to another file."
            ) from error
        try:
            yield
        finally:
            self._file_lock.release()

    def _locked(self) -> str:
        return (
            f"The database {self.shown} has been locked by another program for "
            f"{self.wait_s:g} s: end that program or wait, then try again."
        )

    def _read_only(self) -> str:
        return (
            f"The database {self.shown} is read-only: make it and its folder writable, or set "
            "GPTLAB_DATABASE_URL to another one."
        )

    def _checkpoint_if_due(self) -> None:
        if self.path is None:
            return
        log = Path(f"{self.path}-wal")
        now = time.monotonic()
        if now - self._checkpointed_at < CHECKPOINT_PAUSE_S or not log.exists():
            return
        if log.stat().st_size >= CHECKPOINT_BYTES:
            self._checkpoint()

    def _checkpoint(self) -> None:
        # Passive waits for nobody: what a reader still needs stays in the log until next time.
        self._checkpointed_at = time.monotonic()
        with self._writer.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert isinstance(raw, sqlite3.Connection)
            raw.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn what the database libraries raise into a StoreError with one sentence."""
        try:
            yield
        except DBAPIError as error:
            raise StoreError(self._sentence(error.orig or error)) from error
        except PoolTimeout as error:
            raise StoreError(self._locked()) from error
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise StoreError(self._sentence(error)) from error
        except Exception as error:
            if not _is_psycopgs(error):
                raise
            raise StoreError(self._sentence(error)) from error

    def _sentence(self, error: BaseException) -> str:
        name = getattr(error, "sqlite_errorname", "") or ""
        state = getattr(error, "sqlstate", "") or ""
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return (
                f"The database {self.shown} is locked by another program: end that program or "
                "wait, then try again."
            )
        if name.startswith("SQLITE_FULL") or state == "53100":
            return (
                f"The disk of the database {self.shown} is full: free some space, then try again."
            )
        if name.startswith("SQLITE_READONLY") or state in ("25006", "42501"):
            return self._read_only()
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return _damaged(self.shown)
        if name.startswith("SQLITE_CANTOPEN"):
            return (
                f"The database {self.shown} cannot be opened: check that its folder exists and is "
                "writable, or set GPTLAB_DATABASE_URL to another file."
            )
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if _is_psycopgs(error, "OperationalError") and not state:
            return (
                f"The database {self.shown} cannot be reached ({first}): check that the server "
                "runs and that GPTLAB_DATABASE_URL is right."
            )
        return f"The database {self.shown} failed: {first}"


def _is_psycopgs(error: BaseException, name: str = "Error") -> bool:
    """Whether it is PostgreSQL's driver's; that is there only with requirements-postgres.txt."""
    return any(
        one.__name__ == name and one.__module__.partition(".")[0] == "psycopg"
        for one in type(error).__mro__
    )


def parsed(url: str) -> URL:
    """Return ``url`` with the driver that this program uses.

    Raises:
        StoreError: it is no URL, or one of another kind of database.
    """
    try:
        found = make_url(url)
    except SQLAlchemyError:
        # The text may hold a password, so it is not repeated.
        raise StoreError(
            "GPTLAB_DATABASE_URL is not a database URL: write sqlite:////folder/lab.db or "
            "postgresql://user:password@host/name."
        ) from None
    kind = found.drivername.partition("+")[0]
    if kind in ("postgresql", "postgres"):
        if importlib.util.find_spec("psycopg") is None:
            raise StoreError(
                "GPTLAB_DATABASE_URL names a PostgreSQL database, whose driver is not installed: "
                "pip install -r requirements-postgres.txt."
            )
        return found.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise StoreError(
            f"GPTLAB_DATABASE_URL names a {kind} database; SQLite and PostgreSQL are supported."
        )
    if not found.database or found.database == ":memory:":
        raise StoreError(
            "GPTLAB_DATABASE_URL names a SQLite database in memory, which other processes cannot "
            "see: write sqlite:////folder/lab.db."
        )
    return found.set(drivername="sqlite+pysqlite")


def _file_of(url: URL) -> Path | None:
    if not url.drivername.startswith("sqlite"):
        return None
    assert url.database is not None
    if url.database.startswith("file:"):
        return Path(url.database.removeprefix("file:"))
    path = Path(url.database).expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The folder {path.parent} of the database cannot be made ({error.strerror}): set "
            "GPTLAB_DATABASE_URL to another file."
        ) from error
    return path


def _sqlite_engine(url: URL, wait_s: float, *, writes: bool) -> Engine:
    engine = create_engine(
        url,
        connect_args={"timeout": wait_s, "check_same_thread": False},
        # No overflow: an overflowing connection would be closed, outside the lock.
        pool_size=1 if writes else 8,
        max_overflow=0,
        pool_timeout=10.0,
    )

    @event.listens_for(engine, "connect")
    def _set_up(raw: sqlite3.Connection, _record: object) -> None:
        raw.isolation_level = None  # transactions are begun below, and by nobody else
        raw.execute("PRAGMA foreign_keys = ON")
        if not writes:
            raw.execute("PRAGMA query_only = ON")
            return
        raw.execute("PRAGMA wal_autocheckpoint = 0")
        raw.execute(f"PRAGMA journal_size_limit = {LOG_LIMIT_BYTES}")
        # With a write-ahead log this loses nothing when a process is killed; a power cut may take
        # the last seconds, never the database.
        raw.execute("PRAGMA synchronous = NORMAL")
        if raw.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            raw.execute("PRAGMA journal_mode = WAL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(url: URL) -> Engine:
    return create_engine(url, pool_size=5, pool_pre_ping=True, connect_args={"connect_timeout": 10})


def _dispose(writer: Engine, reader: Engine, lock: filelock.BaseFileLock | None) -> None:
    if lock is None:
        writer.dispose()
        return
    try:
        lock.acquire(timeout=2.0)
    except (filelock.Timeout, OSError):
        # Somebody holds the lock and we must end: leave the connections to the system, which
        # takes them away without a checkpoint.
        writer.dispose(close=False)
        reader.dispose(close=False)
        return
    try:
        reader.dispose()
        writer.dispose()
    finally:
        lock.release()


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    row = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).first()
    return None if row is None else str(row[0])


def _number(version: str) -> int:
    """Return the number that a revision starts with; one without a number is from elsewhere."""
    digits = version.partition("_")[0]
    return int(digits) if digits.isdigit() else 10**6


def _damaged(shown: str) -> str:
    return (
        f"The database {shown} is damaged and was left as it is: move it away to start with a new "
        "one, or bring back a copy."
    )
