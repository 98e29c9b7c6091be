"""The devices of a base in the kernel, and its export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.policy.layout import BuildInputs, Graph
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.devnames import ImageNames, VolumeNames
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.state import READY, Base


class BaseDevices:
    """Builds and removes the devices of bases."""

    def __init__(self, host: Host, portal: str) -> None:
        """:param portal: "address:port" of this host's exports"""
        self._kit = host.kit
        self._store = host.store
        self._name = host.topology.host
        self._portal = portal

    def build(self, base: Base, disks: tuple[str, ...], undo: UndoStack, new_thin: bool) -> None:
        """Build all devices of a base and export it; ``undo`` removes them.

        :param disks: of its replicas, nearest first; none for a complete base
        :param new_thin: create its thin device, too, rather than use the one that is in the pool
        :raises errors.NoReplica: there are no disks for a base that needs them: it would read as
            zeroes, which are wrong bytes
        """
        if not disks and not base.complete:
            raise errors.NoReplica(f"base of image {base.image_id} is not complete")
        inputs = BuildInputs(self._kit.pool.block, sources=disks, portal=self._portal)
        devices.assemble(self._kit, self._graph(base), inputs, undo, new_thin)

    def export(self, base: Base) -> None:
        """Export a base whose devices exist; already exported is success."""
        devices.export(self._kit, self._graph(base), self._portal)

    def are_whole(self, base: Base, present: set[str]) -> bool:
        """Whether a base's devices are among those present."""
        return devices.is_whole(self._graph(base), present)

    def detach_sources(self, base: Base) -> None:
        """Have a complete base read zeroes where it has no blocks, and remove what it read from."""
        graph, source = self._graph(base), ImageNames(base.image_id).source
        with self._volumes_suspended(base.image_id):
            devices.reload(self._kit, graph, source, BuildInputs(self._kit.pool.block))
        unused = tuple(spec for spec in graph if not spec.expected)
        devices.dismantle(self._kit, unused, f"replica paths of base {base.image_id}")

    def remove(self, base: Base) -> None:
        """Remove all devices of a base that exist, and its export, but not its thin device.

        :raises errors.UndoFailed: with everything that could not be removed
        """
        what = f"what is left of base {base.image_id}"
        devices.dismantle(self._kit, self._graph(base), what, delete_thin=False)

    def push_removal(self, base: Base, undo: UndoStack) -> None:
        """Have ``undo`` remove all devices of a base that exist, its export and thin device."""
        devices.push_removal(self._kit, self._graph(base), undo)

    @contextlib.contextmanager
    def _volumes_suspended(self, image_id: str) -> Iterator[None]:
        """Suspend an image's volumes while a device below them changes its table.

        Readahead that met a suspended device would fail, and fail the cached path with it. On the
        volume's own device it is retried.
        """
        with contextlib.ExitStack() as resumed:
            for stack in self._store.stacks.values():
                if stack.base_image_id == image_id and stack.phase == READY:
                    name = VolumeNames(stack.volume_id).vol
                    resumed.callback(self._kit.dm.resume, name)
                    self._kit.dm.suspend(name)
            yield

    def _graph(self, base: Base) -> Graph:
        return layout.base_devices(base, iqn_of(self._name, base.image_id))
