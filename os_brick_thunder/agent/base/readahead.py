"""How far the kernel reads ahead of what guests and other hosts miss of bases."""

from __future__ import annotations

import contextlib

from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Loops
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.state import Base

#: Bytes that are read ahead of guests that read sequentially and miss: each time is a round trip to
#: a replica, and with the kernel's own 128 KiB a guest would be slower than with its LUN.
FAR = 512 << 10
#: The same while what boots read is filled. Not nothing: a loop device asks for each page of a
#: request by itself, so that each would be a round trip.
LITTLE = 64 << 10


class Readahead:
    """Sets how far the loop devices read that are under what bases do not hold.

    Little while what boots read is filled: each of the other hosts' pieces arrives as several
    requests in a row, and what is read ahead of these no boot may read. That holds from the
    beginning, as a loop device is opened anew only when what it reads is there.
    """

    def __init__(self, loops: Loops) -> None:
        self._loops = loops
        #: By thin id, as an image may get another base. Of few ids, which are used again.
        self._little: dict[int, bool] = {}

    def begin(self, base: Base) -> None:
        """Devices of a base are built: what boots are known to read will be filled first."""
        self._little[base.thin_id] = bool(base.profile)

    def set(self, base: Base, *, little: bool) -> None:
        """Also for as long as the base reads from other sources. Waits for what is being read."""
        if self._little.get(base.thin_id) != little:
            self._little[base.thin_id] = little
            self.renew(base)

    def renew(self, base: Base) -> None:
        """Have the loop devices of a base opened anew: reads that failed have the kernel read ahead
        less, and a new table under them as far as it does by itself. Waits likewise.
        """
        device = devnames.path(layout.read_through(base))
        while True:
            little = self._little.setdefault(base.thin_id, False)
            # A device that is gone is no reason for which a base cannot be filled or read.
            with contextlib.suppress(errors.DeviceNotFound):
                self._loops.reopen(device, LITTLE if little else FAR)
            if self._little[base.thin_id] == little:  # not changed by another thread meanwhile
                return
