"""The space that a storage host can still allocate for masters."""

from __future__ import annotations

import time
from collections.abc import Callable

from oslo_log import log as logging

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmstatus import PoolStatus

LOG = logging.getLogger(__name__)


class FreeSpace:
    """Free space of the storage pool, measured at most once an interval: every heartbeat reports
    it, and each measurement starts processes."""

    def __init__(
        self,
        status: Callable[[], PoolStatus],
        reserved: float,
        interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """:param status: reads the pool's status
        :param reserved: share of the pool that must stay free, 0 to 1
        :param interval: seconds between two measurements
        """
        self._status = status
        self._reserved = reserved
        self._interval = interval
        self._clock = clock
        self._measured_at: float | None = None
        self._free: int | None = None

    def bytes(self) -> int | None:
        """None while it is not known."""
        now = self._clock()
        if self._measured_at is None or now - self._measured_at >= self._interval:
            self._measured_at = now
            try:
                self._free = self._measure()
            except errors.ThunderError as error:
                LOG.warning("Cannot read the status of the thin pool: %s", error)
                self._free = None
        return self._free

    def _measure(self) -> int:
        pool = self._status()
        if not pool.healthy:
            return 0
        return max(0, pool.total - int(pool.total * self._reserved) - pool.used)
