"""Databases for functional tests: SQLite in a file, and a private MariaDB server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mariadb import ServerError, new_database, server


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a private server, without the database."""
    try:
        with server(tmp_path_factory.mktemp("mariadb")) as server_url:
            yield server_url
    except ServerError as error:
        pytest.fail(str(error))


@pytest.fixture(params=["sqlite", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, once on SQLite and once on MariaDB."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'thunder.sqlite'}"
    return new_database(request.getfixturevalue("mariadb"))
