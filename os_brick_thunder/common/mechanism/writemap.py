"""What is written to a device from a given moment on, by the statistics of device-mapper."""

from __future__ import annotations

import os

from os_brick_thunder.common.mechanism.dmregion import Messages, Region, remove_left
from os_brick_thunder.common.policy import dmstats
from os_brick_thunder.common.policy.extents import Extents


class WriteMap:
    """The parts of a device that were written since this was made.

    It belongs to the device, not to its table: new tables do not change it.
    """

    def __init__(self, dm: Messages, name: str, length: int, block: int) -> None:
        """The kernel lets all I/O in flight end first, and holds new I/O back meanwhile. So what
        counts as not written is on the disks below by now.

        :param length: bytes from the start of the device that are watched
        :param block: bytes of which an area is a multiple
        :raises errors.ProcessError: there is no such device, or not enough memory
        """
        self.length = length
        area = dmstats.area_size(length, block, os.sysconf("SC_NPROCESSORS_CONF"))
        remove_left(dm, name, dmstats.WRITES)
        self._region = Region(dm, name, dmstats.WRITES, 0, length, area)

    def unwritten(self) -> Extents:
        """The watched bytes that are in no area in which a write has ended.

        Exact while the device is suspended; otherwise writes in flight may be missing.

        :raises errors.ProcessError: the device was removed
        """
        return dmstats.written(self._region.counters()).complement(self.length)

    def remove(self) -> None:
        """:raises errors.ProcessError: it is gone, as the device may be"""
        self._region.remove()
