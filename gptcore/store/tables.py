"""The tables as they are today; the migrations lead here, and a test holds the two equal.

Every moment is a number of seconds since 1970 (UTC) in double precision, in every table: it means
the same to SQLite, PostgreSQL and a person with ``datetime(at, 'unixepoch')``, and microseconds
survive it. JSON is kept as text, so that both databases keep exactly what was written.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

VERSION_TABLE = "gptlab_version"
"""Where Alembic notes the schema; a name of our own, because a PostgreSQL may be shared."""


class AnyText(TypeDecorator[str]):
    r"""Text that may hold what a database refuses: NUL and halves of surrogate pairs.

    A model may well produce a NUL. Those characters are kept as ``\u0000``-like escapes, and a
    backslash as two, so that every Python string comes back exactly as it went in.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return ``value`` as it is stored."""
        return None if value is None else escaped(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """Return what was stored as it went in."""
        return None if value is None else unescaped(value)


def escaped(text: str) -> str:
    r"""Return ``text`` with NUL and lone surrogates as ``\uXXXX`` and each backslash doubled."""
    return re.sub(
        "[\\\\\x00\ud800-\udfff]",
        lambda m: "\\\\" if m[0] == "\\" else f"\\u{ord(m[0]):04x}",
        text,
    )


def unescaped(text: str) -> str:
    """Undo ``escaped``."""
    return re.sub(
        r"\\(\\|u[0-9a-f]{4})",
        lambda m: "\\" if m[1] == "\\" else chr(int(m[1][1:], 16)),
        text,
    )


metadata = MetaData()

runs = Table(
    "runs",
    metadata,
    # Narrow columns first and long text last: SQLite reads a row from its start, and a query for
    # numbers must not walk through the pages of a long prompt.
    Column("id", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("state", String(32), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("ended_at", Double),
    Column("machine", String(255), nullable=False),
    Column("owner", String(255), nullable=False),
    Column("variant_hash", String(64)),
    Column("parent_id", String(64)),
    Column("error_kind", String(64)),
    Column("prompt_tokens", Integer),
    Column("new_tokens", Integer),
    Column("finish_reason", String(32)),
    Column("queue_s", Double),
    Column("load_s", Double),
    Column("ttft_s", Double),
    Column("tpot_s", Double),
    Column("e2e_s", Double),
    Column("prefill_tokens_per_s", Double),
    Column("decode_tokens_per_s", Double),
    Column("peak_memory_bytes", BigInteger),
    Column("mbu_ratio", Double),
    Column("mbu_bytes_per_step", BigInteger),
    Column("mbu_peak_bytes_per_s", Double),
    Column("cut_tokens", Integer),
    Column("model", AnyText, nullable=False),
    Column("precision", String(64), nullable=False),
    Column("device", String(64), nullable=False),
    Column("error", AnyText),
    Column("prompt_start", AnyText, nullable=False),
    Column("settings", Text, nullable=False),
    Column("text", AnyText, nullable=False),
    Column("result", Text),
    Index("runs_by_created", "created_at"),
    Index("runs_by_state", "state", "created_at"),
    Index("runs_by_kind", "kind", "created_at"),
    # The live page asks for these columns of all runs of a day: the index alone answers.
    Index(
        "runs_latency",
        "kind",
        "ended_at",
        "state",
        "error_kind",
        "ttft_s",
        "tpot_s",
        "e2e_s",
        "prompt_tokens",
        "new_tokens",
    ),
)

token_streams = Table(
    "token_streams",
    metadata,
    Column("run_id", String(64), ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("count", Integer, nullable=False),
    Column("ids", Text, nullable=False),
    Column("seconds", Text, nullable=False),
    Column("logprobs", Text, nullable=False),
    Column("probabilities", Text, nullable=False),
    Column("texts", Text, nullable=False),
    Column("forced", Text, nullable=False),
    Column("alternatives", LargeBinary, nullable=False),
)

variants = Table(
    "variants",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("created_at", Double, nullable=False),
    Column("definition", Text, nullable=False),
)

provenances = Table(
    "provenances",
    metadata,
    Column("variant_hash", String(64), ForeignKey("variants.hash", ondelete="CASCADE")),
    Column("since", Double, nullable=False),
    Column("machine", String(255), nullable=False),
    Column("app_version", Text, nullable=False),
    Column("git_commit", Text),
    Column("python", Text, nullable=False),
    Column("torch", Text),
    Column("platform", Text, nullable=False),
    Column("cpu", Text),
    Column("gpu", Text),
    Column("cores", Integer),
    Column("memory_bytes", BigInteger),
    Column("weights_hash", Text),
    Column("threads", Integer),
    Column("power", Text),
    Index("provenances_by_variant", "variant_hash", "since"),
)

measurements = Table(
    "measurements",
    metadata,
    Column("run_id", String(64), ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("observations", Text, nullable=False),
)

# What people say about a run; a host that writes down the end of a run leaves it alone.
run_annotations = Table(
    "annotations",
    metadata,
    Column("run_id", String(64), ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("tags", Text, nullable=False),
    Column("note", AnyText, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("archived", Boolean, nullable=False),
    Column("baseline", Boolean, nullable=False),
)

votes = Table(
    "votes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("at", Double, nullable=False),
    Column("left", AnyText, nullable=False),
    Column("right", AnyText, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("left_tokens", Integer, nullable=False),
    Column("right_tokens", Integer, nullable=False),
    Column("prompt_hash", String(64), nullable=False),
    Index("votes_by_time", "at"),
)

series = Table(
    "series",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("machine", String(255), nullable=False),
    Column("name", String(128), nullable=False),
    Column("subject", String(128), nullable=False),
    Index("series_by_name", "machine", "name", "subject", unique=True),
)

# Keys start with the time: each second then writes to the end of one table, and not into a place
# of its own for every series.
readings = Table(
    "readings",
    metadata,
    Column("at", Double, primary_key=True),
    Column("series_id", Integer, ForeignKey("series.id"), primary_key=True),
    Column("value", Double, nullable=False),
    sqlite_with_rowid=False,
)


def _tier(name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("at", BigInteger, primary_key=True),  # the bucket's start
        Column("series_id", Integer, ForeignKey("series.id"), primary_key=True),
        Column("min", Double, nullable=False),
        Column("max", Double, nullable=False),
        Column("mean", Double, nullable=False),
        Column("count", Integer, nullable=False),
        sqlite_with_rowid=False,
    )


readings_1m = _tier("readings_1m")
readings_1h = _tier("readings_1h")

rollups = Table(
    "rollups",
    metadata,
    Column("machine", String(255), primary_key=True),
    Column("tier", String(8), primary_key=True),
    Column("until", Double, nullable=False),  # everything before this moment is in the tier
)
