"""Keeps runs, tokens, variants, measurements and readings; hands out frozen values, never rows."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    Table,
    Text,
    and_,
    cast,
    delete,
    insert,
    or_,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy import func as sql
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from gptcore.errors import StoreError
from gptcore.paths import data_dir
from gptcore.records import (
    Annotation,
    Choice,
    Measurement,
    Provenance,
    Reading,
    Run,
    RunKind,
    RunState,
    Token,
    Vote,
    new_id,
)
from gptcore.store import history, rows, tables, timeline
from gptcore.store.database import KNOWN_VERSION, Database
from gptcore.store.history import Answer, Filter, Found
from gptcore.store.tables import escaped
from gptcore.store.timeline import Latencies, Rates, Series

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400

RAW_KEPT_S = 2 * DAY_S
"""Yesterday can be looked at second by second; raw readings are most of the bytes."""
MINUTES_KEPT_S = 60 * DAY_S
"""Twice the longest range of the live page. Hours are kept for ever: 20 kB a series and month."""
RAW_RANGE_S = HOUR_S
"""Up to an hour a line is drawn from raw readings: 3,600 points for 600 pixels."""
MINUTES_RANGE_S = 7 * DAY_S
"""Up to a week a line is drawn from minutes, beyond from hours (168 of them at least)."""
LATE_S = 5 * MINUTE_S
"""A roll-up looks again at this much before the last one, for readings that came late."""
SETTLED_S = 2.0
"""A minute is rolled up so long after its end: readings land within 2 s."""
CHUNK_S = 6 * HOUR_S
"""What one transaction of a roll-up covers, so that a long pause does not block the writers."""


def open_store(url: str | None = None, *, wait_s: float = 15.0) -> Store:
    """Return the store at ``url``, its schema brought up to date.

    Args:
        url: an SQLAlchemy URL; ``GPTLAB_DATABASE_URL`` if not given, and without that the file
            ``lab.db`` in the data folder.
        wait_s: how long a write waits for other processes before it is refused.

    Raises:
        StoreError: the database is locked, full, read-only, damaged, newer than this program, or
            cannot be reached.
    """
    url = url or os.environ.get("GPTLAB_DATABASE_URL") or f"sqlite:///{data_dir() / 'lab.db'}"
    return Store(Database(url, wait_s=wait_s))


class Store:
    """What the laboratory remembers. All methods may be called from any thread.

    Every method raises StoreError, with one sentence, when the database cannot do it; nothing of
    that call is then kept.

    Args:
        database: where to keep it.
        machine: whose readings and running work this is, where several machines share a database.
    """

    def __init__(self, database: Database, machine: str | None = None) -> None:
        self._database = database
        # A SQLite file belongs to one machine, whose name may change (containers, laptops).
        shared = os.environ.get("GPTLAB_MACHINE") or platform.node()
        self._machine = machine or ("" if database.is_sqlite else shared)
        self._series_ids: dict[tuple[str, str], int] = {}

    @property
    def url(self) -> str:
        """The database's URL, password included: for another process, never for showing."""
        return self._database.url.render_as_string(hide_password=False)

    def close(self) -> None:
        """Close the database; the store cannot be used afterwards."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Runs

    def add_run(self, run: Run) -> None:
        """Keep a new run."""
        try:
            with self._database.writing() as connection:
                connection.execute(insert(tables.runs), rows.run_to_row(run, self._machine))
        except StoreError as error:
            if isinstance(error.__cause__, IntegrityError):
                raise StoreError(f"There is already a run {run.id}.") from error
            raise

    def update_run(self, run_id: str, **changes: Any) -> None:
        """Change fields of a run, such as ``state`` or ``text``."""
        unknown = set(changes) - {field.name for field in fields(Run)} | set(changes) & {"id"}
        if unknown:
            raise TypeError(f"a run has no changeable field {min(unknown)!r}")
        with self._database.writing() as connection:
            changed = connection.execute(
                update(tables.runs)
                .where(tables.runs.c.id == run_id)
                .values(rows.changes_to_row(changes))
            )
            if not changed.rowcount:
                raise StoreError(f"There is no run {run_id} to change.")

    def finish_run(self, run: Run, tokens: Sequence[Token]) -> None:
        """Keep the final state of a run and its tokens, in one transaction.

        A run that could not be added before is added now.
        """
        with self._database.writing() as connection:
            self._upsert(connection, tables.runs, [rows.run_to_row(run, self._machine)])
            self._replace_tokens(connection, run.id, tokens)

    def run(self, run_id: str) -> Run | None:
        """Return a run, or None if there is none of that id."""
        with self._database.reading() as connection:
            row = connection.execute(select(tables.runs).where(tables.runs.c.id == run_id)).first()
        return None if row is None else rows.run_of_row(row._mapping)

    def runs(
        self,
        *,
        kind: str | None = None,
        state: str | None = None,
        model: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        search: str = "",
        limit: int | None = 100,
        offset: int = 0,
    ) -> tuple[Run, ...]:
        """Return runs, newest first.

        Args:
            kind: only this RunKind.
            state: only this RunState.
            model: only this catalogue name.
            since: only runs created then or later.
            until: only runs created before.
            search: only runs whose text, prompt (its first 2,000 characters), model, error or id
                holds this; upper and lower case are the same (in SQLite, for a to z only).
            limit: at most so many; None is all.
            offset: skip so many first.
        """
        table = tables.runs
        query = select(table).order_by(table.c.created_at.desc(), table.c.id.desc())
        if kind is not None:
            query = query.where(table.c.kind == str(kind))
        if state is not None:
            query = query.where(table.c.state == str(state))
        if model is not None:
            query = query.where(table.c.model == model)
        if since is not None:
            query = query.where(table.c.created_at >= rows.seconds_of(since))
        if until is not None:
            query = query.where(table.c.created_at < rows.seconds_of(until))
        if search:
            query = _searched(query, search)
        with self._database.reading() as connection:
            found = connection.execute(query.limit(limit).offset(offset)).all()
        return tuple(rows.run_of_row(row._mapping) for row in found)

    def count_runs(self, *, kind: str | None = None) -> dict[str, int]:
        """Return how many runs there are in each state."""
        table = tables.runs
        query = select(table.c.state, sql.count()).group_by(table.c.state)
        if kind is not None:
            query = query.where(table.c.kind == str(kind))
        with self._database.reading() as connection:
            found = connection.execute(query).all()
        return {str(row[0]): int(row[1]) for row in found}

    def delete_run(self, run_id: str) -> None:
        """Forget a run with its tokens and measurements; an unknown one does no harm."""
        with self._database.writing() as connection:
            connection.execute(delete(tables.runs).where(tables.runs.c.id == run_id))

    def tokens(self, run_id: str) -> tuple[Token, ...]:
        """Return the tokens of a run; empty if none were kept."""
        table = tables.token_streams
        with self._database.reading() as connection:
            row = connection.execute(select(table).where(table.c.run_id == run_id)).first()
        return () if row is None else rows.tokens_of_row(row._mapping)

    def save_tokens(self, run_id: str, tokens: Sequence[Token]) -> None:
        """Keep the tokens of a run, in place of those it had."""
        with self._database.writing() as connection:
            self._replace_tokens(connection, run_id, tokens)

    def interrupt_orphans(self, alive: Callable[[str], bool]) -> int:
        """Mark unfinished runs of this machine as interrupted if their owner is gone.

        Args:
            alive: whether the process that ``Run.owner`` names still runs.

        Returns:
            How many runs were marked.
        """
        table = tables.runs
        unfinished = and_(
            table.c.state.in_([RunState.QUEUED.value, RunState.RUNNING.value]),
            table.c.machine == self._machine,
        )
        with self._database.reading() as connection:
            owners = connection.execute(select(table.c.owner).where(unfinished).distinct())
            dead = [owner for (owner,) in owners if not alive(owner)]
        if not dead:
            return 0
        with self._database.writing() as connection:
            marked = connection.execute(
                update(table)
                .where(unfinished, table.c.owner.in_(dead))
                .values(
                    state=RunState.INTERRUPTED.value,
                    ended_at=time.time(),
                    error_kind="interrupted",
                    error="The program ended while this was under way.",
                )
            )
        return int(marked.rowcount)

    # History

    def history(
        self, wanted: Filter = Filter(), *, limit: int = 500, offset: int = 0
    ) -> tuple[tuple[Found, ...], int]:
        """Return a page of runs as narrow lines, pinned ones first, and how many there are in all.

        Raises:
            InvalidInput: the order is by no column that can be sorted.
        """
        with self._database.reading() as connection:
            found = history.found(connection, wanted, limit, offset)
            return found, history.count(connection, wanted)

    def annotation(self, run_id: str) -> Annotation:
        """Return what was said about a run; an empty one where nothing was."""
        with self._database.reading() as connection:
            return history.said_about(connection, [run_id]).get(run_id, Annotation())

    def annotate(self, run_id: str, **changes: Any) -> Annotation:
        """Change fields of what is said about a run, and return all of it."""
        table = tables.run_annotations
        with self._database.writing() as connection:
            if not connection.execute(
                select(tables.runs.c.id).where(tables.runs.c.id == run_id)
            ).first():
                raise StoreError(f"There is no run {run_id} to say something about.")
            before = history.said_about(connection, [run_id]).get(run_id, Annotation())
            after = replace(before, **changes)
            self._upsert(connection, table, [history.annotation_row(run_id, after)])
        return after

    def tags(self) -> tuple[str, ...]:
        """Return every tag in use, sorted."""
        with self._database.reading() as connection:
            return history.tags(connection)

    def ask(self, question: str) -> Answer:
        """Answer a question in SQL over a connection that can change nothing.

        Raises:
            InvalidInput: it is no SELECT, is wrong, or takes too long.
        """
        if self._database.path is not None:
            return history.ask_sqlite(self._database.path, question)
        with self._database.reading() as connection:
            return history.ask_server(connection, question)

    # Votes

    def add_vote(self, vote: Vote) -> None:
        """Keep a choice between two answers."""
        row = {**vote.model_dump(), "at": vote.at.timestamp(), "id": new_id()}
        row["verdict"] = str(row.pop("choice"))
        with self._database.writing() as connection:
            connection.execute(insert(tables.votes), row)

    def votes(self) -> tuple[Vote, ...]:
        """Return every vote, the oldest first."""
        query = select(tables.votes).order_by(tables.votes.c.at, tables.votes.c.id)
        with self._database.reading() as connection:
            found = connection.execute(query).all()
        return tuple(
            Vote(
                left=row.left,
                right=row.right,
                choice=Choice(row.verdict),
                left_tokens=row.left_tokens,
                right_tokens=row.right_tokens,
                prompt_hash=row.prompt_hash,
                at=datetime.fromtimestamp(row.at, UTC),
            )
            for row in found
        )

    # Variants

    def add_variant(self, hash: str, definition: Mapping[str, Any], provenance: Provenance) -> None:
        """Keep what a variant is, and with which versions and machine it is used from now on.

        The same provenance twice in a row is kept once.
        """
        known = self.variant(hash)
        if known is not None and known[1] == provenance:
            return
        at = time.time()
        with self._database.writing() as connection:
            self._insert_new(
                connection,
                tables.variants,
                [{"hash": hash, "created_at": at, "definition": json.dumps(dict(definition))}],
            )
            connection.execute(
                insert(tables.provenances),
                {"variant_hash": hash, "since": at, "machine": self._machine}
                | {name: getattr(provenance, name) for name in rows.PROVENANCE},
            )

    def variant(
        self, hash: str, at: datetime | None = None
    ) -> tuple[Mapping[str, Any], Provenance] | None:
        """Return what a variant is and what it was run with at a moment (default: last).

        Args:
            hash: of the variant.
            at: a run's ``created_at`` gives the versions and machine of that run.
        """
        old = tables.provenances
        latest = select(old).where(old.c.variant_hash == hash).order_by(old.c.since.desc())
        if not self._database.is_sqlite:
            latest = latest.where(old.c.machine == self._machine)
        with self._database.reading() as connection:
            definition = connection.execute(
                select(tables.variants.c.definition).where(tables.variants.c.hash == hash)
            ).scalar()
            if definition is None:
                return None
            row = None
            if at is not None:
                row = connection.execute(latest.where(old.c.since <= rows.seconds_of(at))).first()
            row = row or connection.execute(latest).first()
        if row is None:
            return None
        made = Provenance(**{name: row._mapping[name] for name in rows.PROVENANCE})
        return json.loads(definition), made

    # Measurements

    def add_measurements(self, measurements: Sequence[Measurement]) -> None:
        """Keep measurements with all their observations; one of the same name is replaced."""
        if not measurements:
            return
        with self._database.writing() as connection:
            self._upsert(
                connection,
                tables.measurements,
                [
                    {
                        "run_id": one.run_id,
                        "name": one.name,
                        "observations": json.dumps(list(one.observations)),
                    }
                    for one in measurements
                ],
            )

    def measurements(self, run_id: str) -> tuple[Measurement, ...]:
        """Return the measurements of a run, by name."""
        table = tables.measurements
        query = select(table).where(table.c.run_id == run_id).order_by(table.c.name)
        with self._database.reading() as connection:
            found = connection.execute(query).all()
        return tuple(
            Measurement(row.run_id, row.name, tuple(json.loads(row.observations))) for row in found
        )

    # Readings

    def add_readings(self, readings: Sequence[Reading]) -> None:
        """Keep readings; a second one of the same name, subject and moment is ignored."""
        kept = [one for one in readings if math.isfinite(one.value) and math.isfinite(one.at)]
        if not kept:
            return
        keys = {(one.name, one.subject) for one in kept}
        with self._database.writing() as connection:
            ids = self._series(connection, keys)
            self._insert_new(
                connection,
                tables.readings,
                [
                    {"at": one.at, "series_id": ids[one.name, one.subject], "value": one.value}
                    for one in kept
                ],
            )
        self._series_ids |= ids  # only now: a transaction that failed gave no lasting number

    def readings(self, names: Sequence[str], start: float, end: float, points: int = 600) -> Series:
        """Return lines for a chart: (name, subject) -> (times, values), times ascending.

        Up to an hour the lines are made of raw readings, up to a week of the least and the
        greatest of each minute, beyond that of each hour; what was not rolled up yet is added
        from the finer tables. Then each line is thinned so that its extremes stay.

        Args:
            names: of the readings; every subject of each is returned.
            start: seconds since 1970, included.
            end: seconds since 1970, included.
            points: at most so many a line.
        """
        with self._database.reading() as connection:
            keys = {
                id: (name, subject)
                for id, name, subject in connection.execute(
                    select(tables.series.c.id, tables.series.c.name, tables.series.c.subject).where(
                        tables.series.c.machine == self._machine,
                        tables.series.c.name.in_(list(names)),
                    )
                )
            }
            if not keys or end < start:
                return {}
            parts = self._parts(connection, list(keys), start, end, points)
        return _lines(keys, parts, points)

    def roll_up(self, at: float) -> None:
        """Sum raw readings up into minutes and hours until ``at``, and forget what is old.

        Doing it twice changes nothing.
        """
        done_until = (at - SETTLED_S) // MINUTE_S * MINUTE_S
        self._roll_up_tier("1m", done_until)
        self._roll_up_tier("1h", done_until // HOUR_S * HOUR_S)
        with self._database.writing() as connection:
            mine = select(tables.series.c.id).where(tables.series.c.machine == self._machine)
            for table, kept_s in (
                (tables.readings, RAW_KEPT_S),
                (tables.readings_1m, MINUTES_KEPT_S),
            ):
                # Only what is in the coarser table goes; that holds since it was just summed up.
                connection.execute(
                    delete(table).where(table.c.at < at - kept_s, table.c.series_id.in_(mine))
                )

    def latencies(self, start: float, end: float, points: int = 120) -> Latencies:
        """Return p50, p95 and p99 of TTFT, TPOT and E2E over time, of generations that succeeded.

        Args:
            start: seconds since 1970.
            end: seconds since 1970.
            points: number of time buckets.
        """
        query = self._ended(start, end, "ttft_s", "tpot_s", "e2e_s")
        query = query.where(tables.runs.c.state == RunState.DONE.value)
        with self._database.reading() as connection:
            at, ttft, tpot, e2e = _numbers(connection, query).T
        return timeline.latencies(ttft, tpot, e2e, at, timeline.bucket_edges(start, end, points))

    def rates(self, start: float, end: float, points: int = 120) -> Rates:
        """Return tokens and requests a second, and errors by kind, over time.

        Args:
            start: seconds since 1970.
            end: seconds since 1970.
            points: number of time buckets.
        """
        query = self._ended(start, end, "prompt_tokens", "new_tokens", "state", "error_kind")
        with self._database.reading() as connection:
            found = connection.execute(query).all()
        at, prompt, new, states, kinds = zip(*found, strict=True) if found else ((),) * 5
        edges = timeline.bucket_edges(start, end, points)
        return timeline.rates(
            timeline.bucket_of(np.array(at, dtype=np.float64), edges),
            states,
            kinds,
            np.array(prompt, dtype=np.float64),
            np.array(new, dtype=np.float64),
            edges,
        )

    # Service

    def check(self) -> str:
        """Return a sentence on the database, once it was read and could be written.

        Raises:
            StoreError: it cannot be read or written, or its schema is another program's.
        """
        version = self._database.version()
        if version != KNOWN_VERSION:
            raise StoreError(
                f"The database {self._database.shown} has schema {version} and this program "
                f"needs {KNOWN_VERSION}: start the program again."
            )
        with self._database.writing() as connection:
            if not self._database.is_sqlite:
                connection.execute(text("SELECT 1"))
        kind = "SQLite" if self._database.is_sqlite else "PostgreSQL"
        return f"{kind}, schema {int(version)}, {self._database.shown}: well."

    def problem_in_pages(self) -> str | None:
        """Look at every page of a SQLite file; return what is wrong, or None."""
        return self._database.problem_in_pages()

    def size_bytes(self) -> int:
        """Return the size of the database on disk, with its write-ahead log."""
        if self._database.path is None:
            with self._database.reading() as connection:
                found = connection.execute(text("SELECT pg_database_size(current_database())"))
                return int(found.scalar_one())
        both = (self._database.path, Path(f"{self._database.path}-wal"))
        return sum(one.stat().st_size for one in both if one.exists())

    # Inside

    def _insert(self, table: Table) -> Any:
        return sqlite.insert(table) if self._database.is_sqlite else postgresql.insert(table)

    def _insert_new(
        self, connection: Connection, table: Table, new: Sequence[Mapping[str, Any]]
    ) -> None:
        """Insert rows; one whose key is there already is left as it is."""
        connection.execute(self._insert(table).on_conflict_do_nothing(), list(new))

    def _upsert(
        self, connection: Connection, table: Table, new: Sequence[Mapping[str, Any]]
    ) -> None:
        """Insert rows; one whose key is there already takes the new values."""
        statement = self._insert(table)
        keys = [column.name for column in table.primary_key]
        changes = {name: statement.excluded[name] for name in new[0] if name not in keys}
        connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changes), new)

    def _replace_tokens(self, connection: Connection, run_id: str, tokens: Sequence[Token]) -> None:
        table = tables.token_streams
        if tokens:
            self._upsert(connection, table, [rows.tokens_to_row(run_id, tokens)])
        else:
            connection.execute(delete(table).where(table.c.run_id == run_id))

    def _series(
        self, connection: Connection, keys: Iterable[tuple[str, str]]
    ) -> dict[tuple[str, str], int]:
        """Return the number of each (name, subject), given where it is new."""
        missing = sorted(set(keys) - set(self._series_ids))
        if not missing:
            return self._series_ids
        self._insert_new(
            connection,
            tables.series,
            [{"machine": self._machine, "name": n, "subject": s} for n, s in missing],
        )
        table = tables.series
        found = connection.execute(
            select(table.c.name, table.c.subject, table.c.id).where(
                table.c.machine == self._machine
            )
        )
        return {(name, subject): id for name, subject, id in found}

    def _parts(
        self, connection: Connection, ids: list[int], start: float, end: float, points: int
    ) -> list[np.ndarray]:
        """Return (N, 3) arrays of series, moment, value, oldest table first."""
        length = end - start
        until = self._rolled_up(connection)
        raw_from = until.get("1m", -math.inf) - RAW_KEPT_S
        minutes_from = until.get("1h", -math.inf) - MINUTES_KEPT_S
        parts = []
        if length > MINUTES_RANGE_S or start < minutes_from:
            parts.append(self._extremes(connection, tables.readings_1h, HOUR_S, ids, start, end))
            start = max(start, until.get("1h", start))
        if length > RAW_RANGE_S or start < raw_from:
            # Several minutes go into one point where there are more minutes than points.
            step = MINUTE_S * max(1, math.ceil(2 * length / MINUTE_S / max(points, 1)))
            step = min(step, HOUR_S)
            parts.append(self._extremes(connection, tables.readings_1m, step, ids, start, end))
            start = max(start, until.get("1m", start))
        table = tables.readings
        raw = select(table.c.series_id, table.c.at, table.c.value).where(
            table.c.at >= start, table.c.at <= end, table.c.series_id.in_(ids)
        )
        return [*parts, _numbers(connection, raw)]

    def _extremes(
        self,
        connection: Connection,
        table: Table,
        step: int,
        ids: list[int],
        start: float,
        end: float,
    ) -> np.ndarray:
        """Return the least and the greatest value of each ``step`` seconds as two points.

        Error: which of the two came first is not kept, so a point may be off by half a step.
        """
        bucket = (table.c.at // step).label("bucket")
        query = (
            select(table.c.series_id, bucket, sql.min(table.c.min), sql.max(table.c.max))
            .where(table.c.at >= start, table.c.at <= end, table.c.series_id.in_(ids))
            .group_by(table.c.series_id, bucket)
        )
        series, number, least, greatest = _numbers(connection, query).T
        early, late = (np.clip((number + part) * step, start, end) for part in (0.25, 0.75))
        return np.concatenate(
            [np.stack([series, early, least], 1), np.stack([series, late, greatest], 1)]
        )

    def _rolled_up(self, connection: Connection) -> dict[str, float]:
        table = tables.rollups
        found = connection.execute(
            select(table.c.tier, table.c.until).where(table.c.machine == self._machine)
        )
        return {tier: float(until) for tier, until in found}

    def _roll_up_tier(self, tier: str, until: float) -> None:
        source, target, step = {
            "1m": (tables.readings, tables.readings_1m, MINUTE_S),
            "1h": (tables.readings_1m, tables.readings_1h, HOUR_S),
        }[tier]
        with self._database.reading() as connection:
            done = self._rolled_up(connection).get(tier)
            if done is None:
                done = connection.execute(select(sql.min(source.c.at))).scalar()
        if done is None:
            return
        # A clock that was set back makes ``until`` the earlier one: what follows is redone.
        start = (min(done, until) - LATE_S) // step * step
        while start < until:
            end = min(start + CHUNK_S, until)
            with self._database.writing() as connection:
                self._sum_up(connection, source, target, step, start, end)
                self._upsert(
                    connection,
                    tables.rollups,
                    [{"machine": self._machine, "tier": tier, "until": end}],
                )
            start = end

    def _sum_up(
        self,
        connection: Connection,
        source: Table,
        target: Table,
        step: int,
        start: float,
        end: float,
    ) -> None:
        """Write the buckets of ``target`` between two moments from ``source``."""
        number = source.c.at / float(step)
        if not self._database.is_sqlite:  # whose cast rounds, where SQLite's cuts
            number = sql.floor(number)
        bucket = (cast(number, BigInteger) * step).label("bucket")
        if source is tables.readings:
            values = source.c.value
            columns: list[ColumnElement[Any]] = [
                sql.min(values),
                sql.max(values),
                sql.avg(values),
                sql.count(),
            ]
        else:
            count = sql.sum(source.c.count)
            columns = [
                sql.min(source.c.min),
                sql.max(source.c.max),
                sql.sum(source.c.mean * source.c.count) / count,
                count,
            ]
        mine = select(tables.series.c.id).where(tables.series.c.machine == self._machine)
        summed = (
            select(bucket, source.c.series_id, *columns)
            .where(source.c.at >= start, source.c.at < end, source.c.series_id.in_(mine))
            .group_by(bucket, source.c.series_id)
        )
        names = ["at", "series_id", "min", "max", "mean", "count"]
        statement = self._insert(target).from_select(names, summed)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=names[:2],
                set_={name: statement.excluded[name] for name in names[2:]},
            )
        )

    def _ended(self, start: float, end: float, *names: str) -> Select[Any]:
        """Return the query for when each generation of a time range ended, and some columns."""
        table = tables.runs
        return select(table.c.ended_at, *(table.c[name] for name in names)).where(
            table.c.ended_at >= start,
            table.c.ended_at <= end,
            table.c.kind == RunKind.GENERATE.value,
        )


def _numbers(connection: Connection, query: Select[Any]) -> timeline.Floats:
    """Return (rows, columns) of a query for numbers; a missing one becomes NaN."""
    result = connection.execute(query)
    # The driver's plain tuples: SQLAlchemy's rows take three times as long to become an array.
    found = result.cursor.fetchall()
    result.close()
    return np.array(found, dtype=np.float64).reshape(-1, len(query.selected_columns))


def _searched(query: Select[Any], search: str) -> Select[Any]:
    table = tables.runs
    wanted = escaped(search)
    return query.where(
        or_(
            *(
                type_coerce(column, Text).icontains(wanted, autoescape=True)
                for column in (
                    table.c.text,
                    table.c.prompt_start,
                    table.c.model,
                    table.c.error,
                    table.c.id,
                )
            )
        )
    )


def _lines(keys: Mapping[int, tuple[str, str]], parts: Sequence[np.ndarray], points: int) -> Series:
    every = np.concatenate(list(parts))
    every = every[np.lexsort((every[:, 1], every[:, 0]))]
    lines: Series = {}
    for id, key in sorted(keys.items(), key=lambda pair: pair[1]):
        first, last = np.searchsorted(every[:, 0], [id, id + 1])
        if first < last:
            times, values = timeline.thinned(
                np.ascontiguousarray(every[first:last, 1]),
                np.ascontiguousarray(every[first:last, 2]),
                points,
            )
            lines[key] = (tuple(times.tolist()), tuple(values.tolist()))
    return lines
