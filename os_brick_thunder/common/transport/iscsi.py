"""Sessions to replicas, through iscsiadm(8) and sysfs.

Only targets whose names have the form of a replica's are ever touched: the volumes' own sessions
are os-brick's. Names, portals and secrets come from other hosts, so they are checked here once
more, where they become arguments and files of root's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from os_brick_thunder.common import errors, formats, wire
from os_brick_thunder.common.policy import timelimits
from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX, portal_of, split_portal
from os_brick_thunder.common.run import DEFAULT_TIMEOUT, Runner, run
from os_brick_thunder.common.transport.base import Endpoint, Session
from os_brick_thunder.common.wire import Export

LOG = logging.getLogger(__name__)
#: Where iscsiadm keeps its node records: Debian up to 12 and Ubuntu; upstream, Debian 13, Red Hat
#: and SUSE.
RECORDS = (Path("/etc/iscsi/nodes"), Path("/var/lib/iscsi/nodes"))
SYSFS_SESSIONS = Path("/sys/class/iscsi_session")
INITIATOR_NAME = Path("/etc/iscsi/initiatorname.iscsi")

#: iscsiadm(8), "EXIT STATUS"
DATABASE_FAILURE = 6
_SESSION_EXISTS = 15
_NO_OBJECTS = 21
_NOT_ADMITTED = 24
#: How often iscsiadm is run in total after database failures.
_ATTEMPTS = 3
_T = TypeVar("_T")


def run_again(iscsiadm: Callable[[], _T], code: Callable[[Exception], int | None]) -> _T:
    """Run iscsiadm, and again where another one has just removed a record, of any target: each
    looks through the records of all, and that is a database failure, too.

    :param code: the exit code that an error of ``iscsiadm`` tells, if any
    :returns: what ``iscsiadm`` does
    :raises Exception: that of its last run, or another failure
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return iscsiadm()
        except Exception as error:
            if code(error) != DATABASE_FAILURE:
                raise
            LOG.info("iscsiadm is run again: %s", error)
    return iscsiadm()


@dataclass(frozen=True)
class _Timeouts:
    """How long a replica may be silent before its path fails, in seconds.

    ``ping``: silence before the target is probed; ``pong``: time for its answer. ``recover``: how
    long I/O then waits for it to come back. ``command`` and ``abort``: time for a target that is
    alive to answer a command, and to abort one.
    """

    ping: int
    pong: int
    recover: int
    command: int
    abort: int

    @property
    def settings(self) -> dict[str, str]:
        """The same as fields of a node record."""
        return {
            "node.conn[0].timeo.noop_out_interval": str(self.ping),
            "node.conn[0].timeo.noop_out_timeout": str(self.pong),
            "node.session.timeo.replacement_timeout": str(self.recover),
            "node.session.err_timeo.abort_timeout": str(self.abort),
            "node.session.err_timeo.lu_reset_timeout": str(self.abort),
            "node.session.err_timeo.tgt_reset_timeout": str(self.abort),
        }


#: Another path with the same bytes follows, or after the last one the volumes' LUNs: after two
#: seconds I/O goes there. A LUN may be on another storage host than the base's last source.
_TIMEOUTS = _Timeouts(
    ping=timelimits.PING,
    pong=timelimits.PONG,
    recover=0,
    command=timelimits.COMMAND,
    abort=timelimits.ABORT,
)
_SETTINGS: Mapping[str, str] = {
    "node.conn[0].timeo.login_timeout": str(timelimits.LOGIN),
    "node.session.initial_login_retry_max": str(timelimits.LOGIN_ATTEMPTS - 1),
    "node.startup": "manual",
    "node.session.auth.authmethod": "CHAP",
}


def initiator_name(file: Path = INITIATOR_NAME) -> str:
    """This host's initiator name.

    :raises errors.LoginError: open-iscsi is not set up here
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
    """The host's iSCSI initiator, for sessions to replicas: :class:`.base.Initiator`."""

    def __init__(self, runner: Runner = run, appear: float = timelimits.LUN_APPEARS) -> None:
        """:param appear: seconds to wait for a LUN to appear after login"""
        self._runner = runner
        self._appear = appear

    def _run(self, *argv: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        """:raises errors.ProcessError:"""
        run_again(
            lambda: self._runner(*argv, timeout=timeout), lambda error: getattr(error, "rc", None)
        )

    def login(self, export: Export) -> str:
        try:
            export = wire.parse(Export, export.to_wire())
        except wire.MalformedValue as error:  # nothing is undone: the name is not ours
            raise errors.LoginError(f"not the export of a replica: {error}") from error
        endpoint = Endpoint.of(export)
        target = _node(endpoint)
        try:
            self._run(*target, "--op", "new")
            self._configure(export)
            try:
                self._run(*target, "--login", timeout=timelimits.ISCSIADM)
            except errors.ProcessError as error:
                if error.rc != _SESSION_EXISTS:
                    raise
            device = self._await_device(endpoint)
            self.set_timeouts(endpoint)
            return device
        except (errors.ProcessError, OSError) as error:
            self.logout(endpoint)
            refused = isinstance(error, errors.ProcessError) and error.rc == _NOT_ADMITTED
            kind = errors.LoginRefused if refused else errors.LoginError
            raise kind(f"{export.iqn} at {export.portal}: {error}") from error

    def logout(self, endpoint: Endpoint) -> None:
        try:
            wire.checked(formats.Target, endpoint.target, "target")
            wire.checked(formats.Portal, endpoint.portal, "portal")
        except wire.MalformedValue as error:
            LOG.warning("Not logged out, as it is not the export of a replica: %s", error)
            return
        target = _node(endpoint)
        for action in (("--logout",), ("--op", "delete")):
            try:
                self._run(*target, *action)
            except errors.ProcessError as error:
                if error.rc != _NO_OBJECTS:
                    raise

    def set_timeouts(self, endpoint: Endpoint) -> None:
        for entry, session in self._sessions():
            if session.endpoint != endpoint:
                continue
            with contextlib.suppress(OSError):  # the session may end meanwhile
                (entry / "recovery_tmo").write_text(str(_TIMEOUTS.recover))
                for timer in (entry / "device").glob("target*/*:*:*:*/timeout"):
                    timer.write_text(str(_TIMEOUTS.command))

    def sessions(self) -> list[Session]:
        return [session for _entry, session in self._sessions()]

    @staticmethod
    def _sessions() -> Iterator[tuple[Path, Session]]:
        for entry in sorted(SYSFS_SESSIONS.glob("session*")):
            try:
                iqn = (entry / "targetname").read_text().strip()
                alive = (entry / "state").read_text().strip() == "LOGGED_IN"
            except OSError:  # the session has just ended
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
            device = f"/dev/{disk.name}" if disk else None
            endpoint = Endpoint(iqn, portal_of(address, int(port)))
            yield entry, Session(endpoint, device, alive)

    def _await_device(self, endpoint: Endpoint) -> str:
        deadline = time.monotonic() + self._appear
        while True:
            for session in self.sessions():
                found = session.device
                if session.endpoint == endpoint and found and _can_be_opened(found):
                    return found
            if time.monotonic() > deadline:
                self.logout(endpoint)
                raise errors.LoginError(
                    f"{endpoint.target} at {endpoint.portal}: logged in, but no LUN in "
                    f"{self._appear:g} s"
                )
            time.sleep(0.02)

    def _configure(self, export: Export) -> None:
        """Put settings and secrets into the record that iscsiadm has just made."""
        endpoint = Endpoint.of(export)
        settings = {**_SETTINGS, **_TIMEOUTS.settings}
        pairs = [word for key, value in settings.items() for word in ("-n", key, "-v", value)]
        self._run(*_node(endpoint), "--op", "update", *pairs)
        # Any user of the host can read argv, so secrets do not go through iscsiadm.
        _write_secrets(_record(endpoint), export.username, export.password)


def _can_be_opened(device: str) -> bool:
    """Whether a disk is there: the kernel makes its node a moment before it can be opened, so that
    until then an open of it fails with ENXIO (device_add_disk() in block/genhd.c).
    """
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _node(endpoint: Endpoint) -> tuple[str, ...]:
    """The beginning of a command about one node record."""
    return ("iscsiadm", "-m", "node", "-T", endpoint.target, "-p", endpoint.portal)


def _record(endpoint: Endpoint) -> Path:
    """The file of a node record, as iscsiadm names it in idbm_rec_write(): a portal that was not
    discovered is a file, one whose portal group was known before is a folder of interfaces.

    A host that was upgraded may have an old record in one place and a new one in another.

    :raises FileNotFoundError: there is none
    """
    address, port = split_portal(endpoint.portal)
    found = [
        record
        for records in RECORDS
        for name in (f"{address},{port}", f"{address},{port},[0-9]*/default")
        for record in (records / endpoint.target).glob(name)
        if record.is_file()
    ]
    if not found:
        places = " or ".join(map(str, RECORDS))
        raise FileNotFoundError(
            f"iscsiadm keeps no record of {endpoint.target} at {endpoint.portal} in {places}"
        )
    return max(found, key=lambda record: record.stat().st_mtime_ns)


def _write_secrets(record: Path, username: str, password: str) -> None:
    secrets = {"node.session.auth.username": username, "node.session.auth.password": password}
    kept = [
        line
        for line in record.read_text().splitlines()
        if line.partition("=")[0].strip() not in secrets and not line.startswith("# END")
    ]
    lines = [*kept, *(f"{key} = {value}" for key, value in secrets.items()), "# END RECORD"]
    fresh = record.with_name(record.name + ".thunder")
    fresh.touch(mode=0o600)
    fresh.write_text("\n".join(lines) + "\n")
    fresh.replace(record)
