"""Run by Alembic: migrates over the connection that ``Database`` hands it, in its transaction."""

from __future__ import annotations

from alembic import context

from gptcore.store.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
context.run_migrations()
