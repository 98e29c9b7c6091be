"""Alembic's environment: runs the migrations on the connection in its configuration.

The tables may be in Cinder's database, so the version table has a name of its own and only our
tables are compared.
"""

from __future__ import annotations

from alembic import context

from cinder_thunder.db import migration

context.configure(connection=context.config.attributes["connection"], **migration.OPTIONS)
with context.begin_transaction():
    context.run_migrations()
