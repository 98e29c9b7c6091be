"""Steps of migrations. What is there already is left out.

MariaDB commits each change of a table by itself. An upgrade that was killed has done a part of a
migration, and the next one begins with its first step again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op


def create_table(name: str, *columns: sa.schema.SchemaItem, **options: Any) -> None:
    if not _found().has_table(name):
        op.create_table(name, *columns, **options)


def add_column(table: str, column: sa.Column[Any]) -> None:
    if column.name not in {found["name"] for found in _found().get_columns(table)}:
        op.add_column(table, column)


def create_index(name: str, table: str, columns: Sequence[str]) -> None:
    if name not in {found["name"] for found in _found().get_indexes(table)}:
        op.create_index(name, table, list(columns))


def _found() -> sa.Inspector:
    """What the database has now."""
    return sa.inspect(op.get_bind())
