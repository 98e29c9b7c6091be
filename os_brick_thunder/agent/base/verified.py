"""Paths to other hosts' bases of which the kernel checks each block that is read (dm-verity).

A block that is not the image's is an I/O error of its path, as if its host had failed: the
multipath device above repeats the read over the next one. No page cache ever has a wrong byte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Kit
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.state import Base, ReplicaPath


class VerifiedPaths:
    """Makes and removes the devices over the disks of such paths."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def over(self, base: Base, path: ReplicaPath, disk: str) -> str:
        """The device from which to read a base over a path: its disk, unless it is to be checked.

        :raises errors.ThunderError: the kernel refused, as where the disk is too short; nothing is
            left
        """
        device = layout.read_from(base, path, disk)
        if device != disk:
            try:
                for name, table in layout.verified_devices(base, disk).items():
                    self._kit.dm.create(name, table, readonly=True)
            except BaseException:
                self.remove(base, disk)
                raise
        return device

    def sent_wrong_blocks(self, base: Base, path: ReplicaPath, disk: str) -> bool:
        """Whether a block that was read over a path was not the image's."""
        if layout.read_from(base, path, disk) == disk:
            return False
        with contextlib.suppress(errors.ProcessError):  # just removed
            return dmstatus.is_corrupted(
                self._kit.dm.status(ImageNames(base.image_id).verity(disk))
            )
        return False

    def remove(self, base: Base, disk: str) -> None:
        """Remove the devices over a disk; absent is success.

        :raises errors.DeviceBusy: they are read from
        """
        names = ImageNames(base.image_id)
        self._kit.dm.remove(names.verified(disk))
        self._kit.dm.remove(names.verity(disk))

    def remove_unused(self, base: Base) -> None:
        """Remove those of a base that its multipath devices do not use; absent is success.

        :raises errors.UndoFailed: with all that could not be removed
        """
        if not base.verified:
            return
        used, names = self._used(base), ImageNames(base.image_id)
        numbers = {device.name: device.number for device in self._kit.dm.devices()}
        with UndoStack(f"paths of the base of image {base.image_id}") as undo:
            for disk in _disks(names, numbers):
                if numbers.get(names.verified(disk)) not in used:
                    undo.push(self.remove, base, disk)
            undo.run()

    def _used(self, base: Base) -> set[str]:
        used: set[str] = set()
        for name in layout.multipaths(base):
            with contextlib.suppress(errors.ProcessError):  # it was removed before
                used |= dmstatus.paths(self._kit.dm.status(name)).keys()
        return used

    def are_left(self, base: Base) -> bool:
        """Whether there is any of a base."""
        present = [device.name for device in self._kit.dm.devices()]
        return bool(_disks(ImageNames(base.image_id), present))


def _disks(names: ImageNames, devices: Iterable[str]) -> set[str]:
    """Names of the disks under those of these devices that check, which may be gone."""
    return {
        device.removeprefix(prefix)
        for device in devices
        for prefix in (names.verified(""), names.verity(""))
        if device.startswith(prefix)
    }
