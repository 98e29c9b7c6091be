"""Sessions to replicas, through iscsiadm(8) and sysfs.

Only targets whose iqn begins with :data:`IQN_PREFIX` are ever touched: the volumes' own sessions
are os-brick's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from os_brick_thunder.common import errors
from os_brick_thunder.common.run import Runner, run
from os_brick_thunder.common.wire import Export

IQN_PREFIX = "iqn.2026-11.org.thunder:"
NODES = Path("/etc/iscsi/nodes")
SYSFS_SESSIONS = Path("/sys/class/iscsi_session")
INITIATOR_NAME = Path("/etc/iscsi/initiatorname.iscsi")

#: iscsiadm(8), "EXIT STATUS"
_SESSION_EXISTS = 15
_NO_OBJECTS = 21
_NOT_ADMITTED = 24


@dataclass(frozen=True)
class _Patience:
    """How long a replica may be silent (seconds) before its path fails.

    ``ping`` and ``pong``: it is asked whether it lives after so long a silence, and is dead so
    much later. ``recover``: I/O then waits so long for it to come back. ``command``: one that
    lives must answer each command in that time, and ``abort`` that it is not wanted any more.
    """

    ping: int
    pong: int
    recover: int
    command: int
    abort: int


#: There is another path behind it, with the same bytes: two seconds, and the I/O goes there.
_HASTY = _Patience(ping=1, pong=1, recover=0, command=5, abort=1)
#: The last path. Without it the base fails, and volumes lose their caches.
_PATIENT = _Patience(ping=5, pong=5, recover=120, command=30, abort=15)
_SETTINGS: Mapping[str, str] = {
    "node.conn[0].timeo.login_timeout": "5",
    "node.session.initial_login_retry_max": "1",
    "node.startup": "manual",
}


@dataclass(frozen=True)
class Session:
    iqn: str
    portal: str
    device: str | None  # /dev/sdX, once the LUN is there
    alive: bool = True  # logged in; else the initiator tries to be, again and again


def initiator_name(file: Path = INITIATOR_NAME) -> str:
    """This host's initiator name.

    :raises errors.DeviceNotFound: open-iscsi is not set up here
    """
    try:
        for line in file.read_text().splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "InitiatorName":
                return value.strip()
    except OSError:
        pass
    raise errors.LoginError(f"{file} gives no InitiatorName: install open-iscsi and name this host")


class IscsiAdm:
    """The host's iSCSI initiator, as far as replicas are concerned."""

    def __init__(self, runner: Runner = run, appear: float = 10.0) -> None:
        """:param appear: seconds that a LUN may take to appear after login"""
        self._run = runner
        self._appear = appear

    def login(self, export: Export, last: bool = False) -> str:
        """Log in (or find the session there is) and return the LUN's device.

        :param last: no other path is behind this one, see :meth:`rank`
        :raises errors.LoginRefused: the target does not admit us with these credentials
        :raises errors.LoginError: unreachable, or no LUN in time
        """
        target = ("iscsiadm", "-m", "node", "-T", export.iqn, "-p", export.portal)
        try:
            self._run(*target, "--op", "new")
            self._write_record(export, _PATIENT if last else _HASTY)
            try:
                self._run(*target, "--login", timeout=20)
            except errors.ProcessError as error:
                if error.rc != _SESSION_EXISTS:
                    raise
            device = self._await_device(export)
            self.rank(export.iqn, export.portal, last)
            return device
        except (errors.ProcessError, OSError) as error:
            self.logout(export.iqn, export.portal)
            refused = isinstance(error, errors.ProcessError) and error.rc == _NOT_ADMITTED
            kind = errors.LoginRefused if refused else errors.LoginError
            raise kind(f"{export.iqn} at {export.portal}: {error}") from error

    def logout(self, iqn: str, portal: str) -> None:
        """Log out and forget the record; absent is success."""
        target = ("iscsiadm", "-m", "node", "-T", iqn, "-p", portal)
        for action in (("--logout",), ("--op", "delete")):
            try:
                self._run(*target, *action)
            except errors.ProcessError as error:
                if error.rc != _NO_OBJECTS:
                    raise

    def rank(self, iqn: str, portal: str, last: bool) -> None:
        """How patient I/O of a session is; absent is success.

        :param last: as the last path of its base it waits for a replica that does not answer. All
            others fail as soon as a replica is found to be dead, and are then to be reinstated
        """
        patience = _PATIENT if last else _HASTY
        for entry, session in self._sessions():
            if (session.iqn, session.portal) != (iqn, portal):
                continue
            with contextlib.suppress(OSError):  # it goes while we look
                (entry / "recovery_tmo").write_text(str(patience.recover))
                for timer in (entry / "device").glob("target*/*:*:*:*/timeout"):
                    timer.write_text(str(patience.command))

    def sessions(self) -> list[Session]:
        """All sessions to replicas."""
        return [session for _entry, session in self._sessions()]

    @staticmethod
    def _sessions() -> Iterator[tuple[Path, Session]]:
        for entry in sorted(SYSFS_SESSIONS.glob("session*")):
            try:
                iqn = (entry / "targetname").read_text().strip()
                alive = (entry / "state").read_text().strip() == "LOGGED_IN"
            except OSError:  # it went while we looked
                continue
            if not iqn.startswith(IQN_PREFIX):
                continue
            connection = next(iter((entry / "device").glob("connection*/iscsi_connection/*")), None)
            if connection is None:
                continue
            try:
                address = (connection / "persistent_address").read_text().strip()
                port = (connection / "persistent_port").read_text().strip()
            except OSError:
                continue
            disk = next(iter((entry / "device").glob("target*/*:*:*:*/block/*")), None)
            host = f"[{address}]" if ":" in address else address
            device = f"/dev/{disk.name}" if disk else None
            yield entry, Session(iqn, f"{host}:{port}", device, alive)

    def _await_device(self, export: Export) -> str:
        deadline = time.monotonic() + self._appear
        while True:
            for session in self.sessions():
                found = session.device
                if (session.iqn, session.portal) != (export.iqn, export.portal) or not found:
                    continue
                if os.path.exists(found):
                    return found
            if time.monotonic() > deadline:
                self.logout(export.iqn, export.portal)
                raise errors.LoginError(
                    f"{export.iqn} at {export.portal}: logged in, but no LUN in {self._appear:g} s"
                )
            time.sleep(0.02)

    def _write_record(self, export: Export, patience: _Patience) -> None:
        """Put secret and timers into the node record iscsiadm has just made.

        Not through ``--op update -v``: a secret in argv can be read by any user of the host.
        """
        wanted = {
            **_SETTINGS,
            "node.conn[0].timeo.noop_out_interval": str(patience.ping),
            "node.conn[0].timeo.noop_out_timeout": str(patience.pong),
            "node.session.timeo.replacement_timeout": str(patience.recover),
            "node.session.err_timeo.abort_timeout": str(patience.abort),
            "node.session.err_timeo.lu_reset_timeout": str(patience.abort),
            "node.session.err_timeo.tgt_reset_timeout": str(patience.abort),
            "node.session.auth.authmethod": "CHAP",
            "node.session.auth.username": export.username,
            "node.session.auth.password": export.password,
        }
        records = [path for path in (NODES / export.iqn).rglob("*") if path.is_file()]
        if not records:
            raise errors.LoginError(f"iscsiadm keeps no record of {export.iqn} under {NODES}")
        for record in records:
            kept = [
                line
                for line in record.read_text().splitlines()
                if line.partition("=")[0].strip() not in wanted and not line.startswith("# END")
            ]
            lines = [*kept, *(f"{key} = {value}" for key, value in wanted.items()), "# END RECORD"]
            fresh = record.with_name(record.name + ".thunder")
            fresh.touch(mode=0o600)
            fresh.write_text("\n".join(lines) + "\n")
            fresh.replace(record)
