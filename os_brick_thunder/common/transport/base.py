"""What a transport does: a replica is exported on one host, and read as a block device on another.

iSCSI is the only one today: :mod:`.lio` exports, :mod:`.iscsi` reads. These are the values that
callers handle; an :class:`Endpoint` is opaque to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from os_brick_thunder.common.wire import Export


@dataclass(frozen=True)
class Endpoint:
    """Where a replica can be reached."""

    target: str
    portal: str

    @classmethod
    def of(cls, export: Export) -> Endpoint:
        return cls(export.iqn, export.portal)


@dataclass(frozen=True)
class Session:
    """A login to a replica.

    :ivar device: its disk (``/dev/sdX``), once that has appeared
    :ivar alive: logged in; otherwise the host keeps trying to be
    """

    endpoint: Endpoint
    device: str | None
    alive: bool = True


@dataclass(frozen=True)
class Credentials:
    """An initiator's user name and secret for one export."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Target:
    """An export in the kernel: the initiators that are admitted, and the ones with a session."""

    iqn: str
    device: str
    portals: tuple[str, ...]
    initiators: tuple[str, ...]
    readers: tuple[str, ...] = ()


class Initiator(Protocol):
    """The reading side."""

    def login(self, export: Export) -> str:
        """Log in, or find the session that exists, and return the replica's disk.

        :raises errors.LoginRefused: the exporter does not admit us with these credentials
        :raises errors.LoginError: unreachable, no disk in time, or not the export of a replica
        """

    def logout(self, endpoint: Endpoint) -> None:
        """Log out and forget the endpoint. Absent is success."""

    def set_timeouts(self, endpoint: Endpoint) -> None:
        """Have a session's I/O fail within seconds if its replica does not answer, as a login does;
        absent is success. The session has to be reinstated where it was used.
        """

    def sessions(self) -> list[Session]:
        """All sessions to replicas."""


class Targets(Protocol):
    """The exporting side. All methods are idempotent.

    Every method may raise :class:`errors.ExportError`.
    """

    def export(self, device: str, iqn: str, portal: str) -> None:
        """Export a device read-only, without admitting anyone yet."""

    def admit(self, iqn: str, initiator: str) -> Credentials:
        """Let an initiator read an export; it keeps its credentials until it is revoked."""

    def revoke(self, iqn: str, initiator: str) -> None:
        """Remove an initiator's access, which ends its session. Absent is success."""

    def unexport(self, iqn: str) -> None:
        """Remove an export with its sessions. Absent is success."""

    def targets(self, prefix: str = ...) -> tuple[Target, ...]:
        """All exports whose name starts with ``prefix``, sorted by name."""
