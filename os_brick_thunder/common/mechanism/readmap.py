"""What is read from a device from a given moment on, by the statistics of device-mapper."""

from __future__ import annotations

import contextlib
import os

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.dmregion import Messages, Region, remove_left
from os_brick_thunder.common.policy import dmstats
from os_brick_thunder.common.policy.dmstats import Touched
from os_brick_thunder.common.policy.extents import Extents


class ReadMap:
    """The areas of a device that were read since this was made.

    It belongs to the device, not to its table: new tables do not change it.
    """

    def __init__(self, dm: Messages, name: str, data: Extents, chunk: int) -> None:
        """
        :param data: what is watched; few of its holes are, so that areas are small
        :param chunk: bytes of which an area is a multiple: one, unless there are many
        :raises errors.ProcessError: there is no such device, or not enough memory
        """
        ranges = dmstats.read_ranges(data, chunk)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cpus = os.sysconf("SC_NPROCESSORS_CONF")
        area = dmstats.read_area(ranges.length, chunk, cpus, memory)
        forget_left(dm, name)
        self._regions: list[Region] = []
        try:
            for start, end in ranges:
                self._regions.append(Region(dm, name, dmstats.READS, start, end, area))
        except errors.ProcessError:
            with contextlib.suppress(errors.ProcessError):  # it went with the device
                self.remove()
            raise

    def touched(self) -> Touched:
        """:raises errors.ProcessError: the device was removed"""
        found = [dmstats.touched(each.counters(), each.end) for each in self._regions]
        return Touched(
            frozenset().union(*(each.read for each in found)),
            frozenset().union(*(each.written for each in found)),
        )

    def remove(self) -> None:
        """:raises errors.ProcessError: some of it was gone, as the device may be"""
        gone: errors.ProcessError | None = None
        for region in self._regions:
            try:
                region.remove()
            except errors.ProcessError as error:
                gone = error
        if gone:
            raise gone


def forget_left(dm: Messages, name: str) -> None:
    """Remove what an agent that was killed has left on a device.

    :raises errors.ProcessError: there is no such device
    """
    remove_left(dm, name, dmstats.READS)
