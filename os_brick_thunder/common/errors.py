"""Errors of Thunder's host side.

ThunderError
 ├─ ProcessError          a tool exited with an error
 │   └─ ProcessTimeout    a tool did not end in time and was killed
 ├─ InvalidRequest        what was asked for makes no sense; nothing was changed
 │   └─ UnknownVersion    a payload of a version that this code does not speak
 ├─ DeviceError
 │   ├─ DeviceNotFound    no such block device
 │   ├─ DeviceBusy        in use by something that is not ours
 │   ├─ ForeignData       carries data that is not ours: never overwritten
 │   └─ TableMismatch     the kernel has a device of that name with another table
 ├─ PoolError             the local thin pool is missing, failed or full
 ├─ ExportError           LIO refused
 ├─ LoginError            an iSCSI target could not be logged in
 │   └─ LoginRefused      it answered, and does not admit this host
 ├─ NoReplica             no replica of the image is here, or none answered
 ├─ TransferError         copying an image failed
 │   ├─ TransferCancelled somebody stopped it
 │   └─ WrongDigest       a source gave other bytes than the image's; they were not written
 ├─ StateError            the state file cannot be read
 ├─ TrackerUnavailable    the tracker did not answer
 ├─ AgentError            the agent answered with an error
 │   └─ AgentUnavailable  the agent is absent, late, or talks nonsense
 └─ UndoFailed            errors (plural) met while taking something down
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class ThunderError(Exception):
    """Base of all errors that Thunder raises on purpose."""


class ProcessError(ThunderError):
    """A tool ended with an error.

    :ivar argv: the command as it was run
    :ivar rc: its exit code
    :ivar err: what it wrote to standard error
    """

    def __init__(self, argv: Sequence[str], rc: int, err: str) -> None:
        self.argv = tuple(argv)
        self.rc = rc
        self.err = err.strip()
        super().__init__(f"{shlex.join(self.argv)}: exit code {rc}: {self.err or '(no message)'}")


class ProcessTimeout(ProcessError):
    """A tool was killed because it did not end in time."""


class InvalidRequest(ThunderError):
    pass


class UnknownVersion(InvalidRequest):
    def __init__(self, version: object, known: int) -> None:
        super().__init__(
            f"the volume's thunder payload has version {version!r}, this host speaks {known}: "
            "upgrade thunder on this host; until then its volumes attach as plain iSCSI"
        )


class DeviceError(ThunderError):
    pass


class DeviceNotFound(DeviceError):
    def __init__(self, device: str, remedy: str = "check the path") -> None:
        super().__init__(f"there is no block device {device}: {remedy}")


class DeviceBusy(DeviceError):
    def __init__(self, device: str, by: str, remedy: str = "") -> None:
        said = f"{device} is in use by {by}: it was not touched"
        super().__init__(f"{said}. {remedy}" if remedy else said)


class ForeignData(DeviceError):
    def __init__(self, device: str, what: str) -> None:
        super().__init__(
            f"{device} carries {what}, which is not thunder's: it was not touched. "
            f"If nothing needs it any more, run: wipefs --all {device}"
        )


class TableMismatch(DeviceError):
    def __init__(self, name: str, wanted: str, found: str) -> None:
        super().__init__(f"device {name} exists with another table: wanted {wanted}; found {found}")


class PoolError(ThunderError):
    pass


class ExportError(ThunderError):
    pass


class LoginError(ThunderError):
    pass


class LoginRefused(LoginError):
    pass


class NoReplica(ThunderError):
    pass


class TransferError(ThunderError):
    pass


class TransferCancelled(TransferError):
    pass


class WrongDigest(TransferError):
    pass


class StateError(ThunderError):
    pass


class TrackerUnavailable(ThunderError):
    pass


class AgentError(ThunderError):
    pass


class AgentUnavailable(AgentError):
    pass


class UndoFailed(ThunderError):
    """Everything that failed while something was taken down; the rest was taken down."""

    def __init__(self, what: str, failures: Sequence[BaseException]) -> None:
        self.failures = tuple(failures)
        super().__init__(f"{what}: " + "; ".join(str(f) for f in failures))
