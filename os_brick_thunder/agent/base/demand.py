"""How a base is filled beside the reads of guests of this host: the rest of it while there are
none, or fast enough that none notices, and slowly if boots are known not to read it; what boots
read at a part of its rate while one of their volumes has no cache yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import VolumeNames

#: Seconds between two looks, and of a pause.
LOOK = 0.2
#: Seconds without a read after which guests are quiet: while it boots, one also computes.
QUIET = 1.0
#: Seconds that the filling of a base pauses in total, and that it waits beside volumes without a
#: cache. After that it is filled in any case.
MOST = 120.0
#: Bytes a second from which a base may be filled while guests read, if it is not known what they
#: will read: they then find much of it here. A slower source has them wait behind what is filled.
FAST = 50 << 20
#: Part of the time that a base is filled while guests read volumes that have no cache yet: they
#: gain nothing from what is filled, and share their link with it.
SHARE = 0.25
#: The same of what boots are known not to read, while volumes use the base: hosts that are still
#: booting share the source's link with it.
SHARE_OF_REST = 0.1
#: Seconds that the filling of a base waits for that in total: about as long as a storm of boots.
MOST_OF_REST = 30.0
#: Seconds of one wait for that: longer ones would keep a filler from stopping.
_LONGEST = 1.0


class _Reads:
    """Whether guests of this host read some of the volumes of an image.

    :ivar seen: whether they had read anything for :data:`QUIET` seconds at the last look, or waited
        for a read: one that is slow is no rest
    """

    def __init__(
        self, host: Host, image_id: str, clock: Callable[[], float], uncached: bool
    ) -> None:
        """:param uncached: only volumes count that have no cache yet"""
        self._store = host.store
        self._blocks = host.kit.blocks
        self._image_id = image_id
        self._clock = clock
        self._uncached = uncached
        self._looked = self._busy = -math.inf
        self._read = 0
        self.seen = False

    def look(self) -> bool:
        """:returns: False if the last look was less than :data:`LOOK` seconds ago"""
        now = self._clock()
        if now < self._looked + LOOK:
            return False
        found = [self._reads_of(volume_id) for volume_id in self.volumes()]
        before, self._read = self._read, sum(read for read, _ in found)
        if self._read > before or any(waiting for _, waiting in found):
            self._busy = now
        self._looked = now
        self.seen = now < self._busy + QUIET
        return True

    def volumes(self) -> list[str]:
        """Those that count."""
        return [
            stack.volume_id
            for stack in self._store.stacks.values()
            if not (self._uncached and stack.mode == "cached")
            and self._image_id in (stack.base_image_id, stack.origin_image_id)
        ]

    def _reads_of(self, volume_id: str) -> tuple[int, int]:
        """Bytes that a volume's guest has read; requests that it waits for."""
        device = devnames.path(VolumeNames(volume_id).vol)
        try:
            return self._blocks.bytes_read(device), self._blocks.in_flight(device)
        except errors.DeviceNotFound:  # not yet, or not any longer
            return 0, 0


class Demand:
    """What guests of this host read of volumes of an image.

    Those of a volume that has no cache yet count, too: on their way they meet what is filled. Reads
    of other hosts do not: they need what is filled, and none is to wait for others.
    """

    def __init__(
        self, host: Host, image_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._all = _Reads(host, image_id, clock, uncached=False)
        self._uncached = _Reads(host, image_id, clock, uncached=True)
        self._paused = self._waited = self._rested = 0.0
        #: Whether guests were quiet at the last look.
        self.quiet = False

    def pause(self, rate: float = 0.0) -> float:
        """Seconds to wait before something is filled that no boot is known to read; then ask again.

        :param rate: bytes a second at which it may be filled while guests read, if it is known
        :returns: 0 if guests are quiet
        """
        if self._all.look():
            self.quiet = not self._all.seen
            if not self.quiet and rate < FAST and self._paused < MOST:
                self._paused += LOOK
                return LOOK
        return 0.0

    def share(self, seconds: float) -> float:
        """Seconds to wait after something was filled that boots are known to read.

        :param seconds: that it took
        """
        if not self.uncached or self._waited >= MOST:
            return 0.0
        self._waited += (wait := _wait_after(seconds, SHARE))
        return wait

    def share_of_rest(self, seconds: float) -> float:
        """Seconds to wait after something was filled that boots are known not to read.

        :param seconds: that it took
        """
        if not self.is_slow:
            return 0.0
        self._rested += (wait := _wait_after(seconds, SHARE_OF_REST))
        return wait

    @property
    def is_slow(self) -> bool:
        """Whether what boots are known not to read is filled slowly: a volume uses the base, and
        that has not been long enough.
        """
        return self._rested < MOST_OF_REST and bool(self._all.volumes())

    @property
    def uncached(self) -> bool:
        """Whether guests read volumes that have no cache yet."""
        self._uncached.look()
        return self._uncached.seen


def _wait_after(seconds: float, share: float) -> float:
    """Seconds to wait after as many of filling, which so has its share of the time."""
    return min(seconds * (1 / share - 1), _LONGEST)
