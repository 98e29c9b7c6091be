"""Removes a volume's devices where the agent does not.

A host must be able to give a volume back without its agent: a LUN below devices of ours would
otherwise be logged out under them, and os-brick would take them for a multipath that it has to
flush. What only the agent knows (its entry, the blocks in the local pool) it cleans up itself.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.mechanism.dmioctl import MappedDevice
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import UUID_PREFIX, VolumeNames
from os_brick_thunder.common.policy.timelimits import PROBE
from os_brick_thunder.privileged import context

_POLL = 0.2


class DeviceMapper(Protocol):
    """What is needed of :class:`.KernelDeviceMapper`."""

    def devices(self) -> list[MappedDevice]: ...

    def remove(self, name: str) -> None: ...


def has_devices(volume_id: str) -> bool:
    """Whether there are devices of this volume; needs no rights."""
    return any(os.path.lexists(devnames.path(name)) for name in VolumeNames(volume_id).all)


@context.entrypoint
def take_down(volume_id: str) -> None:
    """Remove all devices of a volume, as root; absent is success.

    :raises errors.DeviceBusy: the volume is open; nothing was changed
    :raises errors.ProcessError: the kernel refused
    """
    dismantle(KernelDeviceMapper(), volume_id)


def dismantle(dm: DeviceMapper, volume_id: str, patience: float = PROBE) -> None:
    """:func:`take_down` of what ``dm`` has. The agent may remove or build the same meanwhile.

    :param patience: seconds to wait for the volume to be closed
    """
    names = VolumeNames(volume_id).all
    until = time.monotonic() + patience
    while True:
        present = {d.name: d for d in dm.devices() if d.uuid == UUID_PREFIX + d.name}
        used = [present[name] for name in names if name in present]
        if not used or not used[0].opened:
            break
        if time.monotonic() > until:
            raise errors.DeviceBusy(used[0].name, f"{used[0].opened} opener(s)")
        time.sleep(_POLL)
    for device in used:
        dm.remove(device.name)
