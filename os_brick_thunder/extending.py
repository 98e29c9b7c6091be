"""Has a volume follow its LUN's size where the agent does not.

A guest must be able to get the space that its volume was given without its agent. Only what is
past the end of the volume's table is added, all of it over the LUN, so this needs nothing of what
the agent knows.
"""

from __future__ import annotations

from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import blockdev
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmtable import Linear, Segment, Table, sectors
from os_brick_thunder.common.policy.failover import Paths
from os_brick_thunder.privileged import context


class DeviceMapper(Protocol):
    """What is needed of :class:`.KernelDeviceMapper`."""

    def table(self, name: str) -> Table | None: ...

    def status(self, name: str) -> str: ...

    def reload(self, name: str, table: Table) -> None: ...


class Blocks(Protocol):
    """What is needed of :mod:`.blockdev`."""

    def devnum(self, device: str) -> str: ...

    def size(self, device: str) -> int: ...


@context.entrypoint
def extend(volume_id: str) -> None:
    """Have a volume's device be as large as its LUN, as root. I/O continues; what the volume reads
    from its cache it goes on reading from there.

    :raises errors.ThunderError: the volume has the size that it had
    """
    follow(KernelDeviceMapper(), blockdev, volume_id)


def follow(dm: DeviceMapper, blocks: Blocks, volume_id: str) -> None:
    """:func:`extend` with what ``dm`` and ``blocks`` have. The failover watcher may swap the same
    table meanwhile, once, for one of the length that it had.
    """
    names = VolumeNames(volume_id)
    while True:
        live = dm.table(names.vol)
        if live is None:
            raise errors.DeviceNotFound(devnames.path(names.vol))
        table = live.resolved(blocks.devnum)
        lun = _lun(dm, blocks, names, table)
        length = sectors(blocks.size(lun))
        if length <= table.length:
            return
        dm.reload(names.vol, _extended(table, lun, length))


def _lun(dm: DeviceMapper, blocks: Blocks, names: VolumeNames, table: Table) -> str:
    """The number of the LUN of a volume with this table."""
    if not all(isinstance(segment.target, Linear) for segment in table.segments):
        raise errors.InvalidRequest(
            f"{names.vol} was made by an older thunder-agent: start thunder-agent, and extend the "
            f"volume again"
        )
    try:
        failover = blocks.devnum(devnames.path(names.failover))
    except errors.DeviceNotFound:  # the volume has no cache
        return table.devices[0]
    if others := [device for device in table.devices if device != failover]:
        return others[0]
    paths = Paths.of(dm.status(names.failover))
    if paths is None:
        raise errors.InvalidRequest(f"{names.failover} has no path to the LUN: attach it again")
    return paths.lun.number


def _extended(table: Table, lun: str, length: int) -> Table:
    """A table with what it lacks to ``length`` sectors over the LUN."""
    *before, last = table.segments
    start = table.length - last.length
    if last.target == Linear(lun, start):
        return Table((*before, Segment(length - start, last.target)))
    added = Segment(length - table.length, Linear(lun, table.length))
    return Table((*table.segments, added))
