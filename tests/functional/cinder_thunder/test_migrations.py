"""The schema, from an empty database, on the databases that Cinder runs on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from cinder_thunder.db import migration, models


def revisions() -> list[str]:
    config = Config()
    config.set_main_option("script_location", str(migration.scripts()))
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][
        ::-1
    ]


def test_models_are_what_the_migrations_make(url: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:  # a table of Cinder's, in the same database
        connection.execute(sa.text("CREATE TABLE volumes (id INTEGER PRIMARY KEY)"))
    migration.upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=migration.OPTIONS)
        assert compare_metadata(context, models.TableRow.metadata) == []
    names = set(sa.inspect(engine).get_table_names())
    assert names == {*models.TableRow.metadata.tables, "volumes", "thunder_alembic_version"}


def test_walk(url: str) -> None:
    engine = sa.create_engine(url)
    assert migration.version(engine) is None
    assert revisions(), "no migrations found"
    for revision in revisions():
        migration.upgrade(engine, revision)
        assert migration.version(engine) == revision
        migration.upgrade(engine, revision)  # again: nothing happens
    assert migration.version(engine) == revisions()[-1]


def test_an_upgrade_that_was_killed_goes_on(url: str) -> None:
    """MariaDB commits each step by itself: whatever was done stays."""
    engine = sa.create_engine(url)
    for steps in itertools.count(1):
        left = itertools.repeat(True, steps)

        def killed(
            _connection: Any, _cursor: Any, statement: str, *_: Any, left: Iterator[bool] = left
        ) -> None:
            if statement.lstrip().startswith(("CREATE", "ALTER")) and not next(left, False):
                raise KeyboardInterrupt

        sa.event.listen(engine, "before_cursor_execute", killed)
        try:
            migration.upgrade(engine)
            break
        except KeyboardInterrupt:
            continue
        finally:
            sa.event.remove(engine, "before_cursor_execute", killed)
    assert steps > 1
    assert migration.version(engine) == migration.head()
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=migration.OPTIONS)
        assert compare_metadata(context, models.TableRow.metadata) == []


def test_one_head() -> None:
    config = Config()
    config.set_main_option("script_location", str(migration.scripts()))
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1


def test_missing_scripts_say_where_they_were_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    with pytest.raises(FileNotFoundError, match=r"cinder_thunder/migrations, .*install Thunder"):
        migration.scripts()
