"""Errors that Thunder raises on purpose.

ThunderError
 ├─ ProcessError          a tool exited with an error
 │   └─ ProcessTimeout    a tool did not finish in time and was killed
 ├─ ToolError             a tool gives wrong answers: they are not used
 ├─ HostConflict          two hosts use one name, or one initiator name
 ├─ InvalidRequest        the request is not valid; nothing was changed
 │   └─ UnknownVersion    a payload of a version that this code does not support
 ├─ DeviceError
 │   ├─ DeviceNotFound    no such block device
 │   ├─ DeviceBusy        in use by something that is not ours
 │   ├─ ForeignData       carries data that is not ours: never overwritten
 │   └─ TableMismatch     the kernel has a device of that name with another table
 ├─ PoolError             the local thin pool is missing, failed or full
 ├─ WatcherError          the failover watcher does not run, so no volume may have a cache
 ├─ ExportError           LIO refused
 ├─ LoginError            an iSCSI target could not be logged in
 │   └─ LoginRefused      it answered, and does not admit this host
 ├─ NoReplica             there is no replica of the image here, or none answered
 ├─ TransferError         copying an image failed
 │   ├─ TransferCancelled it was stopped
 │   └─ WrongDigest       a source returned other bytes than the image's; they were not written
 ├─ StateError            the state file cannot be read or written, or is not of this host
 ├─ TrackerUnavailable    the tracker did not answer
 ├─ AgentError            the agent answered with an error
 │   └─ AgentUnavailable  the agent is absent, late, or its reply is invalid
 └─ UndoFailed            all the errors met while something was removed

An error's ``args`` are the arguments of its constructor: oslo.privsep passes an error on as its
class and ``args``, and builds it again from them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class ThunderError(Exception):
    """Base of all errors that Thunder raises on purpose."""


class ProcessError(ThunderError):
    """A tool exited with an error.

    :ivar argv: the command as it was run
    :ivar rc: its exit code
    :ivar err: what it wrote to standard error
    """

    def __init__(self, argv: Sequence[str], rc: int, err: str) -> None:
        self.argv = tuple(argv)
        self.rc = rc
        self.err = err.strip()
        super().__init__(self.argv, rc, self.err)

    def __str__(self) -> str:
        return f"{shlex.join(self.argv)}: exit code {self.rc}: {self.err or '(no message)'}"


class ProcessTimeout(ProcessError):
    """A tool was killed because it did not finish in time."""


class ToolError(ThunderError):
    """A tool gives wrong answers: they are not used."""


class HostConflict(ThunderError):
    """Two hosts that are alive use one name, or one initiator name.

    :ivar asking: the host that was refused; ``other``: the one that is alive: name, address and
        initiator
    """

    def __init__(self, asking: str, other: str) -> None:
        self.asking = asking
        self.other = other
        super().__init__(asking, other)

    def __str__(self) -> str:
        return (
            f"{self.asking} is not admitted: {self.other} is alive and uses the same name or "
            "initiator name. Give each host a name (host in [thunder]) and an initiator name "
            "(/etc/iscsi/initiatorname.iscsi) of its own"
        )


class InvalidRequest(ThunderError):
    """The request is not valid; nothing was changed."""


class UnknownVersion(InvalidRequest):
    """A payload of a version that this code does not support."""

    def __init__(self, version: object, known: int) -> None:
        self._version = version
        self._known = known
        super().__init__(version, known)

    def __str__(self) -> str:
        return (
            f"the volume's thunder payload has version {self._version!r}, this host supports "
            f"{self._known}: upgrade thunder on this host; until then its volumes attach as plain "
            "iSCSI"
        )


class DeviceError(ThunderError):
    """Something is wrong with a block device."""


class DeviceNotFound(DeviceError):
    """There is no such block device."""

    def __init__(self, device: str, remedy: str = "check the path") -> None:
        self._device = device
        self._remedy = remedy
        super().__init__(device, remedy)

    def __str__(self) -> str:
        return f"there is no block device {self._device}: {self._remedy}"


class DeviceBusy(DeviceError):
    """A device is in use; it was not touched."""

    def __init__(self, device: str, by: str, remedy: str = "") -> None:
        self._device = device
        self._by = by
        self._remedy = remedy
        super().__init__(device, by, remedy)

    def __str__(self) -> str:
        said = f"{self._device} is in use by {self._by}: it was not touched"
        return f"{said}. {self._remedy}" if self._remedy else said


class ForeignData(DeviceError):
    """A device carries data that is not Thunder's; it was not touched."""

    def __init__(self, device: str, what: str) -> None:
        self._device = device
        self._what = what
        super().__init__(device, what)

    def __str__(self) -> str:
        return (
            f"{self._device} carries {self._what}, which is not thunder's: it was not touched. "
            f"If nothing needs it any longer, run: wipefs --all {self._device}"
        )


class TableMismatch(DeviceError):
    """The kernel has a device of that name with another table."""

    def __init__(self, name: str, expected: str, found: str) -> None:
        self._name = name
        self._expected = expected
        self._found = found
        super().__init__(name, expected, found)

    def __str__(self) -> str:
        return (
            f"device {self._name} exists with another table: expected {self._expected}; "
            f"found {self._found}"
        )


class PoolError(ThunderError):
    """The local thin pool is missing, failed or full."""


class WatcherError(ThunderError):
    """The failover watcher does not run, so no volume may have a cache."""


class ExportError(ThunderError):
    """LIO refused."""


class LoginError(ThunderError):
    """An iSCSI target could not be logged in."""


class LoginRefused(LoginError):
    """The target answered, and does not admit this host."""


class NoReplica(ThunderError):
    """There is no replica of the image here, or none answered."""


class TransferError(ThunderError):
    """Copying an image failed."""


class TransferCancelled(TransferError):
    """A copy was stopped."""


class WrongDigest(TransferError):
    """A source returned other bytes than the image's; they were not written."""


class StateError(ThunderError):
    """The state file cannot be read or written, or is not the one of this host and its pool."""


class TrackerUnavailable(ThunderError):
    """The tracker did not answer."""


class RequestExpired(ThunderError):
    """Its caller no longer waits for an answer."""


class AgentError(ThunderError):
    """The agent answered with an error."""


class AgentUnavailable(AgentError):
    """The agent is absent, late, or its reply is invalid."""


class UndoFailed(ThunderError):
    """What failed while something was removed; the rest was removed.

    :ivar failures: their messages
    """

    def __init__(self, what: str, failures: Sequence[BaseException | str]) -> None:
        self._what = what
        self.failures = tuple(map(str, failures))
        super().__init__(what, self.failures)

    def __str__(self) -> str:
        return f"{self._what}: " + "; ".join(self.failures)
