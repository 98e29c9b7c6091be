"""A node of the lab: a virtual host that runs commands and daemons and has files."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab import pace
from lab.errors import CommandError, LabError
from lab.nodes.net import Counters
from lab.nodes.services import Daemons, Service, StartLimits
from lab.nodes.topology import HOST_ADDRESS, Link, Topology
from lab.nodes.uml import Machine
from lab.shell import Progress, run, wait_for

#: The source tree, which the nodes see at the same path.
TREE = Path(__file__).resolve().parents[2]
VENV = Path(sys.prefix)
#: Time limits of a boot, which takes about 5 s of CPU time.
BOOT = StartLimits()

MODULES = (
    "dm-mod", "dm-thin-pool", "dm-cache", "dm-cache-smq", "dm-snapshot", "dm-multipath",
    "dm-round-robin", "dm-zero", "dm-delay", "dm-flakey", "dm-crypt", "dm-bufio",
    "dm-verity", "loop", "sd_mod", "sg", "iscsi_tcp", "target_core_mod", "target_core_iblock",
    "target_core_file", "iscsi_target_mod", "tcm_loop", "configfs", "sch_netem",
)  # fmt: skip

_PATH = f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: The environment of every process in a node.
ENVIRONMENT = {
    "PATH": _PATH,
    "PYTHONPATH": str(TREE),
    "PYTHONDONTWRITEBYTECODE": "1",  # the tree is read-only in the nodes
    "LC_ALL": "C.UTF-8",
}

_SSHD_CONFIG = """\
HostKey /lab/host_key
AuthorizedKeysFile /lab/authorized_keys
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
MaxSessions 200
MaxStartups 200
SetEnv {environment}
"""

# privsep uses sudo even though the daemons run as root.
_SUDOERS = f"""\
Defaults secure_path="{_PATH}"
Defaults env_keep += "{" ".join(ENVIRONMENT)}"
"""


class Node:
    """One host of a lab. Get it from :attr:`lab.cluster.Cluster.nodes`."""

    def __init__(self, machine: Machine, keys: Path, logs: Path) -> None:
        self.spec = machine.spec
        self.name = machine.spec.name
        self.address = machine.spec.address
        self.logs = logs
        self._daemons = Daemons(self, pids="/run/lab", logs="/var/log/lab")
        self._machine = machine
        self._keys = keys

    def __repr__(self) -> str:
        return f"Node({self.name}, {self.address})"

    # -- power ---------------------------------------------------------------------------------

    def prepare(self, topology: Topology) -> None:
        """Write the files that the node reads while it starts."""
        control = self._machine.control
        control.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        values = {
            "NAME": self.name,
            "ADDRESS": f"{self.address}/24",
            "INITIATOR": self.spec.initiator,
            "TREE": str(TREE),
            "VENV": str(VENV),
            "LOGS": str(self.logs),
            "MODULES": " ".join(MODULES),
        }
        environment = {**ENVIRONMENT, pace.VARIABLE: str(pace.factor())}
        hosts = ["127.0.0.1 localhost", f"{HOST_ADDRESS} controller"]
        hosts += [f"{node.address} {node.name}" for node in topology.nodes]
        files = {
            "node.env": _assignments(values),
            "hosts": "\n".join(hosts) + "\n",
            "sshd_config": _SSHD_CONFIG.format(environment=_assignments(environment, " ")),
            "sudoers": _SUDOERS,
            "authorized_keys": (self._keys / "user_key.pub").read_text(),
            "init": (Path(__file__).parent / "rootfs" / "init").read_text(),
        }
        for name, text in files.items():
            (control / name).write_text(text)
        for name in (
            "host_key",
            "user_key",
        ):  # the user's key, with which Nova copies files between nodes
            (control / name).touch(0o600)
            (control / name).write_bytes((self._keys / name).read_bytes())
        self._write_link(self.spec.link)

    def start(self, cancel: threading.Event | None = None) -> None:
        """Boot, or reboot from the same disks; returns when commands can be run.

        :raises ConditionError: has the end of the console's log
        """
        if self.running():
            raise LabError(f"{self.name} is running; kill it first to boot it again")
        ready = self._machine.control / "ready"
        ready.unlink(missing_ok=True)
        self._machine.console.unlink(missing_ok=True)
        self._machine.start()
        console = self._machine.console
        wait_for(
            f"{self.name}: boot",
            ready.exists,
            timeout=BOOT.total,
            progress=Progress(lambda: self._booted(BOOT.share), BOOT.stall),
            log=console,
            # The kernel's process changes during the start, so only a panic shows that it failed.
            alive=lambda: not console.read_bytes().count(b"Kernel panic"),
            cancel=cancel,
        )
        wait_for(
            f"{self.name}: answer on ssh",
            lambda: self.run(["true"], check=False).returncode == 0,
            timeout=60,
            log=console,
            alive=self.running,
            cancel=cancel,
        )

    def _booted(self, share: float) -> tuple[int, int]:
        """A measure of progress: the size of its console's log, and shares of CPU time used."""
        return self._machine.console.stat().st_size, int(self._machine.cpu_seconds() // share)

    def kill(self) -> None:
        """Cut the power: nothing is flushed or shut down. The disks stay for :meth:`start`."""
        run(["ssh", *self._ssh_options(), "-O", "exit", self.address], check=False)
        self._machine.kill()

    def running(self) -> bool:
        return self._machine.running()

    # -- commands and files --------------------------------------------------------------------

    def run(
        self,
        command: str | Sequence[str],
        *,
        input: str | None = None,
        check: bool = True,
        timeout: float | None = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the node; a string goes to its shell.

        :param timeout: seconds on the reference machine; after it the call fails, but the command
            is not stopped
        :raises CommandError: on an exit code other than 0, if ``check``; 255 may come from ssh
        """
        text = command if isinstance(command, str) else shlex.join(command)
        done = run(self.ssh(text), input=input, check=False, timeout=timeout)
        if check and done.returncode != 0:
            output = done.stderr.strip() or done.stdout
            raise CommandError([self.name + ":", text], done.returncode, output)
        return done

    def ssh(self, *arguments: str, options: Sequence[str] = ()) -> list[str]:
        """The command line of an ssh into this node, for callers that run it themselves."""
        return self._machine.network.command(
            ["ssh", *self._ssh_options(), *options, f"root@{self.address}", *arguments]
        )

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in the node, and the folders above it."""
        quoted = shlex.quote(path)
        self.run(
            f"mkdir -p $(dirname {quoted}) && cat > {quoted} && chmod {mode:o} {quoted}", input=text
        )

    # -- daemons -------------------------------------------------------------------------------

    @property
    def catalog(self) -> dict[str, Service]:
        """The daemons that can be started here, by name; tests may add to it."""
        return self._daemons.catalog

    def service_start(self, name: str, cancel: threading.Event | None = None) -> None:
        """Start a daemon of :attr:`catalog` and wait until it is ready.

        Its log, ``<name>.log`` in :attr:`logs`, is kept across restarts.

        :raises ConditionError: it ended or is not ready in time; has the end of its log
        """
        self._daemons.start(name, cancel)

    def service_stop(self, name: str, timeout: float = 15) -> None:
        """End a daemon with all its processes: SIGTERM, and SIGKILL after ``timeout`` seconds."""
        self._daemons.stop(name, timeout)

    def service_signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a daemon and all its processes (SIGKILL, SIGSTOP, SIGCONT…)."""
        self._daemons.signal(name, number)

    def service_running(self, name: str) -> bool:
        """Whether the daemon's main process exists, be it running or stopped by a signal."""
        return self._daemons.running(name)

    # -- network -------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """Bytes over this node's link, from its point of view, since the lab came up."""
        return self._machine.network.counters(self.name)

    def set_link(self, link: Link) -> None:
        """Change the rate and delay of the link, also while the node runs."""
        self._write_link(link)
        if self.running():
            self.run(["sh", "/lab/link"])

    def _write_link(self, link: Link) -> None:
        queue = "pfifo_fast"
        if link.delay_us:
            queue = f"netem delay {link.delay_us}us limit 20000"
        (self._machine.control / "link").write_text(f"tc qdisc replace dev vec0 root {queue}\n")

    def _ssh_options(self) -> list[str]:
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(pace.whole(5)),
            "ControlMaster": "auto",
            "ControlPath": str(self._keys / f"ssh-{self.name}"),
            "ControlPersist": "yes",
            "HostKeyAlias": "node",
            "IdentityFile": str(self._keys / "user_key"),
            "LogLevel": "ERROR",
            "UserKnownHostsFile": str(self._keys / "known_hosts"),
        }
        return ["-F", "none", *(f"-o{key}={value}" for key, value in options.items())]


def make_keys(folder: Path) -> None:
    """The lab's own ssh keys: the user's, and one host key that all its nodes share."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("user_key", "host_key"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)])
    (folder / "known_hosts").write_text(f"node {(folder / 'host_key.pub').read_text()}")


def _assignments(values: Mapping[str, str], separator: str = "\n") -> str:
    return separator.join(f"{key}={shlex.quote(value)}" for key, value in values.items())
