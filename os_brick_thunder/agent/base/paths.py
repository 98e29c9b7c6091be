"""The iSCSI paths over which bases read from replicas, as the state file and the kernel see them.

A stale path is not read through, but its exporter may have admitted this host, and has to be told
when that is over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.state import READY, STALE, Base, ReplicaPath
from os_brick_thunder.common.transport.base import Endpoint, Session


def in_use(base: Base) -> tuple[ReplicaPath, ...]:
    """The paths that a base reads through, without the stale ones."""
    return tuple(path for path in base.paths if path.is_open)


def endpoint(path: ReplicaPath) -> Endpoint:
    return Endpoint(path.iqn, path.portal)


def stale(base: Base) -> tuple[ReplicaPath, ...]:
    return tuple(path for path in base.paths if not path.is_open)


def as_stale(paths: Iterable[ReplicaPath]) -> tuple[ReplicaPath, ...]:
    return tuple(
        ReplicaPath(path.host, path.location_id, path.exporter, state=STALE) for path in paths
    )


def without(paths: Sequence[ReplicaPath], others: Iterable[ReplicaPath]) -> tuple[ReplicaPath, ...]:
    """The paths whose exporters none of the others has."""
    exporters = {path.exporter for path in others}
    return tuple(path for path in paths if path.exporter not in exporters)


def requested(sources: Iterable[wire.Source]) -> tuple[ReplicaPath, ...]:
    """Stale paths for sources that are about to be asked for an export."""
    return tuple(ReplicaPath(s.host, s.location_id, s.exporter, state=STALE) for s in sources)


def is_master(source: wire.Source) -> bool:
    """Whether a source is on a storage host."""
    return source.kind == "master"


def opened(source: wire.Source, export: wire.Export) -> ReplicaPath:
    """The path to a source that has answered with an export."""
    return ReplicaPath(
        source.host,
        source.location_id,
        source.exporter,
        export.iqn,
        export.portal,
        master=is_master(source),
    )


def describe(base: Base) -> str:
    """For the log: the hosts that a base reads from, nearest first."""
    return ", then ".join(path.host for path in in_use(base))


class Paths:
    """Looks paths up in the kernel: sessions, disks, and what the multipath device says of them."""

    def __init__(self, host: Host, availability: Availability) -> None:
        self._kit = host.kit
        self._store = host.store
        self._availability = availability

    def reading(self, image_id: str) -> Base | None:
        """The base of an image with the paths in use; None unless it reads from replicas."""
        base = self._store.bases.get(image_id)
        if base is None or base.phase != READY or base.complete:
            return None
        paths = in_use(base)
        if not paths or base.thin_id in self._availability.absent:
            return None
        return dataclasses.replace(base, paths=paths)

    def working(self, base: Base) -> dict[ReplicaPath, str]:
        """The paths that a base can read through, with the devices that it reads from, in the order
        in which the kernel tries them.
        """
        devices = self.devices(base, alive=True).items()
        found = {self.devnum(device): (path, device) for path, device in devices}
        used = (number for number, used in self.flags(base).items() if used)
        return dict(found[number] for number in used if number in found)

    def flags(self, base: Base) -> dict[str, bool]:
        """Whether the kernel uses a path, by the number of its device, in the table's order.

        One that two devices have is used if both use it.
        """
        flags: dict[str, bool] = {}
        for name in layout.multipaths(base):
            for number, used in dmstatus.paths(self._kit.dm.status(name)).items():
                flags[number] = flags.get(number, True) and used
        return flags

    def devices(self, base: Base, alive: bool = False) -> dict[ReplicaPath, str]:
        """The devices from which a base is read over its paths: :func:`.layout.read_from`.

        :param alive: only of paths whose sessions are alive
        """
        return {
            path: layout.read_from(base, path, session.device)
            for path, session in self.sessions(base).items()
            if session.device and (session.alive or not alive)
        }

    def sessions(self, base: Base) -> dict[ReplicaPath, Session]:
        sessions = {session.endpoint: session for session in self._kit.initiator.sessions()}
        return {path: sessions[endpoint(path)] for path in base.paths if endpoint(path) in sessions}

    def devnum(self, device: str | None) -> str:
        """The number of a device; empty if it has just disappeared."""
        try:
            return self._kit.blocks.devnum(device) if device else ""
        except errors.DeviceNotFound:
            return ""

    def set_timeouts(self, paths: Iterable[ReplicaPath]) -> None:
        """Have all paths fail over soon: an older agent had the last one wait."""
        for path in paths:
            self._kit.initiator.set_timeouts(endpoint(path))

    def log_out(self, paths: Iterable[ReplicaPath]) -> None:
        """Log out of the paths that are not stale; not logged in is success.

        :raises errors.UndoFailed: not out of all of them; of the others it is
        """
        with UndoStack("logout of replicas") as undo:
            for path in paths:
                if path.is_open:
                    undo.push(self._kit.initiator.logout, endpoint(path))
            undo.run()
