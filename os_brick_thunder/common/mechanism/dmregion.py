"""Regions of a device that the statistics of device-mapper count I/O in."""

from __future__ import annotations

import contextlib
import uuid
from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import dmstats
from os_brick_thunder.common.policy.dmtable import sectors


class Messages(Protocol):
    def message(self, name: str, text: str) -> str: ...


class Region:
    """The counters of equal areas of a part of a device, since this was made.

    They belong to the device, not to its table: new tables do not change them. Region and device
    may be removed at any time, and others may get their number and name. So each region has a word
    of its own, and what is told under its number is taken only if it still has that word.
    """

    def __init__(
        self, dm: Messages, name: str, program: str, start: int, end: int, area: int
    ) -> None:
        """The kernel lets all I/O in flight end first, and holds new I/O back meanwhile.

        :param program: whose regions this is one of
        :param start: first byte of the device; ``end``: the one behind the region
        :param area: bytes of an area
        :raises errors.ProcessError: there is no such device, or not enough memory
        """
        self._dm, self._name, self._program = dm, name, program
        self.end = end
        self._areas = -(-(end - start) // area)
        self._word = uuid.uuid4().hex
        place = f"{sectors(start)}+{sectors(end - start)}"
        region = (place, sectors(area), program, self._word)
        self._id = int(_tell(dm, name, "create", *region))

    def counters(self) -> str:
        """A line for each area, for :mod:`.policy.dmstats`.

        :raises errors.ProcessError: the region or the device was removed
        """
        text = _tell(self._dm, self._name, "print", self._id)
        self._check()  # after it was read: a word is not used twice
        if (found := text.count("\n")) != self._areas:
            raise self._failure("print", f"{found} areas of {self._areas}")
        return text

    def remove(self) -> None:
        """:raises errors.ProcessError: it is gone, as the device may be"""
        self._check()
        _tell(self._dm, self._name, "delete", self._id)

    def _check(self) -> None:
        """:raises errors.ProcessError: the region is gone"""
        listing = _tell(self._dm, self._name, "list", self._program)
        if dmstats.regions(listing).get(self._id) != self._word:
            raise self._failure("list", f"region {self._id} was removed")

    def _failure(self, verb: str, why: str) -> errors.ProcessError:
        return errors.ProcessError(["dm", f"@stats_{verb}", self._name], 1, why)


def remove_left(dm: Messages, name: str, program: str) -> None:
    """Remove all of a program's regions on a device, which an agent that was killed has left.

    :raises errors.ProcessError: there is no such device
    """
    for left in dmstats.regions(_tell(dm, name, "list", program)):
        with contextlib.suppress(errors.ProcessError):  # whoever made it has just removed it
            _tell(dm, name, "delete", left)


def _tell(dm: Messages, name: str, verb: str, *words: str | int) -> str:
    return dm.message(name, " ".join([f"@stats_{verb}", *map(str, words)]))
