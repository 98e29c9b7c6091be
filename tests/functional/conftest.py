"""Databases for functional tests: SQLite in a file, and a private MariaDB server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
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


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 1)

    def __call__(self) -> datetime:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(url: str, clock: Clock) -> Database:
    database = Database(url, heartbeat_timeout=60, clock=clock)
    migration.upgrade(database.engine)
    return database
