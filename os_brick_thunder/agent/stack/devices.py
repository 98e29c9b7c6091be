"""The devices of a stack in the kernel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.policy.layout import BuildInputs
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.state import Stack

#: Seconds for which a device may be open without being in use: udev, LVM and monitoring scan all
#: devices from time to time; and between two checks for that.
PATIENCE, _POLL = 2.0, 0.1


class StackDevices:
    """Builds, changes and removes the devices of stacks, as their entries describe them."""

    def __init__(self, host: Host) -> None:
        self._kit = host.kit

    def build(self, stack: Stack, undo: UndoStack, cache_map: str = "") -> None:
        """Build all devices of a stack; ``undo`` removes them.

        :param cache_map: for a stack with a cache; see :class:`.BuildInputs`
        """
        graph, inputs = layout.stack_devices(stack), self._inputs(stack, cache_map)
        devices.assemble(self._kit, graph, inputs, undo)

    def build_cache(self, stack: Stack, undo: UndoStack, cache_map: str) -> None:
        """Build the devices of a volume's cache, which it does not use yet."""
        graph, inputs = layout.cache_devices(stack), self._inputs(stack, cache_map)
        devices.assemble(self._kit, graph, inputs, undo)

    def reload_volume(self, stack: Stack) -> None:
        """Swap the table of the volume's own device: with its cache or without, by its entry."""
        self._reload(stack, VolumeNames(stack.volume_id).vol)

    def extend_cache(self, stack: Stack) -> None:
        """Have the devices of a volume's cache follow the size of its LUN."""
        for spec in layout.cache_devices(stack):
            if spec.extends:
                self._reload(stack, spec.name)

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
        name, until = VolumeNames(volume_id).vol, time.monotonic() + PATIENCE
        while any(d.name == name and d.opened for d in self._kit.dm.devices()):
            if time.monotonic() >= until:
                return True
            time.sleep(_POLL)
        return False

    def exist(self, volume_id: str) -> bool:
        """Whether there is a device for the volume that could be handed out."""
        name = VolumeNames(volume_id).vol
        return any(d.name == name for d in self._kit.dm.devices())

    @contextlib.contextmanager
    def suspended(self, volume_id: str) -> Iterator[None]:
        """Suspend a volume until the body has reloaded it, or has failed.

        The body ends with :meth:`reload_volume`, which resumes it.
        """
        name = VolumeNames(volume_id).vol
        try:
            self._kit.dm.suspend(name)
            yield
        except BaseException:
            self._kit.dm.resume(name)  # before anything else is undone: a guest waits
            raise

    def _reload(self, stack: Stack, name: str) -> None:
        devices.reload(self._kit, layout.stack_devices(stack), name, self._inputs(stack))

    def _inputs(self, stack: Stack, cache_map: str = "") -> BuildInputs:
        size = self._kit.blocks.size(stack.device)
        return BuildInputs(self._kit.pool.block, lun_size=size, cache_map=cache_map)
