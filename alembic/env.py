"""Alembic's environment: runs the migrations on the connection that it is given.

The tables may share a database with Cinder's, so the version table has a name of its own and
nothing but our tables is compared.
"""

from __future__ import annotations

from alembic import context

from cinder_thunder.db import migration

context.configure(connection=context.config.attributes["connection"], **migration.OPTIONS)
with context.begin_transaction():
    context.run_migrations()
