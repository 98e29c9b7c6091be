"""The devices of a stack in the kernel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.policy import cachemap, layout
from os_brick_thunder.agent.policy.layout import NOTHING, BuildInputs
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.writemap import WriteMap
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmtable import Multipath, Table
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.failover import Paths
from os_brick_thunder.common.policy.timelimits import PROBE
from os_brick_thunder.common.state import Stack
from os_brick_thunder.common.threads import urgent

#: Seconds between two checks whether somebody has a device open.
_POLL = 0.1
#: Attempts at a table that the failover watcher may replace at the same time.
_RELOADS = 3


class StackDevices:
    """Builds, changes and removes the devices of stacks, as their entries describe them."""

    def __init__(self, host: Host) -> None:
        self._kit = host.kit

    def build(self, stack: Stack, undo: UndoStack) -> None:
        """Build the devices of a stack without a cache; ``undo`` removes them."""
        devices.assemble(self._kit, layout.stack_devices(stack), self._inputs(stack), undo)

    def build_cache(self, stack: Stack, undo: UndoStack) -> None:
        """Build the devices of a volume's cache, which it does not use yet."""
        graph, inputs = layout.cache_devices(stack), self._inputs(stack)
        devices.assemble(self._kit, graph, inputs, undo)

    @contextlib.contextmanager
    def watching_writes(self, stack: Stack, length: int) -> Iterator[WriteMap]:
        """For :meth:`swap_in_cache`: watch what is written to a volume in use from now on.

        :param length: of what its cache may cover, bytes
        :raises errors.ProcessError: that cannot be watched
        """
        name = VolumeNames(stack.volume_id).vol
        writes = WriteMap(self._kit.dm, name, length, self._kit.pool.block)
        try:
            yield writes
        finally:
            with contextlib.suppress(errors.ThunderError):  # it was removed with the device
                writes.remove()

    def swap_in_cache(self, stack: Stack, shared: Extents, writes: WriteMap) -> float:
        """Have a volume in use read from its cache what it shared with its image at any moment
        since ``writes`` was made, and still shares with it.

        :returns: seconds for which its I/O was held back
        :raises errors.NoReplica: all of that was written since
        :raises errors.ThunderError: it has a table as before
        """
        names, size = VolumeNames(stack.volume_id), self._inputs(stack).lun_size
        # What is known now need not be looked at while the guest waits.
        shared = shared.intersection(writes.unwritten())
        with self._kit.failover.excluded(stack.volume_id), urgent():
            try:
                began = self._kit.dm.suspend(names.vol)
                shared = shared.intersection(writes.unwritten()).at_most(cachemap.MAX_RANGES)
                if not shared:
                    raise errors.NoReplica(f"volume {stack.volume_id} was overwritten meanwhile")
                table = layout.vol_table(names, stack.device, shared, size)
                return self._kit.dm.swap(names.vol, table) - began
            except BaseException:
                self._kit.dm.resume(names.vol)  # before anything else is undone: a guest waits
                raise

    def reload_volume(self, stack: Stack) -> None:
        """Swap the table of the volume's own device: as large as its LUN, and over that alone if
        its entry says that it is direct. It reads from its cache what it reads from there now: only
        that is known not to have been written.

        :raises errors.ThunderError: it has a table as before
        """
        names = VolumeNames(stack.volume_id)
        for _ in range(_RELOADS):  # the watcher may swap in its own, of the old length
            table = self._vol_table(stack, names)
            if self._has(names.vol, table):
                return
            self._kit.dm.reload(names.vol, table)

    def _vol_table(self, stack: Stack, names: VolumeNames) -> Table:
        size = self._inputs(stack).lun_size
        live = self._kit.dm.table(names.vol)
        if _is_old(live):
            return layout.old_vol_table(stack.device, size)
        shared = self._shared(live, names) if live and stack.mode == "cached" else NOTHING
        return layout.vol_table(names, stack.device, shared, size)

    def _shared(self, live: Table, names: VolumeNames) -> Extents:
        devnum = self._kit.blocks.devnum
        try:
            return live.resolved(devnum).mapped_to(devnum(devnames.path(names.failover)))
        except errors.DeviceNotFound:
            return NOTHING

    def _has(self, name: str, table: Table) -> bool:
        """Whether a table is live, or its device is not there."""
        found, devnum = self._kit.dm.table(name), self._kit.blocks.devnum
        return found is None or found.resolved(devnum) == table.resolved(devnum)

    def is_old(self, volume_id: str) -> bool:
        """Whether a volume was attached by an agent that had it map a multipath device itself."""
        return _is_old(self._kit.dm.table(VolumeNames(volume_id).vol))

    def uses_cache(self, volume_id: str) -> bool:
        """Whether a volume reads from its cache: it maps its failover device, and the kernel uses
        the path to the cache.

        :raises errors.DeviceNotFound: it is being removed
        """
        names, devnum = VolumeNames(volume_id), self._kit.blocks.devnum
        table = self._kit.dm.table(names.vol)
        if table is None:
            raise errors.DeviceNotFound(devnames.path(names.vol))
        if _is_old(table):
            found = dmstatus.paths(self._kit.dm.status(names.vol))
            return len(found) > 1 and next(iter(found.values()))
        try:
            number = devnum(devnames.path(names.failover))
            paths = Paths.of(self._kit.dm.status(names.failover))
        except (errors.ProcessError, errors.DeviceNotFound):
            return False
        used = number in table.resolved(devnum).devices
        return used and paths is not None and paths.cached.active

    def fail_cache(self, volume_id: str) -> bool:
        """Have the kernel use the LUN of a volume rather than its cache, at once and for good.

        :returns: False if the path to the LUN has failed
        :raises errors.ThunderError: it is being built or removed
        """
        names = VolumeNames(volume_id)
        name = names.vol if self.is_old(volume_id) else names.failover
        paths = Paths.of(self._kit.dm.status(name))
        if paths is None or not paths.lun.active:
            return False
        if paths.cached.active:
            self._kit.dm.message(name, f"fail_path {paths.cached.number}")
        return True

    def remove(self, stack: Stack) -> None:
        """Remove all devices of a stack that exist, and their thin devices.

        :raises errors.UndoFailed: with everything that could not be removed
        """
        what = f"removal of the stack of volume {stack.volume_id}"
        devices.dismantle(self._kit, layout.stack_devices(stack), what)

    def remove_cache(self, stack: Stack) -> None:
        """Remove what exists of a volume's cache, which it no longer uses.

        :raises errors.UndoFailed: with everything that could not be removed
        """
        what = f"removal of the cache of volume {stack.volume_id}"
        devices.dismantle(self._kit, layout.cache_devices(stack), what)

    def are_left(self, stack: Stack) -> bool:
        """Whether any device of a stack is in the kernel."""
        present = {device.name for device in self._kit.dm.devices()}
        return any(spec.name in present for spec in layout.stack_devices(stack))

    def are_open(self, volume_id: str) -> bool:
        """Whether somebody has the volume's device open, for longer than a scan of all devices."""
        name, until = VolumeNames(volume_id).vol, time.monotonic() + PROBE
        while any(d.name == name and d.opened for d in self._kit.dm.devices()):
            if time.monotonic() >= until:
                return True
            time.sleep(_POLL)
        return False

    def exist(self, volume_id: str) -> bool:
        """Whether there is a device for the volume that could be handed out."""
        name = VolumeNames(volume_id).vol
        return any(d.name == name for d in self._kit.dm.devices())

    def _inputs(self, stack: Stack) -> BuildInputs:
        size = self._kit.blocks.size(stack.device)
        return BuildInputs(self._kit.pool.block, lun_size=size)


def _is_old(table: Table | None) -> bool:
    return table is not None and any(isinstance(s.target, Multipath) for s in table.segments)
