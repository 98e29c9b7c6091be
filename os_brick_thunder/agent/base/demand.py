"""When the rest of a base is filled: while no guest of this host reads its image, or fast enough
that none notices.
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
#: Seconds that the filling of a base pauses in total. After that it is filled in any case.
MOST = 120.0
#: Bytes a second from which a base may be filled while guests read, if it is not known what they
#: will read: they then find much of it here. A slower source has them wait behind what is filled.
FAST = 50 << 20


class Demand:
    """What guests of this host read of volumes of an image.

    Those of a volume that has no cache yet count, too: on their way they meet what is filled. Reads
    of other hosts do not: they need what is filled, and none is to wait for others.
    """

    def __init__(
        self, host: Host, image_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = host.store
        self._blocks = host.kit.blocks
        self._image_id = image_id
        self._clock = clock
        self._looked = -math.inf
        self._read = 0
        self._paused = 0.0
        #: Whether no guest had read anything at the last look.
        self.quiet = False

    def pause(self, rate: float = 0.0) -> float:
        """Seconds to wait before something is filled that no boot is known to read; then ask again.

        :param rate: bytes a second at which it may be filled while guests read, if it is known
        :returns: 0 if guests have read nothing since the last look
        """
        now = self._clock()
        if now >= self._looked + LOOK:
            before, self._read = self._read, self._bytes_read()
            self._looked = now
            self.quiet = self._read <= before
            if not self.quiet and rate < FAST and self._paused < MOST:
                self._paused += LOOK
                return LOOK
        return 0.0

    def _bytes_read(self) -> int:
        stacks = self._store.stacks.values()
        users = (
            stack.volume_id
            for stack in stacks
            if self._image_id in (stack.base_image_id, stack.origin_image_id)
        )
        return sum(map(self._bytes_read_by, users))

    def _bytes_read_by(self, volume_id: str) -> int:
        try:
            return self._blocks.bytes_read(devnames.path(VolumeNames(volume_id).vol))
        except errors.DeviceNotFound:  # not yet, or not any longer
            return 0
