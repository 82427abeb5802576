"""What goes wrong with a database in real life, each time as one sentence, and nothing is lost."""

import os
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

from gptcore.errors import StoreError
from gptcore.store import database, open_store
from tests.store.examples import run, tokens

NOBODY = 65534


def _url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a database with one run in it."""
    path = tmp_path / "lab.db"
    with open_store(_url(path)) as store:
        store.add_run(run(id="first"))
    return path


def _one_sentence(error: pytest.ExceptionInfo[StoreError]) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert text.endswith(".")


def test_a_write_that_another_program_blocks_is_refused_and_works_afterwards(path: Path) -> None:
    with open_store(_url(path), wait_s=0.2) as store:
        with (
            filelock.FileLock(f"{path}.lock"),
            pytest.raises(StoreError, match=r"locked by another program for 0\.2 s") as error,
        ):
            store.add_run(run(id="second"))
        _one_sentence(error)
        assert store.run("first") is not None
        store.add_run(run(id="second"))
        assert store.run("second") is not None


def test_a_program_that_does_not_know_our_lock_blocks_a_write_and_no_reading(path: Path) -> None:
    with open_store(_url(path), wait_s=0.2) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by another program") as error:
            store.add_run(run(id="second"))
        _one_sentence(error)
        assert store.run("first") is not None
        other.execute("ROLLBACK")
        other.close()
        store.add_run(run(id="second"))


def test_threads_of_one_process_wait_for_each_other(path: Path) -> None:
    with open_store(_url(path)) as store:
        threads = [
            threading.Thread(target=lambda: [store.add_run(run()) for _ in range(20)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.count_runs() == {"queued": 81}


def test_a_full_database_refuses_a_run_keeps_the_rest_and_takes_the_next_one(path: Path) -> None:
    with open_store(_url(path)) as store:

        def limit(pages: int) -> None:
            with store._database._writer.connect() as connection:
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        limit(1)  # SQLite takes the present size where that is more
        with pytest.raises(StoreError, match="full: free some space") as error:
            store.add_run(run(id="second", text="x" * 100_000))
        _one_sentence(error)
        assert store.run("second") is None
        assert store.run("first") is not None
        limit(10_000)
        store.add_run(run(id="second", text="x" * 100_000))
        assert store.run("second") is not None


def test_a_disk_that_is_really_full_is_said_and_harms_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("no small disk can be mounted here (needs root and the right to mount)")
    try:
        with open_store(_url(disk / "lab.db")) as store:
            store.add_run(run(id="first"))
            with pytest.raises(StoreError, match="full: free some space"):
                store.finish_run(run(id="second", text="x" * 2_000_000), tokens())
            assert store.run("first") is not None
            assert store.run("second") is None
            store.add_run(run(id="third"))
            assert store.problem_in_pages() is None
    finally:
        subprocess.run(["umount", disk], check=True)


@contextmanager
def _somebody_without_rights() -> Iterator[None]:
    """Root may write everything, so root becomes somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("lock_file", ["no lock file", "lock file"])
def test_a_database_that_may_not_be_written_is_said_to_be_read_only(lock_file: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lab.db"
        with open_store(_url(path)) as store:
            store.add_run(run(id="first"))
        before = path.read_bytes()
        lock = Path(f"{path}.lock")
        if lock_file == "lock file":
            lock.chmod(0o666)
        else:
            lock.unlink()
        path.chmod(0o444)
        path.parent.chmod(0o555)
        try:
            with (
                _somebody_without_rights(),
                pytest.raises(StoreError, match="is read-only: make it and its folder") as error,
                open_store(_url(path)) as store,
            ):
                store.add_run(run(id="second"))
        finally:
            path.parent.chmod(0o755)
        _one_sentence(error)
        assert path.read_bytes() == before


def test_a_store_whose_database_turns_read_only_says_so_and_goes_on_afterwards(
    path: Path,
) -> None:
    with open_store(_url(path)) as store:
        raw = store._database._writer.raw_connection()
        raw.cursor().execute("PRAGMA query_only = ON")
        raw.close()  # back into the pool of one
        with pytest.raises(StoreError, match="is read-only"):
            store.add_run(run(id="second"))
        raw = store._database._writer.raw_connection()
        raw.cursor().execute("PRAGMA query_only = OFF")
        raw.close()
        store.add_run(run(id="second"))
        assert store.run("second") is not None


def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "lab.db"
    path.write_bytes(b"my diary, not a database\n" * 1000)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="damaged and was left as it is") as error:
        open_store(_url(path))
    _one_sentence(error)
    assert path.read_bytes() == before


@pytest.mark.parametrize("where", ["header", "schema", "middle", "truncated"])
def test_a_damaged_database_is_refused_on_opening_and_left_as_it_is(path: Path, where: str) -> None:
    with open_store(_url(path)) as store:
        for _ in range(50):
            store.finish_run(run(text="x" * 3000), tokens())
    whole = bytearray(path.read_bytes())
    if where == "truncated":
        del whole[len(whole) // 2 :]
    else:
        at = {"header": 0, "schema": 100, "middle": len(whole) // 2 // 4096 * 4096}[where]
        whole[at : at + 2048] = b"\xa5" * 2048
    path.write_bytes(whole)
    with pytest.raises(StoreError, match="damaged and was left as it is") as error:
        open_store(_url(path))
    _one_sentence(error)
    assert path.read_bytes() == whole


def test_a_newer_database_is_refused_by_number_and_left_as_it_is(path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("UPDATE gptlab_version SET version_num = '0009'")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError) as error:
        open_store(_url(path))
    assert str(error.value) == (
        f"The database {path} was written by a newer version (schema 9, this program knows "
        f"{int(database.KNOWN_VERSION)}): "
        "update the program or set GPTLAB_DATABASE_URL to another file."
    )
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE recipes (name)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"belongs to another program .*'recipes'"):
        open_store(_url(path))
    assert path.read_bytes() == before


def test_a_database_that_vanishes_is_said_and_not_made_anew(path: Path) -> None:
    with open_store(_url(path)) as store:
        path.rename(path.with_suffix(".away"))
        for attempt in (lambda: store.run("first"), lambda: store.add_run(run()), store.check):
            with pytest.raises(StoreError, match="is gone"):
                attempt()
        assert not path.exists()
        path.with_suffix(".away").rename(path)
        assert store.run("first") is not None


def test_a_folder_in_place_of_the_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened") as error:
        open_store(_url(tmp_path))
    _one_sentence(error)


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    with open_store(_url(tmp_path / "a" / "b" / "lab.db")) as store:
        assert store.runs() == ()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://user:secret@host/x", "mysql database; SQLite and PostgreSQL are supported"),
        ("secret, not a url", "is not a database URL"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ],
)
def test_an_unusable_url_is_a_sentence_without_its_password(url: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as error:
        open_store(url)
    _one_sentence(error)
    assert "secret" not in str(error.value)
