"""The revision of the schema: read it, and upgrade it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import sqlalchemy
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from cinder_thunder.db import models

VERSION_TABLE = models.TABLE_PREFIX + "alembic_version"


def _is_ours(name: str | None, kind: str, parents: Any) -> bool:
    return kind != "table" or (name or "").startswith(models.TABLE_PREFIX)


#: Alembic's options, for ``env.py`` and for comparisons of models and tables.
OPTIONS: dict[str, Any] = {
    "target_metadata": models.TableRow.metadata,
    "version_table": VERSION_TABLE,
    "include_name": _is_ours,
    "render_as_batch": True,  # SQLite cannot alter a table
}


def scripts() -> Path:
    """The folder of the migrations: ``cinder_thunder.migrations`` if Thunder is installed, or
    ``alembic/`` of a source tree, which setup.cfg installs as that package.

    :raises FileNotFoundError: it is in neither place; names both
    """
    package = resources.files("cinder_thunder")
    candidates = [Path(str(package / "migrations")), Path(str(package)).parent / "alembic"]
    for candidate in candidates:
        if (candidate / "env.py").is_file():
            return candidate
    raise FileNotFoundError(
        f"the migrations are in none of {', '.join(map(str, candidates))}: install Thunder again"
    )


def version(engine: sqlalchemy.Engine) -> str | None:
    """The revision of the database; None before the first upgrade."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection, opts=OPTIONS).get_current_revision()


def head() -> str | None:
    """The newest revision in this code."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def upgrade(engine: sqlalchemy.Engine, revision: str = "head") -> None:
    """Upgrade the tables to ``revision``; nothing happens if they are at it."""
    config = _config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, revision)


def _config() -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    return config
