"""A private MariaDB server, for functional tests and benchmarks."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

REMEDY = "install MariaDB: apt-get install mariadb-server-core mariadb-client-core"


class ServerError(Exception):
    """MariaDB is not installed, or does not start."""


def _tool(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if path is None:
        raise ServerError(f"{name} is not there; {REMEDY}")
    return path


@contextlib.contextmanager
def server(home: Path) -> Iterator[str]:
    """A private server on a Unix socket, without a network.

    :param home: an empty folder with a short path, as it will contain the socket
    :returns: its URL, with ``{}`` in place of the database
    :raises ServerError:
    """
    socket, log = home / "s", home / "log"
    common = ["--no-defaults", f"--datadir={home / 'data'}", "--user=root"]
    subprocess.run(
        [_tool("mariadb-install-db"), *common, "--auth-root-authentication-method=normal"],
        check=True,
        capture_output=True,
    )
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                _tool("mariadbd"),
                *common,
                f"--socket={socket}",
                f"--pid-file={home / 'pid'}",
                "--skip-networking",
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-buffer-pool-size=32M",
                "--max-connections=500",
            ],
            stdout=output,
            stderr=output,
        )
    url = f"mysql+pymysql://root@localhost/{{}}?unix_socket={socket}&charset=utf8mb4"
    try:
        _wait(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    engine = sa.create_engine(url.format(""))
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            with engine.connect():
                return
        except sa.exc.OperationalError:
            time.sleep(0.1)
    raise ServerError(f"mariadbd did not come up: {log.read_text()[-2000:]}")


def new_database(url: str) -> str:
    """Create an empty database on a server.

    :returns: its URL
    """
    name = f"t{uuid.uuid4().hex}"
    engine = sa.create_engine(url.format(""))
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url.format(name)
