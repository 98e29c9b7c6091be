"""The control plane: which daemons it has, and how each is started."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from lab.cloud import config, nova
from lab.nodes.net import Network
from lab.nodes.node import TREE
from lab.nodes.services import Daemons, Service, api, listens, logged, serves
from lab.nodes.topology import HOST_ADDRESS, NodeSpec
from lab.shell import run

_RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # the one in PATH switches to its own user
_PYTHON = f"{sys.prefix}/bin/python"


class Controller:
    """The control plane at 10.77.0.1: MariaDB, RabbitMQ and the OpenStack services."""

    name = "controller"

    def __init__(self, network: Network, folder: Path, logs: Path) -> None:
        self.logs = logs
        self.folder = folder
        self._network = network
        self._daemons = Daemons(self, pids=str(folder / "run"), logs=str(logs))

    def make_catalog(self) -> None:
        """Fill :attr:`catalog`; to be repeated after a change of :mod:`lab.pace`."""
        self.catalog.update({service.name: service for service in _services(self.folder)})

    @property
    def catalog(self) -> dict[str, Service]:
        """The daemons that can be started here, by name, in order of their dependencies."""
        return self._daemons.catalog

    @property
    def images(self) -> Path:
        """Where Glance keeps its images: one file each, by id."""
        return self.folder / "glance" / "images"

    def run(
        self,
        command: str | Sequence[str],
        *,
        input: str | None = None,
        check: bool = True,
        timeout: float | None = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the lab's network; a string goes to a shell.

        :param timeout: seconds on the reference machine
        :raises CommandError: on an exit code other than 0, if ``check``
        """
        argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
        return run(
            self._network.command(argv),
            input=input,
            check=check,
            timeout=timeout,
            env=self.environment(),
        )

    def environment(self) -> dict[str, str]:
        """The environment of processes that run here, with the client's credentials."""
        return {
            "PATH": f"{sys.prefix}/bin:{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(TREE),
            **config.client_environment(),
        }

    def make_folders(self) -> None:
        """Create the folders that the daemons expect."""
        self.logs.mkdir(parents=True)
        for name in ("glance/images", "glance/staging", "glance/tasks", "cinder/conversion"):
            (self.folder / name).mkdir(parents=True)

    def write(self, path: str, text: str) -> None:
        """Write a file, and the folders above it."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)

    def service_start(self, name: str, cancel: threading.Event | None = None) -> None:
        """Start a daemon and wait until it is ready; see :meth:`.services.Daemons.start`."""
        self._daemons.start(name, cancel)

    def service_stop(self, name: str, timeout: float = 15) -> None:
        """End a daemon with all its processes: SIGTERM, and SIGKILL after ``timeout`` seconds."""
        self._daemons.stop(name, timeout)

    def service_signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a daemon and all its processes."""
        self._daemons.signal(name, number)

    def service_running(self, name: str) -> bool:
        """Whether the daemon's main process exists."""
        return self._daemons.running(name)

    def thunder(self, *arguments: str) -> str:
        """Run the ``thunder`` command as on a storage host; returns its output."""
        state = self.folder / "cinder"
        conf = str(state / "thunder.conf")
        self.write(conf, config.operator(state))
        module = [_PYTHON, "-m", "cinder_thunder.cli.thunder"]
        return self.run([*module, *arguments, "--config-file", conf]).stdout

    def discover_hosts(self) -> None:
        """Map the compute hosts that have registered with Nova; it discovers later ones itself."""
        conf = str(self.folder / "nova/nova.conf")
        self.run(["nova-manage", "--config-file", conf, "cell_v2", "discover_hosts"])


def database_socket(folder: Path) -> Path:
    """MariaDB's Unix socket, for its own administrator."""
    return folder / "mysql.sock"


def _services(folder: Path) -> list[Service]:
    keystone, glance, cinder = (folder / name for name in ("keystone", "glance", "cinder"))
    cinder_conf = str(cinder / "cinder.conf")
    cinder_files = {cinder_conf: config.cinder(cinder, HOST_ADDRESS)}
    return [
        _mariadb(folder),
        _rabbitmq(folder / "rabbitmq"),
        api(
            "keystone",
            config.KEYSTONE_PORT,
            "keystone.wsgi.api",
            env={"OS_KEYSTONE_CONFIG_DIR": str(keystone)},
            files={str(keystone / "keystone.conf"): config.keystone(keystone)},
        ),
        api(
            "glance-api",
            config.GLANCE_PORT,
            "glance.wsgi.api",
            env={"OS_GLANCE_CONFIG_DIR": str(glance)},
            files={str(glance / "glance-api.conf"): config.glance(glance)},
        ),
        api(
            "cinder-api",
            config.CINDER_PORT,
            "cinder.wsgi.api",
            "--config-file",
            cinder_conf,
            files=cinder_files,
        ),
        Service(
            "cinder-scheduler",
            ("cinder-scheduler", "--config-file", cinder_conf),
            ready=logged("Starting cinder-scheduler node"),
            files=cinder_files,
        ),
        *nova.services(folder),
    ]


def _mariadb(folder: Path) -> Service:
    socket = database_socket(folder)
    # Durability is of no use here: the data ends with the lab.
    argv = (
        "mariadbd", "--no-defaults", "--user=root", f"--datadir={folder / 'mysql'}",
        f"--socket={socket}", f"--pid-file={folder / 'mysql.pid'}",
        f"--bind-address={HOST_ADDRESS}", "--skip-name-resolve", "--max-connections=500",
        "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0",
        "--innodb-doublewrite=0", "--innodb-buffer-pool-size=128M", "--performance-schema=0",
    )  # fmt: skip
    ready = f"mariadb-admin --no-defaults --socket={shlex.quote(str(socket))} ping > /dev/null 2>&1"
    return Service("mariadb", argv, ready=ready)


def _rabbitmq(folder: Path) -> Service:
    conf, plugins, environment = (
        folder / name for name in ("rabbitmq.conf", "plugins", "rabbitmq-env.conf")
    )
    return Service(
        "rabbitmq",
        (_RABBITMQ,),
        ready=listens(5672),
        env={
            "HOME": str(folder),  # the Erlang cookie is kept there
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "rabbit@localhost",
            "RABBITMQ_CONFIG_FILE": str(conf),
            "RABBITMQ_CONF_ENV_FILE": str(environment),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            # Idle schedulers would spin and take CPU time from the nodes.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        },
        files={str(conf): config.rabbitmq(), str(plugins): "[].\n", str(environment): ""},
    )


# -- daemons of the nodes --------------------------------------------------------------------


def cinder_volume(spec: NodeSpec, driver: str, *, plain: bool = False) -> Service:
    """cinder-volume of a storage node, with its volume group on the data disk."""
    state = Path("/var/lib/cinder")
    conf = state / "cinder.conf"
    group = config.VOLUME_GROUP
    backends = config.storage_backend(spec, driver, plain=plain)
    return Service(
        "cinder-volume",
        (f"{sys.prefix}/bin/cinder-volume", "--config-file", str(conf)),
        # After a reboot the group exists. Whatever of it udev has not activated, the driver does.
        before=f"mkdir -p {state}/conversion {state}/locks\n"
        f"vgs {group} > /dev/null 2>&1 || vgcreate -q {group} /dev/ubdb",
        ready=logged("Driver post RPC initialization completed successfully"),
        files={str(conf): config.cinder(state, spec.address, backends)},
    )


def plain_volume(spec: NodeSpec) -> Service:
    """A second cinder-volume: Cinder's LVM driver, with a volume group on a file."""
    state, group = Path("/var/lib/cinder-plain"), config.PLAIN_GROUP
    disk, backends = f"{state}/disk", config.plain_backend(spec)
    return Service(
        "cinder-volume-plain",
        (f"{sys.prefix}/bin/cinder-volume", "--config-file", f"{state}/cinder.conf"),
        before=f"mkdir -p {state}/conversion {state}/locks\n"
        f"vgs {group} > /dev/null 2>&1 && exit\n"
        f"truncate -s 8G {disk} && vgcreate -q {group} $(losetup --find --show {disk})",
        ready=logged("Driver post RPC initialization completed successfully"),
        files={f"{state}/cinder.conf": config.cinder(state, spec.address, backends)},
    )


def cinder_backup() -> Service:
    """cinder-backup of a storage node, with cinder-volume's configuration."""
    conf = "/var/lib/cinder/cinder.conf"
    return Service(
        "cinder-backup",
        (f"{sys.prefix}/bin/cinder-backup", "--config-file", conf),
        ready=logged("Starting cinder-backup node"),
        before="mkdir -p /var/lib/cinder/backup",
    )


def thunder_agent(spec: NodeSpec) -> Service:
    """thunder-agent of a compute node."""
    conf = "/etc/thunder/thunder.conf"
    return Service(
        "thunder-agent",
        (f"{sys.prefix}/bin/python", "-m", "os_brick_thunder.agent.main", "--config-file", conf),
        ready=serves("/run/thunder/agent.sock"),
        files={conf: config.agent(spec)},
    )
