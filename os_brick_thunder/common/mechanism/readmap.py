"""What is read from a device from a given moment on, by the statistics of device-mapper."""

from __future__ import annotations

import os

from os_brick_thunder.common.mechanism.dmregion import Messages, Region, remove_left
from os_brick_thunder.common.policy import dmstats
from os_brick_thunder.common.policy.dmstats import Touched


class ReadMap:
    """The areas of a device that were read since this was made.

    It belongs to the device, not to its table: new tables do not change it.
    """

    def __init__(self, dm: Messages, name: str, length: int, chunk: int) -> None:
        """
        :param length: bytes from the start of the device that are watched
        :param chunk: bytes of which an area is a multiple: one, unless there are many
        :raises errors.ProcessError: there is no such device, or not enough memory
        """
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        area = dmstats.read_area(length, chunk, os.sysconf("SC_NPROCESSORS_CONF"), memory)
        self._region = Region(dm, name, dmstats.READS, length, area)

    @property
    def area(self) -> int:
        """Bytes of an area; they begin at 0."""
        return self._region.area

    def touched(self) -> Touched:
        """:raises errors.ProcessError: the device was removed"""
        return dmstats.touched(self._region.counters())

    def remove(self) -> None:
        """:raises errors.ProcessError: it is gone, as the device may be"""
        self._region.remove()


def forget_left(dm: Messages, name: str) -> None:
    """Remove what an agent that was killed has left on a device.

    :raises errors.ProcessError: there is no such device
    """
    remove_left(dm, name, dmstats.READS)
