"""What is written to a device from a given moment on, by the statistics of device-mapper."""

from __future__ import annotations

import os
from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import dmstats
from os_brick_thunder.common.policy.dmtable import sectors
from os_brick_thunder.common.policy.extents import Extents


class _Messages(Protocol):
    def message(self, name: str, text: str) -> str: ...


class WriteMap:
    """The parts of a device that were written since this was made.

    It belongs to the device, not to its table: new tables do not change it.
    """

    def __init__(self, dm: _Messages, name: str, length: int, block: int) -> None:
        """The kernel lets all I/O in flight end first, and holds new I/O back meanwhile. So what
        counts as not written is on the disks below by now.

        :param length: bytes from the start of the device that are watched
        :param block: bytes of which an area is a multiple
        :raises errors.ProcessError: there is no such device, or not enough memory
        """
        self._dm, self._name = dm, name
        self.length = length
        for left in dmstats.regions(self._tell("list", dmstats.PROGRAM)):
            self._tell("delete", left)  # by an agent that was killed
        area = dmstats.area_size(length, block, os.sysconf("SC_NPROCESSORS_CONF"))
        self._areas = -(-length // area)
        region = (f"0+{sectors(length)}", sectors(area), dmstats.PROGRAM)
        self._id = int(self._tell("create", *region))

    def unwritten(self) -> Extents:
        """The watched bytes that are in no area in which a write has ended.

        Exact while the device is suspended; otherwise writes in flight may be missing.

        :raises errors.ProcessError: the device was removed
        """
        try:
            written = dmstats.written(self._tell("print", self._id), self._areas)
        except ValueError as error:
            raise errors.ProcessError(["dm", "@stats_print", self._name], 1, str(error)) from error
        return written.complement(self.length)

    def remove(self) -> None:
        """:raises errors.ProcessError: it is gone, as the device may be"""
        self._tell("delete", self._id)

    def _tell(self, verb: str, *words: str | int) -> str:
        return self._dm.message(self._name, " ".join([f"@stats_{verb}", *map(str, words)]))
