"""The devices of a base in the kernel, and its export."""

from __future__ import annotations

import time
from collections.abc import Mapping

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.base.readahead import Readahead
from os_brick_thunder.agent.base.verified import VerifiedPaths
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.policy.layout import BuildInputs, Graph
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.state import Base, ReplicaPath
from os_brick_thunder.common.threads import Jobs

#: Seconds that the last reads from a complete base's sources may take, and between two checks.
_LAST_READS, _POLL = 1.0, 0.02


class BaseDevices:
    """Builds and removes the devices of bases."""

    def __init__(
        self, host: Host, portal: str, verified: VerifiedPaths, readahead: Readahead
    ) -> None:
        """:param portal: "address:port" of this host's exports"""
        self._kit = host.kit
        self._verified = verified
        self._readahead = readahead
        self._name = host.topology.host
        self._portal = portal
        self._reopening = Jobs("reopen")

    def build(self, base: Base, undo: UndoStack, new_thin: bool) -> None:
        """Build all devices of a base and export it; ``undo`` removes them.

        What one that is not complete does not hold cannot be read until :meth:`connect`.

        :param new_thin: create its thin device, too, rather than use the one that is in the pool
        """
        inputs = BuildInputs(self._kit.pool.block, portal=self._portal)
        self._readahead.begin(base)
        undo.push(self._verified.remove_unused, base)
        devices.assemble(self._kit, self._graph(base), inputs, undo, new_thin)
        undo.push(self.fail_reads, base)

    def hold_reads(self, base: Base) -> None:
        """Have reads of a base wait for :meth:`connect`. Not before all of its devices are built:
        udev reads them.
        """
        for name in layout.multipaths(base):
            self._kit.dm.queue(name)

    def fail_reads(self, base: Base) -> None:
        """Have reads that wait for a source fail, and those that would; absent is success."""
        for name in layout.multipaths(base):
            self._kit.dm.unqueue(name)

    def connect(self, base: Base, devices: Mapping[ReplicaPath, str]) -> None:
        """Have a base read from these devices, nearest first, also what waits for that."""
        for name, table in layout.multipath_tables(base, devices).items():
            self._kit.dm.reload_noflush(name, table, readonly=True)
            self._kit.dm.unqueue(name)
        # Reads may have failed before, as those of udev do of a loop device that is new. Not waited
        # for: what waits for a source that hangs would be.
        self._reopening.start(base.image_id, lambda: self._readahead.renew(base))

    def export(self, base: Base) -> None:
        """Export a base whose devices exist; already exported is success."""
        devices.export(self._kit, self._graph(base), self._portal)

    def are_whole(self, base: Base, present: set[str]) -> bool:
        """Whether a base's devices are among those present, with a source if it needs one."""
        name = ImageNames(base.image_id).paths
        if base.complete:  # those of an older agent had no paths
            return devices.is_whole(self._graph(base), {*present, name})
        table = self._kit.dm.table(name)
        return bool(table and table.devices) and devices.is_whole(self._graph(base), present)

    def are_left(self, base: Base) -> bool:
        """Whether any device of a base is in the kernel."""
        present = {device.name for device in self._kit.dm.devices()}
        graph = any(spec.name in present for spec in self._graph(base))
        return graph or self._verified.are_left(base)

    def detach_sources(self, base: Base) -> None:
        """Free the disks of a complete base's sources: from now on, reads from there fail.

        Nothing is read from there any longer but what was begun before the base held it. The loop
        devices under the base's source show when that has ended. What is above them does not
        change its table, so no read waits, and no readahead fails.

        :raises errors.DeviceBusy: something is still being read; nothing was changed
        """
        name = layout.read_through(base)
        if self._kit.dm.table(name) is None:  # an older agent removed it
            return
        until = time.monotonic() + _LAST_READS
        loops = self._kit.loops.find(devnames.path(name))
        while busy := [loop for loop in loops if self._kit.blocks.in_flight(loop)]:
            if time.monotonic() > until:
                raise errors.DeviceBusy(", ".join(busy), "reads from the sources of a base")
            time.sleep(_POLL)
        for each in layout.multipaths(base):
            self._kit.dm.wipe(each)
        self._verified.remove_unused(base)

    def remove(self, base: Base) -> None:
        """Remove all devices of a base that exist, and its export, but not its thin device.

        :raises errors.UndoFailed: with everything that could not be removed
        """
        with UndoStack(f"what is left of base {base.image_id}") as undo:
            self.push_removal(base, undo, delete_thin=False)
            undo.run()

    def push_removal(self, base: Base, undo: UndoStack, delete_thin: bool = True) -> None:
        """Have ``undo`` remove all devices of a base that exist, its export and thin device."""
        undo.push(self._verified.remove_unused, base)  # last: others use them
        devices.push_removal(self._kit, self._graph(base), undo, delete_thin)
        undo.push(self.fail_reads, base)  # first: an export ends when its reads have

    def _graph(self, base: Base) -> Graph:
        return layout.base_devices(base, iqn_of(self._name, base.image_id))
