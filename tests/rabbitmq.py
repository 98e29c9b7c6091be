"""A private RabbitMQ server, for benchmarks. It is alone in its network namespace."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.mariadb import ServerError

#: The one in PATH switches to its own user.
SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
ADDRESS, PORT = "127.0.0.1", 5672
_PATIENCE = 120.0


@contextlib.contextmanager
def server(home: Path) -> Iterator[tuple[str, int]]:
    """:param home: an empty folder
    :returns: its transport URL, and the id of its process group
    :raises ServerError:
    """
    if not SERVER.exists():
        raise ServerError(
            f"{SERVER} is not there; install RabbitMQ: apt-get install rabbitmq-server"
        )
    conf, plugins, log = home / "rabbitmq.conf", home / "plugins", home / "output"
    conf.write_text(f"listeners.tcp.1 = {ADDRESS}:{PORT}\nlog.file = false\nlog.console = true\n")
    plugins.write_text("[].\n")
    environment = {
        **os.environ,
        "HOME": str(home),  # the Erlang cookie is kept there
        "ERL_EPMD_ADDRESS": ADDRESS,
        "RABBITMQ_NODENAME": "rabbit@localhost",
        "RABBITMQ_CONFIG_FILE": str(conf),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        # Idle schedulers would spin.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [SERVER], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(process, log)
        yield f"rabbit://guest:guest@{ADDRESS}:{PORT}/", process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection((ADDRESS, PORT), 1):
            return
        time.sleep(0.2)
    raise ServerError(f"RabbitMQ did not come up: {log.read_text()[-2000:]}")
